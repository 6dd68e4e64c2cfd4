"""The CAM family: slow references on every kind of layer; torchcam and captum as oracles; properties; refusals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchcam.methods as torchcam
from captum import attr
from contracts import seeded
from skimage.transform import resize as skimage_resize
from test_baselines import K, explain, pictures, relu_net, same
from torch import Tensor, nn

from attrib.methods.baselines import GuidedBackprop
from attrib.methods.cam import (
    AblationCAM,
    EigenCAM,
    GradCAM,
    GradCAMPlusPlus,
    HiResCAM,
    LayerCAM,
    ScoreCAM,
    XGradCAM,
)
from attrib.methods.guided_grad_cam import GuidedGradCAM
from attrib.models import Classifier
from attrib.noise import Noise
from attrib.types import Batch, SampleError, UserError

H, W = 8, 10
FAMILY = (GradCAM, GradCAMPlusPlus, LayerCAM, XGradCAM, HiResCAM, ScoreCAM, AblationCAM, EigenCAM)
CUT = (GradCAM, GradCAMPlusPlus, LayerCAM, XGradCAM, ScoreCAM, AblationCAM)  # a ReLU at the end


class Net(nn.Module):
    """A layer with places in one of three layouts, by ``layer``: the same numbers, and the same rest of the net.

    Tokens have two more in front, of which the head reads the first.
    """

    def __init__(self, layout: str, relu: bool = True) -> None:
        super().__init__()
        self.front, self.layer, self.head = nn.Conv2d(3, 7, 3, 2, 1), nn.Identity(), nn.Linear(7, K)
        self.mix, self.layout, self.relu = nn.Conv2d(7, 7, 3, padding=1), layout, relu
        self.extra = nn.Parameter(torch.empty(2, 7))

    def forward(self, x: Tensor) -> Tensor:
        z = self.front(x)
        z = F.relu(z) if self.relu else z
        cls = 0
        if self.layout == "channels_first":
            z = self.layer(z)
        elif self.layout == "channels_last":
            z = self.layer(z.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        else:
            tokens = torch.cat((self.extra.expand(len(x), -1, -1), z.flatten(2).mT), 1)
            tokens = self.layer(tokens)
            z, cls = tokens[:, 2:].mT.unflatten(2, z.shape[2:]), tokens[:, 0]
        return self.head((F.softplus(self.mix(z)) * z).mean((2, 3)) + 0 * cls)


LAYOUTS = ("channels_first", "channels_last", "tokens")
SAID = {"tokens": f"tokens:{H // 2}x{W // 2}+2"}


def net_of(layout: str = "channels_first", relu: bool = True) -> nn.Module:
    return seeded(Net(layout, relu), 0.6)


# ---- from the papers' formulae, one sample, channel and place at a time --------------------------------


@dataclass
class Seen:
    """One image: activations a (C, h, w) of a net with channels first, their gradient g, and the logit behind them."""

    x: Tensor
    a: Tensor
    g: Tensor
    behind: Callable[[Tensor], Tensor]
    whole: Callable[[Tensor], Tensor]

    @classmethod
    def of(cls, net: nn.Module, x: Tensor, target: Tensor) -> Seen:
        def put(value: Tensor | None) -> tuple[Tensor, Tensor]:
            """The layer's output, and the logit when ``value`` is in its place."""
            kept: list[Tensor] = []

            def hook(_module: nn.Module, _inputs: object, out: Tensor) -> Tensor:
                kept.append(out[0].detach())
                return out if value is None else value[None]

            handle = net.layer.register_forward_hook(hook)
            logits = net(x[None])[0]
            handle.remove()
            return kept[0], logits[target] if target.ndim == 0 else logits[target.bool()].sum()

        a = put(None)[0]
        leaf = a.clone().requires_grad_()
        (g,) = torch.autograd.grad(put(leaf)[1], leaf)
        return cls(x, a, g, lambda z: put(z)[1], lambda y: cls._logit(net, y, target))

    @staticmethod
    def _logit(net: nn.Module, x: Tensor, target: Tensor) -> Tensor:
        logits = net(x[None])[0]
        return logits[target] if target.ndim == 0 else logits[target.bool()].sum()


def weighted(seen: Seen, weights: list[Tensor]) -> Tensor:
    return sum((w * a for w, a in zip(weights, seen.a, strict=True)), torch.zeros_like(seen.a[0]))


def places_of(t: Tensor) -> list[tuple[int, int]]:
    return [(i, j) for i in range(t.shape[1]) for j in range(t.shape[2])]


