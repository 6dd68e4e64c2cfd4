"""DeepLIFT and the rules for ReLUs by the graph of a net: against captum, and against formulas written out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
from captum_rules import by_captum
from contracts import seeded
from torch import Tensor, nn
from torchvision import models

from attrib.methods import Method
from attrib.methods.baselines import Deconvolution, DeepLiftShap, Gradient, GuidedBackprop
from attrib.methods.parts.propagation import guided, hookable
from attrib.methods.parts.rescale import check_complete, deep_lift
from attrib.models import Classifier
from attrib.models.activations import RELU_LIKE
from attrib.noise import Noise
from attrib.types import Batch, SampleError, UserError

K = 3


def pictures(n: int = 2, *shape: int) -> Batch:
    x = torch.randn(n, *(shape or (2, 8, 6)), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return Batch(tuple(f"s{i}" for i in range(n)), x, torch.arange(n) % K)


def explain(method: Method, net: nn.Module, batch: Batch) -> dict[str, Tensor]:
    return dict(
        method.attribute(
            Classifier(net, dtype=torch.float64), batch, {}, Noise(batch.uids, seed=5, dtype=batch.x.dtype)
        )
    )


def same(found: Tensor, expected: Tensor, atol: float = 1e-10) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


class Net(nn.Module):
    """A convolution, any function of what it gives (N, 4, 8, 6), and a linear layer."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.function = nn.Conv2d(2, 4, 3, padding=1), function
        size = function(torch.ones(1, 4, 8, 6)).numel()
        self.head = nn.Linear(size, K)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.function(self.conv(x)).flatten(1))


def made(function: Callable[[Tensor], Tensor]) -> Net:
    return seeded(Net(function), 0.5).double().eval()


# ---- as before, where that was right ---------------------------------------------------------------


