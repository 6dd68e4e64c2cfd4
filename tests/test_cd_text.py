"""Contextual decomposition of recurrent nets: the original's numbers, and a slow reference for everything beyond it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from contracts import seeded
from nets import golden
from text_nets import NETS, text_net, texts
from torch import Tensor, nn

from attrib.decomposition import Decomposer, decompose
from attrib.models import AcdLSTM, BiLSTM, Classifier, DeepLSTM
from attrib.models.text import Recurrent, real_tokens
from attrib.types import UserError

F64 = torch.float64


def spans(ends: Tensor, steps: int) -> Tensor:
    """(R, 2) first and last word -> masks (R, T)."""
    t = torch.arange(steps)
    return (t >= ends[:, :1]) & (t <= ends[:, 1:])


# ---- the original's numbers --------------------------------------------------------------------


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("name", ["small", "rand"])
def test_golden_sentences(name: str, both: bool) -> None:
    g = golden("cd_text")
    state = {k.split(".", 1)[1]: torch.tensor(v) for k, v in g.items() if k.startswith(f"sd_{name}.")}
    (words, size), hidden = state["embed.weight"].shape, state["lstm.weight_hh_l0"].shape[1]
    net = AcdLSTM(words, size, hidden, num_classes=2)
    net.load_state_dict(state)
    model = Classifier(net, dtype=F64)  # the original is in float64 inside
    decomposer = Decomposer(model, output_bias=False)
    for key in (k.removesuffix("_tokens") for k in g if k.startswith(name) and k.endswith("_tokens")):
        ids, ends = torch.tensor(g[f"{key}_tokens"])[None], torch.tensor(g[f"{key}_spans"])
        masks = spans(ends, ids.shape[1])[None]
        found = decompose(model, ids, masks, decomposer=decomposer, both=both)
        np.testing.assert_allclose(found.relevant[0], g[f"{key}_rel"], rtol=0, atol=1e-5)
        np.testing.assert_allclose(found.irrelevant[0], g[f"{key}_irrel"], rtol=0, atol=1e-5)
        np.testing.assert_allclose(found.logits[0], g[f"{key}_logits_minus_bias"], rtol=0, atol=1e-4)
        complete = decompose(model, ids, masks)
        np.testing.assert_allclose(complete.logits[0], g[f"{key}_logits"], rtol=0, atol=1e-4)
        assert complete.error.max() < 1e-12


class Last(nn.Module):
    """The last state of an LSTM, from vectors."""

    def __init__(self, lstm: nn.LSTM) -> None:
        super().__init__()
        self.lstm = lstm

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[1][0][0]


def test_golden_layer() -> None:
    """The layer whose weights those of the sentences are; the original's ``<`` for ``<=`` corrected."""
    g, weights = golden("cd_lstm"), golden("cd_text")
    lstm = nn.LSTM(16, 24, batch_first=True)
    lstm.load_state_dict(
        {k.split(".lstm.")[1]: torch.tensor(v) for k, v in weights.items() if k.startswith("sd_small.lstm.")}
    )
    x, ends = torch.tensor(g["x"]), torch.tensor(g["spans"])
    masks = spans(ends, x.shape[1])[:, :, None].expand(-1, -1, 16)
    decomposer = Decomposer(Last(lstm).eval())
    with torch.no_grad():
        relevant, whole = decomposer.rows(x, masks, torch.zeros(len(ends), dtype=torch.long))
    for i in range(len(ends)):
        np.testing.assert_allclose(relevant[i], g[f"rel{i}"].ravel(), rtol=0, atol=1e-5)
        np.testing.assert_allclose((whole - relevant)[i], g[f"irrel{i}"].ravel(), rtol=0, atol=1e-5)
        assert not np.allclose(relevant[i], g[f"rel{i}__buggy"].ravel(), rtol=0, atol=1e-4)


# ---- a slow reference ---------------------------------------------------------------------------


def sigmoid(v: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-v))


def three(a: np.ndarray, b: np.ndarray, c: np.ndarray, f) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    one = (f(a + c) - f(c) + f(a + b + c) - f(b + c)) / 2
    other = (f(b + c) - f(c) + f(a + b + c) - f(a + c)) / 2
    return one, other, f(c)


