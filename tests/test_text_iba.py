"""IBA on sentences: parity with InputIBA's released code, a plain reference, padding that must not matter."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from contracts import FitSamples, PartialInMemory, close, fit_contract, forbid_global_rng, seeded
from nets import golden
from torch import Tensor

import attrib
from attrib.fit import State
from attrib.methods.iba import IBA
from attrib.methods.parts.layout import TextLayout
from attrib.methods.parts.statistics import FeatureStatistics
from attrib.models import Classifier
from attrib.models.text import BiLSTM, DeepLSTM
from attrib.noise import Noise
from attrib.types import Batch, UserError

ROLES = {f"rnn_{i}": f"rnn_{i}" for i in range(1, 5)} | {"bottleneck": "rnn_2", "embedding": "embedding"}


def released_net() -> DeepLSTM:
    data = golden("deeplstm")
    vocabulary, embedding, hidden, layers = (int(n) for n in data["hyper"])
    net = DeepLSTM(vocabulary, embedding, hidden, n_layers=layers, pad_id=1)
    net.load_state_dict({k.removeprefix("sd."): torch.tensor(v) for k, v in data.items() if k.startswith("sd.")})
    return net


def texts(ids: list[list[int]], target: list[int] | None = None, pad: int = 1, width: int = 0) -> Batch:
    """Rows of ids, padded to the longest, or to ``width``."""
    width = max(width, *map(len, ids))
    numbers = [[*range(len(row)), *[-1] * (width - len(row))] for row in ids]
    return Batch(
        uids=tuple(f"s/{i}" for i in range(len(ids))),
        x=torch.tensor([[*row, *[pad] * (width - len(row))] for row in ids]),
        target=torch.tensor(target or [i % 2 for i in range(len(ids))]),
        lengths=torch.tensor([len(row) for row in ids]),
        words=torch.tensor(numbers),
    )


SENTENCES = [[5, 9, 12, 7, 30, 2, 8], [11, 4], [6, 6, 21, 40, 3], [17]]


def small() -> DeepLSTM:
    return seeded(DeepLSTM(50, 6, 5, num_classes=3, pad_id=1), 1.0)


def state_of(net: torch.nn.Module, layer: str = "rnn_2") -> State:
    """Statistics in float64, as a state is stored in float32 otherwise."""
    model = Classifier(net, {"bottleneck": layer}, dtype=torch.float64)
    fitted = FeatureStatistics("bottleneck").run(
        model, FitSamples(texts(SENTENCES), 2), PartialInMemory(), lambda _: None
    )
    return {name: value.double() for name, value in fitted.items()}


# ---- parity ---------------------------------------------------------------------------------------


class ReleasedNoise:
    """The released code's draws, sequence first."""

    def __init__(self, seed: int) -> None:
        self.stream = np.random.RandomState(seed)

    def normal(self, draws: int, steps: int, units: int, ragged: int) -> Tensor:
        assert ragged == 1
        return torch.tensor(self.stream.randn(steps, draws, units).astype(np.float32)).transpose(0, 1)[None].clone()


def test_given_noise_and_statistics_equals_the_released_code():
    data, sentences = golden("inputiba_nlp"), golden("deeplstm")
    tokens = sentences["tokens"][0][: sentences["lens"][0]].tolist()
    state = {name: torch.tensor(data[f"f1_{name}"]) for name in ("mean", "std", "active")}
    model = Classifier(released_net(), {"bottleneck": "rnn_1"})
    method = IBA(beta=15.0)
    for target in (0, 1):
        found, places = method.optimise(model, texts([tokens], [target]), state, ReleasedNoise(3000))
        if abs(found.losses["loss_model"][0, 0] - data["s0_feat_cls_loss"][0]) < 1e-4:
            break
    losses = {"loss": "s0_feat_loss", "loss_model": "s0_feat_cls_loss"}
    for name, key in losses.items():
        np.testing.assert_allclose(found.losses[name][0], data[key], rtol=1e-3, err_msg=name)
    nats = data["s0_capacity_nats"]
    assert np.abs(found.capacity[0].numpy() - nats).max() <= 1e-3 * nats.max()
    bits = places.spread(places.bits(found.capacity))[0].numpy()
    expected = data["s0_feat_mask_nats"] / math.log(2)
    assert np.abs(bits - expected).max() <= 1e-3 * expected.max()


