"""Copies of nets with randomised layers: order, distributions, streams, keys."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
from contracts import forbid_global_rng
from torch import nn
from torchvision.models import resnet18

from attrib.models import BiLSTM, Classifier, DeepLSTM, LeNet, Randomise, ToneCNN
from attrib.models.randomise import randomised, reinitialise, weighted_layers
from attrib.models.variant import WeightedLayer
from attrib.types import UserError

DIGIT = torch.zeros(1, 1, 32, 32)


def seeded(build, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build().eval()


@pytest.fixture(scope="module")
def lenet():
    return seeded(LeNet)


def paths(net, x):
    return [layer.path for layer in weighted_layers(net.eval(), x)]


# ---- order ------------------------------------------------------------------------------------


def test_order_of_lenet_and_of_sounds(lenet):
    assert paths(lenet, DIGIT) == ["fc3", "fc2", "fc1", "conv2", "conv1"]
    assert paths(ToneCNN(), torch.zeros(1, 1, 1024)) == ["fc", "conv4", "conv3", "conv2", "conv1"]


def test_order_of_a_resnet():
    """A normalisation goes with the convolution that it follows, a shortcut where it is computed."""
    layers = weighted_layers(resnet18(num_classes=4).eval(), torch.zeros(1, 3, 64, 64))
    assert len(layers) == 1 + 16 + 3 + 1
    assert [layer.path for layer in layers[:6]] == [
        "fc", "layer4.1.conv2", "layer4.1.conv1", "layer4.0.downsample.0", "layer4.0.conv2", "layer4.0.conv1",
    ]  # fmt: skip
    assert layers[1].modules == ("layer4.1.conv2", "layer4.1.bn2")
    assert layers[3].modules == ("layer4.0.downsample.0", "layer4.0.downsample.1")
    assert layers[-1] == WeightedLayer("conv1", ("conv1", "bn1"))


def test_order_of_lstms():
    ids = torch.tensor([[3, 4, 5, 1]])
    assert paths(DeepLSTM(9, 4, 3), ids) == ["fc", "rnn_4", "rnn_3", "rnn_2", "rnn_1", "embedding"]
    assert paths(BiLSTM(9, 4, 3), ids) == ["fc", "rnn", "embedding"]


class Odd(nn.Module):
    """Registered in another order than run; a layer that runs twice; one that does not run; a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.last, self.unused, self.first = nn.Linear(4, 2), nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.twice, self.norm, self.token = nn.Linear(4, 4), nn.LayerNorm(4), nn.Parameter(torch.ones(4))
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        x = self.norm(self.twice(self.first(x)) + self.token)
        x = x + self.attention(x[:, None], x[:, None], x[:, None])[0][:, 0]
        return self.last(self.twice(x))


def test_order_is_that_of_the_forward_pass():
    found = weighted_layers(Odd().eval().requires_grad_(False), torch.zeros(1, 4))
    assert [layer.path for layer in found] == ["last", "twice", "attention.out_proj", "attention", "", "first"]
    assert found[4].modules == ("", "norm")
    assert paths(Odd().double(), torch.zeros(1, 4).double())[:2] == ["last", "twice"]


def test_a_compiled_net_is_refused(lenet):
    with warnings.catch_warnings(action="ignore"):  # torch says that it is a thing of the past
        traced = torch.jit.trace(lenet, DIGIT)
    with pytest.raises(UserError, match=r"compiled by torch\.jit"):
        weighted_layers(nn.Sequential(traced), DIGIT)


# ---- which ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        (Randomise(2), ["fc3", "fc2"]),
        (Randomise(2, "independent"), ["fc2"]),
        (Randomise("fc1"), ["fc3", "fc2", "fc1"]),
        (Randomise("conv1", "independent"), ["conv1"]),
        (Randomise("all"), ["fc3", "fc2", "fc1", "conv2", "conv1"]),
        (Randomise(None), []),
        (Randomise(0), []),
    ],
)
def test_which_layers(lenet, how, expected):
    assert [layer.path for layer in how.chosen(weighted_layers(lenet, DIGIT))] == expected


def test_a_module_that_holds_layers():
    found = weighted_layers(resnet18(num_classes=4).eval(), torch.zeros(1, 3, 64, 64))
    assert len(Randomise("layer4").chosen(found)) == 6
    assert len(Randomise("layer3", "independent").chosen(found)) == 5


def test_mistakes_are_named(lenet):
    found = weighted_layers(lenet, DIGIT)
    for count in (6, -1):
        with pytest.raises(UserError, match=rf"layers is {count}, but the net has 5 .*: fc3, fc2, fc1, conv2, conv1"):
            Randomise(count).chosen(found)
    with pytest.raises(UserError, match=r"no layer with weights at 'conv3'; did you mean 'conv2'"):
        Randomise("conv3").chosen(found)
    with pytest.raises(UserError, match="no layer with weights at 'fc'"):  # not by the beginning of a name
        Randomise("fc").chosen(found)
    with pytest.raises(UserError, match="cascade or independent, not 'random'"):
        Randomise(1, "random")


# ---- weights ----------------------------------------------------------------------------------

