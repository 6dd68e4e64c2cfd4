"""A small net for sounds, the same net for images of a single row, and batches for both."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from contracts import seeded
from torch import Tensor, nn

from attrib.models import Classifier
from attrib.types import Batch

L, K = 24, 5
LAYERS = ("conv2", "conv3", "hidden", "head")


class SoundNet(nn.Module):
    """(N, 2, 24) -> (N, 5): a conv net with a ReLU, a stride, a functional ReLU and a layer for every role."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv1d(2, 4, 5, stride=2, padding=2), nn.Conv1d(4, 6, 3, padding=1)
        self.conv3, self.relu = nn.Conv1d(6, 4, 3, padding=1), nn.ReLU(inplace=True)
        self.hidden, self.head = nn.Linear(4 * 12, 8), nn.Linear(8, K)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv2(self.relu(self.conv1(x))))
        return self.head(torch.tanh(self.hidden(self.conv3(x).relu().flatten(1)) / 4))


class RowNet(SoundNet):
    """(N, 2, 1, 24) -> (N, 5): the same numbers, by convolutions in two dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 4, (1, 5), stride=(1, 2), padding=(0, 2))
        self.conv2, self.conv3 = nn.Conv2d(4, 6, (1, 3), padding=(0, 1)), nn.Conv2d(6, 4, (1, 3), padding=(0, 1))


def layers(roles: Sequence[str]) -> dict[str, str]:
    known = {"bottleneck": "conv2", "cam": "conv3"}
    return known | dict(zip([role for role in roles if role not in known], LAYERS, strict=False))


def audio_classifier(roles: Sequence[str] = (), net: type[nn.Module] = SoundNet) -> Callable[..., Classifier]:
    def build(rows: int = 64, dtype: torch.dtype = torch.float64) -> Classifier:
        return Classifier(seeded(net()), layers(roles), rows=rows, dtype=dtype)

    return build


def sounds(n: int, seed: int = 0) -> Batch:
    r = np.random.RandomState(seed)
    roi = torch.zeros(n, L, dtype=torch.bool)
    for i in range(n):
        roi[i, i : i + 6] = True
    return Batch(tuple(f"{seed}/{i}" for i in range(n)), torch.tensor(r.randn(n, 2, L)), torch.arange(n) % K, roi)


def as_rows(batch: Batch) -> Batch:
    """Sounds as images of height 1."""
    return dataclasses.replace(batch, x=batch.x.unsqueeze(2), roi=batch.roi.unsqueeze(1))
