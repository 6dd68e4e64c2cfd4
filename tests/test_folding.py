"""Folded nets are the nets as they were, up to rounding, and what cannot be folded is left alone."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from tiny import ROOT
from torch import Tensor, fx, nn
from torch._dynamo import lookup_backend

from attrib.methods.baselines import Gradient
from attrib.models import Classifier
from attrib.models.compiled import Compiled
from attrib.models.fast import Fast, fast_net
from attrib.models.folding import channels_last, folded, graph_of
from attrib.noise import Noise
from attrib.types import Batch, UserError


def images(n: int = 4, side: int = 8) -> Tensor:
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(3)).double()


class Block(nn.Module):
    """Layers that a subclass connects, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.other = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm, self.second, self.act = nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.ReLU()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))

    def features(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


class NormFirst(Block):
    def features(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.other(self.act(self.norm(self.act(x))))


class AfterSum(Block):
    def features(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.norm(x + self.other(x))


class SharedNorm(Block):
    def features(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.other(self.act(self.norm(self.conv(x))))))


class UsedTwice(Block):
    def features(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.conv(x)))
        return self.second(self.other(self.act(self.norm(self.other(x)))))


class ReadElsewhere(Block):
    def features(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.act(self.norm(x)) * x


class Fused(Block):
    def __init__(self) -> None:
        super().__init__()
        self.norm = BatchNormAct2d(4)


class Grouped(Block):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8, affine=False), nn.Conv2d(8, 4, 3, groups=4))


class Transposed(Block):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose2d(3, 4, 3, stride=2)


class TransposedInGroups(Block):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ConvTranspose2d(8, 4, 3, groups=2))


class Standardised(nn.Conv2d):
    """A convolution that is not linear in its weights (Qiao et al., 2019)."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight / self.weight.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, padding=1)


class WithStandardised(Block):
    def __init__(self) -> None:
        super().__init__()
        self.conv = Standardised(3, 4, 3)


class Stopped(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.detach()) + 0 * x


class WithStopped(Block):
    def __init__(self) -> None:
        super().__init__()
        self.norm = Stopped(4)


class Vectors(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Flatten(), nn.Linear(192, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU()
        )


def drawn(kind: type[nn.Module]) -> nn.Module:
    """A net in float64 and eval mode, whose norms have statistics and weights."""
    torch.manual_seed(0)
    net = kind().double().eval().requires_grad_(False)
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                module.weight.uniform_(-2, 2)
                module.bias.normal_()
    return net


def norms(net: nn.Module) -> int:
    return sum(
        isinstance(net.get_submodule(str(node.target)), nn.modules.batchnorm._BatchNorm)
        for node in net.graph.nodes
        if node.op == "call_module"
    )


def way(function, x: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    logits = function(leaf)
    return logits.detach(), torch.autograd.grad(logits[:, 1].sum(), leaf)[0]


# net -> norms that stay
CASES = {
    Block: 0, NormFirst: 1, AfterSum: 1, SharedNorm: 0, UsedTwice: 0, ReadElsewhere: 1, Fused: 0, Grouped: 0,
    Transposed: 0, TransposedInGroups: 1, WithStandardised: 1, WithStopped: 1, Vectors: 0,
}  # fmt: skip


@pytest.mark.parametrize("kind", CASES, ids=lambda kind: kind.__name__)
def test_a_folded_net_is_the_same_function(kind):
    net, x = drawn(kind), images()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    graph = graph_of(net)
    new, _ = folded(graph, x[:2])
    assert norms(new) == CASES[kind]
    assert (new is graph) == (norms(new) == norms(graph))
    for each in (new, channels_last(new)):
        for got, expected in zip(way(each, x), way(net, x), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert net.state_dict().keys() == before.keys()


@pytest.fixture
def always(monkeypatch):
    """Nets of any size are folded."""
    monkeypatch.setattr("attrib.models.fast.LEAST", 0)


@pytest.mark.parametrize("layer", ["conv", "norm", "act", "features_of", "norm2"])
def test_a_cut_net_gives_what_its_layer_gives(always, layer):
    net = drawn(SharedNorm)
    net.norm2 = nn.BatchNorm2d(4).double().eval()
    if layer == "features_of":
        net = nn.Sequential(
            nn.Sequential(nn.Conv2d(3, 3, 1), drawn(Block).conv, drawn(Block).norm), nn.ReLU(), nn.Flatten()
        )
        layer = "0"
    elif layer == "norm2":
        net = nn.Sequential(drawn(Block).conv, nn.BatchNorm2d(4), nn.Flatten()).double()
        layer = "1"
    elif layer != "conv":
        net = drawn(Block)
    slow, fast = (Classifier(net, {"a": layer}, dtype=torch.float64, fold=fold) for fold in (False, True))
    x = images()
    (z, rest), (expected, other) = fast.until("a", x), slow.until("a", x)
    torch.testing.assert_close(z, expected, rtol=1e-10, atol=1e-12)
    assert z.is_contiguous()
    torch.testing.assert_close(z, slow.record(["a"], x)["a"], rtol=1e-10, atol=1e-12)
    objective = lambda logits, rows: logits[:, 0]  # noqa: E731
    for got, wanted in zip(fast.gradient(z, objective, "a", rest), slow.gradient(z, objective, "a", other)):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


def test_it_is_made_once_and_tried_for_every_shape(always, caplog):
    caplog.set_level(logging.INFO, "attrib.models.fast")
    net = drawn(Fused)
    fast = fast_net(net)
    for side in (8, 10):
        x = images(2, side)
        torch.testing.assert_close(fast(x), net(x), rtol=1e-10, atol=1e-12)
    assert fast._fast is not None
    assert len(fast._known) == 2
    assert [record.message.partition(":")[0] for record in caplog.records] == ["Fused"]


def test_small_nets_and_texts_stay_as_they_are():
    net = drawn(Block)
    fast = fast_net(net)
    fast(images())
    assert not fast._made
    embedding = nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, 2))
    assert Fast(embedding, "texts")(torch.ones(4, 2, dtype=torch.long)).shape == (4, 2)


class Branching(Block):
    def features(self, x: Tensor) -> Tensor:
        return super().features(x if x.shape[0] > 10**9 else -x)


class Detached(Block):
    def features(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            gate = self.act(self.norm(self.conv(x)))
        return gate * self.second(self.conv(x))


@pytest.mark.parametrize(
    ("kind", "reason"), [(Branching, "cannot trace"), (Detached, "stops gradients"), (NormFirst, None)]
)
def test_a_net_that_cannot_be_folded_stays_and_the_log_says_why(always, caplog, kind, reason):
    caplog.set_level(logging.INFO, "attrib.models.fast")
    net, x = drawn(kind), images()
    fast = fast_net(net)
    for _ in range(2):
        for got, expected in zip(way(fast, x), way(net, x), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    if reason is not None:
        (record,) = caplog.records
        assert reason in record.message


class ClampedNorm(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(max=4)


class ClampedConv(nn.Conv2d):
    """Torch's own forward, and what it calls is another."""

    def _conv_forward(self, *args: Any) -> Tensor:
        return super()._conv_forward(*args).clamp(-4, 4)