MODULES = {
    "linear": lambda: nn.Linear(300, 200),
    "bilinear": lambda: nn.Bilinear(30, 20, 40),
    "conv without bias": lambda: nn.Conv2d(16, 64, 3, bias=False),
    "grouped conv": lambda: nn.Conv2d(16, 64, 3, groups=4),
    "conv1d": lambda: nn.Conv1d(16, 64, 9),
    "transposed conv": lambda: nn.ConvTranspose2d(32, 24, 3),
    "lstm": lambda: nn.LSTM(30, 40, 2, bidirectional=True),
    "gru cell": lambda: nn.GRUCell(30, 40),
    "embedding": lambda: nn.Embedding(300, 40, padding_idx=1),
    "batch norm": lambda: nn.BatchNorm2d(40),
    "layer norm": lambda: nn.LayerNorm(40),
    "group norm": lambda: nn.GroupNorm(4, 40),
    "attention": lambda: nn.MultiheadAttention(64, 4, add_bias_kv=True),
    "prelu": lambda: nn.PReLU(8),
}


@pytest.mark.parametrize("name", MODULES)
def test_new_weights_are_distributed_as_those_of_a_new_module(name):
    fresh, net = seeded(MODULES[name]), seeded(MODULES[name])
    with torch.no_grad():
        for tensor in net.state_dict().values():  # trained far away
            tensor.copy_(tensor * 7 + 5)
    with forbid_global_rng():
        reinitialise(net, [WeightedLayer("", tuple(path for path, _ in net.named_modules()))], seed=3)
    for key, value in fresh.state_dict().items():
        found, expected = net.state_dict()[key].double().numpy(), value.double().numpy()
        if key == "out_proj.bias":  # attention begins with 0 there; ours is that of a linear layer
            continue
        if np.ptp(expected) == 0:
            np.testing.assert_array_equal(found, expected)
            continue
        assert not (found == expected).all()
        n, std = found.size, expected.std()
        assert found.std() == pytest.approx(std, rel=6 / n**0.5)
        assert abs(found.mean()) < 5 * std / n**0.5
        if name != "embedding" and "bias_" not in key:  # uniform: nothing beyond sqrt(3) standard deviations
            assert np.abs(found).max() <= 3**0.5 * std * (1 + 6 / n**0.5)
    if name == "embedding":
        assert not net.weight[1].any()


def test_parameters_of_an_unknown_class_keep_their_scale():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.token, self.one = nn.Parameter(3 + 0.1 * torch.arange(-50.0, 51)), nn.Parameter(torch.tensor([2.0]))

    net = Scaled().requires_grad_(False)
    before = copy.deepcopy(net)
    reinitialise(net, [WeightedLayer("", ("",))], seed=0)
    assert not torch.equal(net.token, before.token)
    assert not torch.equal(net.one, before.one)
    assert net.token.std().item() == pytest.approx(before.token.std().item(), rel=0.3)
    assert net.token.mean().item() == pytest.approx(3, abs=1.5)


def state(net):
    return {name: value.clone() for name, value in net.state_dict().items()}


def test_a_layers_new_weights_depend_on_its_path_and_the_seed_alone(lenet):
    found, before = weighted_layers(lenet, DIGIT), state(lenet)
    original = Classifier(lenet, {"bottleneck": "conv2"})

    def weights(how):
        return randomised(original, lenet, how, DIGIT).module.state_dict()

    everything, two, one = weights(Randomise("all")), weights(Randomise(2)), weights(Randomise("fc2", "independent"))
    for name, value in before.items():
        layer = name.partition(".")[0]
        assert not torch.equal(everything[name], value)
        assert torch.equal(two[name], everything[name] if layer in ("fc3", "fc2") else value)
        assert torch.equal(one[name], everything[name] if layer == "fc2" else value)
        assert torch.equal(lenet.state_dict()[name], value)  # the caller's own net
        assert torch.equal(original.module.state_dict()[name], value)
    assert not torch.equal(everything["conv1.weight"], weights(Randomise("all", seed=1))["conv1.weight"])
    assert not torch.equal(everything["fc2.bias"][:10], everything["fc3.bias"])
    backwards = copy.deepcopy(lenet)
    reinitialise(backwards, found[::-1], 0)
    assert all(torch.equal(value, everything[name]) for name, value in backwards.state_dict().items())


def test_large_layers_are_drawn_in_pieces(monkeypatch):
    net = nn.Linear(50, 40)
    reinitialise(net, [WeightedLayer("", ("",))], 0)
    monkeypatch.setattr("attrib.models.randomise._CHUNK", 64)
    other = nn.Linear(50, 40)
    reinitialise(other, [WeightedLayer("", ("",))], 0)
    assert torch.equal(net.weight, other.weight)


def test_keys(lenet):
    original = Classifier(lenet, {"bottleneck": "conv2"}, dtype=torch.float64)
    assert original.original is original

    def variant(*how, net=lenet, of=original):
        return randomised(of, net, Randomise(*how), DIGIT)

    three = variant(3)
    assert three.original is original
    assert (three.variant.layers, three.variant.place, three.variant.total) == (("fc3", "fc2", "fc1"), 3, 5)
    assert three.roles.named == original.roles.named
    assert three.key == variant("fc1").key  # said in another way
    single = Classifier(lenet, {"bottleneck": "conv2"})
    assert three.key == variant(3, of=single).key  # the precision is not part of what is computed
    other = seeded(LeNet, 1)
    keys = [original.key, three.key, variant(2).key, variant(3, "independent").key, variant(3, "cascade", 1).key]
    keys += [randomised(Classifier(other), other, Randomise("all"), DIGIT).key, variant("all").key]
    assert len(set(keys)) == len(keys)
    assert [variant(*how).variant.name for how in [(3,), (3, "independent"), ("all",), ("conv1", "independent")]] == [
        "random-3", "random-only-fc1", "random-5", "random-only-conv1",
    ]  # fmt: skip
