"""The adapter of captum: every one of its algorithms, against captum itself, our own methods and slow references."""

from __future__ import annotations

import inspect
import itertools
import random
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from audio_nets import audio_classifier, sounds
from captum import attr
from contracts import KilledError, net_dies, padded, seeded, untouched
from test_baselines import K, Mixed, pictures, same
from test_cam import Net as Layouts
from text_nets import text_classifier, texts
from tiny import ROOT
from torch import Tensor, nn

from attrib import keys
from attrib.methods import Method, baselines, cam
from attrib.methods.captum import Captum
from attrib.methods.parts.captum_names import REFUSED
from attrib.methods.parts.layout import resize
from attrib.models import Classifier
from attrib.noise import Noise
from attrib.types import Batch, SampleError, UserError

H, W = 8, 10
AVAILABLE = sorted(k for k, v in vars(attr).items() if inspect.isclass(v) and callable(getattr(v, "attribute", None)))
IMPOSSIBLE = {  # what captum itself needs more for than plain values
    "DataLoaderAttribution", "LLMAttribution", "LLMGradientAttribution", "LimeBase", "RemoteLLMAttribution",
}  # fmt: skip
USABLE = [name for name in AVAILABLE if name not in REFUSED and name not in IMPOSSIBLE]
NEURON = [0, 2, 2]
GIVEN: dict[str, dict[str, Any]] = {  # what must be given, or makes them quick
    "Occlusion": {"sliding_window_shapes": [3, 3, 3], "strides": [3, 2, 2]},
    "NoiseTunnel": {"attribution_method": "Saliency", "stdevs": 0.3},
    "GradientShap": {"baselines": 0.0, "n_samples": 2},
    "LayerGradientShap": {"baselines": 0.0, "n_samples": 2},
    "NeuronGradientShap": {"baselines": 0.0, "n_samples": 2},
    **{name: {"neuron_selector": NEURON} for name in USABLE if name.startswith("Neuron") and "Shap" not in name},
    **{name: {"n_steps": 6} for name in ("IntegratedGradients", "LayerConductance", "InternalInfluence")},
}
GIVEN["NeuronGradientShap"]["neuron_selector"] = NEURON
MASKED = ("FeatureAblation", "KernelShap", "Lime", "NeuronFeatureAblation", "ShapleyValueSampling", "ShapleyValues")
STOCHASTIC = {"GradientShap", "LayerGradientShap", "NeuronGradientShap", "NoiseTunnel", "KernelShap", "Lime",
              "ShapleyValueSampling"}  # fmt: skip


