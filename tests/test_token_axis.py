"""As many channels as tokens: a layer of a text net is read by what its axes do, not by how long they are."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from contracts import FitSamples, PartialInMemory, seeded
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from attrib.methods.baselines import Gradient
from attrib.methods.iba import IBA
from attrib.methods.parts.layout import places
from attrib.metrics import InsertionDeletion
from attrib.models import Classifier
from attrib.models.token_axis import tokens_are_second
from attrib.noise import Noise
from attrib.types import Batch, UserError

T, K = 6, 3  # tokens, which are also the filters


class Filters(nn.Module):
    """Kim's net: as many filters as these texts have tokens; ``back`` gives their answers token by token."""

    def __init__(self, fixed: bool = False, padded: bool = False) -> None:
        super().__init__()
        self.padded = padded
        self.embedding, self.conv, self.back = nn.Embedding(20, 5), nn.Conv1d(5, T, 3, padding=1), nn.Identity()
        self.place = nn.Parameter(torch.ones(T, 5)) if fixed else None
        self.fc = nn.Linear(T, K)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(F.pad(ids, (0, T - ids.shape[1])) if self.padded else ids)
        if self.place is not None:
            x = x + self.place  # texts of one length only
        return self.fc(self.back(self.conv(x.mT).mT).amax(1))


class Packed(nn.Module):
    """Its LSTM gives no places for padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.lstm, self.fc = nn.Embedding(20, 5), nn.LSTM(5, T, batch_first=True), nn.Linear(T, K)
        self.out = nn.Identity()

    def forward(self, ids: Tensor) -> Tensor:
        lengths = (ids > 0).sum(1).clamp(min=1).cpu()
        packed = pack_padded_sequence(self.embedding(ids), lengths, batch_first=True, enforce_sorted=False)
        return self.fc(self.out(pad_packed_sequence(self.lstm(packed)[0], batch_first=True)[0]).amax(1))


class Fourier(nn.Module):
    """FNet's layer: every place answers to every token; texts of one length only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.embedding, self.place = nn.Embedding(20, channels), nn.Parameter(torch.ones(T, channels))
        self.out, self.fc = nn.Sequential(nn.Linear(channels, channels), nn.GELU()), nn.Linear(channels, K)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids) + self.place
        return self.fc(self.out(x + torch.fft.fft2(x).real).mean(1))


def texts(lengths: tuple[int, ...] = (T, T, T, T), seed: int = 0) -> Batch:
    ids = torch.randint(1, 20, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(seed))
    real = torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]
    words = torch.where(real, torch.arange(ids.shape[1]), -1)
    return Batch(
        tuple(f"{seed}/{i}" for i in range(len(ids))), ids * real, torch.arange(len(ids)) % K,
        lengths=torch.tensor(lengths), words=words,
    )  # fmt: skip


def model_of(net: nn.Module, **layers: str) -> Classifier:
    return Classifier(seeded(net), {"embedding": "embedding", **layers}, dtype=torch.float64)


def fitted(model: Classifier, batch: Batch) -> dict[str, Tensor]:
    return IBA(steps=2).fit.run(model, FitSamples(batch, 2), PartialInMemory(), lambda _: None)


KINDS = pytest.mark.parametrize(
    "kind", [{}, {"fixed": True}, {"padded": True}], ids=["any length", "one length", "padded to one length"]
)


@KINDS
def test_channels_in_the_place_of_tokens_are_refused(kind):
    batch = texts()
    with pytest.raises(UserError, match="bottleneck: conv gives its channels where the tokens would be"):
        fitted(model_of(Filters(**kind), bottleneck="conv"), batch)
    model = model_of(Filters(**kind), bottleneck="conv")
    with pytest.raises(UserError, match="bottleneck: conv gives its channels where the tokens would be"):
        places(model, "bottleneck", batch, model.until("bottleneck", batch.x).z)
    model, noise = model_of(Filters(**kind), embedding="conv"), Noise(batch.uids, dtype=torch.float64)
    with pytest.raises(UserError, match="embedding: conv gives its channels"):
        Gradient().attribute(model, batch, {}, noise)
    with pytest.raises(UserError, match="embedding: conv gives its channels"):
        InsertionDeletion(steps=2).score(model, batch, torch.rand(4, T), noise)


@pytest.mark.parametrize("net", [Filters(), Filters(fixed=True), Filters(padded=True), Packed()])
def test_tokens_are_tokens(net):
    batch = texts() if isinstance(net, Filters) else texts((T, 2, T - 1, 3))
    layer = "back" if isinstance(net, Filters) else "out"
    model = model_of(net, bottleneck=layer)
    noise = Noise(batch.uids, dtype=torch.float64)
    found = IBA(steps=2).attribute(model, batch, fitted(model, batch), noise)
    assert found["map"].shape == batch.x.shape
    assert Gradient().attribute(model, batch, {}, noise)["map"].shape == batch.x.shape
    assert model.roles._token_axes == {layer: True, "embedding": True}


@pytest.mark.parametrize("seed", range(8))
def test_tokens_that_are_mixed_are_told_by_sizes(seed):
    torch.manual_seed(seed)
    assert tokens_are_second(Fourier(16).double(), "out", texts(seed=seed).x[:1])
    strided = Filters(fixed=True)  # as many filters as tokens, and fewer places
    strided.conv.stride = (2,)
    assert not tokens_are_second(strided, "conv", texts(seed=seed).x[:1])


def test_a_single_token_and_texts_of_one_word():
    one = texts((1, 1, 1))
    model = model_of(Filters(), bottleneck="back")
    noise = Noise(one.uids, dtype=torch.float64)
    assert IBA(steps=2).attribute(model, one, fitted(model, one), noise)["map"].shape == (3, 1)
    same = texts()
    same.x[:] = 7  # no other token to ask with
    model = model_of(Filters(fixed=True), bottleneck="back")
    fitted(model, same)


def test_it_is_asked_once_and_costs_the_samples_nothing(monkeypatch):
    batch, asked = texts(), []
    from attrib.models import roles

    real = roles.tokens_are_second
    monkeypatch.setattr(roles, "tokens_are_second", lambda *args: asked.append(args[1]) or real(*args))
    model = model_of(Filters(), bottleneck="back")
    model.until("bottleneck", batch.x)
    before = model.passed
    model.roles.check_tokens("bottleneck", batch.x)
    assert model.passed == before
    fitted(model, batch)
    Gradient().attribute(model, batch, {}, Noise(batch.uids, dtype=torch.float64))
    assert asked == ["back", "embedding"]