class Habits(nn.Module):
    """Residuals, a module that runs twice, in-place functions, overlapping pools, a batch norm, several activations."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.norm = (
            nn.Conv2d(2, 4, 3, padding=1),
            nn.Conv2d(4, 4, 3, padding=1),
            nn.BatchNorm2d(4),
        )
        self.relu, self.pool, self.head = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1), nn.Linear(4, K)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.conv1(x)))
        y = F.gelu(self.conv2(x)) + F.relu6(4 * x)
        y = F.elu(self.relu(self.conv2(self.pool(y)))) + F.leaky_relu(self.pool(x), 0.2)
        return self.head(F.adaptive_avg_pool2d(F.relu(y - 0.2, inplace=True), 1).flatten(1))


BEFORE: dict[str, Callable[[], tuple[nn.Module, Batch]]] = {
    "habits": lambda: (seeded(Habits(), 0.5), pictures()),
    "relu": lambda: (made(F.relu), pictures()),
    "pool": lambda: (made(lambda z: F.max_pool2d(F.relu(z), 2)), pictures()),
    "resnet18": lambda: (models.resnet18(num_classes=K), pictures(2, 3, 32, 32)),
    "lite0": lambda: (timm.create_model("tf_efficientnet_lite0", num_classes=K), pictures(2, 3, 32, 32)),
}


@pytest.mark.parametrize("rule", ["DeepLift", "GuidedBackprop", "Deconvolution"])
@pytest.mark.parametrize("name", BEFORE)
@pytest.mark.quick(but=["lite0-*", "resnet18-*"])
def test_nets_that_captum_is_right_about_give_its_numbers(name, rule):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net, batch = BEFORE[name]()
    net = net.double().eval()
    method = {"DeepLift": DeepLiftShap(samples=1, sigma=0.0), "GuidedBackprop": GuidedBackprop()}.get(
        rule, Deconvolution()
    )
    found = explain(method, net, batch)["map"]
    expected = by_captum(rule, net, batch.x, batch.target, torch.zeros_like(batch.x)).sum(1)
    assert expected.abs().max() > 0
    same(found, expected, 1e-9 * expected.abs().max().item())


# ---- the rescale rule, for any element-wise function -----------------------------------------------

ELEMENTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "prelu": lambda z: F.prelu(z, torch.tensor([0.1, 0.2, 0.3, -0.4], dtype=z.dtype)),
    "selu": F.selu,
    "celu": lambda z: F.celu(z, 0.7),
    "softsign": F.softsign,
    "rrelu": nn.RReLU().eval(),
    "log sigmoid": F.logsigmoid,
    "tanhshrink": F.tanhshrink,
    "hardshrink": F.hardshrink,
    "softshrink": F.softshrink,
    "threshold": lambda z: F.threshold(z, 0.1, -0.3),
    "clamp": lambda z: z.clamp(-0.2, 0.3),
    "clamp above": lambda z: z.clamp(max=0.1),
    "maximum": lambda z: torch.maximum(z, torch.full((), 0.1, dtype=z.dtype)),
    "square": lambda z: F.relu(z) ** 2,
    "product": lambda z: z * z,
    "exp": torch.exp,
    "inverse": lambda z: 1 / (3 + z.abs()),
    "sine": lambda z: z + torch.sin(3 * z) ** 2 / 3,
    "step": lambda z: (z > 0).to(z.dtype),
    "floor": lambda z: torch.floor(4 * z),
    "where": lambda z: torch.where(z > 0.1, z, 0.3 * z),
    "masked": lambda z: z * (z > 0),
    "swish": lambda z: z * F.relu6(z + 3) / 6,
    "written gelu": lambda z: 0.5 * z * (1 + torch.erf(z / 2**0.5)),
    "leaky": lambda z: torch.max(z, 0.1 * z),
    "power": lambda z: (z.abs() + 1e-3) ** 0.3,
    "in place": lambda z: z.clone().mul_(2).tanh_(),
    "softplus": lambda z: F.softplus(z, 2.0, 1.0),
}


@pytest.mark.parametrize("name", ELEMENTWISE)
@pytest.mark.quick(every=2)
def test_the_rescale_rule_holds_for_any_elementwise_function(name):
    net, batch = made(ELEMENTWISE[name]), pictures()
    found = explain(DeepLiftShap(samples=1, sigma=0.0), net, batch)
    z, z0 = net.conv(batch.x), net.conv(torch.zeros_like(batch.x))
    change = ELEMENTWISE[name](z) - ELEMENTWISE[name](z0)
    signal = net.head.weight[batch.target].view_as(z) * change / (z - z0)
    expected = F.conv_transpose2d(signal, net.conv.weight, padding=1) * batch.x
    same(found["map"], expected.sum(1).detach())
    assert found["delta"].max() < 1e-12
    assert expected.abs().max() > 1e-4


def test_where_input_and_baseline_meet_the_multiplier_is_the_derivative():
    net = made(lambda z: z * torch.sigmoid(z) + F.selu(z))
    batch = pictures()
    batch.x[:, :, :4] = 0  # the upper half is as the baseline
    found = explain(DeepLiftShap(samples=1, sigma=0.0), net, batch)["map"]
    z, z0 = net.conv(batch.x).detach(), net.conv(torch.zeros_like(batch.x)).detach()
    leaf = z.clone().requires_grad_()
    (slope,) = torch.autograd.grad(net.function(leaf).sum(), leaf)
    met = (z - z0).abs() < 1e-10
    assert met.any()
    multiplier = torch.where(met, slope, (net.function(z) - net.function(z0)) / (z - z0))
    signal = net.head.weight[batch.target].view_as(z) * multiplier
    same(found, (F.conv_transpose2d(signal, net.conv.weight, padding=1) * batch.x).sum(1).detach())


# ---- maxima ----------------------------------------------------------------------------------------

# A maximum -> for each of its results the places (c, h, w) that it is over.
C, H, W = 4, 8, 6


def _windows(rows, columns):
    return [[(c, h, w) for h in hs for w in ws] for c in range(C) for hs in rows for ws in columns]


MAXIMA: dict[str, tuple[Callable[[Tensor], Tensor], list[list[tuple[int, int, int]]]]] = {
    "global": (nn.AdaptiveMaxPool2d(1), _windows([range(H)], [range(W)])),
    "amax": (lambda z: z.amax((2, 3)), _windows([range(H)], [range(W)])),
    "max of max": (lambda z: z.flatten(2).max(2, keepdim=True).values, _windows([range(H)], [range(W)])),
    "rows": (lambda z: z.max(dim=3)[0], _windows([[h] for h in range(H)], [range(W)])),
    "adaptive": (
        nn.AdaptiveMaxPool2d((3, 2)),
        _windows([range(3), range(2, 6), range(5, 8)], [range(3), range(3, 6)]),
    ),
    "overlap": (
        lambda z: F.max_pool2d(z, 3, 2, ceil_mode=True),
        _windows([range(h, min(h + 3, H)) for h in (0, 2, 4, 6)], [range(w, min(w + 3, W)) for w in (0, 2, 4)]),
    ),
    "dilated": (
        nn.MaxPool2d(2, 3, dilation=2),
        _windows([(0, 2), (3, 5)], [(0, 2), (3, 5)]),
    ),
    "maxout": (
        lambda z: torch.maximum(z[:, :2], z[:, 2:]),
        [[(c, h, w), (c + 2, h, w)] for c in range(2) for h in range(H) for w in range(W)],
    ),
    "channels": (lambda z: z.amax(1), [[(c, h, w) for c in range(C)] for h in range(H) for w in range(W)]),
}


@pytest.mark.parametrize("name", MAXIMA)
def test_a_maximum_is_a_maximum_however_it_is_written(name):
    function, windows = MAXIMA[name]
    net, batch = made(function), pictures()
    found = explain(DeepLiftShap(samples=1, sigma=0.0), net, batch)
    zs, z0 = net.conv(batch.x).detach(), net.conv(torch.zeros(1, 2, H, W, dtype=torch.float64)).detach()[0]
    signal = torch.zeros_like(zs)
    for i, z in enumerate(zs):
        for weight, places in zip(net.head.weight[batch.target[i]], windows, strict=True):
            top, top0 = (max(places, key=lambda p: v[p]) for v in (z, z0))
            rise = z[top] - z0[top0]
            at = top if rise > 0 else top0
            signal[(i, *at)] += weight.detach() * rise / (z[at] - z0[at])
    expected = F.conv_transpose2d(signal, net.conv.weight, padding=1) * batch.x
    same(found["map"], expected.sum(1).detach())
    assert found["delta"].max() < 1e-12


def test_a_minimum_is_minus_the_maximum_of_what_is_negative():
    batch = pictures()
    least, most = made(lambda z: z.amin((2, 3))), made(lambda z: -(-z).amax((2, 3)))
    same(explain(DeepLiftShap(samples=1), least, batch)["map"], explain(DeepLiftShap(samples=1), most, batch)["map"])


# ---- products, and what is made of them ------------------------------------------------------------


def _shapley_of_factors(a, b, a0, b0):
    """What each factor gives to a * b - a0 * b0: the mean over the orders in which they may change."""
    return ((a * b - a0 * b) + (a * b0 - a0 * b0)) / 2, ((a * b - a * b0) + (a0 * b - a0 * b0)) / 2


def test_factors_get_their_shapley_values():
    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Conv2d(2, 4, 1), nn.Conv2d(2, 4, 1), nn.Linear(4 * 48, K)

        def forward(self, x):
            return self.head((self.a(x) * self.b(x)).flatten(1))

    net, batch = seeded(Product(), 0.5).double(), pictures()
    values = [f(x) for x in (batch.x, torch.zeros_like(batch.x)) for f in (net.a, net.b)]
    first, second = _shapley_of_factors(*values)
    weight = net.head.weight[batch.target].view_as(first)
    (a, b), (a0, b0) = values[:2], values[2:]
    expected = sum(
        F.conv_transpose2d(weight * part / (z - z0), conv.weight) * batch.x
        for part, z, z0, conv in ((first, a, a0, net.a), (second, b, b0, net.b))
    )
    found = explain(DeepLiftShap(samples=1, sigma=0.0), net, batch)
    same(found["map"], expected.sum(1).detach())


def _attention(z: Tensor) -> Tensor:
    tokens = z.flatten(2).mT
    return F.scaled_dot_product_attention(tokens, tokens * 0.7 + 0.1, tokens.flip(2))


_RAMP = torch.arange(48.0, dtype=torch.float64).reshape(8, 6)


def _unpooled(z: Tensor, order: Tensor) -> Tensor:
    """The maxima of ``z`` where those of ``order`` are."""
    places = F.max_pool2d(order, 2, return_indices=True)[1]
    return F.max_unpool2d(F.max_pool2d(z, 2), places, 2)


def test_unpooling_where_input_and_baseline_differ_is_refused():
    net, batch = made(lambda z: _unpooled(z, z)), pictures(3)
    with pytest.raises(UserError, match="DeepLIFT has no rule for max_unpool2d"):
        explain(DeepLiftShap(samples=1, sigma=0.7), net, batch)


COMPLETE: dict[str, Callable[[Tensor], Tensor]] = {
    "lp pool": lambda z: F.lp_pool2d(F.relu(z), 2.0, 2),
    "softmax": lambda z: z.softmax(1),
    "log softmax": lambda z: z.log_softmax(2),
    "logsumexp": lambda z: z.logsumexp((2, 3)),
    "glu": lambda z: F.glu(z, 1),
    "norm": lambda z: F.normalize(z, dim=1),
    "layer norm": lambda z: F.layer_norm(z, (8, 6), torch.full((8, 6), 2.0, dtype=z.dtype)),
    "variance": lambda z: z.var(2),
    "group norm": lambda z: F.group_norm(z, 2, torch.arange(4.0, dtype=z.dtype), torch.ones(4, dtype=z.dtype)),
    "instance norm": lambda z: F.instance_norm(z, weight=torch.arange(4.0, dtype=z.dtype)),
    "std": lambda z: z.std((2, 3)),
    "rms norm": lambda z: F.rms_norm(z, (6,)),
    "attention": _attention,
    "quotient": lambda z: z[:, :2] / (2 + z[:, 2:].exp()),
    "squeeze": lambda z: z * z.mean((2, 3), keepdim=True).sigmoid(),
    "views": lambda z: z.clone().transpose(1, 2)[:, 1:3].mul_(3),
    "covariance": lambda z: torch.einsum("nchw,ndhw->ncd", z, z),
    "bilinear": lambda z: F.interpolate(z, size=(5, 9), mode="bilinear"),
    "bicubic": lambda z: F.interpolate(z, scale_factor=1.5, mode="bicubic"),
    "bicubic of a size": lambda z: F.interpolate(z, size=(5, 9), mode="bicubic"),
    "unpooled where it was": lambda z: _unpooled(z, torch.zeros_like(z) + _RAMP),
    "average": lambda z: F.avg_pool2d(z, 3, 2, 1, ceil_mode=True, count_include_pad=False),
    "shuffle": lambda z: F.pixel_shuffle(z, 2),
}


@pytest.mark.parametrize("name", COMPLETE)
@pytest.mark.quick(every=2)
def test_what_is_made_of_the_rules_is_complete_and_leaves_the_logits(name):
    net, batch = made(COMPLETE[name]), pictures(3)
    found = explain(DeepLiftShap(samples=2, sigma=0.7), net, batch)
    stream = Noise(batch.uids, seed=5, dtype=batch.x.dtype)
    change = torch.zeros(3, dtype=torch.float64)
    for _ in range(2):
        baseline = 0.7 * stream.normal(*batch.x.shape[1:])
        with torch.no_grad():
            change += (net(batch.x) - net(baseline)).gather(1, batch.target[:, None])[:, 0] / 2
    same(found["map"].sum((1, 2)), change, 1e-6)
    assert found["delta"].max() < 1e-8
    assert change.abs().max() > 1e-4


# ---- what counts as a ReLU -------------------------------------------------------------------------

RELUS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu_": lambda z: z.clone().relu_(),
    "torch": torch.relu,
    "clamp": lambda z: z.clamp(min=0),
    "clamp_min": lambda z: torch.clamp_min(z, 0.0),
    "threshold": lambda z: F.threshold(z, 0.0, 0.0),
    "module": nn.Threshold(0, 0),
    "maximum": lambda z: torch.maximum(z, torch.zeros(())),
    "zeros like": lambda z: torch.max(torch.zeros_like(z), z),
    "full": lambda z: torch.maximum(z, torch.full((1,), 0.0, dtype=z.dtype)),
    "mask": lambda z: z * (z > 0),
    "float mask": lambda z: (z > 0).to(z.dtype) * z,
    "where": lambda z: torch.where(z > 0, z, torch.zeros_like(z)),
    "where negative": lambda z: torch.where(z < 0, torch.zeros_like(z), z),
    "where not positive": lambda z: torch.where(z <= 0, 0.0, z),
    "masked": lambda z: z.masked_fill(z < 0, 0.0),
    "not negative": lambda z: z * ~(z <= 0),
    "written": lambda z: z.clone().index_put_((z < 0,), torch.zeros((), dtype=z.dtype)),
    "fmax": lambda z: torch.fmax(z, torch.zeros((), dtype=z.dtype)),
    "leaky": lambda z: F.leaky_relu(z, 0.0),
    "view": lambda z: F.relu(z.clone().transpose(1, 2), inplace=True).transpose(1, 2),
}
CEILINGS = {
    "clamp": lambda z: z.clamp(0, 0.3),
    "hardtanh": lambda z: F.hardtanh(z, 0.0, 0.3),
    "module": nn.Hardtanh(0.0, 0.3),
}


def _backward(net: Net, x: Tensor, target: Tensor, rule: type[Method], ceiling: float = torch.inf) -> Tensor:
    z = net.conv(x)
    signal = net.head.weight[target].view_as(z).clamp(min=0)
    if rule is GuidedBackprop:
        signal = signal * ((z > 0) & (z < ceiling))
    return F.conv_transpose2d(signal, net.conv.weight, padding=1).sum(1).detach()


@pytest.mark.parametrize("rule", [GuidedBackprop, Deconvolution])
@pytest.mark.parametrize("name", RELUS)
@pytest.mark.quick(every=3)
def test_a_relu_is_a_relu_however_it_is_written(name, rule):
    net, batch = made(RELUS[name]), pictures()
    same(explain(rule(), net, batch)["map"], _backward(net, batch.x, batch.target, rule))


@pytest.mark.parametrize("rule", [GuidedBackprop, Deconvolution])
@pytest.mark.parametrize("name", CEILINGS)
def test_a_ceiling_makes_no_other_relu(name, rule):
    net, batch = made(CEILINGS[name]), pictures()
    same(explain(rule(), net, batch)["map"], _backward(net, batch.x, batch.target, rule, 0.3))


OTHERS = {
    "gelu": F.gelu,
    "clamp": lambda z: z.clamp(-0.1, 0.3),
    "threshold": lambda z: F.threshold(z, 0.0, 0.1),
    "maximum": lambda z: torch.maximum(z, z.mean()[None] * 0 + 0.1),
    "hardtanh": F.hardtanh,
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_relu_is_refused_by_name(name):
    class Named(nn.Module):
        def forward(self, z):
            return OTHERS[name](z)

    with pytest.raises(UserError, match=rf"defined for ReLUs; Net has none \(but {name} in function \(Named\)\)"):
        explain(GuidedBackprop(), made(Named()), pictures())


def test_other_activations_beside_relus_keep_their_gradient():
    net, batch = made(lambda z: F.gelu(F.relu(z))), pictures()
    z = net.conv(batch.x).detach().requires_grad_()
    signal = net.head.weight[batch.target].view_as(z)
    relu = z.relu().detach().requires_grad_()
    (at_relu,) = torch.autograd.grad((F.gelu(relu) * signal).sum(), relu)
    expected = F.conv_transpose2d(at_relu.clamp(min=0) * (z > 0), net.conv.weight, padding=1).sum(1)
    same(explain(GuidedBackprop(), net, batch)["map"], expected.detach())


# ---- refusals, and what stays as it was ------------------------------------------------------------

REFUSED = {
    "topk": lambda z: z.flatten(2).topk(3, 2).values,
    "sort": lambda z: z.sort(1).values,
    "where": lambda z: torch.where(z[:, :2] > 0, z[:, 2:], z[:, :2]),
    "pow": lambda z: z[:, :2].abs() ** z[:, 2:],
    "gather": lambda z: z.gather(1, z.argmax(1, keepdim=True)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_call_without_a_rule_is_refused_with_its_module(name):
    class Named(nn.Module):
        def forward(self, z):
            return REFUSED[name](z)

    with pytest.raises(UserError, match=r"DeepLIFT has no rule for \w+ in function \(Named\)"):
        explain(DeepLiftShap(samples=1), made(Named()), pictures())


def test_a_net_whose_code_depends_on_values_is_refused():
    with pytest.raises(UserError, match="cannot export Net"):
        explain(DeepLiftShap(samples=1), made(lambda z: z.relu() if z.mean() < 100 else z), pictures())


@pytest.mark.parametrize("method", [DeepLiftShap(samples=1), GuidedBackprop()])
def test_a_net_that_computes_something_else_than_its_graph_is_refused(method):
    class Remembers(nn.Module):
        """What it adds is no function of its input alone."""

        shift = 0.0

        def forward(self, z):
            return F.relu(z) + self.shift

    batch = pictures()
    model = Classifier(made(Remembers()), dtype=torch.float64)
    model.graph(batch.x)
    model.module.function.shift = 1.0
    with pytest.raises(UserError, match="gives other logits than Net itself by"):
        method.attribute(model, batch, {}, Noise(batch.uids, dtype=batch.x.dtype))


def test_a_map_that_is_not_complete_fails_its_sample():
    one, size = torch.tensor([1e-6, 0.2]), torch.tensor([1.0, 1.0])
    with pytest.raises(SampleError, match=r"b: DeepLIFT is not complete: .* by 0\.2, more than rounding"):
        check_complete(("a", "b"), one, size, "DeepLIFT")
    with pytest.raises(SampleError, match="a: DeepLIFT"):
        check_complete(("a",), torch.tensor([torch.nan]), size[:1], "DeepLIFT")
    check_complete(("a",), one[:1], size[:1], "DeepLIFT")


def test_delta_is_a_column():
    assert DeepLiftShap().COLUMNS == {"delta": "lower"}
    assert set(DeepLiftShap().COLUMNS) <= set(DeepLiftShap().EXTRAS)


def test_buffers_that_a_net_counts_in_are_left_alone():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, z):
            self.seen.add_(0)
            return z.relu()

    batch, net = pictures(), made(Counts())
    same(explain(GuidedBackprop(), net, batch)["map"], explain(GuidedBackprop(), made(F.relu), batch)["map"])


def test_the_net_with_hooks_gives_the_logits():
    batch, net = pictures(), made(lambda z: F.relu(z[:, 1:3], inplace=True) + z[:, 1:3])
    model = Classifier(net, dtype=torch.float64)
    with torch.no_grad():
        expected = net(batch.x)
    same(hookable(model, RELU_LIKE)(batch.x), expected)
    same(hookable(model, RELU_LIKE)(batch.x, guided), expected)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.module.modules())
    assert explain(Gradient(), net, batch)["map"].abs().max() > 0


def test_numbers_that_nearly_meet_have_their_derivative():
    """The quotient of two differences that are mostly rounding is noise: 1e-3 and more in float32."""
    x = pictures().x
    baseline = x + 1e-6 * torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=x.dtype)
    net = made(torch.sigmoid)
    found = {}
    for dtype in (torch.float32, torch.float64):
        model = Classifier(net, dtype=dtype)
        leaf = x.to(dtype)
        start = baseline.to(dtype)
        found[dtype] = (deep_lift(model, leaf, start, torch.tensor([0, 1]))[0] / (leaf - start)).double()
    torch.testing.assert_close(found[torch.float32], found[torch.float64], rtol=0, atol=1e-4)


def test_a_place_that_is_found_by_a_maximum_is_refused_by_name():
    class Picks(nn.Module):
        def forward(self, z):
            _, at = z.max(1, keepdim=True)
            return z.gather(1, at)

    with pytest.raises(UserError, match="DeepLIFT has no rule for gather"):
        explain(DeepLiftShap(samples=1), made(Picks()), pictures())
