"""The graph of a net: the same logits, for any number of rows, whatever the net is made of."""

import copy

import captures
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

import attrib
from attrib.methods.baselines import DeepLiftShap, GuidedBackprop
from attrib.methods.cd import CD
from attrib.methods.lrp import LRP
from attrib.models import BiLSTM, Classifier, DeepLSTM, HuggingFaceClassifier
from attrib.models.attention import scaled_dot_product_attention
from attrib.models.calls import call, operation
from attrib.models.capture import captured
from attrib.models.capture_older import OLDER
from attrib.models.graph import Graph, taken_apart
from attrib.models.randomise import randomised
from attrib.models.variant import Randomise
from attrib.noise import Noise
from attrib.types import Batch, UserError
from attrib.units import Partition


class Net(nn.Module):
    """``function`` between a convolution and a linear layer."""

    def __init__(self, function):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.function, self.fc = nn.Conv2d(3, 4, 3, padding=1), function, nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(self.function(self.conv(x)).mean((2, 3)))


def pictures(n=2, dtype=torch.float64):
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=dtype)


def model_of(net, **options):
    return Classifier(net, dtype=torch.float64, **options)


def names(graph):
    return [operation(node) for node in graph.nodes if operation(node)]


def written_through_a_view(z):
    z = z.clone()
    z[:, :2].relu_()
    z.transpose(1, 2)[:, 0].mul_(2)
    return z


@pytest.mark.parametrize("kind", ["convolutions", "lstm", "transformer"])
def test_the_direct_captures_of_the_tests_are_those_of_torch(kind, monkeypatch):
    x = pictures(dtype=torch.float32)
    ids = torch.randint(2, 20, (3, 7), generator=torch.Generator().manual_seed(0))
    net, x = {
        "convolutions": (Net(nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout())), x),
        "lstm": (BiLSTM(30, 4, 5, 2), ids),
        "transformer": (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), x[:, 0]),
    }[kind]
    direct = captured(net.eval(), x)
    for name, function in captures.TORCHS.items():
        monkeypatch.setattr(captures.PLACE, name, function)
    assert direct.code == captured(net, x).code


@pytest.mark.parametrize(
    "function",
    [
        nn.ReLU(inplace=True),
        written_through_a_view,
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
        lambda z: z.reshape(z.shape[0] * 4, 1, 8, 8).tanh().view(-1, 4, 8, 8),
        lambda z: torch.cat([z[i : i + 1] for i in (0,)] * 1) * 0 + z,
        lambda z: nn.functional.lp_pool2d(z.abs(), 2.0, 2),
        lambda z: torch.einsum("nchw,nchv->nchwv", z, z).sum(-1),
    ],
)
def test_the_graph_gives_the_logits_for_any_number_of_rows(function):
    x = pictures(4)
    model = model_of(Net(function))
    graph = model.graph(x[:2])
    for rows in (1, 2, 4):
        torch.testing.assert_close(graph(x[:rows].clone()), model.logits(x[:rows]))
    assert graph.any_rows
    assert not any(name.endswith("_") for name in names(graph))


def test_one_capture_for_all_batches(monkeypatch):
    captures = []
    of = Graph.of
    monkeypatch.setattr(Graph, "of", lambda *given: captures.append(1) or of(*given))
    model = model_of(Net(nn.ReLU()))
    graphs = {id(model.graph(pictures(n))) for n in (1, 2, 5, 3)}
    assert len(graphs) == len(captures) == 1


def test_several_methods_and_a_randomised_copy_share_one_capture(monkeypatch):
    captures = []
    of = Graph.of
    monkeypatch.setattr(Graph, "of", lambda *given: captures.append(1) or of(*given))
    net, x = Net(nn.ReLU()), pictures(3)
    methods = [LRP(composite="epsilon"), GuidedBackprop(), DeepLiftShap(samples=1), CD(units=Partition(side=4))]
    named = {type(method).__name__: method for method in methods}
    run = {"dtype": "float64", "batch": 2, "device": "cpu"}
    compared = attrib.compare(net, x, named, "insertion_deletion", target=0, run=run)
    assert len(captures) == 1
    (model,) = {id(found.cell.model): found.cell.model for found in compared.explanations.values()}.values()
    copied = randomised(model, copy.deepcopy(net), Randomise("all"), x[:1])
    for method in methods:
        batch = Batch(("a", "b"), x[:2], torch.tensor([0, 1]))
        method.attribute(copied, batch, {}, Noise(batch.uids, dtype=torch.float64))
    assert len(captures) == 1
    assert copied.graph(x) is not model.graph(x)


def test_another_size_of_pictures_is_another_graph():
    model = model_of(Net(nn.ReLU()))
    assert model.graph(pictures()) is not model.graph(torch.zeros(2, 3, 10, 8, dtype=torch.float64))


@pytest.mark.parametrize("net", [BiLSTM(20, 6, 5, 3), DeepLSTM(20, 6, 5, 3)])
def test_texts_of_all_lengths_share_a_graph(net):
    x = torch.randint(2, 20, (3, 7), generator=torch.Generator().manual_seed(0))
    x[1, 4:] = 1
    model = model_of(net, layers={"embedding": "embedding"})
    graph = model.graph(x)
    shorter = x[:, :5].contiguous()
    assert model.graph(shorter) is graph
    torch.testing.assert_close(graph(shorter), model.logits(shorter))
    weight = graph.net.get_parameter("embedding.weight").requires_grad_()
    (got,) = torch.autograd.grad(graph(x)[:, 0].sum(), weight)
    (expected,) = torch.autograd.grad(model.module(x)[:, 0].sum(), weight)
    torch.testing.assert_close(got, expected)


