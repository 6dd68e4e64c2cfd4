"""The engine of the perturbation metrics: the fast ways make the same images as the plain one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from attrib.metrics import perturb
from attrib.metrics.perturb import score_grid, score_mixed, score_path
from attrib.models import Classifier
from attrib.noise import Noise

UIDS = ("a", "b", "c")


@pytest.fixture(autouse=True)
def _none_is_small(monkeypatch):
    monkeypatch.setattr(perturb, "SMALL", 0)


class Changing(nn.Module):
    """Every number counts, with another weight; it spoils what it is given. Notes the images that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []
        self.fails = 0  # calls that run out of memory, from the third on

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.clone())
        if self.fails and len(self.seen) > 2:
            self.fails -= 1
            raise torch.OutOfMemoryError("out of memory")
        weight = torch.arange(x[0].numel(), dtype=x.dtype).mul(1.7).sin()
        logit = (x.flatten(1) * weight).sum(1)
        x += 5.0
        return torch.stack((logit, torch.zeros_like(logit)), 1)


def net(rows: int) -> tuple[Classifier, Changing]:
    model = Classifier(Changing(), rows=rows, dtype=torch.float64)
    return model, model.module


def work(size: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Start, end, ranks of tiles (many places of one rank), and the target."""
    noise = Noise(UIDS, dtype=torch.float64)
    start, end = noise.normal(2, *size), noise.normal(2, *size)
    return start, end, noise.integers(20, *size), torch.tensor([0, 1, 0])


COUNTS = {
    "all": list(range(21)),
    "few": [0, 3, 20],
    "repeated": [0, 0, 1, 1, 7, 7, 20, 25],
    "one": [4],
    "late": [18, 19, 20],
}


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("size", [(9, 11), (40,), (1, 1), (60, 70)])  # of the last not all changes fit one step
@pytest.mark.parametrize("rows", [1, 3, 7, 64])
def test_three_ways_give_the_same_images(rows, size, counts):
    start, end, rank, target = work(size)
    below = torch.tensor(counts)
    shape = (-1, 1, *[1] * len(size))

    def images(sample: Tensor, column: Tensor) -> Tensor:
        return torch.where(rank[sample, None] < below[column].view(shape), end[sample], start[sample])

    seen, scores = [], []
    for way in (
        lambda model: score_grid(model, target, len(counts), images, "logit"),
        lambda model: score_mixed(
            model, target, len(counts), start, end, lambda i, some: rank[i] < below[some].view(shape), "logit"
        ),
        lambda model: score_path(model, target, start, end, rank, below, "logit"),
    ):
        model, module = net(rows)
        scores.append(way(model))
        seen.append(torch.cat(module.seen))
        assert model.passed == 3 * len(counts)
        assert max(map(len, module.seen)) <= rows
    assert scores[0].shape == (3, len(counts))
    assert torch.equal(seen[1], seen[0])
    assert torch.equal(seen[2], seen[0])
    assert torch.equal(scores[1], scores[0])
    assert torch.equal(scores[2], scores[0])


def test_nothing_given_is_changed():
    start, end, rank, target = work((9, 11))
    before = [t.clone() for t in (start, end, rank)]
    score_path(net(4)[0], target, start, end, rank, torch.arange(21))
    assert all(torch.equal(a, b) for a, b in zip(before, (start, end, rank)))


def test_a_block_without_memory_is_made_again_smaller(monkeypatch):
    monkeypatch.setattr("attrib.models.classifier.release_memory", lambda device: None)  # takes half a second
    start, end, rank, target = work((9, 11))
    expected = score_path(net(8)[0], target, start, end, rank, torch.arange(21), "logit")
    model, module = net(8)
    module.fails = 2
    found = score_path(model, target, start, end, rank, torch.arange(21), "logit")
    assert model.rows == 2
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_no_samples():
    start, end, rank, target = work((9, 11))
    found = score_path(net(8)[0], target[:0], start[:0], end[:0], rank[:0], torch.arange(21))
    assert found.shape == (0, 21)