class Net(nn.Module):
    """All of its calls are modules, of classes that captum knows; flatten computes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.act1, self.pool = nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)
        self.conv2, self.act2, self.head = nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Linear(80, K)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act2(self.conv2(self.pool(self.act1(self.conv1(x))))).flatten(1))


def model_of(net: nn.Module | None = None, rows: int = 64, layer: str = "conv2") -> Classifier:
    return Classifier(net or seeded(Net(), 0.5), {"cam": layer}, rows=rows, dtype=torch.float64)


def method_of(name: str, **more: Any) -> Captum:
    return Captum(name, GIVEN.get(name, {}) | more, tiles=2 if name in MASKED else None)


def explain(method: Method, model: Classifier, batch: Batch, seed: int = 3) -> dict[str, Tensor]:
    return dict(method.attribute(model, batch, {}, Noise(batch.uids, seed, dtype=torch.float64)))


# ---- all of them --------------------------------------------------------------------------------------


def test_what_captum_has():
    """A new version with other algorithms shows here."""
    assert len(AVAILABLE) == 44
    assert len(USABLE) == 33
    assert set(AVAILABLE) >= IMPOSSIBLE | set(REFUSED)


@pytest.mark.parametrize("name", USABLE)
@pytest.mark.quick(but=["Neuron*", "*LRP", "LayerGradientShap", "Deconvolution", "ShapleyValues", "GuidedGradCam"])
def test_every_algorithm(name):
    """It says something, a batch equals singles, in any order, at any row limit; all else is left as it was."""
    method, batch, model = method_of(name), pictures(), model_of()
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    filters = list(warnings.filters)
    with untouched(model, batch):
        found = explain(method, model, batch)
    assert random.getstate() == states[0]
    assert (np.random.get_state()[1] == states[1]).all()
    assert torch.equal(torch.get_rng_state(), states[2])
    assert warnings.filters == filters
    assert found.keys() == method.MAPS.keys() | method.EXTRAS.keys()
    assert found["map"].shape == (3, H, W)
    says = found["map"].flatten(1).std(1) > 0
    assert says.any() if name.startswith("Neuron") else says.all()  # a neuron may have no effect
    assert found["map"].dtype == torch.float64
    assert "text" in method.MODALITIES or method._reads or method._replaces
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    for rows in (2, 5):
        singles = [explain(method, model_of(rows=rows), batch[[i]]) for i in (2, 0, 1)]
        for key in found:
            same(torch.cat([one[key] for one in singles]), found[key][[2, 0, 1]], 1e-9)
    other = explain(method, model, batch, seed=4)["map"]
    assert torch.equal(other, found["map"]) == (name not in STOCHASTIC)
    assert method.roles == (("cam",) if method._reads else ())


@pytest.mark.parametrize("name", [n for n in USABLE if n not in STOCHASTIC])
def test_equals_captum_in_a_plain_loop(name):
    batch, net = pictures(), seeded(Net(), 0.5)
    kind, arguments = getattr(attr, name), dict(GIVEN.get(name, {}))
    parameters = inspect.signature(kind.attribute).parameters
    arguments = {k: tuple(v) if isinstance(v, list) else v for k, v in arguments.items()}
    if name in MASKED:
        arguments["feature_mask"] = (torch.arange(H)[:, None] * 2 // H * 2 + torch.arange(W) * 2 // W)[None, None]
    expected = []
    for x, target in zip(batch.x, batch.target.tolist(), strict=True):
        algorithm = kind(net, net.conv2) if "layer" in inspect.signature(kind.__init__).parameters else kind(net)
        target = {"target": target} if "target" in parameters else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = algorithm.attribute(x[None].clone().requires_grad_(), **target, **arguments).detach()
        expected.append(found[:, 0] if name in MASKED else found.sum(1))
    found = torch.cat(expected)
    found = resize(found, (H, W)) if found.shape[1:] != (H, W) else found
    # captum adds up differences of scores in float32.
    same(explain(method_of(name), model_of(), batch)["map"], found.double(), 1e-6)


OWN = [
    (Captum("Saliency", {"abs": False}), baselines.Gradient()),
    (Captum("InputXGradient", reduce="abs_max"), baselines.InputXGradient(reduce="abs_max")),
    (Captum("IntegratedGradients", {"n_steps": 7, "baselines": -0.4}), baselines.IntegratedGradients(7, -0.4)),
    (Captum("DeepLift"), baselines.DeepLiftShap(samples=1, sigma=0.0)),  # but for pools, whose rules are others
    (Captum("GuidedBackprop"), baselines.GuidedBackprop()),
    (Captum("Deconvolution"), baselines.Deconvolution()),
    (
        Captum("Occlusion", {"sliding_window_shapes": [3, 4, 4], "strides": [3, 2, 2]}, reduce="abs_max"),
        baselines.Occlusion(4, 2),
    ),
    (Captum("LayerGradCam"), cam.GradCAM(relu=False)),
    (Captum("LayerGradCam", {"relu_attributions": True}), cam.GradCAM()),
    (Captum("LayerGradientXActivation"), cam.HiResCAM()),
]


@pytest.mark.parametrize(("theirs", "ours"), OWN, ids=lambda method: getattr(method, "algorithm", None))
def test_equals_our_own_where_there_is_one(theirs, ours):
    net = seeded(Net(), 0.5)
    if theirs.algorithm == "DeepLift":
        net.pool = nn.AvgPool2d(2)
    found, expected = (explain(method, model_of(net), pictures())["map"].double() for method in (theirs, ours))
    same(found, expected.abs() if theirs.algorithm == "Occlusion" else expected, 1e-6)


def conserves(x: Tensor) -> Tensor:
    """What relevance propagation ends at: no relevance at all."""
    return torch.zeros(len(x), K, dtype=x.dtype)


@pytest.mark.parametrize("name", [name for name in USABLE if method_of(name).EXTRAS])
def test_delta_is_what_the_map_misses_of_the_change_of_the_logit(name):
    """Also of the algorithms that draw, for which captum gives a delta for every draw."""
    drawn, relevance = "Shap" in name, name.endswith("LRP")
    given = {} if relevance else {"baselines": 0.25} | ({"n_samples": 7} if drawn else {})
    method, batch, net = Captum(name, given), pictures(), seeded(Net(), 0.5)
    net.pool = nn.AvgPool2d(2)  # captum's DeepLIFT loses something at maxima
    found = explain(method, model_of(net, layer="conv1"), batch)  # a layer as large as the input: nothing is resized
    with torch.no_grad():
        whole, base = net(batch.x), conserves(batch.x) if relevance else net(torch.full_like(batch.x, 0.25))
    change = (whole - base).gather(1, batch.target[:, None])[:, 0]
    same(found["delta"], (found["map"].sum((1, 2)) - change).abs(), 1e-9)
    assert (found["delta"] > 1e-3).all() or not drawn  # it says something of those


class Noted(nn.Module):
    """Notes what comes in (on the class: a Classifier copies its module)."""

    seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.detach().clone())
        return x


@pytest.mark.parametrize("name", ["GradientShap", "LayerGradientShap"])
def test_delta_of_noisy_draws_is_of_their_means(name):
    """The change is then that of the mean logit of the noisy inputs, which captum evaluates last, and of baselines."""
    net = seeded(Net(), 0.5)
    plain, net.conv1 = net.conv1, nn.Sequential(Noted(), net.conv1)
    batch = pictures()[[0]]
    model = model_of(net, layer="conv1")
    Noted.seen.clear()
    found = explain(Captum(name, {"baselines": 0.25, "n_samples": 7, "stdevs": 0.3}), model, batch)
    net.conv1 = plain
    with torch.no_grad():
        logits = [net(rows)[:, batch.target[0]].mean() for rows in Noted.seen[-2:]]  # both of them, in any order
    assert len(Noted.seen[-1]) == len(Noted.seen[-2]) == 7
    sizes = [(found["map"].sum() - sign * (logits[0] - logits[1])).abs() for sign in (1, -1)]
    assert min((found["delta"][0] - size).abs() for size in sizes) < 1e-9 * max(1, float(max(sizes)))


# ---- slow references ----------------------------------------------------------------------------------


def values_of(net: nn.Module, x: Tensor, target: int) -> dict[tuple[int, ...], float]:
    """The logit with each subset of four tiles present."""
    found = {}
    for size in range(5):
        for kept in itertools.combinations(range(4), size):
            cut = torch.zeros_like(x)
            for tile in kept:
                rows, columns = slice(tile // 2 * 4, tile // 2 * 4 + 4), slice(tile % 2 * 5, tile % 2 * 5 + 5)
                cut[:, rows, columns] = x[:, rows, columns]
            found[kept] = float(net(cut[None])[0, target])
    return found


def test_tiles_are_features():
    """Feature ablation is the fall of the logit without a tile, and Shapley values are the mean over all orders."""
    batch, net = pictures(), seeded(Net(), 0.5)
    for i, (x, target) in enumerate(zip(batch.x, batch.target.tolist(), strict=True)):
        value = values_of(net, x, target)
        everything = (0, 1, 2, 3)
        falls = [value[everything] - value[tuple(t for t in everything if t != tile)] for tile in everything]
        shapley = [0.0] * 4
        for order in itertools.permutations(everything):
            for place, tile in enumerate(order):
                before = tuple(sorted(order[:place]))
                shapley[tile] += (value[tuple(sorted((*before, tile)))] - value[before]) / 24
        for name, numbers in (("FeatureAblation", falls), ("ShapleyValues", shapley)):
            found = explain(method_of(name), model_of(), batch[[i]])["map"][0]
            tiles = torch.tensor(numbers, dtype=torch.float64).view(2, 2)
            same(found, tiles.repeat_interleave(4, 0).repeat_interleave(5, 1), 1e-5)


@pytest.mark.parametrize("net", ["lstm", "mean"])
def test_the_tokens_of_a_text_are_features_and_padding_does_not_matter(net):
    batch, model = texts(4), text_classifier(net)(64, torch.float64)
    method = Captum("FeatureAblation")
    found = explain(method, model, batch)["map"]
    for i, length in enumerate(batch.lengths.tolist()):
        for t in range(length):
            one = model.until("embedding", batch.x[i : i + 1, :length])
            without = one.z.clone()
            without[:, t] = 0
            logits = [model.after("embedding", z, one.rest)[0, batch.target[i]] for z in (one.z, without)]
            same(found[i, t], logits[0] - logits[1], 1e-5)
    assert (found[~batch.mask] == 0).all()
    longer = padded(batch, batch.x, model.module.pad_id)[0]
    same(explain(method, model, longer)["map"][:, : batch.x.shape[1]], found)


@pytest.mark.parametrize("net", ["lstm", "mean"])
def test_sampled_shapley_values_of_tokens_add_up_and_padding_does_not_matter(net):
    batch, model = texts(4), text_classifier(net)(64, torch.float64)
    method = Captum("ShapleyValueSampling", {"n_samples": 2})
    found = explain(method, model, batch)["map"]
    front = model.until("embedding", batch.x)
    whole, none = (model.after("embedding", z, front.rest) for z in (front.z, torch.zeros_like(front.z)))
    change = (whole - none).gather(1, batch.target[:, None])[:, 0]
    same(found.sum(1), change, 1e-5)  # of every order of the tokens
    assert (found[~batch.mask] == 0).all()
    alone = explain(method, model, batch[[2]].cut(int(batch.lengths[2])))["map"]
    same(alone[0], found[2, : batch.lengths[2]])


def test_the_page_has_all_algorithms():
    page = (ROOT / "docs" / "how-to" / "use-captum.md").read_text()
    table = page.partition("## Which work")[2].partition("\n\nOf the refusals")[0].splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table if line.startswith("|")][2:]
    listed = {name.strip(): row[1:4] for row in rows for name in row[0].split(",")}
    assert sorted(listed) == AVAILABLE
    for name in AVAILABLE:
        works = tuple(
            kind for kind, said in zip(("image", "text", "audio"), listed[name], strict=True) if said == "yes"
        )
        assert works == (method_of(name).MODALITIES if name in USABLE else ()), name


def test_sounds():
    batch, model = sounds(3), audio_classifier(())(64, torch.float64)
    found = explain(Captum("FeatureAblation", tiles=4), model, batch)["map"]
    assert found.shape == (3, batch.x.shape[2])
    length = batch.x.shape[2]
    part = torch.arange(length) * 4 // length
    for i in range(3):
        whole = model.logits(batch.x[[i]])[0, batch.target[i]]
        for k in range(4):
            fall = whole - model.logits(batch.x[[i]] * (part != k))[0, batch.target[i]]
            same(found[i, part == k], fall.expand(int((part == k).sum())), 1e-5)


def test_several_labels_are_the_sum_of_their_logits():
    batch = pictures()
    several = Batch(batch.uids, batch.x, F.one_hot(batch.target, K) + F.one_hot((batch.target + 1) % K, K))
    for method in (Captum("Saliency", {"abs": False}), Captum("LayerGradCam"), Captum("FeatureAblation", tiles=2)):
        each = [explain(method, model_of(), Batch(batch.uids, batch.x, (batch.target + k) % K))["map"] for k in (0, 1)]
        same(explain(method, model_of(), several)["map"], each[0] + each[1], 1e-5)


# ---- layers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["channels_last", "tokens"])
@pytest.mark.parametrize("name", ["LayerActivation", "LayerConductance", "LayerGradientXActivation"])
def test_any_layout_of_a_layer(name, layout):
    method, batch = method_of(name), pictures()
    first, other = (model_of(seeded(Layouts(kind), 0.6), layer="layer") for kind in ("channels_first", layout))
    same(explain(method, other, batch)["map"], explain(method, first, batch)["map"])


@pytest.mark.parametrize("name", ["LayerGradCam", "GuidedGradCam"])
def test_what_takes_dimension_1_for_channels_needs_them_there(name):
    model = model_of(seeded(Layouts("channels_last"), 0.6), layer="layer")
    with pytest.raises(UserError, match="takes dimension 1 for channels, and layer is channels_last; take"):
        explain(Captum(name), model, pictures())


class ReluBehind(nn.Module):
    """What follows the layer overwrites its output."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.conv2, self.head, self.inplace = nn.Conv2d(3, 4, 3, 2, 1), nn.Linear(80, K), inplace

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.conv2(x), inplace=self.inplace).flatten(1))


