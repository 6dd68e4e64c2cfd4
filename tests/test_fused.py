"""Convolutions that compute the activation behind them as well give the net's own numbers."""

from __future__ import annotations

import logging
import operator

import pytest
import torch
import torch.nn.functional as F
from test_folding import Block, always, drawn, images  # noqa: F401
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from attrib.models import Classifier
from attrib.models.fast import fast_net, fast_split
from attrib.models.folding import graph_of
from attrib.models.frozen_conv import FrozenConv
from attrib.models.fused import LARGE, fused, harmless
from attrib.models.split import split

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch is without oneDNN")


class Functions(Block):
    def features(self, x: Tensor) -> Tensor:
        return F.relu6(self.norm(F.relu(self.conv(x), inplace=True).relu()))


class Residual(Block):
    def features(self, x: Tensor) -> Tensor:
        x = self.act(self.conv(x))
        y = self.act(x + self.second(self.other(x)))
        return F.relu(operator.iadd(self.norm(self.other(y)), y))


class Ways(Block):
    """Other activations, and a norm with one inside."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.six = BatchNormAct2d(4), nn.ReLU6()

    def features(self, x: Tensor) -> Tensor:
        return F.hardswish(self.other(F.silu(self.other(self.six(self.inner(self.conv(x)))))))


class ReadBefore(Block):
    """What the layers give is read by others, too."""

    def features(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        y = self.other(x)
        return self.act(x) + y.relu() + (y + x).relu() + self.second(self.act(self.other(y) + 1))


class OtherShapes(Block):
    """Sums whose parts have different shapes, and are computed apart; what is added may be the larger part."""

    def features(self, x: Tensor) -> Tensor:
        x = self.act(self.conv(x))
        x = self.act(self.other(x) + x.mean((2, 3), keepdim=True))
        return self.act(self.other(x.mean((2, 3), keepdim=True)) + x)


class Twice(Block):
    """Sums of a layer with itself."""

    def features(self, x: Tensor) -> Tensor:
        x = self.other(self.conv(x))
        return F.relu(x + x)


class Padded(Block):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")
        self.other = nn.Conv2d(4, 4, 2, padding="same")


# net -> layers that compute an activation as well
CASES = {Block: 1, Functions: 1, Residual: 3, Ways: 3, ReadBefore: 0, OtherShapes: 3, Twice: 0, Padded: 0}


def layers(net: nn.Module) -> int:
    """How many convolutions compute an activation as well."""
    return sum(isinstance(module, FrozenConv) and module.then != "none" for module in net.modules())


@pytest.mark.parametrize("kind", CASES, ids=lambda kind: kind.__name__)
def test_it_is_the_same_function(kind, always):  # noqa: F811
    net, x = drawn(kind).float(), images().float()
    fast = fast_net(net)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), net(x), rtol=1e-5, atol=1e-5)
    way = fast._fast
    made = fused(way.graph)
    assert (0 if made is None else layers(made)) == CASES[kind]
    assert (way._fused is None) == (made is None)


class Positions(Block):
    """A table of positions, of one row, is convolved, and what is added to it has a row for each input."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.ones(1, 4, 8, 8))

    def features(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return F.relu(self.other(self.table) + x)


class WrittenTo(Block):
    """What a layer read is changed in place before the sum, but not by inputs as small as the first."""

    def features(self, x: Tensor) -> Tensor:
        x = self.act(self.conv(x))
        y = self.other(x)
        x = F.relu6(x, inplace=True)
        return F.relu(y + x)


@pytest.mark.parametrize("kind", [Positions, WrittenTo], ids=lambda kind: kind.__name__)
def test_inputs_unlike_the_first_are_the_same_too(always, kind):  # noqa: F811
    net, x = drawn(kind).float(), images().float()
    nn.init.constant_(net.conv.bias, 1.0)
    fast = fast_net(net)
    with torch.no_grad():
        fast(x[:1] / 100)
        assert fast._fast._fused is not None
        for inputs in (x, 100 * x, x[:0]):
            torch.testing.assert_close(fast(inputs), net(inputs.clone()), rtol=1e-5, atol=1e-3)


class Prompt(Block):
    """What the layer gives is the same for all rows."""

    def __init__(self) -> None:
        super().__init__()
        self.prompt = nn.Parameter(torch.ones(1, 3, 9, 9))

    def features(self, x: Tensor) -> Tensor:
        return self.act(self.conv(self.prompt) + torch.cat((x, x[:, :1]), 1))


def test_sums_that_broadcast_only_where_there_are_several_rows(always):  # noqa: F811
    net, x = drawn(Prompt).float(), torch.randn(5, 3, 9, 9)
    fast = fast_net(net)
    with torch.no_grad():
        for rows in (1, 5):
            torch.testing.assert_close(fast(x[:rows]), net(x[:rows]), rtol=1e-5, atol=1e-5)
    assert layers(fast._fast._fused) == 1


class TooEarly(Block):
    """What is added changes in place behind the sum, so that the sum cannot be computed later."""

    def features(self, x: Tensor) -> Tensor:
        x = self.other(self.conv(x)) * 3
        y = self.other(x) + x
        x.mul_(2)
        return self.act(y)


@pytest.mark.parametrize("value", [0.0, torch.nan, 1e8])
def test_inputs_that_are_no_numbers_do_not_hide_what_differs(always, value):  # noqa: F811
    """Of such inputs activations are computed apart, so they say nothing of how it is for others."""
    net, x = drawn(TooEarly).float(), images().float()
    fast, first = fast_net(net), x.clone()
    first[:, 0, 0, 0] = value
    with torch.no_grad():
        fast(first)
        assert fast._fast._fused is None
        torch.testing.assert_close(fast(x), net(x), rtol=1e-5, atol=1e-5)


def test_gradients_go_the_way_of_the_net(always):  # noqa: F811
    net, x = drawn(Residual).float(), images().float()
    fast = fast_net(net)
    fast(x)
    found = []
    for function in (fast, net):
        leaf = x.clone().requires_grad_()
        found.append(torch.autograd.grad(function(leaf)[:, 1].sum(), leaf)[0])
    assert fast._fast._fused is not None
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e30])
def test_what_is_no_number_stays_so(always, value):  # noqa: F811
    """oneDNN's ReLU makes 0 of NaN."""
    net, x = drawn(Residual).float(), images().float()
    fast = fast_net(net)
    with torch.no_grad():
        fast(x)
        x[1, 0, 3, 3] = value
        assert not harmless(x)
        got, expected = fast(x), net(x)
    assert torch.equal(got.isnan(), expected.isnan())
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


