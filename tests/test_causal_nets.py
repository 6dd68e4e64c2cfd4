"""Interventions on all kinds of layers against the plain way: one candidate, one sample, the weight really set."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from contracts import seeded
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from attrib.causal import Search, Sites, Structure, find, intervene
from attrib.causal.graph import FIRST
from attrib.causal.interventions import estimate
from attrib.causal.layers import Unit
from attrib.causal.subnetwork import logits, random_graph, weights
from attrib.models import Classifier
from attrib.noise import Noise
from attrib.types import UserError


class Plain(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3, dilation=2),
            nn.MaxPool2d(2), nn.Tanh(), nn.Flatten(), nn.Dropout(), nn.Linear(24, 7), nn.GELU(), nn.Linear(7, 3),
        )  # fmt: skip


class Grouped(nn.Module):
    """A depthwise and a grouped convolution, a gate over channels, circular padding."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depth = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.down, self.up = nn.Conv2d(6, 2, 1), nn.Conv2d(2, 6, 1)
        self.group = nn.Conv2d(6, 9, 3, groups=3, padding=1, padding_mode="circular")
        self.head = nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.depth(F.relu(self.stem(x))))
        gate = torch.sigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))))
        x = F.relu(self.group(x * gate))
        return self.head(x.mean((2, 3)))


