"""Whatever a process lets torch take for products of float32, attrib takes all bits, and leaves it as it was."""

import pytest
import torch
from torch import nn

import attrib
from attrib.models import Classifier
from attrib.models.float32 import _kinds, _restored, all_bits, tf32, use_all_bits

NEW = pytest.mark.skipif(not _kinds(), reason="torch before 2.9 has one way to say it")


def said():
    """All that torch answers about products of float32."""

    def answer(get):
        try:
            return get()
        except RuntimeError:
            return "mixed"

    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    asked = (torch.get_float32_matmul_precision, lambda: cudnn.allow_tf32, lambda: matmul.allow_tf32)
    return [kind.fp32_precision for kind in _kinds()], *map(answer, asked)


def full():
    kinds, *older = said()
    return set(kinds) <= {"ieee", "none"} and older == ["highest", False, False]


@pytest.fixture(autouse=True)
def as_before():
    before = said()
    with _restored():
        yield
    assert said() == before


def high():
    torch.set_float32_matmul_precision("high")


def medium():
    torch.set_float32_matmul_precision("medium")


def allowed():
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True


def one_kind():
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"


def another_kind():
    torch.backends.mkldnn.conv.fp32_precision = "bf16"


def both_ways():
    torch.set_float32_matmul_precision("medium")
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    torch.backends.cuda.matmul.fp32_precision = "ieee"


WAYS = [high, medium, allowed, *(pytest.param(way, marks=NEW) for way in (one_kind, another_kind, both_ways))]


@pytest.mark.parametrize("way", WAYS)
def test_all_bits_and_back(way):
    way()
    before = said()
    with all_bits():
        assert full()
        with tf32():
            assert said()[2:] == (True, True)
        assert full()
    assert said() == before
    use_all_bits()
    assert full()


class Listening(nn.Module):
    """Keeps what torch says while it is computed."""

    def __init__(self):
        super().__init__()
        self.conv, self.head, self.heard = nn.Conv2d(3, 4, 3), nn.Linear(4, 2), []

    def __deepcopy__(self, memo):
        other = Listening()
        other.load_state_dict(self.state_dict())
        other.heard = self.heard
        return other

    def forward(self, x):
        self.heard.append(full())
        return self.head(self.conv(x).relu().mean((2, 3)))


@pytest.mark.parametrize("way", WAYS)
def test_the_door_of_python_computes_with_all_bits(way):
    net, x = Listening(), torch.rand(2, 3, 8, 8)
    with all_bits():
        expected = attrib.explain(net, x, 1, "gradient", run={"batch": 1, "rows": 1}).map
    net.heard.clear()
    way()
    before = said()
    found = attrib.explain(net, x, 1, "gradient", run={"batch": 1, "rows": 1})
    scored = attrib.evaluate(net, x, found, "insertion_deletion")
    assert net.heard
    assert all(net.heard)
    assert said() == before
    assert torch.equal(found.map, expected)
    assert len(scored)


def test_a_classifier_takes_all_bits_from_when_it_is_made():
    medium()
    Classifier(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), input_shape=(3, 2, 2))
    assert full()