class Divides(Block):
    """0 / 0 of an image of one colour; in front of it an activation is computed with its layer."""

    def features(self, x: Tensor) -> Tensor:
        x = self.act(self.conv(x - x.mean((1, 2, 3), keepdim=True)))
        x = x - x.mean((1, 2, 3), keepdim=True)
        return F.relu(self.other(x / x.std((1, 2, 3), keepdim=True)))


class Patched(nn.Conv2d):
    """Divides by how much there is."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x / x.sum((1, 2, 3), keepdim=True))


class Subclass(Block):
    def __init__(self) -> None:
        super().__init__()
        self.other = Patched(4, 4, 3, padding=1)
        self.last = nn.Conv2d(4, 4, 1)

    def features(self, x: Tensor) -> Tensor:
        return F.relu(self.last(self.other(F.relu(self.conv(x)))))


class Normed(Block):
    """A norm without epsilon, of an image of one colour."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, 4, eps=0.0)

    def features(self, x: Tensor) -> Tensor:
        return F.relu(self.other(self.norm(self.act(self.conv(x)))))


@pytest.mark.parametrize("kind", [Divides, Subclass, Normed], ids=lambda kind: kind.__name__)
def test_what_a_net_makes_of_numbers_that_is_none_stays_so(always, kind):  # noqa: F811
    net, x = drawn(kind).float(), images().float()
    nn.init.zeros_(net.conv.bias)
    fast = fast_net(net)
    with torch.no_grad():
        fast(x)
        assert layers(fast._fast._fused) == 1
        got, expected = fast(torch.zeros_like(x)), net(torch.zeros_like(x))
    assert expected.isnan().all()
    assert got.isnan().all()


def test_where_it_does_no_harm():
    x = torch.ones(2, 3)
    assert harmless(x, torch.ones(2, dtype=torch.long), x[:0])
    assert not harmless(x, torch.full((1,), LARGE))
    assert harmless(x.requires_grad_())


def test_parts_of_a_net_and_the_log(always, caplog):  # noqa: F811
    caplog.set_level(logging.INFO, "attrib.models.fast")
    net, x = drawn(Residual).float(), images().float()
    cut = fast_split(split(net, "conv", x), net, "conv")
    with torch.no_grad():
        z, rest = cut.front(x)
        torch.testing.assert_close(z, net.conv(x), rtol=1e-5, atol=1e-5)  # not its ReLU, which is behind the cut
        torch.testing.assert_close(cut.rear(z, rest), net(x), rtol=1e-5, atol=1e-5)
    assert "convolutions fused" in caplog.text


def test_layers_that_are_read_keep_their_meaning(always):  # noqa: F811
    net, x = drawn(Residual).float(), images().float()
    slow, fast = (Classifier(net, {"a": "other", "b": "conv"}, fold=fold) for fold in (False, True))
    fast.logits(x)
    torch.testing.assert_close(fast.record(["b"], x)["b"], slow.record(["b"], x)["b"])
    assert (fast.record(["b"], x)["b"] < 0).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_the_bits_are_rounded_as_torch_rounds_them(always, dtype):  # noqa: F811
    """Only what is exact: an activation that chooses, and none of float16, which is soon at its end."""
    net, x = drawn(Ways).float(), images().float()
    fast = fast_net(net)
    with torch.no_grad():
        fast(x)
        within = fast._fast.within(dtype)
        with torch.autocast("cpu", dtype):
            got = within(x)
            made, within._fused = within._fused, None
            assert torch.equal(got, within(x))
    supported = dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert (0 if made is None else layers(made)) == (1 if supported else 0)


def test_float64_and_the_given_graph_stay():
    net = drawn(Residual)
    graph = graph_of(net)
    assert fused(graph) is None
    graph = graph_of(net.float())
    before = str(graph.graph)
    assert fused(graph) is not None
    assert str(graph.graph) == before
