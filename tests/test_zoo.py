"""Builders of nets by name."""

from __future__ import annotations

import socket

import numpy as np
import pytest
import timm
import torch
from huggingface_hub import constants
from huggingface_hub.errors import OfflineModeIsEnabled
from PIL import Image
from torch import nn
from torchvision import models

from attrib.config import objects
from attrib.datasets import ImageTransform
from attrib.models import Classifier, DeepLSTM, LeNet, load_weights, save_checkpoint, timm_net, torchvision_net
from attrib.models.zoo import input_of, seeded
from attrib.types import UserError


@pytest.mark.parametrize(
    "build",
    [
        lambda: torchvision_net("squeezenet1_1", num_classes=7),
        lambda: torchvision_net("mobilenet_v3_small", num_classes=7),
        lambda: torchvision_net("googlenet", num_classes=7, aux_logits=False),
        lambda: timm_net("resnet10t", num_classes=7),
        lambda: timm_net("vit_tiny_patch16_224.augreg_in21k", num_classes=7, img_size=64, depth=1),
    ],
    ids=["squeezenet1_1", "mobilenet_v3_small", "googlenet", "resnet10t", "vit_tiny"],
)
def test_nets_are_built(build):
    with torch.no_grad():
        assert build().eval()(torch.zeros(2, 3, 64, 64)).shape == (2, 7)