@pytest.mark.parametrize(
    "name", [n for n in USABLE if n.startswith("Layer") and "DeepLift" not in n and "LRP" not in n]
)
def test_a_layer_whose_output_is_overwritten(name):
    found, expected = (
        explain(method_of(name), model_of(seeded(ReluBehind(inplace), 0.5)), pictures())["map"]
        for inplace in (True, False)
    )
    same(found, expected)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv2, self.head = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(240, K)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv2(self.conv2(x)).flatten(1))


def test_layers_that_are_no_layers_of_a_map():
    with pytest.raises(UserError, match="runs 2 times in a forward pass"):
        explain(Captum("LayerActivation"), model_of(seeded(Twice())), pictures())
    with pytest.raises(UserError, match="head gives one vector for the whole image"):
        explain(Captum("LayerActivation"), model_of(layer="head"), pictures())
    found = explain(Captum("NeuronGradient", {"neuron_selector": 1}), model_of(layer="head"), pictures())["map"]
    expected = explain(
        Captum("Saliency", {"abs": False}), model_of(), Batch(pictures().uids, pictures().x, torch.ones(3).long())
    )["map"]
    same(found, expected)


# ---- what captum does not see -------------------------------------------------------------------------


class Functional(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.conv2(self.pool(F.relu(self.conv1(x))))).flatten(1))


