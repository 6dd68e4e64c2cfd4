"""Causal graphs of LeNet: the released code's numbers, the statistics, states, files."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from contracts import FitSamples, PartialInMemory, seeded
from scipy import stats
from torch import Tensor, nn

from attrib import keys
from attrib.causal import CausalGraphs, Search, Sites, Structure, find, from_state, intervene, to_state
from attrib.causal.drawing import draw, draw_stability
from attrib.causal.exchange import connections, to_json
from attrib.causal.graph import FALLEN_BACK, FIRST, NONE_FOUND, NOT_REACHED, TESTED, adjusted, select
from attrib.causal.interventions import estimate
from attrib.causal.stability import bootstrap, jaccard, soft
from attrib.causal.subnetwork import logits, weights
from attrib.models import Classifier, LeNet
from attrib.running.states import load_state
from attrib.types import Batch, SampleError, UserError

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "interventional_lenet.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def model(golden) -> Classifier:
    net = LeNet()
    net.load_state_dict({k[3:]: torch.tensor(v) for k, v in golden.items() if k.startswith("sd.")})
    return Classifier(net, {"bottleneck": "conv2"}, rows=1024)


@pytest.fixture(scope="module")
def x(golden) -> torch.Tensor:
    return torch.tensor(golden["c1_samples"])


@pytest.fixture(scope="module")
def sites(model, x) -> Sites:
    return Sites(model, Structure.of(model, x))


@pytest.fixture(scope="module")
def graph(sites, x):
    return find(sites, x, 1, Search())


def chosen(mask: torch.Tensor) -> list[int]:
    return mask.nonzero()[:, 0].tolist()


# ---- parity ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", ["fc3", "fc2", "fc1", "conv2", "conv1"])
def test_the_graph_is_that_of_the_released_code(golden, graph, layer):
    found = graph.layers[layer]
    assert chosen(found.causes) == golden[f"c1_corrected_{layer}_causes"].tolist()
    assert chosen(found.effects) == golden[f"c1_corrected_{layer}_effects"].tolist()
    assert found.how == {"fc2": FALLEN_BACK, "conv1": FIRST}.get(layer, TESTED)
    assert list(graph.layers) == ["fc3", "fc2", "fc1", "conv2", "conv1"]
    np.testing.assert_allclose(graph.reference, golden["c1_reference_mean_std"], rtol=1e-6)


@pytest.mark.parametrize("layer", ["fc3", "fc2", "fc1", "conv2"])
def test_every_intervened_logit_is_that_of_the_released_code(golden, model, sites, x, graph, layer):
    site, found = sites.at(layer, x), graph.layers[layer]
    y = intervene(model, site, range(len(site.layer.units)), found.effects.nonzero()[:, 0], 1)
    np.testing.assert_allclose(y.numpy(), golden[f"c1_{layer}_Yw"], rtol=0, atol=1e-4)
    effect = golden[f"c1_{layer}_diff"].mean(1)
    np.testing.assert_allclose(found.effect, effect, atol=1e-4)
    spread = np.sqrt(
        golden[f"c1_{layer}_Yw"].var(1, ddof=1) / 10 + golden["c1_logits"][:, 1].astype(float).var(ddof=1) / 10
    )
    np.testing.assert_allclose(found.p, stats.norm.cdf(effect / spread), atol=1e-4)


def test_a_soft_graph_may_end_at_once(golden, sites, x):
    assert not any(name.startswith("c1_soft_fc") for name in golden)
    found = find(sites, x, 1, Search(soft=True, beta=0.2), u={"fc3": float(golden["c1_soft_u"][0])})
    assert [layer.how for layer in found.layers.values()] == [NONE_FOUND, *[NOT_REACHED] * 4]
    assert not found.reached


def test_soft_interventions_over_a_range(golden, sites, x):
    for beta, u, nodes in zip(golden["c1_stab_beta"], golden["c1_stab_u"], golden["c1_stab_nodes"], strict=True):
        search = Search(soft=True, beta=float(beta), layers=1)
        assert (
            chosen(find(sites, x, 1, search, u={"fc3": float(u)}).layers["fc3"].causes)
            == np.flatnonzero(nodes).tolist()
        )


def test_pieces(model, sites):
    with np.load(GOLDEN / "interventional_pieces.npz") as file:
        piece = dict(file)
    both = torch.tensor([0, 5])
    x = torch.tensor(piece["mi_x"])
    site = sites.at("fc1", x)
    y = [intervene(model, site, [4], both, target)[0, 0].item() for target in range(10)]
    np.testing.assert_allclose(y, piece["mi_yhat"], atol=1e-4)
    for layer, kernel in (("fc1", (5, 5)), ("conv2", (5, 5))):
        module, call = model.module.get_submodule(layer), sites.structure.call(layer)
        units = [unit.features for unit in sites.structure.layer(layer).units]
        mine = torch.stack([call.edges(unit, both).weight.reshape(2, *kernel) for unit in units], 1)
        other = piece[f"iw_{layer}"]
        rows = [
            int(np.abs(module.weight.numpy().reshape(len(module.weight), -1) - w.ravel()).sum(1).argmin())
            for w in other
        ]
        mine = torch.stack([call.edges(unit, torch.tensor(rows)).weight.reshape(2, *kernel) for unit in units], 1)
        np.testing.assert_allclose(mine, other, atol=1e-6)
    flat = [i for unit in (1, 3) for i in sites.structure.layer("fc1").units[unit].features.tolist()]
    assert flat == piece["adjust"].tolist()


def test_keeping_the_edges_gives_the_logits_of_the_released_code(golden, model, sites, x, graph):
    y = logits(model, weights(sites.structure, [graph], "keep edges"), x[:1])
    np.testing.assert_allclose(y[0], golden["c1_effect_yhat"], rtol=0, atol=1e-5)


# ---- statistics --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_corrections(seed):
    p = torch.tensor(np.random.RandomState(seed).rand(20) ** 3)
    p[3] = p[7]
    torch.testing.assert_close(adjusted(p, "bh"), torch.tensor(stats.false_discovery_control(p.numpy())))
    order, holm, highest = p.argsort(), torch.empty(20, dtype=torch.float64), 0.0
    for rank, i in enumerate(order.tolist()):
        highest = max(highest, min(1.0, (20 - rank) * p[i].item()))
        holm[i] = highest
    torch.testing.assert_close(adjusted(p, "holm"), holm)
    assert torch.equal(adjusted(p, "none"), p)
    assert (adjusted(p, "holm") >= adjusted(p, "bh")).all()


def test_a_correction_leaves_fewer_causes(sites, x, graph):
    for correction in ("holm", "bh"):
        found = find(sites, x, 1, Search(correction=correction, fallback=None)).layers["conv2"].causes
        assert set(chosen(found)) <= set(range(6))
    y = torch.tensor([[1.0, 2.0, 3.0], [0.9, 1.7, 2.5], [-9.0, -8.0, -9.5], [1.0, 2.1, 3.0]])
    reference = torch.tensor([1.0, 2.0, 3.0])
    plain, effect, p, how = select(y, reference, Search())
    assert plain.tolist() == [False, False, True, False]
    assert how == TESTED
    torch.testing.assert_close(effect[2].item(), -11 + 1 / 6)
    assert select(y, reference, Search(correction="holm"))[0].tolist() == plain.tolist()
    assert (select(y, reference, Search(correction="bh"))[2] >= p).all()


def test_the_fallback():
    y = torch.tensor([[1.0, 2.0, 3.0], [0.9, 1.9, 2.9], [1.5, 2.5, 3.5]])
    reference = torch.tensor([1.0, 2.0, 3.0])
    causes, _, _, how = select(y, reference, Search())
    assert (causes.tolist(), how) == ([False, True, False], FALLEN_BACK)
    # A negative logit that falls is a cause too: the relative change is taken of its size.
    causes, _, _, how = select(y - 10, reference - 10, Search())
    assert (causes.tolist(), how) == ([False, True, False], FALLEN_BACK)
    assert select(y, reference, Search(fallback=None))[3] == NONE_FOUND
    constant = torch.ones(2, 3)  # no spread at all
    assert select(constant - torch.tensor([[0.0], [1.0]]), torch.ones(3), Search())[0].tolist() == [False, True]


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float64, 1e-15), (torch.float32, 1e-7)])
def test_rounding_makes_no_cause(dtype, rounding):
    """The logit of samples that are alike has no spread, and of a dead neuron the intervention changes nothing."""
    reference = torch.tensor([3.0, 3.0], dtype=dtype)
    y = torch.tensor([[3 - rounding * 3, 3.0], [3 - 0.1, 3 - 0.1], [3.0, 3.0]], dtype=dtype)
    assert y[0, 0] < 3
    causes, _, p, how = select(y, reference, Search())
    assert (causes.tolist(), p.tolist(), how) == ([False, True, False], [0.5, 0.0, 0.5], TESTED)
    # Nor does a logit that is 0 and stays 0.
    y, reference = torch.tensor([[0.0, 0.9]] * 2, dtype=dtype), torch.tensor([0.0, 1.0], dtype=dtype)
    assert select(y, reference, Search())[3] == FALLEN_BACK


def test_soft_weights_come_from_streams_of_their_own():
    search = Search(soft=True, beta=0.3)
    values = [search.u(target, path) for target in (0, 1) for path in ("a", "b")]
    assert len(set(values)) == 4
    assert all(0.3 <= u < 0.31 for u in values)
    assert search.u(1, "b") == values[3]
    assert Search(soft=True, beta=0.3, seed=1).u(1, "b") != values[3]
    assert Search(beta=0.3).u(1, "b") == 0.0


# ---- how it is computed changes nothing --------------------------------------------------------------


def test_rows_do_not_matter_and_no_weight_changes(golden, model, x, graph):
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    for rows in (7, 33):
        other = Classifier(model.module, rows=rows)
        found = find(Sites(other, Structure.of(other, x)), x, 1, Search())
        for path, layer in graph.layers.items():
            assert torch.equal(layer.causes, found.layers[path].causes)
            torch.testing.assert_close(layer.effect, found.layers[path].effect, rtol=0, atol=1e-5, equal_nan=True)
    assert all(torch.equal(value, before[name]) for name, value in model.module.state_dict().items())
    assert not any(m._forward_hooks for m in model.module.modules())


def test_the_screening_keeps_the_strongest(model, sites, x, graph):
    site, effects = sites.at("fc3", x), torch.tensor([1])
    # Behind fc3 there is nothing: to first order is exact.
    torch.testing.assert_close(
        estimate(model, site, effects, 1).double(), graph.layers["fc3"].effect, rtol=1e-4, atol=1e-5
    )
    few = find(sites, x, 1, Search(candidates=5)).layers["fc3"]
    assert int(torch.isfinite(few.p).sum()) == 5
    assert chosen(torch.isfinite(few.p)) == sorted(graph.layers["fc3"].effect.argsort()[:5].tolist())
    for path in ("fc1", "conv2"):
        found = graph.layers[path]
        rough = estimate(model, sites.at(path, x), found.effects.nonzero()[:, 0], 1).numpy()
        assert np.corrcoef(rough, found.effect)[0, 1] > 0.8


# ---- states and files --------------------------------------------------------------------------------


def test_a_state_is_the_graphs(sites, x, graph):
    other = find(sites, x, 7, Search())
    read = from_state(sites.structure, to_state({1: graph, 7: other}))
    for target, expected in ((1, graph), (7, other)):
        assert read[target].target == target
        assert read[target].reference == expected.reference
        assert list(read[target].layers) == list(expected.layers)
        for path, layer in expected.layers.items():
            mine = read[target].layers[path]
            assert (mine.how, mine.u) == (layer.how, layer.u)
            for part in ("effects", "causes", "effect", "p"):
                torch.testing.assert_close(getattr(mine, part), getattr(layer, part), equal_nan=True)
    with pytest.raises(UserError, match="not of this net"):
        from_state(sites.structure, {"classes": torch.tensor([1])})


def test_json_is_what_networkx_reads(sites, graph):
    document = json.loads(json.dumps(to_json(sites.structure, graph, {1: "Trouser"}), allow_nan=False))
    assert document["graph"]["name"] == "Trouser"
    assert [layer["how"] for layer in document["graph"]["layers"]] == [
        "z test", "fallback", "z test", "z test", "reads the input",
    ]  # fmt: skip
    assert len(document["edges"]) == 1 + 1 + 28 + 3 * 28 + 2 * 3 + 2
    networkx = pytest.importorskip("networkx")
    read = networkx.node_link_graph(document, edges="edges")
    assert networkx.is_directed_acyclic_graph(read)
    assert set(read.predecessors("output/1")) == {"fc3/1"}
    assert set(read.predecessors("fc1/12")) == {f"conv2/{i}" for i in (12, 13, 14)}
    assert networkx.ancestors(read, "output/1") == set(read.nodes) - {"output/1"}
    assert list(read["conv2/12"]["fc1/12"]) == [12]
    effect = read.edges["conv2/12", "fc1/12", 12]["effect"]
    assert effect == pytest.approx(graph.layers["fc1"].effect[12].item())


class Dense(nn.Module):
    """The last layer reads the channels of ``first`` by themselves, and each in a sum with one of ``second``."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        return self.last(torch.cat((x, (x + self.second(x)).relu()), 1))


