"""Maps and gradients along causal paths, what the sub-networks are worth, and attrib graph."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from contracts import seeded
from scipy import signal, special
from tiny import ROOT, tool
from torch import Tensor, nn

from attrib.causal import CausalGraphs, ClassGraph, Search, Sites, Structure, find, subnetwork, to_state
from attrib.causal.graph import GraphLayer
from attrib.causal.subnetwork import effect, logits, summary, weights
from attrib.cli import graph
from attrib.methods.causal import CausalGradient, CausalPaths
from attrib.models import Classifier, LeNet
from attrib.noise import Noise
from attrib.types import Batch, SampleError, UserError

GOLDEN = Path(__file__).parent / "golden" / "interventional_lenet.npz"
LAYERS = {"bottleneck": "conv2", "pool": "pool2", "first": "fc1", "second": "fc2", "image": "conv1"}


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN) as file:
        return dict(file)


@pytest.fixture(scope="module")
def model(golden) -> Classifier:
    net = LeNet()
    net.load_state_dict({k[3:]: torch.tensor(v) for k, v in golden.items() if k.startswith("sd.")})
    return Classifier(net, LAYERS, rows=64)


@pytest.fixture(scope="module")
def batch(golden) -> Batch:
    x = torch.tensor(golden["c1_samples"])
    return Batch(tuple(f"s{i}" for i in range(len(x))), x, torch.ones(len(x), dtype=torch.long))


@pytest.fixture(scope="module")
def graphs(model, batch) -> dict[int, ClassGraph]:
    sites = Sites(model, Structure.of(model, batch.x))
    return {target: find(sites, batch.x, target, Search()) for target in (1, 7)}


@pytest.fixture(scope="module")
def state(graphs) -> dict[str, Tensor]:
    return to_state(graphs)


def explained(method, model: Classifier, batch: Batch, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(method.attribute(model, batch, state, Noise(batch.uids)))


# ---- maps --------------------------------------------------------------------------------------------


def test_maps_are_those_of_the_released_code_with_the_layers_own_input(golden, model, batch, state):
    expected = golden["c1_attr_conv2__variant_layer_input_crosscorr"]
    found = explained(CausalPaths(nodes=3), model, batch[:1], state)
    np.testing.assert_allclose(found["map"][0], expected.mean(0), rtol=1e-4)
    nodes = torch.cat([found[f"node_{i}"] for i in (1, 2, 3)]).numpy()
    order = [int(np.abs(expected - node).reshape(3, -1).max(1).argmin()) for node in nodes]
    assert sorted(order) == [0, 1, 2]
    np.testing.assert_allclose(nodes, expected[order], rtol=1e-4)
    np.testing.assert_allclose(found["places"].sum((1, 2)), 1.0, rtol=1e-5)


def test_nodes_come_by_their_effect(golden, model, batch, graphs, state):
    found = explained(CausalPaths(nodes=4), model, batch[:1], state)
    effect = graphs[1].layers["fc1"].effect[torch.tensor([12, 13, 14])]
    expected = torch.tensor(golden["c1_attr_conv2__variant_layer_input_crosscorr"])[effect.argsort()]
    for i in range(3):
        torch.testing.assert_close(found[f"node_{i + 1}"][0], expected[i], rtol=1e-4, atol=1e-7)
    assert torch.equal(found["node_4"], found["node_3"])  # there are only three


def test_as_released_gives_the_maps_of_the_released_code(golden, model, batch, graphs, state):
    expected = golden["c1_attr_conv2"]
    mine = explained(CausalPaths(as_released=True, nodes=3), model, batch[:1], state)
    np.testing.assert_allclose(mine["map"][0], expected.mean(0), rtol=1e-4)
    order = graphs[1].layers["fc1"].effect[torch.tensor([12, 13, 14])].argsort()
    for i, at in enumerate(order.tolist()):
        np.testing.assert_allclose(mine[f"node_{i + 1}"][0], expected[at], rtol=1e-4)


def test_as_released_counts_cause_0_as_a_uniform_map(model, batch, graphs):
    found = graphs[1].layers["conv2"]
    assert found.causes.nonzero()[:, 0].tolist() == [0, 3]
    for causes, uniform in (([0], 1.0), ([0, 3], 0.5), ([3], 0.0), ([0, 3, 4], 1 / 3)):
        chosen = found._replace(causes=torch.isin(torch.arange(6), torch.tensor(causes)))
        others = found._replace(causes=chosen.causes & (torch.arange(6) != 0))
        places = []
        for each in (chosen, others) if uniform < 1 else (chosen,):
            graph = graphs[1]._replace(layers=graphs[1].layers | {"conv2": each})
            mine = explained(CausalPaths(as_released=True), model, batch[:1], to_state({1: graph}))["places"][0]
            places.append(mine)
        expected = torch.full_like(places[0], uniform / places[0].numel()) + (1 - uniform) * places[-1]
        torch.testing.assert_close(places[0], expected)


def test_the_map_of_every_layer_by_its_formula(model, batch, graphs, state):
    net, x = model.module, batch.x[:2]
    with torch.no_grad():
        pixels, before = x, net.pool1(net.relu1(net.conv1(x)))
        flat = net.pool2(net.relu2(net.conv2(before)))
    inputs = {"image": (pixels, net.conv1), "bottleneck": (before, net.conv2), "pool": (before, net.conv2)}
    for role, (features, layer) in inputs.items():
        path = "conv2" if role == "pool" else LAYERS[role]
        found = graphs[1].layers[path]
        causes, nodes = (mask.nonzero()[:, 0].tolist() for mask in (found.causes, found.effects))
        maps = explained(CausalPaths(layer=role), model, batch[:2], state)
        for i in range(2):
            slid = lambda e, c, i=i, f=features, m=layer: signal.correlate2d(f[i, c], m.weight[e, c], "full")  # noqa: E731
            expected = [np.mean([special.softmax(slid(e, c)) for c in causes], 0) for e in nodes]
            np.testing.assert_allclose(maps["places"][i], np.mean(expected, 0), rtol=1e-4, atol=1e-8)
    found, w = graphs[1].layers["fc1"], net.fc1.weight.reshape(120, 16, 5, 5)
    expected = [
        np.mean([special.softmax((flat[0, c] * w[e, c]).numpy()) for c in found.causes.nonzero()[:, 0]], 0)
        for e in found.effects.nonzero()[:, 0]
    ]
    maps = explained(CausalPaths(layer="first"), model, batch[:2], state)
    np.testing.assert_allclose(maps["places"][0], np.mean(expected, 0), rtol=1e-4)
    torch.testing.assert_close(
        maps["map"], F.interpolate(maps["places"][:, None], (32, 32), mode="bilinear", align_corners=False)[:, 0]
    )


def test_the_map_of_a_transposed_convolution_is_what_it_gives():
    """Every cause's places spread their kernel, which is not turned, a stride apart."""
    net = seeded(
        nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.Softplus(), nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=2), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2),
        )
    )  # fmt: skip
    model = Classifier(net, {"bottleneck": "2"}, dtype=torch.float64)
    x = Noise(["x"], dtype=torch.float64).normal(4, 1, 7, 9)[0]
    graph = find(Sites(model, Structure.of(model, x)), x, 0, Search(z=0.01))
    found = graph.layers["2"]
    causes, nodes = (mask.nonzero()[:, 0].tolist() for mask in (found.causes, found.effects))
    batch = Batch(("a",), x[:1], torch.tensor([0]))
    places = explained(CausalPaths(), model, batch, to_state({0: graph}))["places"][0]
    with torch.no_grad():
        read = net[1](net[0](x[:1]))[0]
    expected = []
    for node in nodes:
        responses = []
        for cause in (c for c in causes if c // 2 == node // 3):
            given = torch.zeros(2 * 5 + 1 - 2 + 2, 2 * 7 + 1 - 2 + 2, dtype=torch.float64)
            for i, j in np.ndindex(5, 7):
                given[2 * i : 2 * i + 3, 2 * j : 2 * j + 3] += read[cause, i, j] * net[2].weight[cause, node % 3]
            responses.append(given.flatten().softmax(0).view_as(given))
        if responses:
            expected.append(torch.stack(responses).mean(0))
    assert len(expected) > 1
    torch.testing.assert_close(places, torch.stack(expected).mean(0))


class OverLast(nn.Module):
    """A linear layer over the last axis: that of the columns, or where ``last`` of the channels, of a square map."""

    def __init__(self, last: bool) -> None:
        super().__init__()
        self.last, self.conv, self.mix = last, nn.Conv2d(1, 8, 3, padding=1), nn.Linear(8, 8)
        self.head = nn.Linear(512, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).relu()
        return self.head(self.mix(x.permute(0, 2, 3, 1) if self.last else x).relu().flatten(1))


def test_a_layer_over_columns_reads_no_places():
    """Sizes are the same; its map would have channels for rows."""
    x = Noise(["x"], dtype=torch.float64).normal(4, 1, 8, 8)[0]
    for last in (True, False):
        model = Classifier(seeded(OverLast(last)), {"bottleneck": "mix"}, dtype=torch.float64)
        state = to_state({0: find(Sites(model, Structure.of(model, x)), x, 0, Search(z=0.01, layers=2))})
        batch = Batch(("a",), x[:1], torch.tensor([0]))
        if last:
            assert explained(CausalPaths(), model, batch, state)["places"].shape == (1, 8, 8)
        else:
            with pytest.raises(UserError, match="does not tell which axes are space"):
                explained(CausalPaths(), model, batch, state)


def test_classes_in_one_batch_do_not_mix(model, batch, state):
    mixed = Batch(batch.uids[:4], batch.x[:4], torch.tensor([1, 7, 7, 1]))
    for method in (CausalPaths(layer="image", nodes=1, draws=2), CausalGradient()):
        together = explained(method, model, mixed, state)
        for i in range(4):
            alone = explained(method, model, mixed[[i]], state)
            for name, value in alone.items():
                torch.testing.assert_close(value[0], together[name][i], rtol=1e-4, atol=1e-6)


def test_what_cannot_be_explained(model, batch, graphs, state):
    other = Batch(batch.uids[:1], batch.x[:1], torch.tensor([3]))
    with pytest.raises(SampleError, match="s0: no causal graph of class 3, only of 1, 7"):
        explained(CausalPaths(), model, other, state)
    wrong = Batch(batch.uids[:1], batch.x[:1], torch.tensor([12]))
    with pytest.raises(UserError, match="class 12 does not exist, the net has 10"):
        explained(CausalPaths(), model, wrong, state)
    ended = graphs[1]._replace(layers={"fc3": graphs[1].layers["fc3"]})
    with pytest.raises(SampleError, match="s0: the causal graph of class 1 has no paths at layer conv2"):
        explained(CausalPaths(), model, batch[:1], to_state({1: ended}))
    with pytest.raises(UserError, match="fc2 reads no image features"):
        explained(CausalPaths(layer="second"), model, batch[:1], state)
    for role in ("image", "first"):
        with pytest.raises(UserError, match="does not read just one convolution"):
            explained(CausalPaths(layer=role, as_released=True), model, batch[:1], state)
    many = Batch(batch.uids[:1], batch.x[:1], torch.ones(1, 10))
    with pytest.raises(SampleError, match="one class each"):
        explained(CausalPaths(), model, many, state)
    for field in ("nodes", "draws"):
        with pytest.raises(UserError, match=f"{field} is -1"):
            CausalPaths(**{field: -1})


# ---- gradients along paths ---------------------------------------------------------------------------


def full(graph: ClassGraph) -> ClassGraph:
    everything = {
        path: f._replace(effects=torch.ones_like(f.effects), causes=torch.ones_like(f.causes), how=1)
        for path, f in graph.layers.items()
    }
    return graph._replace(layers=everything)


def gradient(net: nn.Module, x: Tensor, target: int) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(net(x)[:, target].sum(), x)[0]


def test_along_all_edges_it_is_the_gradient(model, batch, graphs):
    state = to_state({1: full(graphs[1])})
    found = explained(CausalGradient(multiply=False), model, batch, state)["map"]
    torch.testing.assert_close(found, gradient(model.module, batch.x, 1).sum(1), rtol=1e-4, atol=1e-5)


def test_paths_add_up(model, batch, graphs, state):
    """fc3 alone: what flows through its causes and what flows through the others is the gradient."""
    top = graphs[1].layers["fc3"]
    only = [graphs[1]._replace(layers={"fc3": top._replace(causes=c)}) for c in (top.causes, ~top.causes)]
    parts = [explained(CausalGradient(), model, batch, to_state({1: graph})) for graph in only]
    whole = (gradient(model.module, batch.x, 1) * batch.x).sum(1)
    torch.testing.assert_close(parts[0]["map"] + parts[1]["map"], whole, rtol=1e-4, atol=1e-5)
    # By hand: the gates of the net as it is, but the causal weights only.
    net, x = model.module, batch.x[:1].clone().requires_grad_()
    kept_weights = weights(Structure.of(model, batch.x), [graphs[1]], "keep edges")
    masked = {name.removesuffix(".weight"): weight for name, weight in kept_weights.items()}
    z = x
    for name, module in net.named_children():
        if name in masked:
            linear = F.conv2d if isinstance(module, nn.Conv2d) else F.linear
            kept = linear(z, masked[name])
            z = kept + (module(z) - kept).detach()
        else:
            z = module(z)
    (expected,) = torch.autograd.grad(z[0, 1], x)
    found = explained(CausalGradient(multiply=False), model, batch[:1], state)["map"]
    torch.testing.assert_close(found, expected.sum(1), rtol=1e-4, atol=1e-6)


# ---- sufficiency and necessity -----------------------------------------------------------------------


def test_the_table(model, batch, graphs):
    structure = Structure.of(model, batch.x)
    targets = torch.tensor([1] * 8 + [7] * 2)
    data = [Batch(batch.uids[i : i + 4], batch.x[i : i + 4], targets[i : i + 4]) for i in range(0, 10, 4)]
    frame = effect(model, structure, graphs, data, draws=3)
    assert len(frame) == 3 * (1 + 4 * (1 + 3))
    row = frame.set_index(["class", "change", "network", "draw"]).loc
    y = logits(model, weights(structure, [graphs[1]], "keep nodes"), batch.x)
    mine = row[1, "keep nodes", "causal", 0]
    assert mine["samples"] == 8
    assert mine["logit"] == pytest.approx(y[:8, 1].mean().item(), rel=1e-5)
    assert mine["accuracy"] == pytest.approx((y[:8].argmax(1) == 1).float().mean().item())
    assert mine["others"] == pytest.approx((y[8:].argmax(1) == 1).float().mean().item())
    assert row[1, "none", "whole", 0]["accuracy"] == 1
    both = logits(model, weights(structure, [graphs[1], graphs[7]], "remove edges"), batch.x)
    assert row["union", "remove edges", "causal", 0]["accuracy"] == pytest.approx(
        (both.argmax(1) == targets).float().mean().item()
    )
    table = summary(frame).set_index(["class", "change", "network"]).loc
    assert table["1", "keep nodes", "random"]["logit"] == pytest.approx(
        frame.query("`class` == 1 and change == 'keep nodes' and network == 'random'")["logit"].mean()
    )
    assert table["mean", "none", "whole"]["accuracy"] == pytest.approx((1 + row[7, "none", "whole", 0]["accuracy"]) / 2)


def test_masked_weights_are_made_again_where_there_is_no_room(model, batch, graphs, monkeypatch):
    structure, data = Structure.of(model, batch.x), [batch[[0, 1]], batch[[8, 9]]]
    made = []
    monkeypatch.setattr(subnetwork, "weights", lambda *args: made.append(args[2]) or weights(*args))
    frames, counts = [], []
    for room in (2**30, 0):
        monkeypatch.setattr(subnetwork, "HELD_BYTES", room)
        frames.append(effect(model, structure, graphs, data, draws=1))
        counts.append(len(made))
    assert counts == [3 * 4 * 2, 3 * 4 * 2 * 3]  # once, then once a batch
    pd.testing.assert_frame_equal(*frames)


def test_the_columns_of_the_method_are_those_of_the_table(model, batch, graphs, state):
    found = explained(CausalPaths(draws=2), model, batch, state)
    structure = Structure.of(model, batch.x)
    frame = effect(model, structure, graphs, [batch], draws=2).query("`class` == 1")
    for net, change in (("kept", "keep nodes"), ("removed", "remove nodes")):
        for prefix, network in (("", "causal"), ("random_", "random")):
            rows = frame[(frame["change"] == change) & (frame["network"] == network)]
            assert found[f"{prefix}{net}_logit"].mean().item() == pytest.approx(rows["logit"].mean(), rel=1e-4)
            assert found[f"{prefix}{net}_right"].mean().item() == pytest.approx(rows["accuracy"].mean())
    method = CausalPaths(draws=2)
    assert method.COLUMNS["kept_right"] == "higher"
    assert method.COLUMNS["removed_logit"] == "lower"
    assert method.COLUMNS["random_kept_logit"] == "none"
    assert set(method.COLUMNS) == set(method.EXTRAS) - {"places"}
    assert not CausalPaths().COLUMNS


# ---- the tool ----------------------------------------------------------------------------------------


def test_tables_of_the_command_are_in_order_and_say_each_name_once(capsys):
    layer = GraphLayer(*(torch.ones(2, dtype=torch.bool),) * 2, torch.ones(2), torch.ones(2), 0, 0.0)
    graphs = {target: ClassGraph(target, 4, (0.0, 1.0), {"fc": layer}) for target in (8, 9, 7, 10)}
    table = graph._layers(graphs, {7: "7", 8: "eight", 10: ""})
    assert list(table["class"]) == ["7", "8 eight", "9", "10"]
    graph._shown("title", pd.DataFrame({"class": ["mean", "union"], "others": [0.25, math.nan]}))
    out = capsys.readouterr().out
    assert "0.250" in out
    assert "–" in out
    assert "nan" not in out


def test_the_command_writes_everything(tmp_path, capsys):
    command = ["method=causal_paths", "dataset=digits", "model=lenet", "metric=[]", f"run.root={tmp_path}"]
    command += ["run.device=cpu", "run.limit=30", "method.graph.correct=false", "method.graph.samples=4"]
    command += ["method.graph.classes=[3,8]", "dataset.estimation.select.count=60", "method.graph.search.layers=3"]
    command += ["repeats=2", "+draws=1", "betas=[0.0,0.1]"]
    graph = tool("graph")
    status = graph.main(command)
    out = capsys.readouterr()
    assert status == 0, out.err
    (folder,) = (tmp_path / "graphs").iterdir()
    files = {path.name for path in folder.iterdir()}
    assert files == {
        "class_3.json", "class_3.png", "class_8.json", "class_8.png", "effect.csv", "stability.csv", "stability.png",
        "bootstrap.csv",
    }  # fmt: skip
    assert json.loads((folder / "class_8.json").read_text())["graph"]["samples"] == 4
    assert set(pd.read_csv(folder / "effect.csv")["class"]) == {"3", "8", "union"}
    assert set(pd.read_csv(folder / "stability.csv")["layer"]) == {"fc3", "fc2", "fc1"}
    assert "mean over the classes" in out.out

    for wrong, message in (
        ("do=[pictures]", "'pictures' is none of graphs, effect, stability"),
        ("repeats=x", "repeats must be a whole number, not 'x'"),
        ("betas=0.1", r"betas must be a list, not 0.1; write betas=[...]"),
        ("betas=[a]", "betas: 'a' is no number"),
        ("+do=graphs", "do must be a list, not 'graphs'"),
    ):
        name = wrong.partition("=")[0]
        assert graph.main([*(c for c in command if not c.startswith(name)), wrong]) == 2
        assert message in capsys.readouterr().err
    assert graph.main(["method=gradient", *command[1:6]]) == 2
    assert "take method=causal_paths" in capsys.readouterr().err


def test_the_configuration_says_what_the_classes_say():
    for name in ("causal_paths", "causal_gradient"):
        text = (ROOT / "configs" / "method" / f"{name}.yaml").read_text()
        assert "attrib.causal.CausalGraphs" in text
    assert CausalPaths().fit == CausalGradient().fit == CausalGraphs()