def test_statistics_equal_the_corrected_ones():
    data, sentences = golden("inputiba_nlp"), golden("deeplstm")
    rows = [row[:n].tolist() for row, n in zip(sentences["est_tokens"], sentences["est_len"])]
    model = Classifier(released_net(), {"bottleneck": "rnn_4"})
    fit = FeatureStatistics("bottleneck")
    for size in (64, 5):
        state = fit.run(model, FitSamples(texts(rows), size), PartialInMemory(), lambda _: None)
        assert state["n"] == data["welford_n"] == sum(map(len, rows))
        for name in ("mean", "std"):
            np.testing.assert_allclose(state[name], data[f"welford_{name}"], rtol=1e-4, atol=1e-5)
        assert np.array_equal((state["active"] > 0.01).numpy(), data["welford_active"])
    assert np.abs(data["welford_std__buggy"] - data["welford_std"]).max() > 0.1  # counting padding is another number


# ---- reference ------------------------------------------------------------------------------------


def reference(net: DeepLSTM, ids: list[int], target: int, state: State, noise: Noise, method: IBA) -> Tensor:
    """One sentence, one draw at a time, Adam by its formula: bits per token."""
    x = torch.tensor([ids])
    lengths = torch.tensor([len(ids)])

    def rear(z: Tensor) -> Tensor:
        for name in ("rnn_3", "rnn_4"):
            z = net.get_submodule(name)(z, lengths)
        return net.fc(z[:, -1])

    with torch.no_grad():
        r = net.rnn_2(net.rnn_1(net.embedding(x), lengths), lengths)[0]
    mean, std = state["mean"], state["std"].clamp(min=method.min_std)
    active = (state["active"] > method.active_neurons_threshold).double()
    alpha = torch.full_like(r, method.initial_alpha)
    m, v = torch.zeros_like(r), torch.zeros_like(r)
    for step in range(1, method.steps + 1):
        alpha.requires_grad_()
        lam = torch.sigmoid(alpha)
        eps = noise.normal(method.batch, *r.shape, ragged=1)[0]
        loss = 0.0
        for draw in eps:
            z = (lam * r + (1 - lam) * (draw * std + mean)) * active
            loss = loss + F.cross_entropy(rear(z[None]), torch.tensor([target])) / method.batch
        mu, var = (r - mean) / std * lam, (1 - lam) ** 2
        nats = 0.5 * (mu**2 + var - 1 - var.log()) * active
        (g,) = torch.autograd.grad(loss + method.beta * nats.mean(), alpha)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        alpha = alpha.detach() - method.lr * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
    return nats.detach().sum(1) / math.log(2)


def test_equals_a_plain_loop():
    net, state, method = small(), state_of(small()), IBA(steps=4, batch=3, beta=2.0)
    batch = texts(SENTENCES)
    model = Classifier(net, ROLES, dtype=torch.float64)
    with forbid_global_rng():
        found = method.attribute(model, batch, state, Noise(batch.uids, 3, dtype=torch.float64))
    assert not found["map"][~batch.mask].any()
    for i, ids in enumerate(SENTENCES):
        noise = Noise([batch.uids[i]], 3, dtype=torch.float64)
        expected = reference(net, ids, int(batch.target[i]), state, noise, method)
        torch.testing.assert_close(found["map"][i, : len(ids)], expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found["capacity"], found["map"])


# ---- padding --------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", ["embedding", "rnn_1", "rnn_4"])
def test_padding_and_company_do_not_matter(layer):
    net, method = small(), IBA(steps=3, batch=2, beta=1.0)
    state, batch = state_of(net, layer), texts(SENTENCES)

    def explain(batch: Batch, rows: int = 64) -> dict[str, Tensor]:
        model = Classifier(net, {"bottleneck": layer}, dtype=torch.float64, rows=rows)
        return dict(method.attribute(model, batch, state, Noise(batch.uids, 3, dtype=torch.float64)))

    whole, wide = explain(batch), explain(texts(SENTENCES, width=19))
    for name in ("map", "capacity"):
        assert not wide[name][:, 7:].any()
        wide[name] = wide[name][:, :7]
    close(wide, whole)
    close(explain(batch, rows=1), whole)
    for i, ids in enumerate(SENTENCES):
        alone = texts([ids], [int(batch.target[i])])
        alone = Batch((batch.uids[i],), alone.x, alone.target, None, alone.lengths, alone.words)
        one = explain(alone)
        cut = {k: v[i : i + 1, : len(ids)] if k in ("map", "capacity") else v[i : i + 1] for k, v in whole.items()}
        close(one, cut)