def test_json_keeps_all_edges_between_two_neurons():
    """One for each cause that they are part of, with its own effect; as a DiGraph networkx took the last of them."""
    x = torch.tensor(np.random.RandomState(0).randn(6, 3)).float()
    sites = Sites(model := Classifier(seeded(Dense())), Structure.of(model, x))
    graph = find(sites, x, 1, Search(z=-1e9))  # all that is tested is a cause
    networkx = pytest.importorskip("networkx")
    read = networkx.node_link_graph(to_json(sites.structure, graph), edges="edges")
    assert read.number_of_edges() == len(list(connections(sites.structure, graph)))
    for channel in range(4):
        both = read[f"first/{channel}"]["last/1"]
        assert list(both) == [channel, 4 + channel]
        effects = [both[unit]["effect"] for unit in both]
        assert effects == graph.layers["last"].effect[[channel, 4 + channel]].tolist()
        assert effects[0] != effects[1]


def test_pictures(sites, x, graph):
    figure = draw(sites.structure, graph, "Trouser")
    assert "class 1 (Trouser)" in figure.axes[0].get_title()
    (lines,) = figure.axes[0].collections[:1]
    assert len(lines.get_segments()) == len(list(connections(sites.structure, graph)))
    empty = find(sites, x, 1, Search(z=1e6, fallback=None))
    draw(sites.structure, empty)
    frame = soft(sites, x, 1, Search(), [0.0, 0.3], repeats=2)
    assert [axes.get_title() for axes in draw_stability(frame).axes] == ["nodes", "edges"]