class Residual(nn.Module):
    """An identity shortcut, one with a convolution, branches that are joined; logits are pooled channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.short, self.wide = nn.Conv2d(4, 5, 1, stride=2), nn.Conv2d(4, 5, 3, stride=2, padding=1)
        self.norm, self.last = nn.BatchNorm2d(4), nn.Conv2d(9, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(x + self.b(F.relu(self.norm(self.a(x)))))
        y = F.relu(self.short(x) + self.wide(x))
        x = torch.cat((F.avg_pool2d(x, 2), y), 1)
        return F.adaptive_avg_pool2d(self.last(x), 1).view(x.size(0), -1)


class Permuted(nn.Module):
    """A ConvNeXt block: depthwise convolution, layer norm, linear layers over the last axis, layer scale."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depth = nn.Conv2d(3, 4, 2, stride=2), nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.norm, self.up, self.down = nn.LayerNorm(4), nn.Linear(4, 8), nn.Linear(8, 4)
        self.scale, self.head = nn.Parameter(torch.ones(4, 1, 1)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.down(F.gelu(self.up(self.norm(self.depth(x).permute(0, 2, 3, 1))))).permute(0, 3, 1, 2)
        return self.head((x + self.scale * y).mean([-2, -1]))


NETS = [Plain, Grouped, Residual, Permuted]
PLACES = {Plain: 16, Grouped: 6, Residual: 6, Permuted: 8}


def prepared(kind: type[nn.Module], rows: int = 64) -> tuple[Classifier, Tensor]:
    net = seeded(kind())
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean += 0.1
            module.running_var *= 1.3
    size = PLACES[kind]
    x = Noise(["x"], dtype=torch.float64).normal(5, 3, size, size)[0]
    return Classifier(net, rows=rows, dtype=torch.float64), x


def edge_mask(net: nn.Module, path: str, features: Tensor, effects: Tensor) -> Tensor:
    """Which weights of a layer lead from these inputs to these outputs; a grouped convolution's within a group only."""
    layer = net.get_submodule(path)
    mask, inputs = torch.zeros_like(layer.weight, dtype=torch.bool), layer.weight.shape[1]
    groups = getattr(layer, "groups", 1)
    for e in effects.tolist():
        for i in features.tolist():
            if isinstance(layer, nn.ConvTranspose2d):
                assert groups == 1
                mask[i, e] = True
            elif isinstance(layer, Conv1D):
                mask[i, e] = True
            elif groups == 1:
                mask[e, i] = True
            elif i // inputs == e // (layer.out_channels // groups):
                mask[e, i % inputs] = True
    return mask


def plainly(net: nn.Module, path: str, units: list[Unit], effects: Tensor, u: float, x: Tensor) -> Tensor:
    """(units, n, K) by setting the weights of a copy."""
    rows = []
    for unit in units:
        changed = copy.deepcopy(net)
        changed.get_submodule(path).weight.data[edge_mask(net, path, unit.features, effects)] = u
        rows.append(torch.cat([changed(one[None]) for one in x])[None])
    return torch.cat(rows)


@pytest.mark.parametrize("u", [0.0, 0.37])
@pytest.mark.parametrize("kind", NETS)
@torch.no_grad()
@pytest.mark.quick(every=3)
def test_interventions_are_those_of_set_weights(kind, u):
    model, x = prepared(kind, rows=7)
    sites = Sites(model, Structure.of(model, x))
    for path in sites.structure.paths:
        outputs = sites.structure.outputs(path)
        effects = torch.arange(outputs)[torch.tensor([i % 3 != 1 for i in range(outputs)])]
        site = sites.at(path, x)
        expected = plainly(model.module, path, list(site.layer.units), effects, u, x)
        for target in range(3):
            y = intervene(model, site, range(len(site.layer.units)), effects, target, u)
            torch.testing.assert_close(y, expected[:, :, target], rtol=0, atol=1e-10)
        if not site.layer.first:
            assert (expected - model.logits(x)).abs().max() > 1e-6, path  # it does something


@pytest.mark.parametrize("kind", NETS)
@torch.no_grad()
def test_nothing_set_or_set_to_itself_changes_nothing(kind):
    model, x = prepared(kind)
    for parameter in model.module.parameters():
        if parameter.ndim > 1:
            parameter.fill_(0.2)
    sites, whole = Sites(model, Structure.of(model, x)), model.logits(x)
    for path in sites.structure.paths:
        site, outputs = sites.at(path, x), len(model.module.get_submodule(path).weight)
        units = range(len(site.layer.units))
        for effects, u in ((torch.arange(outputs), 0.2), (torch.arange(0), 0.7)):
            y = intervene(model, site, units, effects, 1, u)
            torch.testing.assert_close(y, whole[:, 1].expand_as(y), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", NETS)
def test_the_estimate_is_a_derivative(kind):
    """Moving the weights a little towards u changes the logit by as much of the estimate."""
    model, x = prepared(kind)
    sites, step = Sites(model, Structure.of(model, x)), 1e-6
    for path in sites.structure.paths:
        site = sites.at(path, x)
        module = model.module.get_submodule(path)
        effects = torch.arange(len(module.weight))[::2]
        found = estimate(model, site, effects, 2, u=0.1)
        moved = copy.deepcopy(model.module)
        mask = edge_mask(moved, path, site.layer.units[-1].features, effects)
        weight = moved.get_submodule(path).weight
        weight.data += step * mask * (0.1 - weight.data)
        with torch.no_grad():
            slope = (moved(x) - model.module(x))[:, 2].mean() / step
        torch.testing.assert_close(found[-1], slope, rtol=1e-3, atol=1e-6)


# ---- what feeds what ---------------------------------------------------------------------------------


def fed(kind: type[nn.Module]) -> dict[str, list[tuple[list[int], tuple]]]:
    model, x = prepared(kind)
    structure = Structure.of(model, x)
    return {
        path: [(unit.features.tolist(), unit.origin) for unit in structure.layer(path).units]
        for path in (*structure.paths, "output")
    }


def of(count: int, *paths: str, span: int = 1, at: int = 0) -> list[tuple[list[int], tuple]]:
    """So many channels of these layers, from a feature on, with ``span`` features each."""
    return [
        ([*range(at + j * span, at + (j + 1) * span)], tuple((path, j) for path in sorted(paths))) for j in range(count)
    ]


def test_sources():
    assert fed(Plain) == {
        "0": of(3, "input"), "3": of(4, "0"), "8": of(6, "3", span=4), "10": of(7, "8"), "output": of(3, "10"),
    }  # fmt: skip
    assert fed(Grouped) == {
        "stem": of(3, "input"), "depth": of(6, "stem"), "down": of(6, "depth"), "up": of(2, "down"),
        "group": of(6, "depth", "up"), "head": of(9, "group"), "output": of(3, "head"),
    }  # fmt: skip
    residual = fed(Residual)
    assert residual["a"] == of(4, "stem")
    assert residual["short"] == residual["wide"] == of(4, "b", "stem")
    assert residual["last"] == of(4, "b", "stem") + of(5, "short", "wide", at=4)
    permuted = fed(Permuted)
    assert permuted["up"] == of(4, "depth")
    assert permuted["head"] == of(4, "down", "stem")


def structure_of(net: nn.Module, x: Tensor) -> Structure:
    return Structure.of(Classifier(seeded(net), dtype=torch.float64), x)


def test_one_channel_is_a_channel():
    x = Noise(["x"], dtype=torch.float64).normal(2, 1, 8, 8)[0]
    perceptron = structure_of(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), x).layer("1")
    assert [(unit.features.tolist(), unit.origin) for unit in perceptron.units] == of(1, "input", span=64)
    assert perceptron.places == (8, 8)
    narrow = nn.Sequential(nn.Conv2d(1, 1, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3))
    layer = structure_of(narrow, x).layer("3")
    assert (layer.sources, layer.places, layer.refused, len(layer.units)) == (("0",), (6, 6), "", 1)
    pooled = nn.Sequential(nn.Conv2d(1, 1, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 3))
    (unit,) = structure_of(pooled, x).layer("3").units
    assert (unit.features.tolist(), unit.origin) == ([0], (("0", 0),))


@pytest.mark.parametrize(
    ("name", "layers"), [("resnet18", 21), ("mobilenet_v3_small", 54), ("convnext_tiny", 59), ("vgg11_bn", 11)]
)
@pytest.mark.quick("resnet18-*")
def test_architectures(name, layers):
    models = pytest.importorskip("torchvision.models")
    model = Classifier(getattr(models, name)(weights=None, num_classes=10))
    structure, net = Structure.of(model, torch.zeros(1, 3, 64, 64)), model.module
    assert len(structure.paths) == layers
    first, *others = (structure.layer(path) for path in structure.paths)
    assert first.first
    for layer in others:
        assert not layer.first
        assert not layer.refused
        module = net.get_submodule(layer.path)
        inputs = module.in_features if isinstance(module, nn.Linear) else module.in_channels
        assert sorted(torch.cat([unit.features for unit in layer.units]).tolist()) == list(range(inputs))
    assert len(structure.layer("output").units) == 10
    if name == "resnet18":
        sources = set(structure.layer("layer2.0.conv1").sources)
        assert sources == {"conv1", "layer1.0.conv2", "layer1.1.conv2"}
    if name == "vgg11_bn":
        assert structure.layer("classifier.0").places == (7, 7)


# ---- whole graphs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", NETS)
def test_graphs_hang_together(kind):
    """Every cause that is no pixel is a node of the layers that it comes from, and no node is there without one."""
    model, x = prepared(kind)
    structure = Structure.of(model, x)
    graph = find(Sites(model, structure), x, 1, Search(z=0.1, fallback=None))
    assert list(graph.layers) == list(reversed(structure.paths))
    expected = {path: torch.zeros_like(found.effects) for path, found in graph.layers.items()}
    for path, channel in structure.layer("output").units[1].origin:
        expected[path][channel] = True
    for path, found in graph.layers.items():
        layer = structure.layer(path)
        assert torch.equal(found.effects, expected[path])
        assert (found.how == FIRST) == (layer.first and bool(found.effects.any()))
        for number in found.causes.nonzero()[:, 0].tolist():
            for source, channel in layer.units[number].origin:
                if source in expected:
                    expected[source][channel] = True
    few = find(Sites(model, structure), x, 1, Search(z=0.1, fallback=None, layers=2))
    assert list(few.layers) == list(graph.layers)[:2]
    for path, found in few.layers.items():
        assert torch.equal(found.causes, graph.layers[path].causes)


@pytest.mark.parametrize("kind", NETS)
def test_keeping_everything_is_the_net_and_removing_everything_is_its_biases(kind):
    model, x = prepared(kind)
    structure = Structure.of(model, x)
    graph = find(Sites(model, structure), x, 1, Search())
    ones = {
        p: f._replace(effects=torch.ones_like(f.effects), causes=torch.ones_like(f.causes), how=1)
        for p, f in graph.layers.items()
    }
    full, whole = graph._replace(layers=ones), model.logits(x)
    for change in ("keep edges", "keep nodes"):
        torch.testing.assert_close(logits(model, weights(structure, [full], change), x), whole, rtol=0, atol=1e-12)
    for change in ("remove edges", "remove nodes"):
        y = logits(model, weights(structure, [full], change), x)
        torch.testing.assert_close(y, y[:1].expand_as(y), rtol=0, atol=1e-12)  # the image no longer matters
    kept, gone = (weights(structure, [graph], f"{verb} edges") for verb in ("keep", "remove"))
    state = model.module.state_dict()
    assert all(torch.equal(kept[name] + gone[name], state[name]) for name in kept)


@pytest.mark.parametrize("kind", NETS)
def test_random_graphs_have_the_same_size(kind):
    model, x = prepared(kind)
    structure = Structure.of(model, x)
    graph = find(Sites(model, structure), x, 1, Search(z=0.1))
    drawn = [random_graph(structure, graph, Noise([f"draw {i}"])) for i in range(6)]
    top = next(iter(graph.layers))
    for random in drawn:
        assert int(random.layers[top].causes.sum()) == int(graph.layers[top].causes.sum())
        for path, found in random.layers.items():
            assert int(found.causes.sum()) <= max(int(graph.layers[path].causes.sum()), 0)
    again = random_graph(structure, graph, Noise(["draw 0"]))
    assert all(torch.equal(again.layers[p].causes, drawn[0].layers[p].causes) for p in graph.layers)


# ---- what is refused ---------------------------------------------------------------------------------


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mix = nn.Conv2d(3, 4, 4, stride=4), nn.LSTM(4, 4, batch_first=True)
        self.hidden, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        x = self.mix(x)[0].mean(1)
        return self.head(F.relu(self.hidden(x)))


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight / self.weight.norm(), self.bias)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.same, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.same(self.same(self.conv(x))).mean((2, 3)))


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1)[:, :12] if x.sum() > 0 else x.flatten(1)[:, 12:24])