class Residual(Net):
    def forward(self, x: Tensor) -> Tensor:
        z = self.pool(self.act1(self.conv1(x)))
        return self.head((z + self.act2(self.conv2(z))).flatten(1))


class Gelu(Net):
    def __init__(self) -> None:
        super().__init__()
        self.act1 = nn.GELU()


class Relu6(Net):
    def __init__(self) -> None:
        super().__init__()
        self.act1 = nn.ReLU6()


RULES = ["GuidedBackprop", "Deconvolution", "GuidedGradCam", "NeuronGuidedBackprop", "NeuronDeconvolution"]


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize(("build", "seen"), [(Functional, "0 of the 2"), (Relu6, "1 of the 2"), (Gelu, None)])
@pytest.mark.quick(every=2)
def test_rules_for_relus_need_modules_of_the_class(name, build, seen):
    layer = "conv2"
    if seen is None:  # its one ReLU is seen, and a GELU has no rule
        assert explain(method_of(name), model_of(seeded(build(), 0.5), layer=layer), pictures())["map"].abs().max() > 0
        return
    with pytest.raises(UserError, match=f"only {seen} ReLUs of {build.__name__} are such; take method=guided_backprop"):
        explain(method_of(name), model_of(seeded(build(), 0.5), layer=layer), pictures())