def reference_lstm(r: np.ndarray, q: np.ndarray, lstm: nn.LSTM, suffix: str) -> tuple[np.ndarray, np.ndarray]:
    """Murdoch et al. (2018), one row (T, E) of each part, step by step; -> (T, H) of each part."""
    u, w, b, c = (
        getattr(lstm, f"{n}_{suffix}").detach().numpy() for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    )
    (ui, uf, ug, uo), (wi, wf, wg, wo), (bi, bf, bg, bo) = (np.split(v, 4) for v in (u, w, b + c))
    size = len(bi)
    hr, hq, cr, cq = (np.zeros(size) for _ in range(4))
    outputs = []
    for x, y in zip(r, q, strict=True):
        total = np.abs(x).sum() + np.abs(y).sum()
        inside = np.abs(x).sum() / total if total else 0.5
        ri, qi, i0 = three(ui @ x + wi @ hr, ui @ y + wi @ hq, bi, sigmoid)
        rf, qf, f0 = three(uf @ x + wf @ hr, uf @ y + wf @ hq, bf, sigmoid)
        rg, qg, g0 = three(ug @ x + wg @ hr, ug @ y + wg @ hq, bg, np.tanh)
        o = sigmoid(uo @ (x + y) + wo @ (hr + hq) + bo)
        old_r, old_q = cr, cq
        cr = ri * rg + ri * g0 + i0 * rg + inside * i0 * g0 + (rf + f0) * old_r
        cq = qi * (rg + qg + g0) + (ri + i0) * qg + (1 - inside) * i0 * g0
        cq = cq + (rf + qf + f0) * old_q + qf * old_r
        hr = o * (np.tanh(cr) + np.tanh(cr + cq) - np.tanh(cq)) / 2
        hq = o * (np.tanh(cq) + np.tanh(cr + cq) - np.tanh(cr)) / 2
        outputs.append((hr, hq))
    return tuple(np.stack(part) for part in zip(*outputs, strict=True))


def reference_layers(r: np.ndarray, q: np.ndarray, lstm: nn.LSTM) -> tuple[np.ndarray, np.ndarray]:
    for layer in range(lstm.num_layers):
        ways = [reference_lstm(r, q, lstm, f"l{layer}")]
        if lstm.bidirectional:
            back = reference_lstm(r[::-1], q[::-1], lstm, f"l{layer}_reverse")
            ways.append(tuple(part[::-1] for part in back))
        r, q = (np.concatenate(parts, 1) for parts in zip(*ways, strict=True))
    return r, q


class Sequence(nn.Module):
    """(N, T, E) -> (N, T * H), with or without the batch first; and padded, by attrib's own layer."""

    def __init__(self, lstm: nn.Module, first: bool = True) -> None:
        super().__init__()
        self.lstm, self.first = lstm, first

    def forward(self, x: Tensor) -> Tensor:
        if self.first:
            return self.lstm(x)[0].flatten(1)
        return self.lstm(x.transpose(0, 1))[0].transpose(0, 1).flatten(1)


@pytest.mark.parametrize(("layers", "two_ways", "first"), [(1, False, True), (2, True, True), (2, False, False)])
@pytest.mark.quick(every=2)
def test_layers_and_directions_against_the_reference(layers: int, two_ways: bool, first: bool) -> None:
    lstm = nn.LSTM(3, 4, layers, bidirectional=two_ways, batch_first=first)
    net = seeded(Sequence(lstm, first).to(F64), 0.7).eval()
    r = np.random.RandomState(0)
    x, masks = torch.tensor(r.randn(2, 5, 3)), torch.tensor(r.rand(6, 5, 1) > 0.5).expand(-1, -1, 3)
    of = torch.tensor([0, 1, 1, 0, 0, 1])
    for both in (False, True):
        with torch.no_grad():
            relevant, whole = Decomposer(net).rows(x, masks, of, both)
            assert torch.allclose(whole, net(x)[of], atol=1e-12)
        for i, s in enumerate(of):
            a, b = ((x[s] * m).numpy() for m in (masks[i], ~masks[i]))
            wanted, other = reference_layers(a, b, lstm)
            np.testing.assert_allclose(relevant[i], wanted.ravel(), rtol=0, atol=1e-12)
            np.testing.assert_allclose((whole - relevant)[i], other.ravel(), rtol=0, atol=1e-12)


