"""The separated net: the same logits, every activation a module of its own, nothing shared but weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from nets import small_cnn
from torch import Tensor, nn
from torchvision import models

from attrib.models import Classifier
from attrib.models.activations import _FUNCTIONS, ELEMENTWISE, RELU_LIKE, separated, stand_in
from attrib.types import UserError


def images(n: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(n, *(shape or (3, 64, 64)), generator=generator)


def hooked_gradient(net: nn.Module, x: Tensor, kinds: tuple[type[nn.Module], ...]) -> tuple[Tensor, Tensor, list[str]]:
    """Logits and gradient with a full backward hook at every activation, as captum's methods have them."""
    fired: list[str] = []
    handles = [
        m.register_full_backward_hook(lambda *_, n=n: fired.append(n))
        for n, m in net.named_modules()
        if isinstance(m, kinds)
    ]
    leaf = x.clone().requires_grad_()
    logits = net(leaf.clone())
    (grad,) = torch.autograd.grad(logits[:, 1].sum(), leaf)
    assert len(fired) == len(handles), "an activation runs more than once, or never"
    for handle in handles:
        handle.remove()
    return logits.detach(), grad, fired


def unhooked_gradient(net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    logits = net(leaf.clone())
    return logits.detach(), torch.autograd.grad(logits[:, 1].sum(), leaf)[0]


def same(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> None:
    for got, wanted in zip(a, b):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6 * wanted.abs().max().item())


def torchvision_net(arch: str) -> Callable[[], nn.Module]:
    return lambda: getattr(models, arch)(weights=None, num_classes=10)


def timm_net(arch: str, **options) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(arch, num_classes=10, **options)


NETS = {
    "resnet18": torchvision_net("resnet18"),
    "densenet121": torchvision_net("densenet121"),
    "mobilenet_v2": torchvision_net("mobilenet_v2"),
    "mobilenet_v3_small": torchvision_net("mobilenet_v3_small"),
    "squeezenet1_1": torchvision_net("squeezenet1_1"),
    "timm tf_efficientnet_lite0": timm_net("tf_efficientnet_lite0"),
    "timm vit_tiny": timm_net("vit_tiny_patch16_224", img_size=64, depth=2),
    "small_cnn": small_cnn,
}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("as_relu", [(), ELEMENTWISE], ids=["plain", "stand-ins"])
def test_logits_and_gradients_are_unchanged(name, as_relu):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = NETS[name]()
    net = Classifier(module).module
    x = images(2, 3, 32, 32) if name == "small_cnn" else images(2)
    made = separated(net, as_relu)
    logits, grad, fired = hooked_gradient(made, x, (*ELEMENTWISE, nn.MaxPool2d))
    same((logits, grad), unhooked_gradient(net, x))
    assert fired
    if as_relu:
        assert all(type(m) is nn.ReLU for m in made.modules() if isinstance(m, ELEMENTWISE))


class Functional(nn.Module):
    """Every activation and max-pooling function that is known, in one of its spellings each."""

    CALLS: tuple[Callable[[Tensor], Tensor], ...] = (
        F.relu, torch.relu, lambda x: x.relu(), lambda x: F.relu(input=x), lambda x: F.relu(x, True),
        lambda x: F.relu(x, inplace=True), lambda x: x.clone().relu_(), lambda x: torch.relu_(x.clone()),
        F.relu6, partial(F.relu6, inplace=True), lambda x: F.elu(x, 0.5), lambda x: F.elu(x, alpha=2.0, inplace=True),
        lambda x: F.leaky_relu(x, 0.2), lambda x: F.leaky_relu(input=x, negative_slope=0.3, inplace=True),
        lambda x: F.softplus(x, 2.0, 10.0), lambda x: F.softplus(x, beta=0.5), torch.sigmoid, F.sigmoid,
        lambda x: x.sigmoid(), lambda x: x.clone().sigmoid_(), torch.tanh, F.tanh, lambda x: x.tanh(),
        lambda x: x.clone().tanh_(), F.silu, partial(F.silu, inplace=True), F.gelu,
        lambda x: F.gelu(x, approximate="tanh"), F.mish, F.hardswish, partial(F.hardswish, inplace=True),
        F.hardsigmoid, lambda x: F.hardtanh(x, -0.5, 0.7), lambda x: F.hardtanh(x, max_val=0.3, inplace=True),
        lambda x: F.max_pool2d(x, 2), lambda x: F.max_pool2d(x, 3, 1, padding=1),
        lambda x: F.max_pool2d(x, kernel_size=2, stride=3, ceil_mode=True), lambda x: torch.max_pool2d(x, 2, stride=1),
        lambda x: F.max_pool1d(x.flatten(2), 3)[..., None], lambda x: F.max_pool3d(x[:, None], (1, 2, 2))[:, 0],
    )  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        features = [call(x * 1.0).mean((2, 3)) for call in self.CALLS]
        return torch.stack([self.head(f) for f in features]).cumsum(0).tanh().sum(0)


def test_every_function_becomes_a_module():
    net = Functional().double().eval()
    made = separated(net)
    x = images(3, 2, 6, 6).double()
    logits, grad, fired = hooked_gradient(made, x, (*ELEMENTWISE, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d))
    same((logits, grad), unhooked_gradient(net, x))
    assert len(fired) == len(Functional.CALLS) + 1
    assert not [n for n in made.graph.nodes if n.op in ("call_function", "call_method") and n.target in _FUNCTIONS]
    assert not any(getattr(m, "inplace", False) for m in made.modules())
    # One linear layer, run for every feature: as many modules, one weight.
    heads = [m for m in made.modules() if isinstance(m, nn.Linear)]
    assert len(heads) == len(Functional.CALLS)
    assert {m.weight.data_ptr() for m in heads} == {net.head.weight.data_ptr()}


def test_what_was_changed_in_place_is_read_changed():
    class Statements(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = nn.ReLU6(inplace=True)

        def forward(self, x):
            x = x * 2
            before = x.sum(1, keepdim=True)
            x.sigmoid_()
            F.elu(x - 0.7, inplace=True)  # changes something that nobody reads
            y = x - 0.6
            F.leaky_relu(y, 0.1, inplace=True)
            z = y * 9
            self.act(z)
            return torch.cat((x, y, z, before, torch.tanh(z)), 1)

    net, x = Statements().double().eval(), images(2, 3).double()
    torch.testing.assert_close(separated(net)(x), net(x), rtol=0, atol=0)
    assert net.act.inplace


def test_reused_modules_are_separated_and_weights_shared():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.act = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()

        def forward(self, x):
            for _ in range(3):
                x = self.act(self.norm(self.conv(x)))
            return F.relu(x - 0.1).mean((2, 3))

    net = Block().eval()
    net.norm.running_mean.add_(0.1)
    made = separated(net)
    x = images(2, 3, 8, 8)
    logits, grad, fired = hooked_gradient(made, x, (nn.ReLU,))
    same((logits, grad), unhooked_gradient(net, x))
    assert len(fired) == 4
    for kind, name in ((nn.Conv2d, "conv"), (nn.BatchNorm2d, "norm")):
        copies = [m for m in made.modules() if isinstance(m, kind)]
        assert len({id(m) for m in copies}) == 3
        for m in copies:
            for key, value in (*m.named_parameters(), *m.named_buffers()):
                assert value is dict(getattr(net, name).state_dict(keep_vars=True))[key]
    with torch.no_grad():
        net.conv.weight.mul_(2)
    same(unhooked_gradient(made, x), unhooked_gradient(net, x))


def test_the_given_net_is_untouched():
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = nn.ReLU()

        def forward(self, x):
            return self.act(x * torch.tensor([1.0, 2.0, 3.0]))

    net = Constant().eval()
    attributes = copy.copy(net.__dict__)
    made = separated(net, RELU_LIKE)
    fired = []
    for module in made.modules():
        module.register_forward_hook(lambda *_: fired.append("made"))
    net.act.register_forward_hook(lambda *_: fired.append("net"))
    x = images(2, 3)
    torch.testing.assert_close(made(x), net(x))
    assert fired.count("net") == 1
    assert net.__dict__.keys() == attributes.keys()
    assert not [k for k in vars(net) if "constant" in k]
    assert dict(net.named_modules()).keys() == {"", "act"}
    assert not made.training


def test_fused_norm_and_activation():
    """timm's BatchNormAct2d is not traced into; its activation is replaced inside."""
    net = Classifier(timm.create_model("tf_efficientnet_lite0", num_classes=5)).module
    made = separated(net, RELU_LIKE)
    assert sum(type(m).__name__ == "BatchNormAct2d" for m in made.modules()) > 30
    assert not any(isinstance(m, nn.ReLU6) for m in made.modules())
    assert any(isinstance(m, nn.ReLU6) for m in net.modules())


@pytest.mark.parametrize("kind", ELEMENTWISE, ids=lambda k: k.__name__)
def test_stand_ins_compute_the_same(kind):
    torch.manual_seed(0)
    x = 4 * images(5, 7)
    activation = kind()
    module = stand_in(activation)
    assert type(module) is nn.ReLU
    torch.testing.assert_close(module(x), activation(x), rtol=0, atol=0)
    assert (module is activation) == (kind is nn.ReLU)
    fired = []
    module.register_forward_hook(lambda *_: fired.append(None))
    module(x)
    assert fired == [None]


def test_a_net_that_cannot_be_traced():
    class Branches(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(UserError, match=r"needs a net that torch\.fx can trace: torch\.fx cannot trace Branches"):
        separated(Branches())