# ---- stability ---------------------------------------------------------------------------------------


def test_jaccard():
    assert jaccard(frozenset("ab"), frozenset("bc")) == pytest.approx(1 / 3)
    assert jaccard(frozenset("ab"), frozenset("ab")) == 1
    assert math.isnan(jaccard(frozenset(), frozenset()))


def test_stability(sites, x, graph):
    frame = soft(sites, x, 1, Search(), [0.0, 0.5], repeats=3)
    top = frame[frame["layer"] == "fc3"].set_index("beta")
    assert top.loc[0.0, "nodes_reference"] > 0  # u < 0.01 is almost 0
    assert top.loc[0.5, "nodes_reference"] == 0  # nothing lowers the logit any more
    assert math.isnan(top.loc[0.5, "nodes"])
    shares = frame[["nodes", "edges", "nodes_reference", "edges_reference"]].to_numpy()
    assert ((shares >= 0) & (shares <= 1) | np.isnan(shares)).all()
    again = bootstrap(sites, x, 1, Search(layers=1), repeats=3)
    assert again["layer"].tolist() == ["fc3"]
    assert again.equals(bootstrap(sites, x, 1, Search(layers=1), repeats=3))
    same = bootstrap(sites, x[:1].repeat(4, 1, 1, 1), 1, Search(layers=1), repeats=3)  # nothing to choose among
    assert same["nodes"].tolist() == same["edges_reference"].tolist() == [1.0]