class WithClampedNorm(Block):
    def __init__(self) -> None:
        super().__init__()
        self.norm = ClampedNorm(4)


class WithClampedConv(Block):
    def __init__(self) -> None:
        super().__init__()
        self.conv = ClampedConv(3, 4, 3, padding=1)


class WithClampedCall(Block):
    """The layer's forward is replaced in the layer alone."""

    def features(self, x: Tensor) -> Tensor:
        if "forward" not in vars(self.conv):
            forward = self.conv.forward
            self.conv.forward = lambda x: forward(x).clamp(-4, 4)
        return super().features(x)


class Clamp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(-4, 4)


class WithClampWithin(Block):
    """A library's norm that calls what somebody else wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = BatchNormAct2d(4)
        self.norm.act = Clamp()


@pytest.mark.parametrize("kind", [WithClampedNorm, WithClampedConv, WithClampedCall, WithClampWithin])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_bends_large_numbers_alone_is_not_folded(always, kind, dtype):
    """The first inputs, on which the folds are tried, are too small to show it."""
    net, x = drawn(kind).to(dtype), images().to(dtype)
    fast = fast_net(net)
    fast(x / 100)
    for got, expected in zip(way(fast, 50 * x), way(net, 50 * x), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)


class NormAndReLU6(nn.BatchNorm2d):
    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.ReLU6()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


def test_a_clamp_that_stays_behind_the_fold_is_no_hindrance(always):
    """What was large in front of it has the rounding of large numbers."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1024, 1024, 1), NormAndReLU6(1024)).eval().requires_grad_(False)
    net[1].running_mean.normal_()
    net[1].weight.uniform_(10, 30)
    new, _ = folded(graph_of(net), torch.randn(1, 1024, 8, 8))
    assert norms(new) == 0


