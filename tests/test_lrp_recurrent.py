"""LRP through recurrent layers against Arras et al.'s formulas in loops, and through log_softmax."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from attrib.methods.lrp import LRP
from attrib.models import AcdLSTM, BiLSTM, Classifier, DeepLSTM
from attrib.models.graph import Graph
from attrib.relevance.composites import Composite
from attrib.relevance.plan import Plan, output_of
from attrib.relevance.propagation import Propagation
from attrib.types import Batch, UserError

T, E, H, K = 5, 4, 3, 3
LAYERS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}


class Sequences(nn.Module):
    """A recurrent layer over the rows of a picture (N, 1, T, E), of which the classes read all steps."""

    def __init__(self, kind: str, started: bool = False, **options) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = LAYERS[kind](E, H, **options)
        ways = 2 if self.layer.bidirectional else 1
        self.fc = nn.Linear(T * ways * (self.layer.proj_size or H), K, bias=False)
        self.start = nn.Parameter(torch.randn(ways * self.layer.num_layers, 1, H)) if started else None

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, 0] if self.layer.batch_first else x[:, 0].transpose(0, 1)
        state = None
        if self.start is not None:
            state = self.start.expand(-1, x.shape[0 if self.layer.batch_first else 1], -1).contiguous()
            state = (state, -state) if isinstance(self.layer, nn.LSTM) else state
        z = self.layer(x, state)[0]
        return self.fc((z if self.layer.batch_first else z.transpose(0, 1)).flatten(1))


def rows(n: int = 3) -> Batch:
    x = torch.randn(n, 1, T, E, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return Batch(tuple(map(str, range(n))), x, torch.arange(n) % K)


def chosen(target: Tensor):
    return lambda logits: torch.zeros_like(logits).scatter(1, target[:, None], logits.gather(1, target[:, None]))


def relevance(net: nn.Module, batch: Batch, composite: Composite | None = None, path: str = ""):
    graph = Classifier(net, dtype=torch.float64).graph(batch.x)
    plan = Plan(graph, output_of(graph, path) if path else graph.input)
    exact = composite or Composite.of("epsilon", epsilon=0.0)
    found = Propagation(plan, exact, 0.0).relevance(batch.x, chosen(batch.target))
    score = found.logits.gather(1, batch.target[:, None]).sum()
    missing = score - found.relevance.sum() - found.ledger.kept
    assert abs(float(missing)) < 1e-12 * max(float(found.ledger.size), float(score.abs()))
    return found


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9 * expected.abs().max().item())


# ---- by hand: one text, one layer, one direction, unit by unit -----------------------------------------


def shares(contributions: Tensor, bias: Tensor | float, r: Tensor) -> Tensor:
    """Summands (I,) of a unit and its bias -> the relevance of each summand."""
    return contributions / (contributions.sum() + bias) * r


def lstm_by_hand(layer: nn.LSTM, x: Tensor, r_out: Tensor) -> Tensor:
    """(T, E) and the relevance of every output (T, H) -> that of the input."""
    w, u, b = layer.weight_ih_l0, layer.weight_hh_l0, layer.bias_ih_l0 + layer.bias_hh_l0
    h, c, steps = [x.new_zeros(H)], [x.new_zeros(H)], []
    for t in range(len(x)):
        i, f, g, o = (w @ x[t] + u @ h[t] + b).chunk(4)
        i, f, o = i.sigmoid(), f.sigmoid(), o.sigmoid()
        steps.append((i, f, g.tanh()))
        c.append(f * c[t] + i * g.tanh())
        h.append(o * c[-1].tanh())
    r_x, r_h, r_c = torch.zeros_like(x), x.new_zeros(H), x.new_zeros(H)
    for t in reversed(range(len(x))):
        i, f, g = steps[t]
        r_c = r_c + r_out[t] + r_h  # of h = o tanh(c) the gate gets nothing
        r_h, r_before = x.new_zeros(H), x.new_zeros(H)
        for unit in range(H):
            old, new = shares(torch.stack((f[unit] * c[t][unit], i[unit] * g[unit])), 0.0, r_c[unit])
            r_before[unit] = old
            row = 2 * H + unit
            found = shares(torch.cat((w[row] * x[t], u[row] * h[t])), b[row], new)
            r_x[t] += found[:E]
            r_h += found[E:]
        r_c = r_before
    return r_x


def gru_by_hand(layer: nn.GRU, x: Tensor, r_out: Tensor) -> Tensor:
    w, u, b, d = layer.weight_ih_l0, layer.weight_hh_l0, layer.bias_ih_l0, layer.bias_hh_l0
    h, steps = [x.new_zeros(H)], []
    for t in range(len(x)):
        ours, back = (w @ x[t] + b).chunk(3), (u @ h[t] + d).chunk(3)
        reset, update = (ours[0] + back[0]).sigmoid(), (ours[1] + back[1]).sigmoid()
        n = (ours[2] + reset * back[2]).tanh()
        steps.append((reset, update, n))
        h.append((1 - update) * n + update * h[t])
    r_x, r_h = torch.zeros_like(x), x.new_zeros(H)
    for t in reversed(range(len(x))):
        reset, update, n = steps[t]
        r, r_h = r_h + r_out[t], x.new_zeros(H)
        for unit in range(H):
            terms = torch.stack(((1 - update[unit]) * n[unit], update[unit] * h[t][unit]))
            new, old = shares(terms, 0.0, r[unit])
            r_h[unit] += old
            row = 2 * H + unit
            found = shares(torch.cat((w[row] * x[t], reset[unit] * u[row] * h[t])), b[row] + reset[unit] * d[row], new)
            r_x[t] += found[:E]
            r_h += found[E:]
    return r_x


def rnn_by_hand(layer: nn.RNN, x: Tensor, r_out: Tensor) -> Tensor:
    w, u, b = layer.weight_ih_l0, layer.weight_hh_l0, layer.bias_ih_l0 + layer.bias_hh_l0
    h = [x.new_zeros(H)]
    for t in range(len(x)):
        h.append((w @ x[t] + u @ h[t] + b).tanh())
    r_x, r_h = torch.zeros_like(x), x.new_zeros(H)
    for t in reversed(range(len(x))):
        r, r_h = r_h + r_out[t], x.new_zeros(H)
        for unit in range(H):
            found = shares(torch.cat((w[unit] * x[t], u[unit] * h[t])), b[unit], r[unit])
            r_x[t] += found[:E]
            r_h += found[E:]
    return r_x


BY_HAND = {"lstm": lstm_by_hand, "gru": gru_by_hand, "rnn": rnn_by_hand}


@pytest.mark.parametrize("kind", BY_HAND)
def test_cells_are_the_papers(kind):
    net, batch = Sequences(kind, batch_first=True).double().eval(), rows()
    found = relevance(net, batch).relevance
    with torch.no_grad():
        for i, target in enumerate(batch.target.tolist()):
            out = net.layer(batch.x[i])[0][0]
            r_out = (out.flatten() * net.fc.weight[target]).view(T, H)
            same(found[i, 0], BY_HAND[kind](net.layer, batch.x[i, 0], r_out))


OPTIONS = {
    "plain": {},
    "both ways, two layers": {"bidirectional": True, "num_layers": 2},
    "no bias": {"bias": False},
    "states": {"started": True, "num_layers": 2},
    "projection": {"proj_size": 2, "bidirectional": True},
    "relu": {"nonlinearity": "relu"},
}


@pytest.mark.parametrize(
    ("options", "composite"),
    [
        pytest.param(
            options, composite, marks=[pytest.mark.slow] if composite != "epsilon" and options != "plain" else []
        )
        for options in OPTIONS
        for composite in ("epsilon", "epsilon_plus_flat")
    ],
)
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.quick("lstm-both ways*", "gru-states-*", "rnn-plain-*")
def test_nothing_is_lost(kind, options, composite):
    """``relevance`` checks it: states that the layer begins with, and biases, keep their share; time may come first."""
    if (options, kind) in (("projection", "gru"), ("projection", "rnn"), ("relu", "gru"), ("relu", "lstm")):
        pytest.skip("no such layer")
    net = Sequences(kind, batch_first=True, **OPTIONS[options]).double().eval()
    other = Sequences(kind, batch_first=False, **OPTIONS[options]).double().eval()
    found = relevance(net, rows(), Composite.of(composite)).relevance
    assert found.abs().max() > 0
    same(relevance(other, rows(), Composite.of(composite)).relevance, found)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_an_own_line_reaches_the_layers_inside(kind):
    """z+ in the cell: a number that adds to no unit gets nothing."""
    net = Sequences(kind, batch_first=True).double().eval()
    own = Composite.of("epsilon", [{"operation": kind, "rule": "zplus"}], epsilon=0.0)
    found, plain = relevance(net, rows(), own).relevance, relevance(net, rows()).relevance
    w = net.layer.weight_ih_l0[2 * H : 3 * H]
    against = (rows().x[:, 0, :, :, None] * w.T).amax(-1) <= 0
    assert against.any()
    assert not found[:, 0][against].any()
    assert plain[:, 0][against].any()


# ---- padded texts --------------------------------------------------------------------------------------


def texts() -> Batch:
    lengths = torch.tensor([6, 3, 1, 5])
    x = torch.randint(2, 12, (4, 7), generator=torch.Generator().manual_seed(2))
    real = torch.arange(7) < lengths[:, None]
    words = torch.where(real, torch.arange(7), -1)
    return Batch(tuple("abcd"), x.masked_fill(~real, 1), torch.tensor([0, 1, 0, 1]), lengths=lengths, words=words)


SIZES = dict(vocab_size=12, embedding_dim=E, hidden_dim=H, pad_id=1)
NETS = {
    "deep": lambda: DeepLSTM(**SIZES, mask_id=0, num_classes=2),
    "both ways": lambda: BiLSTM(**SIZES, n_layers=2, mask_id=0, num_classes=2),
    "mean": lambda: BiLSTM(**SIZES, pooling="mean", mask_id=0, num_classes=2),
}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.quick("mean")
def test_padding_changes_nothing(name):
    torch.manual_seed(1)
    net, batch = NETS[name]().double().eval(), texts()
    found = relevance(net, batch, path="embedding").relevance
    for i, length in enumerate(batch.lengths.tolist()):
        one = Batch(batch.uids[i : i + 1], batch.x[i : i + 1, :length], batch.target[i : i + 1])
        same(found[i, :length], relevance(net, one, path="embedding").relevance[0])
        assert not found[i, length:].any()


def test_padded_texts_are_the_papers():
    torch.manual_seed(1)
    net, batch = AcdLSTM(12, E, H, num_classes=2, pad_id=1).double().eval(), texts()
    found = relevance(net, batch, path="embed").relevance
    with torch.no_grad():
        for i, length in enumerate(batch.lengths.tolist()):
            x = net.embed(batch.x[i, :length])
            last = nn.LSTM.forward(net.lstm, x[None])[0][0, -1]
            r_out = torch.zeros(length, H, dtype=torch.float64)
            logit = net(batch.x[i : i + 1])[0, batch.target[i]]
            z = last * net.hidden_to_label.weight[batch.target[i]]
            r_out[-1] = z / (z.sum() + net.hidden_to_label.bias[batch.target[i]]) * logit
            same(found[i, :length], lstm_by_hand(net.lstm, x, r_out))


# ---- log_softmax ---------------------------------------------------------------------------------------


class Ends(nn.Module):
    """A linear layer, and what ``end`` makes of it."""

    def __init__(self, end) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.end = nn.Linear(T * E, K), end

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.fc(x.flatten(1)))


LOGS = {
    "plain": lambda z: z.log_softmax(1),
    "moved": lambda z: z.unsqueeze(1).log_softmax(2).transpose(1, 2)[:, :, 0],
    "module": nn.LogSoftmax(dim=-1),
}


@pytest.mark.parametrize("end", LOGS)
@pytest.mark.parametrize("size", [1.0, 200.0])  # with 200 the logarithm of the probability is 0, or far below
@pytest.mark.quick(every=2)
def test_of_log_probabilities_the_logit_is_explained(end, size):
    nets, batch = (Ends(LOGS[end]), Ends(nn.Identity())), rows()
    for net in nets:
        net.double().eval().fc.weight.data.mul_(size)
    found, expected = (relevance(net, batch) for net in nets)
    same(found.relevance, expected.relevance)
    torch.testing.assert_close(found.logits, expected.logits.log_softmax(1))
    model = Classifier(nets[0], dtype=torch.float64)
    maps = LRP(composite="epsilon").attribute(model, batch, {}, None)
    score = model.logits(batch.x).gather(1, batch.target[:, None])[:, 0]
    torch.testing.assert_close(maps["map"].flatten(1).sum(1) + maps["bias_relevance"], score)


def test_log_softmax_inside_is_its_taylor_expansion():
    weight = torch.randn(K, K, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    net, batch = Ends(lambda z: z.log_softmax(1) @ weight).double().eval(), rows()
    found = relevance(net, batch).relevance
    with torch.no_grad():
        for i, target in enumerate(batch.target.tolist()):
            x = batch.x[i].flatten()
            z = net.fc(x)
            s = [math.exp(v) / sum(math.exp(u) for u in z.tolist()) for v in z.tolist()]
            q = weight[:, target]  # R / log s, with R = log s * weight
            r = torch.stack([z[j] * (q[j] - s[j] * q.sum()) for j in range(K)])
            same(found[i].flatten(), x * ((r / z) @ net.fc.weight))


# ---- what is refused -----------------------------------------------------------------------------------


def test_weights_that_depend_on_the_input_are_refused():
    class Hyper(Sequences):
        def forward(self, x):
            weights = [self.layer.weight_ih_l0 * x.mean(), *self.layer._flat_weights[1:]]
            zero = x.new_zeros(1, x.shape[0], H)
            out = torch._VF.lstm(x[:, 0], (zero, zero), weights, True, 1, 0.0, False, False, True)[0]
            return self.fc(out.flatten(1))

    graph = Graph.of(Hyper("lstm", batch_first=True).double().eval(), rows().x)
    with pytest.raises(UserError, match=r"LRP has no rule for lstm in its forward \(Hyper\)"):
        Plan(graph, graph.input)
