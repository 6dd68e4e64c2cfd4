"""The copy of a net on which results of a pass hang, and of one that changes while it runs."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import attrib
from attrib.models import Classifier
from attrib.types import UserError

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

X = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))


def pruned() -> nn.Module:
    net = plain()
    prune.l1_unstructured(net[0], "weight", 0.5)
    prune.random_unstructured(net[0], "bias", 1)
    prune.ln_structured(net[4], "weight", 0.3, n=2, dim=1)
    prune.random_unstructured(net[4], "weight", 0.2)  # two after each other
    return net


class Tied(nn.Module):
    """Two layers of the same weights, of which each leaves out its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.b.weight = self.a.weight
        for layer in (self.a, self.b):
            prune.random_unstructured(layer, "weight", 0.5)
        self.head = nn.Linear(192, 3)

    def forward(self, x):
        return self.head(self.b(self.a(x).tanh()).tanh().flatten(1))


def tied() -> nn.Module:
    torch.manual_seed(0)
    return Tied()


def normed() -> nn.Module:
    net = plain()
    weight_norm(net[0])
    spectral_norm(net[4])
    return net


def parametrised() -> nn.Module:
    net = plain()
    parametrizations.weight_norm(net[0])
    return net


class Keeps(nn.Module):
    """It keeps what it computed."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.seen, self.all = plain(), None, {"here": []}

    def forward(self, x):
        self.seen = self.net[:2](x)
        self.all["here"].append((self.seen,))
        self.all["here"] = self.all["here"][-2:]
        return self.net[2:](self.seen)


NETS = pytest.mark.parametrize("make", [pruned, tied, normed, parametrised, Keeps])


def state(net: nn.Module) -> dict[str, object]:
    """All that hangs on a net."""
    return {f"{path}.{name}": id(value) for path, m in net.named_modules() for name, value in vars(m).items()} | {
        name: value.clone() for name, value in net.state_dict().items()
    }


@NETS
@pytest.mark.parametrize("ran", [False, True])
def test_it_computes_what_the_net_does_and_leaves_it_alone(make, ran):
    net = make()
    if ran:
        net(X).sum().backward()
    net.eval()
    before = state(net)
    hooks = [list(m._forward_pre_hooks) for m in net.modules()]
    model = Classifier(net, input_shape=X.shape[1:])
    found = attrib.explain(net, X, 1, "gradient").map
    after = state(net)
    assert before.keys() == after.keys()
    assert all(torch.equal(v, after[k]) if isinstance(v, torch.Tensor) else v == after[k] for k, v in before.items())
    assert hooks == [list(m._forward_pre_hooks) for m in net.modules()]
    torch.testing.assert_close(model.logits(X), net(X).detach())
    x = X.clone().requires_grad_()
    net(x)[:, 1].sum().backward()
    torch.testing.assert_close(found, x.grad.sum(1))


@NETS
@pytest.mark.parametrize("ran", [False, True])
def test_it_is_frozen(make, ran):
    net = make()
    if ran:
        net(X)
    assert not any(parameter.requires_grad for parameter in Classifier(net).module.parameters())


@NETS
@pytest.mark.parametrize("method", ["lrp_epsilon", "captum", "cd", "smooth_grad"])
def test_methods_read_its_weights(make, method):
    net = make().eval()
    net(X)
    assert attrib.explain(net, X[:1], 1, method).map.isfinite().all()


def test_the_pruned_net_is_the_one_of_pruned_weights():
    net, same = pruned().eval(), plain()
    for layer, of in ((same[0], net[0]), (same[4], net[4])):
        layer.load_state_dict({"weight": of.weight, "bias": of.bias})
    one, other = (attrib.explain(n.eval(), X, 1, "lrp_epsilon").map for n in (net, same))
    torch.testing.assert_close(one, other)
    assert Classifier(net).key != Classifier(plain()).key
    masked = copy.deepcopy(net.state_dict())
    masked["0.weight_mask"] = torch.ones_like(masked["0.weight_mask"])
    key = Classifier(net).key
    net.load_state_dict(masked)
    assert Classifier(net).key != key


# ---- nets that change while they run ---------------------------------------------------------------------


class Complex(nn.Module):
    """Layers, a weight and a buffer of complex numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 4, 3), nn.Linear(4, 4, dtype=torch.complex64)
        self.weight = nn.Parameter(torch.randn(4, 4, dtype=torch.complex64))
        self.register_buffer("phase", torch.randn(4, dtype=torch.complex64))
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.conv(x).mean((2, 3)).to(self.weight.dtype) @ self.weight
        return self.head((self.linear(z) * self.phase).abs())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_complex_numbers_stay_complex(dtype):
    torch.manual_seed(0)
    net = Complex().eval()
    model = Classifier(net, input_shape=(3, 8, 8), dtype=dtype)
    assert model.module.weight.dtype == dtype.to_complex()
    with torch.no_grad():
        torch.testing.assert_close(model.logits(X.to(dtype)).float(), net(X), rtol=1e-5, atol=1e-6)