def test_an_operation_that_is_not_known_is_named():
    model = Classifier(seeded(Recurrent()), dtype=torch.float64)
    x = Noise(["x"], dtype=torch.float64).normal(4, 3, 8, 8)[0]
    sites = Sites(model, Structure.of(model, x))
    with pytest.raises(UserError, match=r"lstm of mix \(LSTM\), on the way to hidden.*layers: the last so many"):
        find(sites, x, 1, Search(z=0.0))
    found = find(sites, x, 1, Search(z=0.0, layers=2))  # what is behind it
    assert list(found.layers) == ["head", "hidden"]
    assert found.layers["hidden"].causes.any()


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (nn.Sequential(nn.Flatten(), Scaled(192, 3)), "no convolution or linear layer whose weight is a parameter"),
        (Twice(), "layer same runs 2 times"),
        (Branching(), "torch cannot export Branching"),
        (nn.Sequential(nn.Flatten(), nn.ReLU()), "has no convolution or linear layer"),
    ],
)
def test_nets_that_are_refused(net, message):
    x = Noise(["x"], dtype=torch.float64).normal(4, 3, 8, 8)[0]
    model = Classifier(seeded(net), dtype=torch.float64)

    def cut_everywhere() -> None:
        sites = Sites(model, Structure.of(model, x))
        for path in sites.structure.paths:
            sites.at(path, x)

    with pytest.raises(UserError, match=message):
        cut_everywhere()
