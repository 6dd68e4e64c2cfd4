"""Nets over texts that look at what shares a batch, or number its rows: a text has the same numbers as alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from contracts import seeded
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import attrib
from attrib.models import Classifier
from attrib.models.padding import seen

WORDS, WIDTH, PAD = 24, 6, 0
STEPS = 5  # of integrated gradients
LENGTHS = (30, 30, 9, 4, 2, 1)


class Net(nn.Module):
    pad_id, mask_id = PAD, 1

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH, padding_idx=PAD)
        self.rnn = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.head = nn.Linear(WIDTH, 3)

    def lengths(self, x: Tensor) -> Tensor:
        return (x != PAD).sum(1).clamp(min=1)


class Numbered(Net):
    """Reads the last token of each row, by the row's number: ``x.size(0)`` can be traced, ``len(x)`` cannot."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.embedding(x))[0][torch.arange(x.size(0)), self.lengths(x) - 1])


class Trimmed(Net):
    """Sees padding up to the longest of its batch, and none where it is alone."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.embedding(x[:, : self.lengths(x).max()]))[1][-1])


class ByTheLongest(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(x)).sum(1) / self.lengths(x).max())


class Sorted(Net):
    """Its layers have the longest text first; ``back`` says whether its logits are in order again."""

    back = True

    def forward(self, x: Tensor) -> Tensor:
        lengths, order = self.lengths(x).sort(descending=True, stable=True)
        packed = pack_padded_sequence(self.embedding(x[order]), lengths.cpu(), batch_first=True)
        last = self.rnn(packed)[1][-1]
        return self.head(last[order.argsort()] if self.back else last)


class NotSortedBack(Sorted):
    back = False


class Largest(Net):
    """Padding counts where no token of a text has more, which is in short texts only."""

    def forward(self, x: Tensor) -> Tensor:
        z = self.rnn.weight_ih_l0[:WIDTH] @ self.embedding(x)[..., None]
        return self.head(torch.relu(z.squeeze(-1) + 0.3).amax(1))


class Shuffled(Sorted):
    """As torch sorts by default: more than 16 texts of equal length come in any order."""

    def forward(self, x: Tensor) -> Tensor:
        lengths, order = self.lengths(x).sort(descending=True)
        packed = pack_padded_sequence(self.embedding(x[order]), lengths.cpu(), batch_first=True)
        return self.head(self.rnn(packed)[1][-1][order.argsort()])


class MostHideIt(Net):
    """Padding counts in texts that have the token 17 alone."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.where((x == 17)[..., None], 0.0, 1.0) + self.embedding(x).sigmoid()
        return self.head(torch.where((x == PAD)[..., None], 0.9, hidden).amax(1))


KINDS = [Numbered, Trimmed, ByTheLongest, Sorted, NotSortedBack, Shuffled, Largest]


def texts() -> list[Tensor]:
    made = torch.Generator().manual_seed(0)
    return [torch.randint(2, WORDS, (length,), generator=made) for length in LENGTHS]


