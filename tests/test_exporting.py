"""What is around torch.export: nothing on the screen, and ``len`` of a tensor that leaves the number of rows open."""

import builtins
import sys
import threading

import pytest
import torch
from torch import nn

from attrib.methods.cd import CD
from attrib.methods.lrp import LRP
from attrib.models import Classifier
from attrib.models.exporting import symbolic_len, unprinted
from attrib.models.graph import Graphs
from attrib.noise import Noise
from attrib.types import Batch, UserError


class Tokens(nn.Module):
    """(N, 5, 4) -> (N, 3): a class token in front, as ``function(tokens, net)`` puts it there."""

    def __init__(self, function):
        super().__init__()
        torch.manual_seed(0)
        self.function, self.cls = function, nn.Parameter(torch.randn(1, 1, 4))
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.inner(self.function(x, self)).relu().mean(1))


def count(x):
    """``len`` outside of the method and its module's class."""
    return len(x)


OPEN = {
    "expand": lambda x, net: torch.cat((net.cls.expand(len(x), -1, -1), x), 1),
    "view": lambda x, net: torch.cat((net.cls.expand(x.shape[0], -1, -1), x), 1).view(len(x), 6, -1),
    "of something later": lambda x, net: net.inner(x).reshape(len(net.inner(x)) * 5, 4).view(-1, 5, 4),
    "arange": lambda x, net: x + 0.1 * (torch.arange(len(x)) * 0 + 1).view(-1, 1, 1),
    "zeros": lambda x, net: x + torch.zeros(len(x), 5, 4),
    "in a function": lambda x, net: x.reshape(count(x) * 5, 4).view(count(x), 5, 4),
    "of a list, too": lambda x, net: torch.cat([net.cls.expand(len(x), len([1]), 4), x], 1),
}


def pictures(rows=2):
    return torch.randn(rows, 5, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", OPEN)
def test_len_leaves_the_number_of_rows_open(kind):
    net = Tokens(OPEN[kind]).eval()
    graph = Graphs(net).of(pictures())
    graph.check_any_rows("x")
    for rows in (1, 2, 4, 7):
        torch.testing.assert_close(graph(pictures(rows)), net(pictures(rows)))
    assert builtins.len is len
    assert type(len) is type(print)  # the usual one


@pytest.mark.parametrize("method", [CD(), LRP()], ids=["cd", "lrp"])
def test_methods_on_the_graph_take_such_a_net(method):
    class Picture(nn.Module):
        def __init__(self, rows):
            super().__init__()
            torch.manual_seed(0)
            self.rows, self.conv, self.head = rows, nn.Conv2d(3, 4, 3), nn.Linear(4 * 36, 3)

        def forward(self, x):
            return self.head(self.conv(x).relu().reshape(self.rows(x), -1))

    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    batch = Batch(("a", "b", "c"), x, torch.tensor([0, 1, 2]))
    maps = []
    for rows in (count, lambda x: x.shape[0]):
        model = Classifier(Picture(rows), dtype=torch.float64)
        noise = Noise(batch.uids, 0, dtype=torch.float64)
        maps.append(next(iter(method.attribute(model, batch, {}, noise).values())))
    torch.testing.assert_close(maps[0], maps[1])


def test_rows_that_are_counted_in_python_are_refused_with_the_cure():
    net = Tokens(lambda x, net: torch.stack([x[i] for i in range(len(x))])).eval()
    with pytest.raises(UserError, match=r"cd sends any number of rows .* x\.shape\[0\] leaves it open"):
        Graphs(net).of(pictures()).check_any_rows("cd")


def test_another_number_than_that_of_the_rows_is_noticed():
    """The graph of a net that only looks open is compared with the net on other rows."""

    def half(x, net):
        return x * (2.0 if len(x) > 2 else 1.0)

    net = Tokens(half).eval()
    with pytest.raises(UserError, match="gives other logits"):
        Graphs(net).of(pictures(4)).check_any_rows("cd")


@pytest.mark.parametrize("given", ["a sum", "an item"])
def test_what_cannot_be_exported_is_said_in_one_place(given, capfd):
    ways = {
        "a sum": lambda x, net: x if x.sum() > 0 else -x,
        "an item": lambda x, net: x[:, : int(x.abs().sum().item()) % 3 + 1],
    }
    with pytest.raises(UserError, match="torch cannot export Tokens") as caught:
        Graphs(Tokens(ways[given]).eval()).of(pictures())
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")
    assert not isinstance(sys.stderr, type(None))


def test_what_others_write_and_ask_for_is_as_always(capsys):
    said = []

    def other():
        print("from another thread", file=sys.stderr)
        said.append(len(torch.zeros(3, 2)))

    with unprinted(), symbolic_len():
        print("from this one", file=sys.stderr)
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert capsys.readouterr().err == "from another thread\n"
    assert said == [3]
    assert builtins.len.__module__ == "builtins"


def test_all_is_put_back_after_an_error_and_when_threads_take_turns():
    before, usual = sys.stderr, builtins.len
    with pytest.raises(KeyError), unprinted(), symbolic_len():
        raise KeyError
    assert (sys.stderr, builtins.len) == (before, usual)

    def export():
        for _ in range(50):
            with unprinted(), symbolic_len():
                len([1])

    threads = [threading.Thread(target=export) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (sys.stderr, builtins.len) == (before, usual)