class Padded(nn.Module):
    def __init__(self, lstm: Recurrent) -> None:
        super().__init__()
        self.embedding, self.lstm = nn.Embedding(9, 3, padding_idx=1), lstm

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(self.embedding(x), real_tokens(x, 1).sum(1)).flatten(1)


@pytest.mark.parametrize("two_ways", [False, True])
def test_padded_texts_against_the_reference(two_ways: bool) -> None:
    """Each row by itself at its own length; zero on padding."""
    lstm = Recurrent(3, 4, 2, bidirectional=two_ways)
    net = seeded(Padded(lstm).to(F64), 0.7).eval()
    ids = torch.tensor([[3, 4, 5, 6, 7, 2], [8, 2, 3, 1, 1, 1]])
    masks = torch.tensor(np.random.RandomState(1).rand(4, 6) > 0.5)
    of = torch.tensor([0, 1, 0, 1])
    with torch.no_grad():
        relevant, whole = Decomposer(net).rows(ids, masks, of)
        vectors = net.embedding(ids).numpy()
    relevant = relevant.unflatten(1, (6, -1))
    for i, s in enumerate(of):
        n = [6, 3][s]
        m = masks[i, :n, None].numpy()
        wanted, other = reference_layers(vectors[s, :n] * m, vectors[s, :n] * ~m, lstm)
        np.testing.assert_allclose(relevant[i, :n], wanted, rtol=0, atol=1e-12)
        np.testing.assert_allclose((whole.unflatten(1, (6, -1)) - relevant)[i, :n], other, rtol=0, atol=1e-12)
        assert (relevant[i, n:] == 0).all()