def test_a_relu_that_is_used_twice_is_seen_twice():
    class Shared(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.act1(self.conv2(self.pool(self.act1(self.conv1(x))))).flatten(1))

    for name, own in (("GuidedBackprop", baselines.GuidedBackprop()), ("Deconvolution", baselines.Deconvolution())):
        found, expected = (explain(m, model_of(seeded(Shared(), 0.5)), pictures())["map"] for m in (Captum(name), own))
        same(found, expected)


@pytest.mark.parametrize("name", ["DeepLift", "LayerDeepLift"])
@pytest.mark.parametrize("build", [Functional, Gelu, Relu6, Mixed])
def test_deep_lift_that_is_not_complete_is_refused(name, build):
    with pytest.raises(SampleError, match=f"captum's {name} (is not complete.*take method=deep_lift_shap|refuses it)"):
        explain(Captum(name), model_of(seeded(build(), 0.5), layer="conv1"), pictures())


def test_deep_lift_goes_through_a_residual_connection():
    found = explain(Captum("DeepLift"), model_of(seeded(Residual(), 0.5)), pictures())
    assert found["delta"].max() < 1e-12
    assert Captum("DeepLift").COLUMNS == {"delta": "lower"}
    with pytest.raises(UserError, match="cannot be checked with multiply_by_inputs=false"):
        Captum("DeepLift", {"multiply_by_inputs": False})


