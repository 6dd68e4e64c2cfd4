"""A net, inputs and explanations on which every metric of quantus has something to say."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from attrib.models import Classifier
from attrib.types import Batch

SIDE, CLASSES = 16, 5


class Weighted(nn.Module):
    """Logit 1 is a weighted sum of the pixels, logit 0 is zero; a layer that has representations and parameters."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.sum = nn.Linear(weight.numel(), 2, bias=False)
        self.sum.weight.data = torch.stack((torch.zeros(weight.numel()), weight.flatten()))

    def forward(self, x: Tensor) -> Tensor:
        return self.sum(x.flatten(1))


def small_net(channels: int) -> nn.Module:
    net = nn.Sequential(nn.Conv2d(channels, 4, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(4 * SIDE**2, CLASSES))
    for i, p in enumerate(net.parameters()):
        p.data = torch.arange(p.numel()).add(7.0 * i).mul(1.7).sin().mul(0.3).view_as(p)
    return net


def classifier(channels: int = 3, rows: int = 64, dtype: torch.dtype = torch.float32) -> Classifier:
    return Classifier(small_net(channels), rows=rows, dtype=dtype)


def samples(n: int = 3, channels: int = 3, dtype: torch.dtype = torch.float32) -> tuple[Batch, Tensor]:
    """Images with a square region, and maps (n, H, W) of both signs."""
    r = np.random.RandomState(0)
    x = nn.functional.avg_pool2d(torch.tensor(r.randn(n, channels, SIDE, SIDE)), 3, 1, 1) * 3
    roi = torch.zeros(n, SIDE, SIDE, dtype=torch.bool)
    roi[:, 2:9, 3:11] = True
    batch = Batch(tuple(f"s{i}" for i in range(n)), x.to(dtype), torch.tensor(r.randint(0, CLASSES, n)), roi)
    return batch, torch.tensor(r.randn(n, SIDE, SIDE)).to(dtype)


def gradient(model: Classifier, batch: Batch) -> Tensor:
    """Of the target's logit, summed over channels."""
    x = batch.x.to(model.device, model.dtype).clone().requires_grad_()
    with torch.enable_grad():
        score = model.module(x).gather(1, batch.target[:, None].to(x.device)).sum()
        return torch.autograd.grad(score, x)[0].sum(1)
