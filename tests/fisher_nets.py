"""Small nets, inputs and covariances for the tests of functional information."""

from __future__ import annotations

import numpy as np
import torch
from contracts import seeded
from torch import Tensor, nn

from attrib.models import Classifier
from attrib.types import Batch


class Exponential(nn.Module):
    """exp of a linear function, of images (N, C, H, W) or anything else; and a constant beside it."""

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(w.flatten())

    def forward(self, x: Tensor) -> Tensor:
        f = (x.flatten(1) @ self.w).exp()
        return torch.stack((f, torch.ones_like(f) + 0 * f), 1)


class Linear(Exponential):
    """(w x, 0): log f = w x - log(1 + exp(w x)) under softmax, w x itself without."""

    def forward(self, x: Tensor) -> Tensor:
        f = x.flatten(1) @ self.w
        return torch.stack((f, 0 * f), 1)


def spd(n: int, seed: int = 0) -> Tensor:
    a = torch.tensor(np.random.RandomState(seed).randn(n, n + 2))
    return a @ a.T / n


class Conv(nn.Module):
    """Nothing in it is piecewise linear."""

    def __init__(self, dims: int = 2) -> None:
        super().__init__()
        conv = {1: nn.Conv1d, 2: nn.Conv2d}[dims]
        self.conv, self.head = conv(3, 4, 3, padding=1), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.conv(x)).flatten(2).mean(2))


def conv(rows: int = 64, dims: int = 2) -> Classifier:
    return Classifier(seeded(Conv(dims)), rows=rows, dtype=torch.float64)


def inputs(n: int, shape: tuple[int, ...] = (3, 4, 5), seed: int = 0) -> Batch:
    r = np.random.RandomState(seed)
    return Batch(
        tuple(f"{seed}/{i}" for i in range(n)), torch.tensor(r.randn(n, *shape)), torch.tensor(r.randint(0, 4, n))
    )


def low_rank_state(features: int, rank: int = 4) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    r = np.random.RandomState(5)
    basis = torch.linalg.qr(torch.tensor(r.randn(features, rank)))[0]
    rest, gain = torch.tensor(r.rand(features)) + 0.5, torch.tensor(r.rand(rank)) * 5 + 1
    about = {"classes": torch.tensor([-1]), "n": torch.tensor([0])}
    state = {"rest": rest[None], "basis": basis[None], "gain": gain[None], **about}
    d, one = torch.diag(rest.sqrt()), torch.eye(features).double()
    sigma = d @ (one + basis @ torch.diag(gain) @ basis.T) @ d
    return state, sigma, d @ (one + basis @ torch.diag((1 + gain).sqrt() - 1) @ basis.T)