class Gate(nn.Module):
    """A layer in which gradients stop half-way."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            gate = self.norm(self.conv(x)).sigmoid()
        return gate * self.norm(self.conv(x))


def test_gradients_stop_inside_the_layer_at_which_a_net_is_cut(always):
    def net() -> nn.Module:
        return nn.Sequential(Gate(), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))

    found = []
    for fold in (True, False):
        model = Classifier(drawn(net), {"cam": "0"}, dtype=torch.float64, fold=fold)
        z, back = model.vjp("cam", images())
        found.append(back(torch.ones_like(z)))
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)


class HandsOverAMask(Block):
    """Behind the layer ``norm`` a mask is read that was made in front of it."""

    def features(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        positive = x > 0
        return torch.where(positive, self.norm(x), 0 * x)


def test_a_mask_that_is_handed_over_at_a_cut_is_compared_as_one(always, caplog):
    caplog.set_level(logging.INFO, "attrib.models.fast")
    model = Classifier(drawn(HandsOverAMask).float(), {"cam": "norm"})
    x = images().float()
    z, rest = model.until("cam", x)
    torch.testing.assert_close(model.after("cam", z, rest), model.module(x), rtol=1e-5, atol=1e-5)
    assert not [record for record in caplog.records if "as it is written" in record.message]


class InFloat(Block):
    def features(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return super().features(x.float())


def test_a_net_that_depends_on_autocast_stays_as_it_is_there(always):
    net, x = drawn(InFloat).float(), images().float()
    fast = fast_net(net)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            assert torch.equal(fast(x), net(x))
    torch.testing.assert_close(fast(x), net(x), rtol=1e-5, atol=1e-5)


def test_hooks_see_the_net_as_it_is_written(always):
    model = Classifier(drawn(Block), {"norm": "norm"}, dtype=torch.float64, fold=True)
    x, seen = images(), []
    model.logits(x)
    handle = model.roles.layer("norm").register_forward_hook(lambda module, inputs, output: seen.append(output))
    model.logits(x)
    handle.remove()
    assert len(seen) == 1
    model.logits(x)
    assert len(seen) == 1


def test_weights_are_cast_once_for_half_precision(always):
    net, x = drawn(SharedNorm).float(), images().float()
    fast = fast_net(net)
    fast(x)
    way_ = fast._fast
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert torch.equal(fast(x), way_.graph(x.contiguous(memory_format=torch.channels_last)))
        assert {p.dtype for p in way_.within(torch.bfloat16).graph.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in way_.graph.parameters()} == {torch.float32}


def test_a_method_gives_the_same_maps_in_half_precision_too(always):
    net = drawn(SharedNorm).float()
    batch = Batch(("a", "b"), images(2).float(), torch.tensor([0, 2]))
    models = [Classifier(net, fold=fold).with_precision("bfloat16") for fold in (False, True)]
    slow, fast = (Gradient().attribute(model, batch, {}, Noise(batch.uids))["map"] for model in models)
    assert (slow - fast).norm() < 0.05 * slow.norm()


def test_a_first_call_without_gradients_makes_nothing_without_them(always):
    net, x = drawn(SharedNorm), images()
    fast = fast_net(net)
    with torch.inference_mode():
        fast(x), fast(x.clone())
    assert fast._fast is not None
    for got, expected in zip(way(fast, x), way(net, x), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("how", ["in place", "loaded", "data", "another"])
def test_a_weight_that_is_another_later_is_noticed(always, how):
    model, x = Classifier(drawn(Block), {"cam": "norm"}, dtype=torch.float64), images()
    conv = model.module.conv

    def found() -> list[Tensor]:
        z, rest = model.until("cam", x)
        return [model.logits(x), model.after("cam", z, rest), model.gradient(x, lambda out, _: out[:, 1])[1]]

    before, new = found(), -2 * conv.weight.detach()
    if how == "in place":
        with torch.no_grad():
            conv.weight.copy_(new)
    elif how == "loaded":
        model.module.load_state_dict({**model.module.state_dict(), "conv.weight": new})
    elif how == "data":
        conv.weight.data = new
    else:
        conv.weight = nn.Parameter(new, requires_grad=False)
    leaf = x.clone().requires_grad_()
    logits = model.module(leaf.clone())
    expected = [logits.detach(), logits.detach(), torch.autograd.grad(logits[:, 1].sum(), leaf)[0]]
    for got, wanted, old in zip(found(), expected, before, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)
        assert not torch.allclose(got, old)


def test_weights_that_are_changed_later_are_noticed(always):
    net, x = drawn(SharedNorm), images()
    fast = fast_net(net)
    for change in (
        lambda: net.conv.weight.mul_(2),
        lambda: net.norm.running_mean.add_(1),
        lambda: net.head.bias.zero_(),
    ):
        before = fast(x)
        with torch.no_grad():
            change()
        assert not torch.allclose(fast(x), before)
        torch.testing.assert_close(fast(x), net(x), rtol=1e-10, atol=1e-12)
    net.conv = nn.Conv2d(3, 4, 3, padding=1).double().requires_grad_(False)
    torch.testing.assert_close(fast(x), net(x), rtol=1e-10, atol=1e-12)


def test_it_is_tried_with_all_bits_whatever_the_precision_is(always, monkeypatch):
    seen, convolve, matmul = [], nn.Conv2d.forward, torch.backends.cuda.matmul
    before = matmul.allow_tf32

    def forward(module, x):
        seen.append(matmul.allow_tf32)
        return convolve(module, x)

    monkeypatch.setattr(nn.Conv2d, "forward", forward)
    try:
        matmul.allow_tf32 = True
        fast_net(drawn(Block))(images())
        assert matmul.allow_tf32
    finally:
        matmul.allow_tf32 = before
    assert seen.count(True) == 1  # the call itself
    assert len(seen) > 5


# Compiled ---------------------------------------------------------------------------------------


def warnings_of(caplog) -> list[logging.LogRecord]:
    """Of attrib alone: torch's compiler has its own, and a test before may have asked for more than warnings."""
    return [r for r in caplog.records if r.name.startswith("attrib") and r.levelno >= logging.WARNING]