def test_statistics_keep_the_promises_of_a_fit():
    batch = texts([[*row, *row] for row in SENTENCES])
    state = fit_contract(
        FeatureStatistics("bottleneck"), lambda rows, dtype: Classifier(small(), ROLES, dtype=dtype, rows=rows), batch
    )
    z = small().rnn_2(small().rnn_1(small().embedding(batch.x), batch.lengths), batch.lengths)
    tokens = torch.cat([z[i, :n] for i, n in enumerate(batch.lengths)])
    torch.testing.assert_close(state["mean"], tokens.mean(0).float())
    torch.testing.assert_close(state["std"], tokens.std(0).float())
    assert state["n"] == batch.lengths.sum()


# ---- meaning --------------------------------------------------------------------------------------


def test_the_word_that_decides_has_the_information():
    """A net that reads one word of many: logit = +-8 for the ids 2 and 3, whatever the others are."""

    class Reader(torch.nn.Module):
        pad_id, mask_id = 1, 0

        def __init__(self) -> None:
            super().__init__()
            self.embedding = torch.nn.Embedding(20, 4)
            self.embedding.weight.data = torch.tensor(np.random.RandomState(0).randn(20, 4)) * 0.7
            self.embedding.weight.data[:, 0] = 0.0
            self.embedding.weight.data[2:4, 0] = torch.tensor([3.0, -3.0])

        def forward(self, x: Tensor) -> Tensor:
            score = (self.embedding(x) * (x != 1).unsqueeze(2))[:, :, 0].sum(1, keepdim=True)
            return torch.cat((score, -score), 1)

    net = Reader().double()
    rows = [[5, 6, 2, 7, 8, 9], [3, 10, 11], [12, 13, 14, 15, 2], [16, 17, 3, 18]]
    batch = texts(rows, [0, 1, 0, 1])
    model = Classifier(net, {"bottleneck": "embedding"}, dtype=torch.float64)
    state = FeatureStatistics("bottleneck").run(model, FitSamples(batch, 4), PartialInMemory(), lambda _: None)
    state = {k: v.double() for k, v in state.items()}
    found = IBA(beta=1.0, steps=20).attribute(model, batch, state, Noise(batch.uids, dtype=torch.float64))["map"]
    for row, bits in zip(rows, found):
        decides = next(i for i, word in enumerate(row) if word in (2, 3))
        assert bits.argmax() == decides
        assert bits[decides] > bits.sum() / 2


def test_a_layer_without_places_for_tokens():
    batch = texts(SENTENCES)
    vector = TextLayout.of(torch.ones(4, 3), batch.mask)
    spread = vector.spread(vector.bits(torch.full((4, 3), math.log(2))))
    torch.testing.assert_close(spread.sum(1), torch.full((4,), 3.0))
    assert spread[3, 0] == 3.0
    assert not spread[3, 1:].any()
    with pytest.raises(UserError, match="no place for each of the 7 tokens"):
        TextLayout.of(torch.ones(4, 9, 3), batch.mask)


def test_bits_at_a_vector_are_explained():
    """By ``attrib.explain``, which checks what a method returns, as a run does."""
    net = seeded(BiLSTM(50, 6, 4, num_classes=2, pad_id=1, pooling="mean"), 1.0).float()
    x = [torch.tensor([5, 3, 9, 2]), torch.tensor([7, 4])]
    found = attrib.explain(net, x, 1, "iba", fit=x, layers={"bottleneck": "fc"}, steps=2)
    assert found.map.shape == (2, 4)
    for row, length in zip(found.map, (4, 2)):
        torch.testing.assert_close(row[:length], row[:1].expand(length))
        assert row[0] > 0
    torch.testing.assert_close(found.extras["capacity"], found.map)


def test_bidirectional_nets_and_vectors():
    net = seeded(BiLSTM(50, 6, 4, num_classes=2, pad_id=1, pooling="mean"), 1.0)
    model = Classifier(net, {"bottleneck": "rnn", "head": "fc"}, dtype=torch.float64)
    batch = texts(SENTENCES)
    for role in ("bottleneck", "head"):
        state = FeatureStatistics(role).run(model, FitSamples(batch, 2), PartialInMemory(), lambda _: None)
        found = IBA(layer=role, steps=2, batch=2).attribute(model, batch, state, Noise(batch.uids, dtype=torch.float64))
        assert found["map"].shape == batch.x.shape
        assert found["map"].isfinite().all()
        assert not found["map"][~batch.mask].any()
