"""Torch's batch norm for the CPU gives one row wrong gradients where its output becomes tokens; here it must not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attrib.methods.baselines import Deconvolution, Gradient, GuidedBackprop
from attrib.methods.cam import HiResCAM
from attrib.methods.captum import Captum
from attrib.models import Classifier
from attrib.noise import Noise
from attrib.types import Batch


def written(norm: nn.BatchNorm2d | nn.InstanceNorm2d, x: torch.Tensor) -> torch.Tensor:
    mean, var = (t.view(1, -1, 1, 1) for t in (norm.running_mean, norm.running_var))
    return (x - mean) / (var + norm.eps).sqrt()


def by_function(norm: nn.BatchNorm2d | nn.InstanceNorm2d, x: torch.Tensor) -> torch.Tensor:
    return F.batch_norm(x, norm.running_mean, norm.running_var, eps=norm.eps)


class Tokens(nn.Module):
    """A convolution, a norm, and tokens of its places; ``norm`` is how the norm is computed."""

    def __init__(self, kind: type[nn.Module] = nn.BatchNorm2d, norm=lambda norm, x: norm(x)) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(3, 4, 3), kind(4, affine=False, track_running_stats=True)
        self.norm.running_var.uniform_(0.5, 2)
        self.norm.running_mean.normal_()
        self.tokens, self.fc, self.by = nn.LayerNorm(4), nn.Linear(4, 3), norm

    def forward(self, x):
        x = self.by(self.norm, self.conv(x))
        x = self.tokens(x.flatten(2).transpose(1, 2))
        return self.fc(F.relu(x).mean(1))


def maps(method, net: nn.Module, rows: int) -> torch.Tensor:
    x = torch.randn(2, 3, 6, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    model = Classifier(net.double().eval(), {"cam": "conv"}, rows=rows, dtype=torch.float64)
    uids = ("a", "b")
    batch = Batch(uids, x, torch.tensor([0, 2]))
    return method.attribute(model, batch, {}, Noise(uids, 0, dtype=torch.float64))["map"]


METHODS = (Gradient(), GuidedBackprop(), Deconvolution(), HiResCAM(), Captum("Saliency"), Captum("InputXGradient"))


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize(
    "net",
    [Tokens(), Tokens(norm=by_function), Tokens(nn.InstanceNorm2d)],
    ids=["batch_norm", "function", "instance_norm"],
)
@pytest.mark.quick(but=["*-Deconvolution*", "instance_norm-GuidedBackprop*"])
def test_one_row_gets_the_gradient_of_the_norm_written_out(method, net):
    expected = maps(method, Tokens(norm=written), 2)
    for rows in (1, 2):
        torch.testing.assert_close(maps(method, net, rows), expected, rtol=1e-9, atol=1e-12)
