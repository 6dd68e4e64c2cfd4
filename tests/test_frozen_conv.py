"""Convolutions whose weights stay as they are: their numbers, and their way back, against torch's own in float64."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn
from torch.autograd import forward_ad

from attrib.models.frozen_conv import EXACT, FrozenConv
from attrib.models.fused import harmless

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch is without oneDNN")

FUNCTIONS = {"none": nn.Identity(), "relu": F.relu, "hardtanh": F.relu6, "swish": F.silu, "hardswish": F.hardswish}

LAYERS = {
    "pointwise": nn.Conv2d(8, 4, 1),
    "3x3": nn.Conv2d(8, 12, 3, padding=1),
    "not square": nn.Conv2d(8, 4, (1, 5), padding=(0, 2), bias=False),
    "asymmetric": nn.Conv2d(8, 4, (3, 2), padding=(2, 0)),
    "dilated": nn.Conv2d(8, 4, 3, padding=1, dilation=2),
    "groups": nn.Conv2d(8, 12, 3, padding=1, groups=4),
    "depthwise": nn.Conv2d(8, 8, 5, padding=2, groups=8),
    "depthwise, two each": nn.Conv2d(8, 16, 3, groups=8),
    "stride": nn.Conv2d(8, 4, 3, stride=2, padding=1),
    "stride of one side": nn.Conv2d(8, 4, 3, stride=(1, 2)),
    "stride beyond the kernel": nn.Conv2d(8, 4, 1, stride=3),
    "groups, stride": nn.Conv2d(8, 12, 3, stride=2, groups=2),
    "depthwise stride": nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8),
    "padded beyond the kernel": nn.Conv2d(8, 4, 3, padding=4),
    "as TensorFlow pads": Conv2dSame(8, 8, 3, stride=2, groups=8),
    "as TensorFlow pads, dilated": Conv2dSame(8, 4, 4, dilation=2),
}


def images(rows: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(rows, 8, 11, 10, generator=torch.Generator().manual_seed(0))
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


def layer_of(name: str) -> nn.Conv2d:
    layer = copy.deepcopy(LAYERS[name]).requires_grad_(False)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    return layer


def forwards_and_back(function, *inputs: Tensor) -> list[Tensor]:
    """What it gives, and its gradients at all inputs, of weights that differ."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    found = function(*leaves)
    shape = found.shape[1:]
    weights = torch.linspace(-1, 2, shape.numel(), dtype=torch.float64).view(1, *shape)
    weights = weights.contiguous(memory_format=torch.channels_last)
    return [found, *torch.autograd.grad((found.double() * weights).sum(), leaves)]


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("then", FUNCTIONS)
@pytest.mark.parametrize("rows", [1, 3])
def test_numbers_and_gradients_are_those_of_float64(name, then, rows):
    layer, x = layer_of(name), images(rows)
    slow = copy.deepcopy(layer).double()
    fast = FrozenConv(layer, then)
    expected = forwards_and_back(lambda x: FUNCTIONS[then](slow(x)), x.double())
    got = forwards_and_back(fast, x)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(fast(x).double(), expected[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["3x3", "depthwise", "stride", "as TensorFlow pads"])
def test_sums(name):
    """Of something of the same shape, of one image for all, and where only one of the two has a way back."""
    layer, x = layer_of(name), images()
    slow = copy.deepcopy(layer).double()
    fast = FrozenConv(layer, "relu")
    shape = layer(x).shape
    for other in (torch.randn(shape), torch.randn(1, *shape[1:]), torch.randn(shape[0], shape[1], 1, 1)):
        expected = forwards_and_back(lambda x, o: F.relu(slow(x) + o), x.double(), other.double())
        for a, b in zip(forwards_and_back(fast, x, other), expected, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)
        for at in (0, 1):
            leaves = [x.clone(), other.clone()]
            leaves[at].requires_grad_()
            weights = torch.linspace(-1, 2, shape[1:].numel()).view(shape[1:])
            (grad,) = torch.autograd.grad((fast(*leaves) * weights).sum(), leaves[at])
            torch.testing.assert_close(grad.double(), expected[1 + at], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("then", FUNCTIONS)
def test_gradients_of_gradients(name, then):
    layer, x = layer_of(name), images()
    slow = copy.deepcopy(layer).double()

    def twice(function, x: Tensor) -> Tensor:
        leaf = x.clone().requires_grad_()
        found = function(leaf)
        (grad,) = torch.autograd.grad((found**3).sum(), leaf, create_graph=True)
        return torch.autograd.grad((grad**2).sum(), leaf)[0]

    expected = twice(lambda x: FUNCTIONS[then](slow(x)), x.double())
    got = twice(FrozenConv(layer, then), x)
    torch.testing.assert_close(got.double() / expected.abs().max(), expected / expected.abs().max(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", LAYERS)
def test_half_the_bits(name):
    """As near to the truth as torch's own way back in bfloat16."""
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this processor does not multiply bfloat16")
    layer, x = layer_of(name).bfloat16(), images(dtype=torch.bfloat16)
    truth = forwards_and_back(lambda x: F.relu(copy.deepcopy(layer).double()(x)), x.double())[1]
    off = [
        (forwards_and_back(function, x)[1].double() - truth).norm() / truth.norm()
        for function in (FrozenConv(layer, "relu"), lambda x: F.relu(layer(x)))
    ]
    assert off[0] <= max(1.5 * off[1], 0.01)


def test_memory_formats_stay():
    for name, then in itertools.product(LAYERS, EXACT):
        found = forwards_and_back(FrozenConv(layer_of(name), then), images())
        for tensor in found:  # a gradient may be a part of one that has the padding, too
            assert (tensor.stride(1), tensor.stride(3)) == (1, tensor.shape[1]), (name, then)


@pytest.mark.parametrize("sizes", [(11, 10), (12, 12), (7, 1)])
@pytest.mark.parametrize("form", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("then", ["none", "relu"])
def test_a_layer_in_front_of_one_that_pads(sizes, form, then):
    """Padding is on one side, on both, or nowhere; what comes back from it is a part of something larger."""
    torch.manual_seed(3)
    first, second = nn.Conv2d(8, 8, 3, padding=1), Conv2dSame(8, 4, 4, stride=2)
    x = torch.randn(2, 8, *sizes, generator=torch.Generator().manual_seed(2)).contiguous(memory_format=form)
    slow = copy.deepcopy(nn.Sequential(first, second)).requires_grad_(False).double()
    expected = forwards_and_back(lambda x: slow[1](FUNCTIONS[then](slow[0](x))), x.double())
    fast = nn.Sequential(FrozenConv(first, then), FrozenConv(second)).requires_grad_(False)
    for a, b in zip(forwards_and_back(fast, x), expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


def test_no_rows():
    for name in LAYERS:
        layer = layer_of(name)
        found, grad = forwards_and_back(FrozenConv(layer, "relu"), images()[:0])
        assert found.shape == layer(images()[:0]).shape
        assert grad.shape == (0, 8, 11, 10)


@pytest.mark.parametrize("then", FUNCTIONS)
def test_numbers_of_another_precision_are_refused_as_torch_does(then):
    with pytest.raises(RuntimeError):
        FrozenConv(layer_of("3x3"), then)(images(dtype=torch.float64))


def test_what_is_something_else_is_refused():
    class Other(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    class Inside(nn.Conv2d):
        def _conv_forward(self, *args: Tensor) -> Tensor:
            return 2 * super()._conv_forward(*args)

    replaced = nn.Conv2d(3, 3, 3)
    replaced.forward = lambda x: x
    hooked = nn.Conv2d(3, 3, 3)
    hooked.register_forward_hook(lambda *_: None)
    shared = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 3))
    others = [
        Other(3, 3, 3),
        Inside(3, 3, 3),
        replaced,
        hooked,
        shared,
        nn.Conv2d(3, 3, 3, padding="same"),
        nn.Conv1d(3, 3, 3),
        None,
    ]
    others += [nn.Conv2d(3, 3, 3, padding_mode="circular"), nn.Conv2d(3, 3, 3).double(), nn.Conv2d(3, 3, 3).half()]
    assert not any(map(FrozenConv.can_be, others))
    assert all(map(FrozenConv.can_be, LAYERS.values()))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")
def test_derivatives_forwards_are_left_to_torch():
    with forward_ad.dual_level():
        x = forward_ad.make_dual(torch.ones(1, 3), torch.ones(1, 3))
        assert not harmless(x)
    assert harmless(torch.ones(1, 3))
