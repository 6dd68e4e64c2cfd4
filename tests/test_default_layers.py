"""Layers for cam and bottleneck where nobody names one: right, or refused with the candidates."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import pytest
import timm
import torch
from generated_nets import generate
from net_zoo import ZOO, vgg16
from text_nets import text_net
from tiny import only_cell, pictures, quickly
from torch import Tensor, nn
from torchvision import models

from attrib.methods.cam import GradCAM
from attrib.models import AcdCNN, Classifier, LeNet, ToneCNN, resnet18_cifar
from attrib.models.default_layers import cuts, default_layer
from attrib.models.zoo import seeded
from attrib.noise import Noise
from attrib.types import Batch, UserError


def zoo(library: str, name: str) -> nn.Module:
    return next(entry for entry in ZOO if (entry.library, entry.name) == (library, name)).net().float()


# The layers that presets name by hand, or where they name another one with the same places: (cam, bottleneck).
PRESETS = {
    "lenet": (lambda: LeNet(num_classes=4), (1, 32, 32), "relu2", "conv2"),
    "acd_cnn": (lambda: AcdCNN(num_classes=4), (1, 28, 28), "conv2", "conv2"),  # by hand relu2, behind the pooling
    "resnet18_cifar": (lambda: resnet18_cifar(num_classes=4), (3, 32, 32), "layer4", "layer2"),
    "tone_cnn": (ToneCNN, (1, 2048), "relu4", "conv2"),  # by hand relu2, the same but for the ReLU
    "vgg16": (vgg16, (3, 224, 224), "features.29", "features.17"),
    "resnet50": (lambda: models.resnet50(weights=None, width_per_group=8), (3, 96, 96), "layer4", "layer2"),
    # by hand blocks.4, the next stage on the same grid
    "efficientnet_lite0": (lambda: timm.create_model("tf_efficientnet_lite0"), (3, 128, 128), "bn2", "blocks.3"),
}


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.quick(but=["vgg16", "resnet50"])
def test_the_layers_are_those_of_the_presets(name):
    build, shape, cam, bottleneck = PRESETS[name]
    model = Classifier(seeded(build, 1), {"cam": None}, input_shape=shape)
    before, state = model.passed, torch.random.get_rng_state()
    assert (model.roles.path("cam"), model.roles.path("bottleneck")) == (cam, bottleneck)
    assert model.passed == before
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not any(module._forward_hooks for module in model.module.modules())
    assert model.roles.named == {}  # what was named


TRANSFORMERS = {
    ("timm", "vit"): ("blocks.1", "tokens:4x4+1"),  # of three: behind the last, only the class token is read
    ("timm", "vit with registers"): ("blocks.1", "tokens:4x6+5"),
    ("timm", "deit, distilled"): ("blocks.1", "tokens:4x4+2"),
    ("timm", "cait"): ("blocks", "tokens:4x4+0"),
    ("timm", "swin"): ("norm", "channels_last"),
    ("timm", "convnext"): ("stages", "channels_first"),
    ("torchvision", "swin"): ("norm", "channels_last"),
    ("torchvision", "vit"): ("encoder.layers.encoder_layer_1", "tokens:4x4+1"),
    ("transformers", "ViT"): ("vit.layers.1", "tokens:4x4+1"),
    ("transformers", "DINOv2 with registers"): ("dinov2_with_registers.layernorm", "tokens:4x6+5"),
}


@pytest.mark.parametrize(("library", "name"), TRANSFORMERS)
def test_grad_cam_of_transformers_without_a_named_layer(library, name):
    entry = next(entry for entry in ZOO if (entry.library, entry.name) == (library, name))
    model = Classifier(entry.net(), dtype=torch.float64, input_shape=entry.shape, output=entry.output)
    x = torch.randn(2, *entry.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    batch = Batch(("a", "b"), x, torch.tensor([1, 3]))
    found = GradCAM(relu=False).attribute(model, batch, {}, Noise(batch.uids))["map"]
    path = model.roles.path("cam")
    path = path.replace("vit.encoder.layer.", "vit.layers.")  # its name before transformers 5.9 or so
    assert (path, str(model.roles.reading("cam", entry.shape))) == TRANSFORMERS[library, name]
    assert found.std((1, 2)).min() > 0
    named = Classifier(entry.net(), {"cam": model.roles.path("cam")}, dtype=torch.float64, output=entry.output)
    assert torch.equal(GradCAM(relu=False).attribute(named, batch, {}, Noise(batch.uids))["map"], found)


def reads_nothing_else(net: nn.Module, path: str, x: Tensor) -> bool:
    """Whether no gradient flows to x when that of the layer's output is cut off; slow and obvious."""
    handle = net.get_submodule(path).register_forward_hook(lambda _module, _inputs, output: output.detach())
    try:
        with torch.enable_grad():
            return not net(x.clone().requires_grad_().clone()).requires_grad
    finally:
        handle.remove()


def expected_cuts(net: nn.Module, x: Tensor) -> set[str]:
    """Modules that run once, give one tensor, and are read by everything behind."""
    outputs: dict[str, list[object]] = {}
    handles = [
        module.register_forward_hook(lambda _m, _i, output, path=path: outputs.setdefault(path, []).append(output))
        for path, module in net.named_modules()
        if path
    ]
    net(x)
    for handle in handles:
        handle.remove()
    return {
        path
        for path, found in outputs.items()
        if len(found) == 1 and isinstance(found[0], Tensor) and reads_nothing_else(net, path, x)
    }


