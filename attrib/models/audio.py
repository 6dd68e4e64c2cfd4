"""Small nets for sounds, on the raw wave."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn


class ToneCNN(nn.Sequential):
    """(N, channels, L) -> (N, num_classes): four strided convolutions in time and the mean over time, L >= 1024.

    The kernels of the first, 64 samples long, are a bank of filters. One place of the last sees 100 ms at 8 kHz, in
    steps of 8 ms. Every layer is a module of its own, so that any of them can have a role.
    """

    def __init__(self, num_classes: int = 6, channels: int = 1, width: int = 32) -> None:
        super().__init__(
            OrderedDict(
                conv1=nn.Conv1d(channels, width, 64, stride=8, padding=28),
                relu1=nn.ReLU(),
                conv2=nn.Conv1d(width, width, 8, stride=4, padding=2),
                relu2=nn.ReLU(),
                conv3=nn.Conv1d(width, 2 * width, 8, stride=2, padding=3),
                relu3=nn.ReLU(),
                conv4=nn.Conv1d(2 * width, 2 * width, 7, padding=3),
                relu4=nn.ReLU(),
                pool=nn.AdaptiveAvgPool1d(1),
                flatten=nn.Flatten(),
                fc=nn.Linear(2 * width, num_classes),
            )
        )