@pytest.mark.parametrize("method", ["occlusion", "integrated_gradients", "gradient"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_text_has_the_map_that_it_has_alone(kind, method):
    net, x = seeded(kind(), 0.9).requires_grad_(True), texts()
    net.embedding.weight.data[PAD] = 0
    names = [str(i) for i in range(len(x))]
    fields = {"steps": STEPS} if method == "integrated_gradients" else {}
    found = attrib.explain(net, x, 1, method, uids=names, run={"batch": len(x), "dtype": "float64"}, **fields).map
    for uid, text, map in zip(names, x, found):
        z = net.embedding(text[None]).detach()
        alone = _reference(net, text, z, method)
        torch.testing.assert_close(map[: len(text)].double(), alone, rtol=1e-6, atol=1e-7, msg=uid)


@pytest.mark.parametrize("between", [[17], [20]])
def test_a_padding_that_most_texts_hide(between):
    """Whether or not the token is among the texts that the net is tried on."""
    net = seeded(MostHideIt(), 0.9)
    model = Classifier(net, dtype=torch.float64)
    model.logits(torch.tensor([[5, 3, 9, 2, 7], [*between, 0, 0, 0, 0], [7, 4, 0, 0, 0], [9, 0, 0, 0, 0]]))
    found = model.logits(torch.tensor([[17, 0, 0], [6, 3, 8]]))
    torch.testing.assert_close(found[:1], net(torch.tensor([[17]])), rtol=0, atol=1e-12)


def _reference(net: nn.Module, text: Tensor, z: Tensor, method: str) -> Tensor:
    def score(other: Tensor) -> Tensor:
        handle = net.embedding.register_forward_hook(lambda *_: other)
        try:
            return net(text[None])[0, 1]
        finally:
            handle.remove()

    if method == "occlusion":
        kept = [torch.where(torch.arange(len(text))[:, None] == i, 0.0, z) for i in range(len(text))]
        return torch.stack([score(z) - score(one) for one in kept]).detach()
    whole = method == "integrated_gradients"
    nodes, weights = _legendre() if whole else (torch.ones(1).double(), torch.ones(1).double())
    total = torch.zeros_like(z)
    for node, weight in zip(nodes, weights):
        at = (node * z).requires_grad_()
        total += weight * torch.autograd.grad(score(at), at)[0]
    return ((total * z) if whole else total).sum(-1)[0]


def _legendre() -> tuple[Tensor, Tensor]:
    nodes, weights = np.polynomial.legendre.leggauss(STEPS)
    return torch.from_numpy((nodes + 1) / 2), torch.from_numpy(weights / 2)


def test_a_net_that_cuts_padding_off_goes_row_by_row() -> None:
    net, x = seeded(Trimmed(), 0.9).requires_grad_(True), texts()
    names = [str(i) for i in range(len(x))]
    many, single = (
        attrib.explain(net, x, 1, "gradient", uids=names, run={"batch": 6, "rows": rows, "dtype": "float64"}).map
        for rows in (6, 1)
    )
    torch.testing.assert_close(many, single)


END = 2


class Ended(Net):
    """Wants the token that ends a text, as BART's classifier does, and sees padding."""

    def forward(self, x: Tensor) -> Tensor:
        if not (x == END).any(1).all():
            raise ValueError("a text does not end")
        return self.head(torch.tanh(self.embedding(x)).mean(1))


def test_a_net_that_wants_the_token_that_ends_a_text_is_examined() -> None:
    net = seeded(Ended(), 0.9)
    x = torch.full((3, 7), PAD)
    for row, length in zip(x, (7, 5, 2)):
        row[:length] = torch.tensor([*range(5, 4 + length), END])
    model = Classifier(net, dtype=torch.float64)
    alone = torch.cat([net(row[row != PAD][None]) for row in x])
    torch.testing.assert_close(model.logits(x), alone, rtol=0, atol=1e-12)
    assert model.exam is not None
    assert model.exam.on == "sample"
    assert model.exam.padding > 1e-3


class Placed(Net):
    """What it makes of the number of tokens has a row for each of them: of one token, as many as a batch of one."""

    def __init__(self) -> None:
        super().__init__()
        self.places, self.query = nn.Embedding(8, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        z = self.embedding(x) + self.places(torch.arange(x.size(1)))
        weights = (self.query(z) @ z.transpose(1, 2)).masked_fill((x == PAD)[:, None], -1e4).softmax(-1)
        return self.head((weights @ z)[:, 0])


def test_a_net_that_meets_a_text_of_one_token_first():
    net = seeded(Placed(), 0.9)
    model = Classifier(net, {"embedding": "embedding"}, dtype=torch.float64)
    for text in ([5], [3, 9, 4, 7], [8, 2]):
        x = torch.tensor([text])
        z, rest = model.until("embedding", x)
        torch.testing.assert_close(model.after("embedding", z, rest), net(x), rtol=0, atol=1e-12)


def test_a_text_of_one_kind_of_token_is_not_examined_beside_nothing():
    """Of a text of padding alone, the net that looks for the longest would see another length."""
    net = seeded(ByTheLongest(), 0.9)
    net.embedding.weight.data[PAD] = 0
    text = torch.full((1, 4), 5)
    found = attrib.explain(net, text, 1, "occlusion", run={"dtype": "float64"}).map
    torch.testing.assert_close(found[0].double(), _reference(net, text[0], net.embedding(text), "occlusion"))


def test_the_exam_takes_few_passes():
    """Of a large net they take as long as an explanation."""
    net, passes = seeded(ByTheLongest(), 0.9), []
    forward = type(net).forward
    net.forward = lambda x: passes.append(tuple(x.shape)) or forward(net, x)
    seen(net, torch.arange(1, 21).repeat(2, 1), PAD, pairs=True)
    assert len(passes) <= 16