@pytest.mark.parametrize("name", ["LRP", "LayerLRP"])
@pytest.mark.parametrize(("build", "call"), [(Residual, "add"), (Functional, "relu")])
def test_lrp_needs_modules_alone(name, build, call):
    with pytest.raises(
        UserError, match=rf"sees only modules, and its forward \({build.__name__}\).* calls {call} itself"
    ):
        explain(Captum(name), model_of(seeded(build(), 0.5), layer="conv2"), pictures())
    with pytest.raises(SampleError, match=r"s0: captum's LRP refuses it: Module of type .*GELU"):
        explain(Captum("LRP"), model_of(seeded(Gelu(), 0.5)), pictures())


def test_lrp_conserves_relevance_in_a_net_without_biases():
    net = seeded(Net(), 0.5)
    for layer in (net.conv1, net.conv2, net.head):
        layer.bias.zero_()
    found = explain(Captum("LRP"), model_of(net), pictures())
    with torch.no_grad():
        logit = net(pictures().x).gather(1, pictures().target[:, None])[:, 0]
    same(found["map"].sum((1, 2)), logit, 1e-6)
    assert found["delta"].max() < 1e-6


# ---- limits, errors, refusals -------------------------------------------------------------------------


class Watch(nn.Module):
    """Notes how many rows come in at a time (on the class: a Classifier copies its module)."""

    seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(len(x))
        return x


@pytest.mark.parametrize("rows", [2, 4, 10])
# ``Watch`` has no graph, which those with rules need: they send one row.
@pytest.mark.parametrize("name", [name for name in USABLE if name not in (*RULES, "LRP", "LayerLRP")])
@pytest.mark.quick(every=3)
def test_never_more_rows_than_the_limit_and_all_are_counted(name, rows):
    net = seeded(Net(), 0.5)
    net.conv1 = nn.Sequential(Watch(), net.conv1)
    batch, model = pictures(), model_of(net, rows)
    explain(method_of(name), model, batch)  # the net is traced, and the layer read
    Watch.seen.clear()
    before = model.passed
    explain(method_of(name), model, batch)
    assert max(Watch.seen) <= rows
    assert model.passed - before == sum(Watch.seen)