def grad_cam(seen: Seen) -> Tensor:
    places = places_of(seen.a)
    return weighted(seen, [sum(g[at] for at in places) / len(places) for g in seen.g])


def grad_cam_plus_plus(seen: Seen) -> Tensor:
    weights = []
    for a, g in zip(seen.a, seen.g, strict=True):
        total = torch.zeros(())
        for at in places_of(seen.a):
            numerator, denominator = g[at] ** 2, 2 * g[at] ** 2 + sum(a[b] * g[at] ** 3 for b in places_of(seen.a))
            if g[at] != 0:
                total = total + numerator / denominator * g[at].clamp(min=0)
        weights.append(total)
    return weighted(seen, weights)


def layer_cam(seen: Seen) -> Tensor:
    return sum(g.clamp(min=0) * a for a, g in zip(seen.a, seen.g, strict=True))


def xgrad_cam(seen: Seen) -> Tensor:
    return weighted(
        seen, [sum(g[at] * a[at] / a.sum() for at in places_of(seen.a)) for a, g in zip(seen.a, seen.g, strict=True)]
    )


def hires_cam(seen: Seen) -> Tensor:
    return sum(g * a for a, g in zip(seen.a, seen.g, strict=True))


def score_cam(seen: Seen) -> Tensor:
    """With the logit of the baseline, which cancels."""
    scores = []
    for a in seen.a:
        up = torch.tensor(skimage_resize(a.numpy(), seen.x.shape[1:], order=1))
        mask = (up - up.min()) / (up.max() - up.min())
        scores.append(seen.whole(seen.x * mask) - seen.whole(torch.zeros_like(seen.x)))
    total = sum(s.exp() for s in scores)
    return weighted(seen, [s.exp() / total for s in scores])


def ablation_cam(seen: Seen) -> Tensor:
    """The paper's (S - S_k) / S, times S."""
    whole, weights = seen.behind(seen.a), []
    for k in range(len(seen.a)):
        without = seen.a.clone()
        without[k] = 0
        weights.append((whole - seen.behind(without)) / whole * whole)
    return weighted(seen, weights)


def eigen_cam(seen: Seen) -> Tensor:
    """By numpy's eigenvectors of O'O, of which V has the singular vectors."""
    o = seen.a.flatten(1).T.numpy()
    first = np.linalg.eigh(o.T @ o)[1][:, -1]
    found = o @ first
    found *= np.sign(found[np.abs(found).argmax()])
    return torch.tensor(found).view_as(seen.a[0])


REFERENCES = {
    GradCAM: grad_cam, GradCAMPlusPlus: grad_cam_plus_plus, LayerCAM: layer_cam, XGradCAM: xgrad_cam,
    HiResCAM: hires_cam, ScoreCAM: score_cam, AblationCAM: ablation_cam, EigenCAM: eigen_cam,
}  # fmt: skip


def references(kind: type, batch: Batch, relu_behind: bool = True) -> Tensor:
    net = net_of(relu=relu_behind)
    return torch.stack(
        [REFERENCES[kind](Seen.of(net, x, t)).detach() for x, t in zip(batch.x, batch.target, strict=True)]
    )


@pytest.mark.parametrize("relu_behind", [True, False], ids=["relu", "signed"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", FAMILY, ids=lambda kind: kind.__name__)
def test_each_equals_its_formula_on_every_layout(kind, layout, relu_behind):
    batch, net = pictures(), net_of(layout, relu_behind)
    expected = references(kind, batch, relu_behind)
    assert expected.abs().amax((1, 2)).min() > 1e-3
    for relu in (True, False):
        found = explain(kind(relu=relu, layout=SAID.get(layout, layout)), net, batch, {"cam": "layer"})
        wanted = expected.clamp(min=0) if relu else expected
        same(found["cam"], wanted, 1e-9)
        enlarged = torch.stack([torch.tensor(skimage_resize(cam.numpy(), (H, W), order=1)) for cam in wanted])
        same(found["map"], enlarged, 1e-9)


@pytest.mark.parametrize("kind", FAMILY, ids=lambda kind: kind.__name__)
def test_the_layout_is_found_out(kind):
    found = [explain(kind(), net_of(layout), pictures(), {"cam": "layer"})["cam"] for layout in LAYOUTS]
    same(found[1], found[0])
    same(found[2], found[0])


@pytest.mark.parametrize("kind", FAMILY, ids=lambda kind: kind.__name__)
def test_several_labels_are_the_sum_of_their_logits(kind):
    several = Batch(pictures().uids, pictures().x, torch.tensor([[1, 0, 0, 1, 0], [0, 0, 1, 0, 0], [1, 1, 1, 0, 1]]))
    found = explain(kind(relu=False), net_of(), several, {"cam": "layer"})["cam"]
    same(found, references(kind, several), 1e-9)


def test_which_have_a_relu_as_their_papers_do():
    assert [kind for kind in FAMILY if kind().relu] == list(CUT)
    for kind in CUT:
        assert explain(kind(), net_of(relu=False), pictures(), {"cam": "layer"})["cam"].min() >= 0


# ---- oracles ------------------------------------------------------------------------------------------


class Even(nn.Module):
    """A layer of the image's own size, so that nobody enlarges anything: interpolation differs at the border."""

    def __init__(self) -> None:
        super().__init__()
        self.front, self.layer, self.conv = nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 3, 2, 1)
        self.act, self.head = nn.ReLU(), nn.Linear(4 * 20, K)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.conv(self.layer(self.front(x)))).flatten(1))