def reference_gru(r: np.ndarray, q: np.ndarray, gru: nn.GRU) -> np.ndarray:
    """The relevant part of each state, (T, H): products as in the LSTM."""
    u, w, b, c = (getattr(gru, f"{n}_l0").detach().numpy() for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    (ur, uz, un), (wr, wz, wn), (br, bz, bn), (cr, cz, cn) = (np.split(v, 3) for v in (u, w, b, c))
    hr, hq = np.zeros(len(br)), np.zeros(len(br))
    outputs = []
    for x, y in zip(r, q, strict=True):
        inside = float(np.abs(x).sum() > 0)
        rr, qr, r0 = three(ur @ x + wr @ hr, ur @ y + wr @ hq, br + cr, sigmoid)
        rz, qz, z0 = three(uz @ x + wz @ hr, uz @ y + wz @ hq, bz + cz, sigmoid)
        back_r, back_q = wn @ hr, wn @ hq
        whole = (rr + qr + r0) * (back_r + back_q + cn)
        reset = rr * (back_r + cn) + r0 * back_r
        rest = whole - reset - r0 * cn
        rn, qn, n0 = three(un @ x + reset, un @ y + rest, bn + r0 * cn, np.tanh)
        new = (1 - rz - qz - z0) * (rn + qn + n0) + (rz + qz + z0) * (hr + hq)
        hr = -rz * (rn + n0) + (1 - z0) * rn + inside * (1 - z0) * n0 + (rz + z0) * hr
        hq = new - hr
        outputs.append(hr)
    return np.stack(outputs)


def test_gru_and_plain_recurrence() -> None:
    r = np.random.RandomState(0)
    x, masks = torch.tensor(r.randn(1, 5, 3)), torch.tensor(r.rand(3, 5, 1) > 0.5).expand(-1, -1, 3)
    of = torch.zeros(3, dtype=torch.long)
    for layer in (nn.GRU(3, 4, batch_first=True), nn.RNN(3, 4, 2, batch_first=True, bidirectional=True),
                  nn.RNN(3, 4, batch_first=True, nonlinearity="relu")):  # fmt: skip
        net = seeded(Sequence(layer).to(F64), 0.7).eval()
        for both in (False, True):
            with torch.no_grad():
                relevant, whole = Decomposer(net).rows(x, masks, of, both)
                assert torch.allclose(whole, net(x)[of], atol=1e-12)
            assert relevant.std(0).max() > 1e-3
            if isinstance(layer, nn.GRU):
                for i in range(3):
                    wanted = reference_gru((x[0] * masks[i]).numpy(), (x[0] * ~masks[i]).numpy(), layer)
                    np.testing.assert_allclose(relevant[i], wanted.ravel(), rtol=0, atol=1e-12)


# ---- text nets of the project ---------------------------------------------------------------------


def classifiers() -> dict[str, nn.Module]:
    sizes = {"vocab_size": 12, "embedding_dim": 6, "hidden_dim": 5}
    return {
        "deep": DeepLSTM(**sizes),
        "acd": AcdLSTM(**sizes, num_classes=3),
        "bi last": BiLSTM(**sizes, n_layers=2),
        "bi mean": BiLSTM(**sizes, pooling="mean"),
        "bi max": BiLSTM(**sizes, pooling="max"),
    }


@pytest.mark.parametrize("name", classifiers())
@pytest.mark.quick("bi mean", "acd")
def test_parts_of_text_nets_add_up_whatever_the_batch_is(name: str) -> None:
    net = seeded(classifiers()[name], 0.9)
    batch = texts(3)
    masks = torch.tensor(np.random.RandomState(2).rand(3, 3, batch.x.shape[1]) > 0.5)
    model = Classifier(net, rows=5, dtype=F64)
    found = decompose(model, batch.x, masks, checks=2)
    assert found.error.max() < 1e-12
    assert found.relevant.std(1).max() > 1e-4
    model = Classifier(net, rows=64, dtype=F64)
    for i, length in enumerate(batch.lengths[:2]):
        alone = decompose(model, batch.x[i : i + 1, :length], masks[i : i + 1, :, :length])
        assert torch.allclose(alone.relevant[0], found.relevant[i], atol=1e-12)
    # Masks over padding are masks over nothing.
    more = masks | (torch.arange(masks.shape[2]) >= batch.lengths[:, None])[:, None]
    assert torch.allclose(decompose(model, batch.x, more).relevant, found.relevant, atol=1e-12)


@pytest.mark.parametrize("name", ["mean", "around", "untraceable"])
def test_other_text_nets(name: str) -> None:
    """Division by the number of words; two embeddings; a net that cannot be traced."""
    assert name in NETS
    batch = texts(3)
    masks = torch.eye(batch.x.shape[1]).bool().expand(3, -1, -1)
    model = Classifier(text_net(name), dtype=F64)
    if name == "untraceable":
        with pytest.raises(UserError, match="trace"):
            decompose(model, batch.x, masks)
        return
    found = decompose(model, batch.x, masks, checks=3)
    assert found.error.max() < 1e-12
    assert found.relevant.std(1).min() > 0


def test_a_gradient_through_a_recurrent_net() -> None:
    net = seeded(AcdLSTM(12, 4, 3), 0.9).double().eval().requires_grad_()
    ids, mask = torch.tensor([[3, 4, 5, 6]]), torch.tensor([[[False, True, True, False]]])
    decomposer = Decomposer(net)
    relevant = decomposer.decompose(ids, mask).relevant[0, 0, 1]
    weight = net.lstm.weight_hh_l0
    (gradient,) = torch.autograd.grad(relevant, weight)
    step = 1e-6
    with torch.no_grad():
        weight[2, 1] += step
        above = decomposer.decompose(ids, mask).relevant[0, 0, 1]
        weight[2, 1] -= 2 * step
        below = decomposer.decompose(ids, mask).relevant[0, 0, 1]
    assert gradient[2, 1].item() == pytest.approx(((above - below) / (2 * step)).item(), rel=1e-5)


@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_what_recurrent_layers_cannot_do() -> None:
    class Started(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(3, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            h = x.new_zeros(1, x.shape[0], 4)
            return self.lstm(x, (h, h))[0][:, -1]

    x, masks = torch.rand(1, 5, 3), torch.ones(1, 2, 5, 3)
    zeros = Started().eval()
    assert torch.allclose(Decomposer(zeros).decompose(x, masks).relevant[0, 0], zeros(x)[0])
    with pytest.raises(UserError, match="projections"):
        Decomposer(Sequence(nn.LSTM(3, 4, proj_size=2, batch_first=True)).eval()).decompose(x, masks)