def test_more_rows_than_the_limit_are_refused():
    method = Captum("GradientShap", {"baselines": 0, "n_samples": 9})
    with pytest.raises(UserError, match=r"sends 9 rows through the net at a time, and run\.rows is 4; lower"):
        explain(method, model_of(rows=4), pictures())
    assert explain(method, model_of(rows=9), pictures())["map"].isfinite().all()


@pytest.mark.parametrize("name", ["DeepLift", "LayerConductance", "GuidedGradCam", "FeatureAblation", "LRP"])
def test_errors_of_the_net_are_its_own_and_nothing_is_left(name):
    method, batch, model = method_of(name), pictures(), model_of()
    expected = explain(method, model, batch)["map"]
    with net_dies(None) as calls:
        explain(method, model, batch)
    for call in (1, calls[0] // 2, calls[0]):
        with pytest.raises(KilledError), untouched(model, batch), net_dies(call):
            explain(method, model, batch)
        same(explain(method, model, batch)["map"], expected)


def test_what_captum_refuses_is_a_failure_of_the_sample():
    method = Captum("IntegratedGradients", {"method": "simpson"})
    with pytest.raises(SampleError, match=r"s0: captum's IntegratedGradients refuses it: .*simpson"):
        explain(method, model_of(), pictures())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"algorithm": "DeepLifd"}, r"captum has no algorithm 'DeepLifd'; did you mean 'DeepLift'\? \(it has: DataL"),
        ({"algorithm": "Attribution"}, "captum has no algorithm 'Attribution'"),
        ({"algorithm": "FeaturePermutation"}, "among the samples of a batch.*take FeatureAblation"),
        ({"algorithm": "NeuronDeepLift"}, "no error of completeness.*take DeepLift"),
        ({"algorithm": "LayerDeepLiftShap"}, "needs several baselines.*method=deep_lift_shap"),
        ({"algorithm": "LLMAttribution"}, "needs attr_method and tokenizer, for which there is no plain value"),
        ({"algorithm": "NeuronGradient"}, r"needs neuron_selector; set method\.arguments\.neuron_selector"),
        ({"algorithm": "GradientShap"}, r"needs baselines; set method\.arguments\.baselines"),
        ({"algorithm": "NoiseTunnel"}, r"needs arguments\.attribution_method"),
        ({"algorithm": "NoiseTunnel", "arguments": {"attribution_method": "NoiseTunnel"}}, "around another one"),
        ({"algorithm": "NoiseTunnel", "arguments": {"attribution_method": "Grad"}}, "no algorithm 'Grad'"),
        ({"arguments": {"n_step": 4}}, r"IntegratedGradients has no argument 'n_step'; did you mean 'n_steps'\?"),
        ({"arguments": {"n_steps": 0}}, "n_steps is 0, must be a whole number of at least 1"),
        ({"arguments": {"n_steps": 2.5}}, r"n_steps is 2\.5, must be a whole number"),
        ({"arguments": {"target": 3}}, "target is set by attrib, take it out"),
        ({"algorithm": "Lime", "arguments": {"similarity_func": "exp"}}, "similarity_func has no plain value"),
        ({"arguments": [1]}, r"Captum\.arguments is \[1\], must be names and values"),
        ({"tiles": 4}, "IntegratedGradients has no features that could be tiles"),
        ({"algorithm": "Lime", "tiles": 0}, "tiles is 0"),
        ({"reduce": "mean"}, "reduce is 'mean'"),
        ({"layout": "rows"}, r"Captum\.layout is 'rows'"),
    ],
)
def test_refusals(given, message):
    with pytest.raises(UserError, match=message):
        Captum(**given)


def test_what_it_is_for():
    assert Captum("Saliency").MODALITIES == ("image", "text", "audio")
    assert Captum("DeepLift").MODALITIES == ("image", "audio")
    assert Captum("LayerConductance").MODALITIES == ("image",)


def test_the_version_enters_the_key(monkeypatch):
    before = keys.digest(Captum())
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.7.0")
    assert keys.digest(Captum()) != before
