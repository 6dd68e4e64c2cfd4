"""What every method promises, tested by registration: a YAML in ``configs/method`` is enough."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from contracts import fit_contract, method_contract, seeded
from torch import Tensor, nn

from attrib.config import build
from attrib.models import Classifier
from attrib.types import Batch

ROOT = Path(__file__).parent.parent
METHODS = sorted((ROOT / "configs" / "method").glob("*.yaml"))
H, W, K = 12, 10, 5

# What makes a method cheap, wherever it has such a field. Nothing else is taken from the YAML but its own values.
CHEAP = {
    "steps": 3, "samples": 3, "batch": 2, "draws": 2, "epochs": 2, "train_batch": 4, "window": 4, "stride": 3,
}  # fmt: skip


class Net(nn.Module):
    """A conv net with a ReLU, a pool, a functional ReLU and a layer for every role that a method may ask for."""

    LAYERS = ("conv2", "conv3", "conv4", "hidden", "head")

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)
        self.conv3, self.conv4 = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 4, 3, padding=1)
        self.relu, self.pool = nn.ReLU(inplace=True), nn.MaxPool2d(2)
        self.hidden, self.head = nn.Linear(4 * 6 * 5, 8), nn.Linear(8, K)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.conv1(x)))
        x = F.relu(self.conv2(x))
        x = self.relu(self.conv3(x))
        x = self.conv4(x).relu()
        return self.head(F.relu(self.hidden(x.flatten(1))))


def layers(roles: Sequence[str]) -> dict[str, str]:
    """The bottleneck first, the layer for CAMs behind it, any other roles from front to back."""
    known = {"bottleneck": "conv2", "cam": "conv4"}
    others = [role for role in roles if role not in known]
    return known | dict(zip(others, Net.LAYERS, strict=False))


def classifier(roles: Sequence[str]) -> Callable[[int, torch.dtype], Classifier]:
    return lambda rows, dtype: Classifier(seeded(Net()), layers(roles), rows=rows, dtype=dtype)


def pictures(n: int, seed: int = 0) -> Batch:
    r = np.random.RandomState(seed)
    uids = tuple(f"{seed}/{i}" for i in range(n))
    return Batch(uids, torch.tensor(r.randn(n, 3, H, W)), torch.tensor(r.randint(0, K, n)))


def load(path: Path) -> Any:
    """The method of a YAML, made cheap."""
    node = yaml.safe_load(path.read_text())
    node.pop("name")
    return build({field: CHEAP.get(field, value) for field, value in node.items()}, path.stem)


@pytest.mark.parametrize("path", METHODS, ids=lambda path: path.stem)
def test_method(path):
    method = load(path)
    roles = (*method.roles, *(method.fit.roles if method.fit else ()))
    build_model = classifier(roles)
    state = fit_contract(method.fit, build_model, pictures(10, seed=1)) if method.fit else {}
    method_contract(method, build_model, pictures(4), state)


def test_there_are_methods():
    assert {"iba", "gradient", "random"} <= {path.stem for path in METHODS}
