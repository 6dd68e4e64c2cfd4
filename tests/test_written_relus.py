"""Guided backpropagation and deconvolution find a ReLU however it is written."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attrib.methods.baselines import Deconvolution, GuidedBackprop
from attrib.models import Classifier
from attrib.types import Batch, UserError

RELUS = [
    lambda z, net: (z + z.abs()) / 2,
    lambda z, net: 0.5 * z + 0.5 * z.abs(),
    lambda z, net: (z + (z * z).sqrt()) * 0.5,
    lambda z, net: z - z.clamp(max=0),
    lambda z, net: z - torch.minimum(z, torch.zeros_like(z)),
    lambda z, net: -torch.minimum(-z, torch.zeros_like(z)),
    lambda z, net: -((-z).clamp(max=0)),
    lambda z, net: z + F.relu(-z),
    lambda z, net: F.prelu(z, net.none),
    lambda z, net: z * torch.heaviside(z, torch.zeros((), dtype=z.dtype)),
    lambda z, net: z * (z.sign() + 1) / 2,
    lambda z, net: torch.lerp(torch.zeros_like(z), z, (z > 0).to(z.dtype)),
]
RELU6S = [lambda z, net: F.relu(z) - F.relu(z - 6), lambda z, net: torch.minimum((z + z.abs()) / 2, 6 + 0 * z)]


class Net(nn.Module):
    """A layer of ReLUs, each written in another way; or all alike, as ``reference``."""

    def __init__(self, forms, reference=None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.none = nn.Conv2d(3, 4, 3), nn.Parameter(torch.zeros(4))
        self.fc = nn.Linear(4 * len(forms), 3)
        self.forms, self.reference = forms, reference

    def forward(self, x):
        z = 4 * self.conv(x)
        parts = [form(z, self) if self.reference is None else self.reference(z) for form in self.forms]
        return self.fc(torch.cat(parts, 1).mean((2, 3)))


def maps(method, net: nn.Module) -> torch.Tensor:
    x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    model = Classifier(net.double().eval(), dtype=torch.float64)
    return method.attribute(model, Batch(("a", "b"), x, torch.tensor([0, 2])), {}, None)["map"]


@pytest.mark.parametrize("method", [GuidedBackprop(), Deconvolution()], ids=["guided", "deconvolution"])
@pytest.mark.parametrize(("forms", "relu"), [(RELUS, F.relu), (RELU6S, F.relu6)], ids=["relu", "relu6"])
def test_a_relu_is_found_however_it_is_written(method, forms, relu):
    torch.testing.assert_close(maps(method, Net(forms)), maps(method, Net(forms, relu)), rtol=0, atol=1e-12)


def test_what_is_no_relu_keeps_its_gradient():
    """Beside a ReLU: functions that look like one in part of their range."""
    others = [
        lambda z, net: F.leaky_relu(z, 0.1),
        lambda z, net: z.abs(),
        lambda z, net: z.clamp(min=-0.5),
        lambda z, net: F.softplus(z, beta=50),
        lambda z, net: (z + z.roll(1, 1).abs()) / 2,
        lambda z, net: (z + z.abs()) * net.none.add(torch.arange(4)).view(-1, 1, 1),
    ]
    net = Net(others)
    with pytest.raises(UserError, match="guided backpropagation is defined for ReLUs"):
        maps(GuidedBackprop(), Net(others[:-1]))
    assert maps(GuidedBackprop(), net).abs().sum() > 0  # 2 ReLU, times a constant per channel


def test_a_maximum_with_a_stacked_zero_is_refused():
    net = Net([lambda z, net: F.relu(z), lambda z, net: torch.stack((z, torch.zeros_like(z))).amax(0)])
    with pytest.raises(UserError, match="a zero that is stacked on them"):
        maps(GuidedBackprop(), net)