def test_complex_weights_are_not_rounded_with_the_others(monkeypatch):
    monkeypatch.setattr("attrib.models.fast.LEAST", 0)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), Real()).eval()
    coarse = Classifier(net, input_shape=(3, 8, 8)).with_precision("bfloat16")
    with torch.no_grad():
        torch.testing.assert_close(coarse.logits(X), net(X), rtol=0.03, atol=0.03)


class Real(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(144, 3, dtype=torch.complex64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.to(torch.complex64)).imag


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.calls = plain(), 0

    def forward(self, x):
        self.calls += 1
        return self.net(x) * (1 + 2e-4 * self.calls)


class Updates(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = plain()
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x):
        self.mean += 2e-4
        return self.net(x) * (1 + self.mean)


class Elsewhere(nn.Module):
    """What it remembers is not on it."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.past = plain(), [0]

    def forward(self, x):
        self.past.append(0)
        return self.net(x) * (1 + 2e-4 * len(self.past))


class Harmless(nn.Module):
    """It counts, and the count changes nothing; what does is an operation in place."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.act, self.calls = plain(), nn.ReLU(inplace=True), 0

    def forward(self, x):
        self.calls += 1
        x = self.net[0](x)
        self.act(x)
        return self.net[3:](x)


@pytest.mark.parametrize(
    ("net", "words"),
    [
        (Counts, "something else in each run: .*, and calls changes. Let that change in training only"),
        (Updates, "something else in each run: .*, and mean changes. Let that change in training only"),
        (Elsewhere, "something else in each run: .*, and something that it keeps changes"),
        (Harmless, "relies on in-place operations"),
    ],
)
def test_a_net_that_changes_is_told_what_changes(net, words):
    with pytest.raises(UserError, match=f"{net.__name__} .*{words}"):
        Classifier(net().eval(), input_shape=X.shape[1:])


def test_inference_mode_is_named_where_it_leaves_no_gradients():
    model = Classifier(plain().eval(), input_shape=(3, 8, 8))
    with torch.inference_mode(), pytest.raises(UserError, match=r"within torch\.inference_mode there are no gradients"):
        model.gradient(X.clone(), lambda out, _: out[:, 0])
    model.gradient(X, lambda out, _: out[:, 0])


def test_a_net_without_numbers_is_refused():
    with torch.device("meta"):
        net = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    with pytest.raises(UserError, match=r'1 \(Linear\) has the shapes .* but no numbers: it is on the device "meta"'):
        Classifier(net, input_shape=X.shape[1:])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_part_that_is_torchscript_is_copied_but_not_read():
    torch.manual_seed(0)
    part = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    net = nn.Sequential(torch.jit.script(part), nn.Flatten(), nn.Linear(4 * 36, 3)).eval()
    same = nn.Sequential(part, *net[1:])
    target = torch.tensor([0, 1])
    found, expected = (attrib.explain(one, X, target, "gradient").map for one in (net, same))
    assert abs(found).max() > 0
    assert torch.allclose(torch.as_tensor(found), torch.as_tensor(expected))
    assert all(value.requires_grad for value in net.parameters())
    for layers in ({"cam": "0"}, None):
        with pytest.raises(UserError, match=r"TorchScript, whose layers cannot be read|no layer that could be taken"):
            attrib.explain(net, X, target, "grad_cam", layers=layers)
