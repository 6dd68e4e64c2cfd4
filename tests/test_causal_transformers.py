"""Heads and neurons of transformers as causes: every effect against the original net with its edges set by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from contracts import FitSamples, PartialInMemory, method_contract, seeded
from scipy.special import softmax
from test_exam import TEXTS, Convolved, Last, Texts, text_model
from torch import Tensor, nn

from attrib.causal import CausalGraphs, Search, Sites, Structure, find, from_state, intervene, to_state
from attrib.causal.graph import FIRST, ClassGraph
from attrib.causal.subnetwork import logits, weights
from attrib.methods.causal import CausalGradient, CausalPaths
from attrib.models import Classifier
from attrib.models.huggingface import HuggingFaceClassifier
from attrib.noise import Noise
from attrib.types import Batch, UserError

transformers, timm = pytest.importorskip("transformers"), pytest.importorskip("timm")
TINY = {"vocab_size": 30, "num_labels": 3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
WIDE = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
KINDS = {
    "Bert": WIDE,
    "DistilBert": {"dim": 8, "n_layers": 2, "n_heads": 2, "hidden_dim": 12},
    "GPT2": {"n_embd": 8, "n_layer": 2, "n_head": 2, "n_inner": 12},
    "Llama": {**WIDE, "num_key_value_heads": 1},
}
SMALL = {"img_size": 16, "embed_dim": 8, "num_classes": 3}
BLOCKS = {**SMALL, "patch_size": 4, "depth": 2, "num_heads": 2, "mlp_ratio": 1.5}
PICTURES = {
    "vit_tiny_patch16_224": BLOCKS,
    "deit_tiny_distilled_patch16_224": BLOCKS,
    "swin_tiny_patch4_window7_224": {**SMALL, "patch_size": 2, "depths": (2, 1), "num_heads": (2, 4), "window_size": 4},
}
# The output projection of the last attention, its heads, and the second layer of the last MLP with its neurons.
PLACES = {
    "Bert": ("net.bert.encoder.layer.1.attention.output.dense", 2, "net.bert.encoder.layer.1.output.dense", 12),
    "DistilBert": (
        "net.distilbert.transformer.layer.1.attention.out_lin", 2, "net.distilbert.transformer.layer.1.ffn.lin2", 12,
    ),
    "GPT2": ("net.transformer.h.1.attn.c_proj", 2, "net.transformer.h.1.mlp.c_proj", 12),
    "Llama": ("net.model.layers.1.self_attn.o_proj", 2, "net.model.layers.1.mlp.down_proj", 12),
    "vit_tiny_patch16_224": ("blocks.1.attn.proj", 2, "blocks.1.mlp.fc2", 12),
    "deit_tiny_distilled_patch16_224": ("blocks.1.attn.proj", 2, "blocks.1.mlp.fc2", 12),
    "swin_tiny_patch4_window7_224": ("layers.0.blocks.1.attn.proj", 2, "layers.0.blocks.1.mlp.fc2", 32),
}  # fmt: skip
EMBEDDING = {
    "Bert": "net.bert.embeddings", "DistilBert": "net.distilbert.embeddings", "GPT2": "net.transformer.wte",
    "Llama": "net.model.embed_tokens",
}  # fmt: skip
NETS = [*KINDS, *PICTURES]


def prepared(name: str, rows: int = 64, dtype: torch.dtype = torch.float64) -> tuple[Classifier, Tensor]:
    """With texts of different lengths, and a class that no single head decides."""
    if name in KINDS:
        config = getattr(transformers, f"{name}Config")(**TINY, **KINDS[name])
        net: nn.Module = HuggingFaceClassifier(
            getattr(transformers, f"{name}ForSequenceClassification")(config), pad_id=0, mask_id=1
        )
        x = torch.randint(2, 30, (4, 7), generator=torch.Generator().manual_seed(0))
        x[1, 5:] = x[2, 3:] = 0
    else:
        net = timm.create_model(name, **PICTURES[name])
        x = Noise(["x"], dtype=torch.float64).normal(4, 3, 16, 16)[0]
    layers = {"bottleneck": PLACES[name][2]} | ({"embedding": EMBEDDING[name]} if name in KINDS else {})
    return Classifier(seeded(net.eval()), layers, rows=rows, dtype=dtype), x


# Of texts and of pictures one each; the graphs of the others take ten times as long.
QUICK = ("GPT2", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224")


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in NETS],
)
def case(request) -> tuple[str, Classifier, Tensor, Structure]:
    model, x = prepared(request.param)
    return request.param, model, x, Structure.of(model, x)


def by_hand(net: nn.Module, path: str, features: Tensor, effects: Tensor, u: float, x: Tensor) -> Tensor:
    """(n, K) one by one, with the weights of a copy set."""
    changed = copy.deepcopy(net)
    module = changed.get_submodule(path)
    weight = module.weight.data.T if type(module).__name__ == "Conv1D" else module.weight.data
    weight[effects[:, None], features] = u
    with torch.no_grad():
        return torch.cat([changed(row[None]) for row in x])


@pytest.mark.parametrize("u", [0.0, 0.3])
@pytest.mark.quick("vit*-0.3", "GPT2-0.3")
def test_effects_of_heads_and_neurons(case, u):
    name, model, x, structure = case
    head, heads, neuron, neurons = PLACES[name]
    sites = Sites(model, structure)
    for path, count in ((head, heads), (neuron, neurons)):
        site, outputs = sites.at(path, x), structure.outputs(path)
        assert len(site.layer.units) == count
        assert not site.layer.refused
        effects, some = torch.arange(outputs)[::2], [0, count - 1]
        for target in range(2):
            found = intervene(model, site, some, effects, target, u)
            for row, unit in zip(found, some, strict=True):
                expected = by_hand(model.module, path, site.layer.units[unit].features, effects, u, x)[:, target]
                torch.testing.assert_close(row, expected, rtol=0, atol=1e-10)
                assert (expected - model.logits(x)[:, target]).abs().max() > 1e-8, (path, unit)


def test_a_head_is_a_slice_that_comes_from_its_queries_keys_and_values(case):
    name, _, _, structure = case
    path, _, neuron, _ = PLACES[name]
    for number, unit in enumerate(structure.layer(path).units):
        size = len(unit.features)
        assert unit.features.tolist() == list(range(number * size, (number + 1) * size))
        kinds = {source.rpartition(".")[2] for source, _ in unit.origin}
        assert kinds in (
            {"query", "key", "value"}, {"q_lin", "k_lin", "v_lin"}, {"c_attn"}, {"q_proj", "k_proj", "v_proj"}, {"qkv"},
        )  # fmt: skip
    above = {source for unit in structure.layer(neuron).units for source, _ in unit.origin}
    assert len(above) == (2 if name == "Llama" else 1)  # its MLP has a gate


def test_the_residual_stream_keeps_channels_apart(case):
    name, _, _, structure = case
    reads = {"Llama": "net.model.layers.1.mlp.up_proj", "GPT2": "net.transformer.h.1.mlp.c_fc"}.get(name)
    reads = reads or PLACES[name][2].replace("fc2", "fc1").replace("lin2", "lin1").replace(".output.", ".intermediate.")
    units = structure.layer(reads).units
    assert all(unit.features.tolist() == [j] for j, unit in enumerate(units))
    assert all({channel for _, channel in unit.origin} == {j} for j, unit in enumerate(units))
    assert PLACES[name][0] in structure.layer(reads).sources


def test_whole_graphs(case):
    _, model, x, structure = case
    graph = find(Sites(model, structure), x, 1, Search(z=-100.0, candidates=3))
    assert list(graph.layers) == list(reversed(structure.paths))
    assert any(found.how == FIRST for found in graph.layers.values())
    full = {
        path: found._replace(effects=torch.ones_like(found.effects), causes=torch.ones_like(found.causes), how=1)
        for path, found in graph.layers.items()
    }
    kept = logits(model, weights(structure, [graph._replace(layers=full)], "keep edges"), x)
    torch.testing.assert_close(kept, model.logits(x), rtol=0, atol=1e-10)
    again = find(Sites(model, structure), x, 1, Search(z=0.1, layers=3))
    model.rows = 3
    few = find(Sites(model, structure), x, 1, Search(z=0.1, layers=3))
    model.rows = 64
    for path, found in again.layers.items():
        torch.testing.assert_close(few.layers[path].effect, found.effect, rtol=0, atol=1e-10, equal_nan=True)


def test_one_head_is_no_candidate_among_others_but_a_softmax_over_channels_is_refused():
    class Weighed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.hidden, self.head = nn.Conv2d(3, 4, 4, stride=4), nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.hidden(self.stem(x).mean((2, 3)).softmax(1)).relu())

    model = Classifier(seeded(Weighed()), dtype=torch.float64)
    x = Noise(["x"], dtype=torch.float64).normal(4, 3, 8, 8)[0]
    with pytest.raises(UserError, match=r"softmax of its forward \(Weighed\), on the way to hidden"):
        find(Sites(model, Structure.of(model, x)), x, 1, Search(z=0.0))


# ---- maps ----------------------------------------------------------------------------------------------


def batch_of(x: Tensor, target: int = 1) -> Batch:
    """The class for all; token 0 is padding."""
    uids, targets = tuple(map(str, range(len(x)))), torch.full((len(x),), target)
    if x.is_floating_point():
        return Batch(uids, x, targets)
    real = x != 0
    return Batch(uids, x, targets, lengths=real.sum(1), words=torch.arange(x.shape[1]).where(real, -1))


def everything(graph: ClassGraph) -> ClassGraph:
    """With all edges."""
    layers = {
        path: found._replace(effects=torch.ones_like(found.effects), causes=torch.ones_like(found.causes), how=1)
        for path, found in graph.layers.items()
    }
    return graph._replace(layers=layers)


def test_along_all_edges_the_map_is_the_gradient_times_the_input(case):
    """Of every text alone, and with the net's own gradient."""
    name, model, x, structure = case
    if name not in KINDS:
        return
    graph = find(Sites(model, structure), x, 1, Search(z=-100.0, candidates=2, layers=4))
    batch, state = batch_of(x), to_state({1: everything(graph)})
    found = CausalGradient().attribute(model, batch, state, Noise(batch.uids))["map"]
    some = CausalGradient().attribute(model, batch, to_state({1: graph}), Noise(batch.uids))["map"]
    assert (some - found).abs().max() > 1e-6
    assert not found[~batch.mask].any()
    for row, mine, own in zip(x, found, batch.mask, strict=True):
        kept: list[Tensor] = []

        def hook(_module: nn.Module, _inputs: object, z: Tensor, kept: list[Tensor] = kept) -> Tensor:
            kept.append(z.detach().requires_grad_())
            return kept[0]

        with torch.enable_grad():
            handle = model.module.get_submodule(EMBEDDING[name]).register_forward_hook(hook)
            logit = model.module(row[own][None])[0, 1]
            handle.remove()
            (grad,) = torch.autograd.grad(logit, kept[0])
        torch.testing.assert_close(mine[own], (grad * kept[0]).sum(2)[0].detach(), rtol=1e-9, atol=1e-12)