class Pooled(Even):
    """The gradient of a channel is the same at all places, as where a net ends in a pool and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(6, 4, 1), nn.Linear(4, K)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.conv(self.layer(self.front(x)).mean((2, 3), keepdim=True))).flatten(1))


# torchcam's own numbers, "normalized=False": it would scale each map to 0 .. 1. Where it is not the formula:
# - Grad-CAM++: its GradCAMpp divides a copy of alpha's numerator (``alpha[idx][mask].div_``), so the weights are the
#   sum of relu(g)^3. Its SmoothGradCAMpp, here of one copy without noise, does divide; in the denominator it sums g^3 A
#   with each place's own g, where the formula has the g of the place that is weighted: equal where all g of a channel
#   are. Neither has a ReLU at the end.
# - its ``eps``, 1e-8 beside squares of gradients or sums of activations, which are often smaller, can be set to 0;
#   in the range by which ScoreCAM's masks are scaled it cannot. Those it scales before it enlarges them.
# A batch with a target for each image gives what single images give, but its layers must be (B, C, H, W), or be made so
# by the caller, its rows (ScoreCAM: ``batch_size``) are no promise, and its hooks stay until the extractor is closed.
@pytest.mark.parametrize(
    ("kind", "theirs", "build", "more"),
    [
        (GradCAM, torchcam.GradCAM, Even, {}),
        (GradCAMPlusPlus, partial(torchcam.SmoothGradCAMpp, num_samples=1, std=1e-15), Pooled, {"eps": 0.0}),
        (LayerCAM, torchcam.LayerCAM, Even, {}),
        (XGradCAM, torchcam.XGradCAM, Even, {"eps": 0.0}),
        (ScoreCAM, torchcam.ScoreCAM, Even, {}),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_equals_torchcam(kind, theirs, build, more):
    batch, net = pictures(), seeded(build(), 0.5)
    found = explain(kind(), net, batch, {"cam": "layer"})["cam"]
    with torch.random.fork_rng(), theirs(net, "layer") as extractor:
        scores = net(batch.x.clone().requires_grad_())
        (expected,) = extractor(batch.target.tolist(), scores, normalized=False, **more)
    assert found.max() > 1e-3
    same(found, expected.clamp(min=0).detach(), 1e-7 if kind is ScoreCAM else 1e-10)


def test_ablation_and_hires_equal_captums_layer_methods():
    batch, net = pictures(), seeded(Even(), 0.5)
    channels = torch.arange(6)[None, :, None, None].expand(1, 6, H, W)
    ablated = attr.LayerFeatureAblation(net, net.layer).attribute(
        batch.x, target=batch.target, layer_mask=channels, layer_baselines=0
    )
    with torch.no_grad():
        layer = net.layer(net.front(batch.x))
    found = explain(AblationCAM(relu=False), net, batch, {"cam": "layer"})["cam"]
    same(found, (ablated[:, :, :1, :1] * layer).sum(1), 1e-6)  # captum counts in float32
    product = attr.LayerGradientXActivation(net, net.layer).attribute(batch.x.requires_grad_(), target=batch.target)
    same(explain(HiResCAM(), net, pictures(), {"cam": "layer"})["cam"], product.sum(1).detach())


@pytest.mark.filterwarnings("ignore:Setting backward hooks")
@pytest.mark.parametrize("reduce", ["sum", "abs_sum", "abs_max"])
def test_guided_grad_cam_is_the_product_and_equals_captum(reduce):
    batch, net, layers = pictures(), seeded(Even(), 0.5), {"cam": "layer"}
    found = explain(GuidedGradCAM(reduce=reduce), net, batch, layers)["map"]
    guided = explain(GuidedBackprop(reduce=reduce), net, batch, layers)["map"]
    same(found, guided * explain(GradCAM(), net, batch, layers)["map"])
    expected = attr.GuidedGradCam(net, net.layer).attribute(batch.x.requires_grad_(), target=batch.target).detach()
    how = {"sum": lambda t: t.sum(1), "abs_sum": lambda t: t.abs().sum(1), "abs_max": lambda t: t.abs().amax(1)}
    same(found, how[reduce](expected))
    assert found.abs().max() > 1e-3


# ---- properties ---------------------------------------------------------------------------------------


def linear_behind() -> nn.Module:
    """Linear behind its ReLU "1", with the same weight everywhere if pooled."""
    net = [nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, K)]
    return seeded(nn.Sequential(*net), 0.5)


def test_where_the_net_ends_in_a_pool_and_a_linear_layer_they_are_cam_and_complete():
    """Three generalisations of CAM agree there, and each sums to the logit without its bias."""
    batch, net = pictures(), linear_behind()
    kinds = (GradCAM, HiResCAM, XGradCAM)
    found = [explain(kind(relu=False), net, batch, {"cam": "1"})["cam"] for kind in kinds]
    with torch.no_grad():
        layer, head = net[1](net[0](batch.x)), net[-1]
        cam = torch.einsum("bk,bkij->bij", head.weight[batch.target], layer) / (H * W)
        logit = net(batch.x).gather(1, batch.target[:, None])[:, 0] - head.bias[batch.target]
    for one in found:
        same(one, cam)
        same(one.sum((1, 2)), logit)


@pytest.mark.parametrize("kind", [HiResCAM, XGradCAM], ids=lambda kind: kind.__name__)
def test_completeness_needs_no_pool(kind):
    batch, net = pictures(), seeded(nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(80, K)))
    found = explain(kind(relu=False), net, batch, {"cam": "1"})["cam"]
    with torch.no_grad():
        logit = net(batch.x).gather(1, batch.target[:, None])[:, 0] - net[-1].bias[batch.target]
    same(found.sum((1, 2)), logit)


def test_eigen_cam_does_not_look_at_the_target_and_has_its_sign():
    batch = pictures()
    others = Batch(batch.uids, batch.x, (batch.target + 1) % K)
    for relu_behind in (True, False):
        net = net_of(relu=relu_behind)
        found, again = (explain(EigenCAM(), net, b, {"cam": "layer"})["cam"] for b in (batch, others))
        same(again, found)
        assert (found.amax((1, 2)) > -found.amin((1, 2))).all()
        assert found.min() >= -1e-12 or not relu_behind


class Counts(nn.Module):
    """Notes how many rows come in at a time (on the class: a Classifier copies its module)."""

    seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(len(x))
        return x


@pytest.mark.parametrize("rows", [1, 4, 10])
@pytest.mark.parametrize("kind", [ScoreCAM, AblationCAM], ids=lambda kind: kind.__name__)
def test_many_rows_keep_to_the_limit_and_are_counted(kind, rows):
    batch, net = pictures(), relu_net()
    net = nn.Sequential(*net[:4], Counts(), *net[4:])
    model = Classifier(net, {"cam": "1"}, rows=rows, dtype=torch.float64)
    model.until("cam", batch.x)
    Counts.seen.clear()
    before = model.passed
    kind().attribute(model, batch, {}, Noise(batch.uids, dtype=torch.float64))
    assert max(Counts.seen) <= rows
    assert rows == 1 or max(Counts.seen) > 1
    pairs = len(batch) * 4  # channels; the layer itself once more, and the whole
    assert model.passed - before == len(batch) + pairs + (len(batch) if kind is AblationCAM else 0)


def test_channels_that_are_zero_cost_nothing_and_add_nothing():
    """Score-CAM and Ablation-CAM do not run the net for them; the maps are those of a net without them."""

    class Padded(Net):
        def __init__(self, zeros: int) -> None:
            super().__init__("channels_first")
            self.zeros = zeros

        def forward(self, x: Tensor) -> Tensor:
            z = F.relu(self.front(x))
            z = self.layer(F.pad(z, (0, 0, 0, 0, 0, self.zeros)))[:, :7]
            return self.head((F.softplus(self.mix(z)) * z).mean((2, 3)))

    batch = pictures()
    for kind in FAMILY:
        found, passed = [], []
        for zeros in (0, 5):
            model = Classifier(seeded(Padded(zeros), 0.6), {"cam": "layer"}, dtype=torch.float64)
            found.append(kind().attribute(model, batch, {}, Noise(batch.uids, dtype=torch.float64))["cam"])
            passed.append(model.passed)
        same(found[1], found[0])
        assert passed[1] == passed[0]


# ---- refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*FAMILY, GuidedGradCAM], ids=lambda kind: kind.__name__)
def test_a_layer_without_places_is_refused(kind):
    with pytest.raises(UserError, match=r"a layer with places; 5 gives \(B, 12\)"):
        explain(kind(), relu_net(), pictures(), {"cam": "5"})
    with pytest.raises(UserError, match=rf"{kind.__name__}.layout is 'rows', must be auto"):
        kind(layout="rows")


def test_guided_grad_cam_needs_relus_and_a_known_reduction():
    net = seeded(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(192, K)))
    with pytest.raises(UserError, match="guided backpropagation is defined for ReLUs"):
        explain(GuidedGradCAM(), net, pictures(), {"cam": "1"})
    with pytest.raises(UserError, match=r"GuidedGradCAM\.reduce is 'mean'"):
        GuidedGradCAM(reduce="mean")


def built(layer: nn.Module) -> nn.Module:
    return seeded(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), layer, nn.Tanh(), nn.Flatten(), nn.Linear(320, K)), 0.5)


def test_xgrad_cam_does_not_divide_by_rounding():
    with pytest.raises(SampleError, match=r"s0: 1: the activations of a channel cancel.*hires_cam"):
        explain(XGradCAM(), built(nn.InstanceNorm2d(4)), pictures(), {"cam": "1"})


class Uniform(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3), keepdim=True).expand_as(x)


def test_score_cam_needs_a_channel_that_varies():
    with pytest.raises(SampleError, match="s0: 1: every channel is the same at all places"):
        explain(ScoreCAM(layout="channels_first"), built(Uniform()), pictures(), {"cam": "1"})


class Twins(nn.Module):
    """Two orthogonal channels of the same length: any mixture of them is a first singular vector."""

    def forward(self, x: Tensor) -> Tensor:
        one = x[:, 0].flatten(1)
        other = x[:, 1].flatten(1)
        other = other - (one * other).sum(1, keepdim=True) / one.square().sum(1, keepdim=True) * one
        other = other * one.norm(dim=1, keepdim=True) / other.norm(dim=1, keepdim=True)
        return torch.cat((torch.stack((one, other), 1).view_as(x[:, :2]), 0 * x[:, 2:]), 1)


class Mirrored(nn.Module):
    """One channel, whose right half is minus its left half: a map with this sign is as good as with the other."""

    def forward(self, x: Tensor) -> Tensor:
        half = x[:, :1, :, :5]
        return torch.cat((half, -half), 3) * torch.arange(1, 5, dtype=x.dtype)[:, None, None]


def test_eigen_cam_needs_one_first_singular_vector_with_a_sign():
    for layer, why in ((Twins(), "no first singular vector of their own"), (Mirrored(), "nothing tells the sign")):
        with pytest.raises(SampleError, match=f"s0: 1: Eigen-CAM: .*{why}"):
            explain(EigenCAM(layout="channels_first"), built(layer), pictures(), {"cam": "1"})


class ScaledAway(nn.Module):
    """The last layer's scale does not matter, as to the residual stream of a transformer in front of its norm."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.layer, self.norm, self.head = nn.Conv2d(3, 8, 4, 4), nn.LayerNorm(8, eps=eps), nn.Linear(8, K)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.layer(x).permute(0, 2, 3, 1)).mean((1, 2)))


@pytest.mark.parametrize("eps", [1e-12, 1e-6])
def test_hires_cam_is_refused_where_the_scale_of_the_layer_does_not_matter(eps):
    """What would be left is what the norm's epsilon leaves: a millionth of what is summed, or rounding."""
    net = seeded(ScaledAway(eps))
    with pytest.raises(UserError, match=r"HiResCAM leaves nothing: .* behind the norm"):
        explain(HiResCAM(), net, pictures(), {"cam": "layer"})
    assert explain(HiResCAM(), net, pictures(), {"cam": "norm"})["cam"].any()