def check_cuts(net: nn.Module, shape: Sequence[int]) -> None:
    """Of the modules that give the same tensor, one stands for all; it is one of those that a slow search finds."""
    x = torch.randn(1, *shape, dtype=next(net.parameters()).dtype, generator=torch.Generator().manual_seed(0))
    found = [cut.path for cut in cuts(net.requires_grad_(False), shape, x)[0]]
    expected = expected_cuts(net, x)
    assert set(found) <= expected
    for path in expected - set(found):  # an outer or an inner module, or an Identity, gives what one of these gives
        assert any(same_tensor(net, path, other, x) for other in found), path


def same_tensor(net: nn.Module, one: str, other: str, x: Tensor) -> bool:
    kept: dict[str, Tensor] = {}
    handles = [
        net.get_submodule(path).register_forward_hook(lambda _m, _i, output, path=path: kept.update({path: output}))
        for path in (one, other)
    ]
    net(x)
    for handle in handles:
        handle.remove()
    return kept[one] is kept[other]


@pytest.mark.parametrize(
    ("library", "name"),
    [
        ("torchvision", "resnet50"),
        ("torchvision", "densenet"),
        ("timm", "cait"),
        ("timm", "swin"),
        ("own", "one logit"),
    ],
)
def test_cuts_are_those_that_a_slow_search_finds(library, name):
    entry = next(entry for entry in ZOO if (entry.library, entry.name) == (library, name))
    check_cuts(entry.net(), entry.shape)


@pytest.mark.parametrize("seed", range(12))
def test_cuts_of_random_nets(seed):
    given = generate(seed)
    if "random" in given.program.features:
        pytest.skip("draws random numbers")
    model = Classifier(given.net, dtype=torch.float64)  # without in-place operations
    check_cuts(model.module, given.shape)


class Around(nn.Module):
    """Each layer is gone around: by the input itself."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        z = self.two(self.one(x).relu())
        return self.head(torch.cat((z.mean((2, 3)), x.mean((2, 3))), 1))


class Zero(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 4)
        nn.init.zeros_(self.head.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).mean((2, 3)))


class Detached(Zero):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).detach()


class WritesOver(Zero):
    """Autograd kept what it then writes over."""

    def forward(self, x: Tensor) -> Tensor:
        z = self.conv(x)
        z[:, 2:] *= z[:, :2]
        return z.mean((2, 3))


REFUSED = [
    (WritesOver, "no layer of WritesOver can be chosen by default; name one .*score_cam.*no gradient comes from"),
    (Around, "Around has no layer that could be taken by default.*read by everything behind them are head"),
    (lambda: nn.Sequential(nn.Flatten(), nn.Linear(768, 8), nn.ReLU(), nn.Linear(8, 4)), "no layer.*3, 2, 1"),
    (Zero, "logits of Zero do not change with its input"),
    (Detached, "no gradient flows from the logits of Detached"),
]


@pytest.mark.parametrize(("build", "message"), REFUSED)
@pytest.mark.parametrize("role", ["cam", "bottleneck"])
def test_no_layer_to_choose(build, message, role):
    model = Classifier(seeded(build), input_shape=(3, 16, 16))
    with pytest.raises(UserError, match=message):
        model.roles.path(role)
    with pytest.raises(UserError, match=message):
        model.roles.path(role)  # and again


def test_other_roles_and_texts_have_no_default():
    model = Classifier(seeded(lambda: LeNet(num_classes=4)), input_shape=(1, 32, 32))
    with pytest.raises(UserError, match="no layer for the role 'readout_1'"):
        model.roles.path("readout_1")
    with pytest.raises(ValueError, match="only cam and bottleneck"):
        default_layer(model.module, "readout_1", (1, 32, 32), torch.empty(0), lambda path: None)
    text = Classifier(text_net("mean"), {"embedding": "embedding"}, dtype=torch.float64)
    text.logits(torch.tensor([[2, 3, 4]]))
    with pytest.raises(UserError, match="no layer for the role 'bottleneck'"):
        text.roles.path("bottleneck")


def test_layers_of_a_net_that_has_seen_an_input():
    """Python users give no shape; the first samples have one."""
    model = Classifier(seeded(lambda: LeNet(num_classes=4)))
    with pytest.raises(UserError, match="no layer for the role 'cam'"):
        model.roles.path("cam")
    model.logits(torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(0)))
    assert model.roles.path("cam") == "relu2"


def test_a_randomised_copy_has_the_layers_of_its_original():
    original = Classifier(seeded(lambda: LeNet(num_classes=4)), input_shape=(1, 32, 32))
    copied = Classifier(seeded(lambda: LeNet(num_classes=4), 7), input_shape=(1, 32, 32), original=original)
    assert copied.roles.path("bottleneck") == "conv2"
    assert copied.roles.found == {}
    assert original.roles.found["bottleneck"].path == "conv2"


def test_a_run_without_named_layers(tmp_path, capfd, caplog):
    """The key is that of the same layer named by hand; what was chosen, and why, is said."""
    images = pictures(tmp_path)
    run = quickly(capfd)
    settings = ("dataset=image_folder", "model=timm", "method=grad_cam", f"dataset.root={images}", "metric=[]")
    settings += (
        "model.arch=test_resnet.r160_in1k",
        "model.pretrained=false",
        "dataset.target=predicted",
        "run.limit=2",
    )
    settings += ("model.input.size=64",)
    with caplog.at_level(logging.INFO):
        assert run(*settings, f"run.root={tmp_path / 'found'}").status == 0
    spec = only_cell(tmp_path / "found").spec
    (path,) = spec["layers"].values()
    assert spec["default_layers"]["cam"].startswith("the last layer that everything behind it reads")
    assert f"model.layers.cam={path}, which nobody named" in caplog.text
    assert run(*settings, f"run.root={tmp_path / 'named'}", f"model.layers.cam={path}").status == 0
    named = only_cell(tmp_path / "named").spec
    assert named["key"] == spec["key"]
    assert "default_layers" not in named