def test_the_map_of_a_layer_is_the_response_of_its_nodes(case):
    """The last MLP's neurons, token by token; of an image without its class tokens."""
    name, model, x, structure = case
    path = PLACES[name][2]
    graph = find(Sites(model, structure), x, 1, Search(z=-100.0, candidates=3, layers=4))
    found, batch = graph.layers.get(path), batch_of(x)
    if found is None:  # Swin's is too far from the logits
        assert name.startswith("swin")
        return
    read: list[Tensor] = []
    handle = model.module.get_submodule(path).register_forward_pre_hook(lambda _, given: read.append(given[0]))
    model.module(x)
    handle.remove()
    maps = CausalPaths(nodes=1).attribute(model, batch, to_state({1: graph}), Noise(batch.uids))
    module = model.module.get_submodule(path)
    weight = (module.weight.T if type(module).__name__ == "Conv1D" else module.weight).numpy()
    effects, causes = (mask.nonzero()[:, 0].tolist() for mask in (found.effects, found.causes))
    for i, one in enumerate(read[0].reshape(len(x), -1, read[0].shape[-1]).numpy()):
        one = one[: batch.lengths[i]] if name in KINDS else one[-16:]
        nodes = [sum(softmax(one[:, c] * weight[e, c]) for c in causes) / len(causes) for e in effects]
        mean = torch.tensor(sum(nodes) / len(nodes))
        if name in KINDS:
            torch.testing.assert_close(maps["map"][i, : len(one)], mean)
            assert not maps["map"][i, len(one) :].any()
        else:
            torch.testing.assert_close(maps["places"][i], mean.reshape(4, 4))


