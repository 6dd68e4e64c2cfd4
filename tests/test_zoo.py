"""Builders of nets by name."""

from __future__ import annotations

import pytest
import torch
from torchvision import models

from attrib.models import timm_net, torchvision_net
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


def test_unknown_architectures_list_near_names():
    with pytest.raises(UserError, match=r"model\.arch: torchvision has no model 'resnet49'; near names: .*resnet50"):
        torchvision_net("resnet49")
    with pytest.raises(
        UserError, match=r"model\.arch: timm has no model 'vit_tinny_patch16_224'; near names: vit_tiny_patch16_224"
    ):
        timm_net("vit_tinny_patch16_224")
    for build in (torchvision_net, timm_net):
        with pytest.raises(UserError, match="near names: none"):
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