@pytest.mark.parametrize(
    "build",
    [
        lambda: torchvision_net("resnet18", num_classes=3),
        lambda: timm_net("vit_tiny_patch16_224", num_classes=3, img_size=64, depth=1),
        lambda: DeepLSTM(20, 4, 5),
    ],
    ids=["torchvision", "timm", "lstm"],
)
def test_random_weights_belong_to_the_seed(build):
    """And the process' random numbers go on as if nothing had been built."""
    before = torch.random.get_rng_state()
    one, again, other = (seeded(build, seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_the_seed_changes_nothing_of_loaded_weights(tmp_path):
    save_checkpoint(tmp_path / "net.safetensors", LeNet(), {})
    nets = [seeded(LeNet, seed) for seed in (0, 1)]
    for net in nets:
        load_weights(net, str(tmp_path / "net.safetensors"))
    assert Classifier(nets[0]).key == Classifier(nets[1]).key


def test_unknown_architectures_list_near_names():
    with pytest.raises(UserError, match=r"model\.arch: torchvision has no model 'resnet49'; did you mean 'resnet"):
        torchvision_net("resnet49")
    with pytest.raises(
        UserError, match=r"model\.arch: timm has no model 'vit_tinny_patch16_224'; did you mean 'vit_tiny_patch16_224'"
    ):
        timm_net("vit_tinny_patch16_224")
    for build in (torchvision_net, timm_net):
        with pytest.raises(UserError, match=r"has no model [^;]*$"):
            build("~~~~~~")


def test_unknown_weights_are_named():
    with pytest.raises(
        UserError, match=r"model\.weights: resnet18 has no weights 'IMAGENET'; it has IMAGENET1K_V1, DEFAULT"
    ):
        torchvision_net("resnet18", weights="IMAGENET")


def test_a_download_that_fails_says_what_to_do(monkeypatch):
    def fail(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fail)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)
    with pytest.raises(
        UserError, match=r"cannot download https://.*\(no network\).*model\.weights=null model\.checkpoint=FILE"
    ):
        torchvision_net("squeezenet1_1", weights="DEFAULT")


def test_downloaded_weights_are_loaded(monkeypatch):
    wanted = models.squeezenet1_1().state_dict()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: wanted)
    net = torchvision_net("squeezenet1_1", weights="IMAGENET1K_V1")
    assert all(torch.equal(v, wanted[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize("arch", ["googlenet", "inception_v3"])
def test_transform_input_does_not_depend_on_the_source_of_the_weights(arch, monkeypatch):
    bare = torchvision_net(arch)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: bare.state_dict())
    assert bare.transform_input
    assert torchvision_net(arch, weights="DEFAULT").transform_input
    for weights in (None, "DEFAULT"):
        assert not torchvision_net(arch, weights=weights, transform_input=False).transform_input


def test_transform_input_of_other_nets():
    with pytest.raises(UserError, match=r"model\.transform_input: squeezenet1_1 has none"):
        torchvision_net("squeezenet1_1", transform_input=True)


# Input ------------------------------------------------------------------------------------------


def photo(width: int, height: int) -> Image.Image:
    pixels = np.random.RandomState(0).randint(0, 255, (height // 8, width // 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height))


@pytest.mark.parametrize(
    ("arch", "weights"),
    [("resnet50", "IMAGENET1K_V1"), ("resnet50", "DEFAULT"), ("inception_v3", "DEFAULT"), ("vit_b_16", "DEFAULT"),
     ("swin_t", "DEFAULT"), ("efficientnet_b1", "DEFAULT")],
)  # fmt: skip
def test_torchvision_prepares_alike(arch, weights):
    image = photo(500, 375)
    mine = ImageTransform(**input_of(torchvision_net, arch=arch, weights=weights)).tensor(image)
    torch.testing.assert_close(mine, models.get_model_weights(arch)[weights].transforms()(image))


def test_timm_without_a_network(monkeypatch):
    """It is not asked again and again; what is in the cache is found."""
    seen = []

    def create_model(arch, pretrained, **_):
        seen.append(constants.HF_HUB_OFFLINE)
        if arch == "resnet10t":
            raise OfflineModeIsEnabled("offline mode is enabled")
        return nn.Identity()

    def nowhere(*_):
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(timm, "create_model", create_model)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("urllib.request.getproxies", lambda: {"no": "localhost"})
    monkeypatch.setattr("socket.getaddrinfo", lambda *_: [])
    timm_net("resnet18", pretrained=True)
    monkeypatch.setattr("socket.getaddrinfo", nowhere)
    timm_net("resnet18", pretrained=True)
    with pytest.raises(UserError, match=r"cannot download .*huggingface.co: Name .* not in the hub's cache.*by hand"):
        objects.build({"_target_": "attrib.models.timm_net", "arch": "resnet10t", "pretrained": True}, "mine.yaml")
    assert seen == [False, True, True]
    assert not constants.HF_HUB_OFFLINE


@pytest.mark.parametrize(
    "arch", ["vit_small_patch16_224", "vit_base_patch16_clip_224.openai", "tf_efficientnet_lite0", "inception_v3",
             "mobilenetv3_small_050", "beit_base_patch16_384"],
)  # fmt: skip
def test_timm_prepares_alike(arch):
    image = photo(375, 500)
    mine = ImageTransform(**input_of(timm_net, arch=arch, pretrained=False)).tensor(image)
    how = timm.data.resolve_data_config({}, pretrained_cfg=timm.get_pretrained_cfg(arch).to_dict())
    torch.testing.assert_close(mine, timm.data.create_transform(**how)(image))


def test_what_is_not_known_of_the_input():
    resnet = input_of(torchvision_net, arch="resnet50")  # two sets of weights that want 256 and 232
    assert "resize_size" not in resnet
    assert resnet["size"] == 224
    assert input_of(torchvision_net, arch="resnet18")["resize_size"] == 256
    assert input_of(timm_net, arch="vit_tiny_patch16_224", img_size=64)["resize_size"] == 71
    assert "resize" not in input_of(timm_net, arch="vit_tiny_patch16_224", img_size=[64, 96])
    assert input_of(timm_net, arch="test_vit")["size"] == 160
    assert input_of(dict, a=1) == {}


def test_mistakes_are_named_before_the_net_is_built():
    with pytest.raises(UserError, match="resnet49"):
        input_of(torchvision_net, arch="resnet49")
    with pytest.raises(UserError, match="no weights 'V9'"):
        input_of(torchvision_net, arch="resnet50", weights="V9")
    with pytest.raises(UserError, match="resnet_49"):
        input_of(timm_net, arch="resnet_49")
    with pytest.raises(UserError, match=r"model\.arch: .*nosuch"):
        input_of(timm_net, arch="vit_small_patch16_224.nosuch")


def test_of_other_channels_than_three_colours_timm_says_no_mean():
    known = input_of(timm_net, arch="resnet18", in_chans=1)
    assert known.keys() == input_of(timm_net, arch="resnet18").keys() - {"mean", "std"}