@pytest.mark.slow
@pytest.mark.parametrize("method", [CausalGradient, CausalPaths])
@pytest.mark.parametrize("name", ["Bert", "GPT2"])
def test_contract_of_texts(name, method):
    model, x = prepared(name)
    fit = CausalGraphs(samples=4, correct=False, search=Search(z=0.1, layers=3))
    state = fit.run(model, FitSamples(batch_of(x), 2), PartialInMemory(), lambda line: None)
    method_contract(method(graph=fit), lambda rows, dtype: prepared(name, rows, dtype)[0], batch_of(x), state)


# ---- padding -------------------------------------------------------------------------------------------


def test_padding_does_not_change_a_graph(case):
    name, model, x, structure = case
    if name not in KINDS:
        return
    search = Search(z=0.1, layers=3, candidates=4)
    graphs = [find(Sites(model, structure), ids, 1, search) for ids in (x, torch.nn.functional.pad(x, (0, 3)))]
    for path, found in graphs[0].layers.items():
        assert torch.equal(found.causes, graphs[1].layers[path].causes)
        torch.testing.assert_close(found.effect, graphs[1].layers[path].effect, rtol=0, atol=1e-10, equal_nan=True)


@pytest.mark.parametrize("kind", [pytest.param(Last, marks=pytest.mark.slow), Convolved])
def test_a_net_that_sees_padding_is_searched_with_texts_of_one_length_at_a_time(kind):
    net, model = text_model(kind)
    batch = Texts().batch(Texts.uids)
    model.examine(batch.x, batch.lengths)
    site = Sites(model, Structure.of(model, batch.x))
    found = find(site, batch.x, 1, Search(z=-100.0, candidates=4)).layers["head"]
    assert found.causes.sum() == 4
    for unit in found.causes.nonzero()[:, 0].tolist():
        cut = copy.deepcopy(net)
        cut.head.weight.data[1, unit] = 0
        falls = []
        for row in TEXTS:
            z = net.read(net.embedding(torch.tensor([row])), torch.ones(1, len(row), dtype=torch.bool))
            falls.append((cut.head(z) - net.head(z))[0, 1].item())
        assert found.effect[unit].item() == pytest.approx(sum(falls) / len(falls), abs=1e-12)


@pytest.mark.slow
def test_layers_that_see_no_tokens_have_no_map_of_a_text():
    model, x = prepared("Bert")
    batch, structure = batch_of(x), Structure.of(model, x)
    state = to_state({1: find(Sites(model, structure), x, 1, Search(z=-100.0, layers=2))})
    for path, message in (
        ("net.classifier", "net.classifier does not read a vector of each token"),
        ("net.bert.embeddings", "no convolution or linear layer produces the output of net.bert.embeddings"),
    ):
        model.roles.named["bottleneck"] = path
        with pytest.raises(UserError, match=message):
            CausalPaths().attribute(model, batch, state, Noise(batch.uids))
    model.roles.named["embedding"] = "net.bert.embeddings.word_embeddings"
    with pytest.raises(UserError, match=r"channels of each place cancel.* Set method.multiply=true, or take"):
        CausalGradient(multiply=False).attribute(model, batch, state, Noise(batch.uids))
    assert from_state(structure, state)[1].samples == len(x)