@pytest.fixture
def quickly_compiled(monkeypatch):
    """By all of torch.compile but the C++ compiler; counts the graphs that are compiled."""
    made: list[fx.GraphModule] = []

    def backend(graph: fx.GraphModule, example: list[Tensor]) -> Callable[..., Any]:
        made.append(graph)
        return lookup_backend("aot_eager")(graph, example)

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    return made


def test_a_compiled_net_is_the_same_function(always, quickly_compiled):
    net = drawn(SharedNorm)
    slow, fast = (Classifier(net, {"a": "conv"}, dtype=torch.float64, compile=on) for on in (False, True))
    objective, made = lambda logits, rows: logits[:, 0], []
    for n in (4, 3, 7, 1):
        x = images(n)
        torch.testing.assert_close(fast.logits(x), slow.logits(x), rtol=1e-10, atol=1e-12)
        (z, rest), _ = fast.until("a", x), slow.until("a", x)
        torch.testing.assert_close(fast.after("a", z, rest), slow.after("a", z, rest), rtol=1e-10, atol=1e-12)
        for where in ((x, objective), (z, objective, "a", rest)):
            for got, wanted in zip(fast.gradient(*where), slow.gradient(*where)):
                torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)
        made.append(len(quickly_compiled))
    # The net and what is behind the layer, and not anew for other numbers of rows.
    assert made[1] >= 2
    assert made[1:] == made[1:2] * 3


@pytest.mark.parametrize("error", [RuntimeError("no\ncompiler"), OSError("no g++"), torch.OutOfMemoryError("full")])
@pytest.mark.parametrize("when", ["made", "called"])
def test_what_cannot_be_compiled_is_computed_as_it_is(always, monkeypatch, caplog, error, when):
    def failing(graph: nn.Module, dynamic: bool) -> Callable[..., Any]:
        def call(*inputs: Tensor) -> Tensor:
            raise error

        return call if when == "called" else call()

    monkeypatch.setattr(torch, "compile", failing)
    net, x = drawn(SharedNorm), images()
    graph = graph_of(net)
    compiled = Compiled(graph, "SharedNorm")
    if isinstance(error, torch.OutOfMemoryError):  # whoever asked takes fewer rows
        with pytest.raises(torch.OutOfMemoryError):
            compiled(x)
        assert not warnings_of(caplog)
        return
    assert torch.equal(compiled(x), graph(x))
    assert torch.equal(compiled(x), graph(x))
    (record,) = warnings_of(caplog)
    said = f"{type(error).__name__}: {error}".replace("\n", " ")
    assert f"SharedNorm is not compiled, but computed as it is: {said}" in record.message
    caplog.set_level(logging.INFO, "attrib.models.fast")
    model = Classifier(net, dtype=torch.float64, compile=True)
    torch.testing.assert_close(model.logits(x), net(x), rtol=1e-10, atol=1e-12)
    assert "norms folded, channels_last memory" in caplog.records[-1].message


