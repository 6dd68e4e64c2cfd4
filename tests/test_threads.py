"""Threads that explain at once, with one Classifier or each with its own, get what they get alone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from nets import small_cnn
from torch import Tensor, nn

import attrib
from attrib.models import Classifier
from attrib.models.layers import hooked
from attrib.models.split import GraphSplit, HookSplit, trace


class Steps(nn.Sequential):
    """A convolution, a norm, an activation and a head."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))


class Untraced(Steps):
    """A net that torch.fx cannot trace, so that it is cut by hooks."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(-x if float(x.sum()) > 1e9 else x)


def images(seed: int) -> Tensor:
    return torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def at_once(*work: Callable[[], None]) -> None:
    """Each in a thread of its own; raises what any of them raises."""
    errors: list[Exception] = []

    def run(one: Callable[[], None]) -> None:
        try:
            one()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(one,)) for one in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_a_hook_is_that_of_the_thread_that_set_it():
    layer = nn.ReLU()
    with hooked(layer, lambda *_: torch.full((1,), 7.0)):
        found: list[Tensor] = []
        at_once(lambda: found.append(layer(torch.ones(1))))
        assert layer(torch.ones(1)) == 7
    assert found == [torch.ones(1)]


@pytest.mark.parametrize(("kind", "cut"), [(Steps, GraphSplit), (Untraced, HookSplit)])
def test_one_classifier_in_two_threads(kind, cut, monkeypatch):
    monkeypatch.setattr("attrib.models.fast.LEAST", 0)
    torch.manual_seed(0)
    model = Classifier(kind().eval(), {"cam": "0", "bottleneck": "2"}, input_shape=(3, 8, 8), rows=1)

    def work(x: Tensor) -> list[Tensor]:
        z, rest = model.until("cam", x)
        _, grad = model.gradient(z, lambda out, _: out[:, 1], "cam", rest)
        return [
            z,
            model.after("cam", 2 * z, rest),
            grad,
            model.logits(x),
            *model.record(["cam", "bottleneck"], x).values(),
        ]

    expected = [work(images(i)) for i in range(2)]
    assert type(model._splits["cam"]) is cut

    def again(i: int) -> None:
        for _ in range(30):
            for got, wanted in zip(work(images(i)), expected[i], strict=True):
                torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)

    at_once(lambda: again(0), lambda: again(1))


class Slow(nn.Sequential):
    """Waits while it is traced until another thread has done something."""

    traced: threading.Event
    done: threading.Event

    def forward(self, x: Any) -> Any:
        if isinstance(x, torch.fx.Proxy):
            self.traced.set()
            assert self.done.wait(10)
        return super().forward(x)


def test_another_thread_computes_while_a_net_is_traced():
    """torch.fx takes hold of the calls, and the attributes, of all modules of the process meanwhile."""
    net = Slow(nn.Conv2d(3, 2, 3), nn.ReLU())
    net.traced, net.done = threading.Event(), threading.Event()
    other, x, found = nn.Linear(2, 2), torch.ones(1, 2), []

    def compute() -> None:
        assert net.traced.wait(10)
        found.extend([other(x), net[0].weight, net[0](images(0))])
        net.done.set()

    graphs: list[torch.fx.Graph] = []
    at_once(lambda: graphs.append(trace(net)), compute)
    assert torch.equal(found[0], other(x))
    assert found[1] is net[0].weight
    assert isinstance(found[2], Tensor)
    assert [node.op for node in graphs[0].nodes] == ["placeholder", "call_module", "call_module", "output"]


def test_two_threads_explain_with_nets_of_their_own():
    call, nets = nn.Module.__call__, [small_cnn().eval() for _ in range(2)]

    def maps(i: int) -> Tensor:
        x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(i))
        return torch.stack([*attrib.explain(nets[i], x, method="gradient", target=0).maps.values()])

    expected = [maps(i) for i in range(2)]

    def again(i: int) -> None:
        for _ in range(3):
            torch.testing.assert_close(maps(i), expected[i])

    at_once(lambda: again(0), lambda: again(1))
    assert nn.Module.__call__ is call
