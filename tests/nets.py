"""Small nets with known weights, shared by the tests. Goldens: see ``tests/golden``."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

GOLDEN = Path(__file__).parent / "golden"


def golden(name: str) -> dict[str, np.ndarray]:
    """All arrays of ``tests/golden/<name>.npz``."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


class SmallCNN(nn.Module):
    """(N, 3, 32, 32) -> (N, 10); trained on Fashion-MNIST by the makers of the goldens."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.ReLU(),
        )
        self.pool = nn.AdaptiveAvgPool2d((4, 4))
        self.classifier = nn.Sequential(nn.Linear(512, 64), nn.ReLU(), nn.Dropout(), nn.Linear(64, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.pool(self.features(x)).flatten(1))


@cache
def _fashion() -> dict[str, np.ndarray]:
    return golden("smallcnn_fashion")


def small_cnn() -> SmallCNN:
    """A fresh copy with the golden weights, in eval mode, float32."""
    net = SmallCNN()
    net.load_state_dict({k.removeprefix("sd."): torch.tensor(v) for k, v in _fashion().items() if k.startswith("sd.")})
    return net.eval()


def small_cnn_images(which: str = "images") -> tuple[Tensor, Tensor]:
    """(N, 3, 32, 32) float32 and labels (N,): the 5 analysed "images", or the 200 "est_images"."""
    pixels = torch.tensor(_fashion()[which]).float() / 255
    x = (nn.functional.pad(pixels, (2, 2, 2, 2)) - 0.2860) / 0.3530
    labels = _fashion()["labels" if which == "images" else "est_labels"]
    return x[:, None].repeat(1, 3, 1, 1), torch.tensor(labels).long()