@pytest.mark.parametrize("fault", ["fails", "is wrong"])
def test_a_way_back_that_cannot_be_compiled(always, monkeypatch, caplog, fault):
    """torch may compile it no sooner than it is needed."""

    class Odd(torch.autograd.Function):
        @staticmethod
        def forward(ctx, result):
            return result.clone()

        @staticmethod
        def backward(ctx, gradient):
            if fault == "fails":
                raise RuntimeError("backend raised")
            return gradient * 2

    monkeypatch.setattr(torch, "compile", lambda graph, dynamic: lambda *inputs: Odd.apply(graph(*inputs)))
    net, x = drawn(SharedNorm), images()
    model, plain = (Classifier(net, dtype=torch.float64, compile=on) for on in (True, False))
    objective = lambda logits, rows: logits[:, 0]  # noqa: E731
    for got, wanted in zip(model.gradient(x, objective), plain.gradient(x, objective)):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)
    (record,) = warnings_of(caplog)
    assert "its gradients are not those of the graph" in record.message


def test_several_ways_back_from_one_pass(always, quickly_compiled):
    """As functional information of all classes has them."""
    model, x = Classifier(drawn(SharedNorm), dtype=torch.float64, compile=True), images().requires_grad_()
    logits = model(x)

    def back() -> None:
        for label in range(logits.shape[1]):
            (gradient,) = torch.autograd.grad(logits[:, label].sum(), x, retain_graph=True)
            found.append(gradient.any().item())

    found: list[bool] = []
    back()
    other = threading.Thread(target=back)  # as on a GPU, whose backward passes have threads of their own
    other.start()
    other.join()
    assert found == [True] * 2 * logits.shape[1]
    assert quickly_compiled


def test_an_error_of_the_net_is_not_the_compilers(monkeypatch, caplog):
    monkeypatch.setattr(torch, "compile", lambda graph, dynamic: graph)
    with pytest.raises(RuntimeError, match=r"size|shape|channels"):
        Compiled(graph_of(drawn(Block)), "Block")(images()[:, :2])
    assert not caplog.records


def test_a_net_that_is_too_small_to_be_compiled_says_so_once(caplog):
    model = Classifier(drawn(Block), dtype=torch.float64, compile=True)
    for side in (8, 10):
        model.logits(images(2, side))
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "Block is not compiled, but computed as it is: it is too small" in record.message


def test_a_net_with_hooks_of_the_users_own_says_that_it_is_not_compiled(always, caplog):
    net = drawn(Block)
    net.act.register_forward_hook(lambda _module, _inputs, output: 2 * output)
    model, x = Classifier(net, dtype=torch.float64, compile=True), images()
    assert torch.equal(model.logits(x), net(x))
    model.logits(x)
    (record,) = caplog.records
    assert "Block is not compiled, but computed as it is: somebody has hooks" in record.message


def test_what_is_not_folded_is_not_compiled_either(always, caplog):
    with pytest.raises(UserError, match=r"run\.compile=true .* run\.fold=true"):
        Classifier(drawn(Block), fold=False, compile=True)
    model = Classifier(drawn(Branching), dtype=torch.float64, compile=True)
    model.logits(images())
    (record,) = caplog.records
    assert "Branching is computed as it is written, not compiled" in record.message


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_a_net_is_compiled_in_earnest(always, caplog):
    net, x = drawn(SharedNorm).float(), images().float()
    model = Classifier(net, compile=True)
    torch.testing.assert_close(model.logits(x), net(x), rtol=1e-5, atol=1e-5)
    gradient = model.gradient(x, lambda logits, rows: logits[:, 0])[1]
    expected = Classifier(net).gradient(x, lambda logits, rows: logits[:, 0])[1]
    assert (gradient - expected).norm() < 1e-4 * expected.norm()
    assert not warnings_of(caplog)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_a_process_in_which_nobody_loaded_the_compiler():
    code = (
        "import torch; from torch import fx, nn; from attrib.models.compiled import Compiled; "
        "made = Compiled(fx.symbolic_trace(nn.Linear(3, 2)), 'a net'); made(torch.ones(2, 3)); assert made.works"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