def test_a_net_that_loops_over_the_steps_is_read_anew_for_another_length():
    class Loops(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.lstm, self.fc = nn.Embedding(20, 4), nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 3)

        def forward(self, x):
            return self.fc(self.lstm(self.embedding(x))[0][:, -1])

    model = model_of(Loops(), layers={"embedding": "embedding"})
    x = torch.randint(0, 20, (2, 6), generator=torch.Generator().manual_seed(0))
    graph = model.graph(x)
    assert "lstm" in names(graph)
    assert graph.any_rows
    assert model.graph(x[:, :4].contiguous()) is not graph


def test_what_depends_on_the_shape_alone_is_not_fed():
    graph = model_of(Net(lambda z: z + torch.arange(z.shape[2], dtype=z.dtype) + torch.ones_like(z))).graph(pictures())
    fed = {operation(node) for node in graph.nodes if node in graph.fed}
    assert {"conv2d", "add", "linear"} <= fed
    assert fed.isdisjoint({"arange", "ones_like", "sym_size"})


def test_a_call_says_which_module_makes_it():
    graph = model_of(Net(nn.Sequential(nn.ReLU(), nn.Tanh()))).graph(pictures())
    where = {operation(node): graph.where(node) for node in graph.nodes if operation(node)}
    assert where["tanh"] == "function.1 (Tanh)"
    assert where["mean"] == "its forward (Net)"


def test_a_net_whose_code_depends_on_values_is_refused():
    model = model_of(Net(lambda z: z.relu() if z.mean() < 100 else z))
    with pytest.raises(UserError, match=r"torch cannot export Net: .*integrated_gradients"):
        model.graph(pictures())


def test_a_net_that_picks_a_token_by_its_value_is_refused():
    """As an encoder-decoder of transformers does: what torch asserts of its sizes holds of some rows alone."""
    config = transformers.BartConfig(
        vocab_size=20, d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=8, decoder_ffn_dim=8, max_position_embeddings=16, num_labels=3,
    )  # fmt: skip
    torch.manual_seed(0)
    net = HuggingFaceClassifier(transformers.BartForSequenceClassification(config).eval(), 1, 3)
    ids = torch.tensor([[0, 4, 5, 6, 2], [0, 7, 8, 9, 2]])
    says = "cannot export" if OLDER else "is not good for all inputs: .* looks for a token .*Runtime assertion"
    # Those that need the gradient alone are refused as well (``every_word``), so that nobody is sent to them.
    instead = r"reads its words by net\.model\.encoder\.embed_tokens and net\.model\.decoder\.embed_tokens: give a net"
    with pytest.raises(UserError, match=f"{says}.*{instead}"):
        Classifier(net).graph(ids)
    with pytest.raises(UserError, match=says) as refused:
        Classifier(net).graph(ids[:, :2])  # two tokens have no other order
    assert refused.value.args[0].endswith("integrated_gradients")


def test_a_net_that_computes_something_else_than_its_graph_is_refused():
    class Shifted(nn.Module):
        shift = 0.0

        def forward(self, z):
            return z.relu() + self.shift

    model = model_of(Net(Shifted()))
    model.graph(pictures())
    model.module.function.shift = 1.0
    with pytest.raises(UserError, match="gives other logits than Net itself by"):
        model._graphs.check(model.graph(pictures()), pictures())


@pytest.mark.parametrize("mask", [None, "bool", "float", "causal"])
@pytest.mark.parametrize("heads", [4, 2])
def test_attention_taken_apart_is_torchs(mask, heads):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 5, 3, generator=generator, dtype=torch.float64)
    key, value = torch.randn(2, 2, heads, 5, 3, generator=generator, dtype=torch.float64)
    options = {"scale": 0.3, "is_causal": mask == "causal"}
    given = None
    if mask in ("bool", "float"):
        given = torch.rand(5, 5, generator=generator) < 0.5
        given[2] = False  # attends to nothing
        if mask == "float":
            given = torch.zeros(5, 5, dtype=torch.float64).masked_fill(~given, -3.0)
    shared = [each.repeat_interleave(4 // heads, 1) for each in (key, value)]  # torch does so itself from 2.5 on
    expected = F.scaled_dot_product_attention(query, *shared, given, **options)
    if OLDER and mask == "bool":
        expected = expected.nan_to_num()  # of what attends to nothing
    found = scaled_dot_product_attention(query, key, value, given, **options, enable_gqa=heads != 4)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_recurrent_layer_is_taken_apart(kind):
    class Recurs(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = kind(6, 5, batch_first=True, bidirectional=True)

        def forward(self, x):
            return self.layer(x)[0][:, -1]

    torch.manual_seed(0)
    net = Recurs().double().eval()
    x = torch.randn(3, 4, 6, dtype=torch.float64)
    seen = set()

    def rule(node, args, kwargs):
        if operation(node) in ("lstm", "gru", "rnn_tanh"):
            return taken_apart(node, args, kwargs, rule, lambda v: v if isinstance(v, torch.Tensor) else None)
        seen.add(operation(node))
        return call(node)(*args, **kwargs)

    torch.testing.assert_close(Graph.of(net, x).propagate(x, rule), net(x))
    assert "tanh" in seen
    assert not any(name.endswith("_") for name in seen)


def test_the_graph_of_a_copy_reads_the_copys_weights():
    net, x = Net(lambda z: z + torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)[:, None, None]), pictures()
    graph = model_of(net).graph(x)
    other = Net(net.function).double().eval()
    torch.nn.init.normal_(other.fc.weight)
    torch.testing.assert_close(graph.of_copy(other)(x), other(x))
    assert not torch.allclose(graph(x), other(x))