# ---- the fit -----------------------------------------------------------------------------------------


def samples(x: torch.Tensor, targets: list[int]) -> FitSamples:
    return FitSamples(Batch(tuple(f"s{i}" for i in range(len(x))), x, torch.tensor(targets)), 3)


def test_the_fit_takes_correct_samples_of_each_class(model, x, graph):
    given = samples(torch.cat((x, x.flip(0))), [1] * 10 + [7] * 10)
    assert CausalGraphs().choose(model, given, print) == {1: [f"s{i}" for i in range(10)]}
    assert list(CausalGraphs(correct=False).choose(model, given, print)) == [1, 7]
    assert CausalGraphs(samples=4).choose(model, given, print)[1] == ["s0", "s1", "s2", "s3"]
    state = CausalGraphs().run(model, given, PartialInMemory(), lambda line: None)
    assert torch.equal(state["fc2.causes"][0].bool(), graph.layers["fc2"].causes)
    assert state["samples"].tolist() == [10]


def test_each_search_has_its_own_key():
    keys_ = {keys.digest(CausalGraphs(search=s)) for s in (Search(), Search(soft=True), Search(correction="bh"))}
    assert len(keys_ | {keys.digest(CausalGraphs(samples=9)), keys.digest(CausalGraphs(classes=(1,)))}) == 5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Search(correction="fdr"), "must be one of none, holm, bh"),
        (lambda: Search(candidates=0), "candidates is 0"),
        (lambda: CausalGraphs(samples=1), "must be at least 2"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_bad_input(model, sites, x):
    with pytest.raises(UserError, match="at least 2 samples, there is 1"):
        find(sites, x[:1], 1, Search())
    with pytest.raises(UserError, match="class 10 does not exist: the net has 10 classes"):
        find(sites, x, 10, Search())
    with pytest.raises(UserError, match=r"'fc9' is no convolution or linear layer of LeNet; these are: conv1, conv2"):
        find(sites, x, 1, Search(layers=("fc9",)))
    with pytest.raises(UserError, match="nor the logits, read conv2, so that no path leads to it"):
        find(sites, x, 1, Search(layers=("conv2", "fc3")))
    with pytest.raises(UserError, match="layers is 0"):
        find(sites, x, 1, Search(layers=0))
    with pytest.raises(UserError, match="class 3 has 0 correctly classified samples"):
        CausalGraphs(classes=(1, 3)).choose(model, samples(x, [1] * 10), print)
    with pytest.raises(UserError, match="no class has two samples"):
        CausalGraphs().choose(model, samples(x, [7] * 10), print)
    labels = Batch(("a", "b"), x[:2], torch.ones(2, 10))
    with pytest.raises(SampleError, match="one class each"):
        CausalGraphs().choose(model, FitSamples(labels, 2), print)


def test_only_the_classes_that_are_explained_are_searched(model, x, tmp_path, monkeypatch):
    """Others are added to the state later, and are those of a search for all."""
    searched = []

    def noted(sites, x, target, search):
        searched.append(target)
        return find(sites, x, target, search)

    monkeypatch.setattr("attrib.causal.graph.find", noted)
    fit = CausalGraphs(correct=False, samples=4)
    given = samples(torch.cat((x, x.flip(0))), [1] * 6 + [7] * 7 + [5] * 6 + [3])
    given.skipped = {}

    def state(asked, root=tmp_path / "some"):
        searched.clear()
        return load_state(root, "k" * 64, fit, model, given, asked=asked)

    assert state(frozenset({7}))["classes"].tolist() == searched == [7]
    assert state(frozenset({7}))["classes"].tolist() == [7]
    assert searched == []
    both = state(frozenset({7, 5}))
    assert (both["classes"].tolist(), searched) == ([7, 5], [5])
    again = state(frozenset({3, 7}))  # 3 has one sample only, which is remembered
    assert (again["classes"].tolist(), again["sought"].tolist()) == ([7, 5], [3, 5, 7])
    everything = state(None)
    assert (sorted(everything["classes"].tolist()), searched, "sought" in everything) == ([1, 5, 7], [1], False)
    whole = state(None, tmp_path / "all")
    order = everything["classes"].argsort()
    assert whole.keys() == everything.keys()
    for name, value in whole.items():
        torch.testing.assert_close(everything[name][order], value, rtol=0, atol=0, equal_nan=True)
    with pytest.raises(UserError, match="none of the classes that are explained has two samples"):
        state(frozenset({3}), tmp_path / "none")
