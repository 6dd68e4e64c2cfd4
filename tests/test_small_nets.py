"""The small image nets: goldens, shapes, roles."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from nets import golden
from tiny import ROOT
from torch import nn
from torchvision.models import resnet18

from attrib.models import AcdCNN, Classifier, LeNet, load_weights, resnet18_cifar

ACD = ROOT.parent / "shared" / "golden" / "cd_mnist.npz"  # its weights may not be copied


def weights(data: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {k.removeprefix("sd."): torch.tensor(v) for k, v in data.items() if k.startswith("sd.")}


def test_lenet_is_the_net_of_the_interventional_golden(tmp_path: Path):
    data = golden("interventional_lenet")
    safetensors.torch.save_file(weights(data), tmp_path / "lenet.safetensors")
    net = LeNet()
    load_weights(net, str(tmp_path / "lenet.safetensors"))
    model = Classifier(net, input_shape=(1, 32, 32))
    logits = model.logits(torch.tensor(data["c1_samples"]))
    torch.testing.assert_close(logits, torch.tensor(data["c1_logits"]), rtol=1e-5, atol=1e-5)
    assert (logits.argmax(1) == 1).all()


@pytest.mark.skipif(not ACD.is_file(), reason="the golden with ACD's own weights is not here")
def test_acd_cnn_is_the_net_of_the_acd_golden(tmp_path: Path):
    with np.load(ACD) as file:
        data = {key: file[key] for key in file.files}
    safetensors.torch.save_file(weights(data), tmp_path / "acd.safetensors")
    net = AcdCNN()
    load_weights(net, str(tmp_path / "acd.safetensors"))
    logits = Classifier(net, input_shape=(1, 28, 28)).logits(torch.tensor(data["images"]))
    torch.testing.assert_close(logits, torch.tensor(data["logits"]), rtol=1e-5, atol=1e-5)
    assert (logits.argmax(1) == torch.tensor(data["labels"])).all()


def small_resnet() -> nn.Module:
    torch.manual_seed(0)
    return resnet18_cifar(num_classes=7)


@pytest.mark.parametrize(
    ("net", "shape"),
    [
        (LeNet(7), (1, 32, 32)),
        (LeNet(7, channels=3, padding=2), (3, 28, 28)),
        (AcdCNN(7), (1, 28, 28)),
        (AcdCNN(7, channels=3), (3, 28, 28)),
    ],
)
def test_every_layer_can_be_a_role(net, shape):
    layers = {name: name for name, _ in net.named_children()}
    model = Classifier(net, layers, dtype=torch.float64, input_shape=shape)
    assert not any(getattr(m, "inplace", False) for m in net.modules())
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits = model.logits(x)
    assert logits.shape == (2, 7)
    for role in layers:
        z, rest = model.until(role, x)
        assert rest == ()
        torch.testing.assert_close(model.after(role, z, rest), logits)


def test_resnet18_for_small_images():
    net = small_resnet()
    assert not any(getattr(m, "inplace", False) for m in net.modules())
    model = Classifier(net, {f"{i}": f"layer{i}" for i in range(1, 5)}, input_shape=(3, 32, 32))
    x = torch.zeros(1, 3, 32, 32)
    assert [tuple(model.until(f"{i}", x).z.shape[1:]) for i in range(1, 5)] == [
        (64, 32, 32),
        (128, 16, 16),
        (256, 8, 8),
        (512, 4, 4),
    ], "nothing is thrown away before the first block"
    usual = resnet18(num_classes=7).state_dict()
    own = net.state_dict()
    assert own.keys() == usual.keys()
    assert [k for k in own if own[k].shape != usual[k].shape] == ["conv1.weight"]
    assert resnet18_cifar(channels=1).conv1.weight.shape == (64, 1, 3, 3)


def test_dropout_is_where_training_wants_it():
    """The original drops feature maps of the second convolution and units of the first linear layer."""
    torch.manual_seed(0)
    net, seen = AcdCNN().train(), {}
    for name in ("drop2", "drop3"):
        net.get_submodule(name).register_forward_hook(lambda m, i, o, name=name: seen.update({name: (i[0], o)}))
    net(torch.rand(4, 1, 28, 28) + 0.5)
    before, after = seen["drop2"]
    dropped = (after == 0).flatten(2).all(2)
    assert before.shape == (4, 20, 8, 8)
    assert 0.2 < dropped.float().mean() < 0.8, "whole maps"
    torch.testing.assert_close(after[~dropped], 2 * before[~dropped])
    assert seen["drop3"][0].shape == (4, 50)


@pytest.mark.parametrize("name", ["lenet", "acd_cnn", "resnet18_cifar"])
def test_presets_say_what_the_nets_take(name):
    node = yaml.safe_load((ROOT / "configs" / "model" / f"{name}.yaml").read_text())
    assert len(node["input"]["mean"]) == len(node["input"]["std"]) == node["channels"]
    arguments = {k: node[k] for k in ("num_classes", "channels", "padding") if k in node}
    net = {"lenet": LeNet, "acd_cnn": AcdCNN, "resnet18_cifar": resnet18_cifar}[name](**arguments)
    size = node["input"]["size"]
    model = Classifier(net, node["layers"], input_shape=(node["channels"], size, size))
    x = torch.zeros(1, node["channels"], size, size)
    assert model.logits(x).shape == (1, 10)
    for role in node["layers"]:
        assert model.until(role, x).z.shape[0] == 1
