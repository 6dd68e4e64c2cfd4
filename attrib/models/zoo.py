"""Builders of nets by name; what a model YAML's ``_target_`` points to."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from attrib.classes import ClassNames
from attrib.models.huggingface_images import hf_image_classifier, hf_image_text, hf_input
from attrib.process.hub import hub_at_once
from attrib.types import UserError, did_you_mean


def seeded(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """``build()``, with the random weights that ``seed`` determines.

    torch's global random numbers go on afterwards as if nothing had been built. ``seed`` makes no difference for a net
    whose weights are loaded, by the builder or later.

    >>> one, same = (seeded(lambda: nn.Linear(2, 1), seed=3) for _ in range(2))
    >>> bool((one.weight == same.weight).all())
    True
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed the GPUs, which are not forked
        return build()


def _unknown(library: str, arch: str, known: Iterable[str]) -> UserError:
    return UserError(f"model.arch: {library} has no model {arch!r}{did_you_mean(arch, known)}")


def _torchvision_weights(arch: str, weights: str) -> Any:
    """The entry of torchvision's table of weights, with their address and how images are prepared for them."""
    from torchvision import models

    entries = models.get_model_weights(arch).__members__
    if weights not in entries:
        raise UserError(f"model.weights: {arch} has no weights {weights!r}; it has {', '.join(entries)}")
    return entries[weights]


def _torchvision_builder(arch: str) -> Callable[..., nn.Module]:
    from torchvision import models

    try:
        return models.get_model_builder(arch)
    except ValueError as error:
        raise _unknown("torchvision", arch, models.list_models(models)) from error


def torchvision_net(
    arch: str, weights: str | None = None, transform_input: bool | None = None, **options: Any
) -> nn.Module:
    """Any torchvision classifier, or segmentation net (fcn_resnet50 and others).

    ``weights`` names a set of weights that torchvision downloads ("DEFAULT", "IMAGENET1K_V1");
    None leaves the net random, for a checkpoint to fill.

    ``transform_input`` is for googlenet and inception_v3 only: whether the net first converts an input that was
    normalised with ImageNet's mean and standard deviation to one normalised with 0.5 and 0.5. None means yes, as
    torchvision's weights expect it, also where they come from a checkpoint. (torchvision's own default depends on
    whether it loads them.)
    """
    builder = _torchvision_builder(arch)
    if arch in ("googlenet", "inception_v3"):
        options = {"init_weights": False, **options}  # else they warn, and take a long time
        options["transform_input"] = transform_input is not False
    elif transform_input is not None:
        raise UserError(f"model.transform_input: {arch} has none, only googlenet and inception_v3 do")
    if "weights_backbone" in inspect.signature(builder).parameters:
        options = {"weights_backbone": None, **options}  # else they are downloaded, and then replaced
    entry = None if weights is None else _torchvision_weights(arch, weights)
    net = builder(weights=None, **options)
    if entry is None:
        return net
    try:
        net.load_state_dict(entry.get_state_dict(progress=False, check_hash=True, weights_only=True))
    except OSError as error:
        raise UserError(
            f"torchvision cannot download {entry.url} ({error}). On a machine without network, put the file there "
            f"by hand and set model.weights=null model.checkpoint=FILE"
        ) from error
    return net


def _torchvision_input(arch: str, weights: str | None = None, **_: Any) -> dict[str, Any]:
    from torchvision import models
    from torchvision.transforms._presets import ImageClassification

    _torchvision_builder(arch)
    named = models.get_model_weights(arch) if weights is None else [_torchvision_weights(arch, weights)]
    found = []
    for how in (entry.transforms() for entry in named):
        if not isinstance(how, ImageClassification):
            return {}
        found.append(
            {
                "size": how.crop_size[0],
                "mean": list(how.mean),
                "std": list(how.std),
                "resize": "crop",
                "resize_size": how.resize_size[0],
                "interpolation": how.interpolation.value,
            }
        )
    # Without a name the weights may be any of them, so only what all agree on is known.
    return {k: v for k, v in found[0].items() if all(other[k] == v for other in found)} if found else {}


def timm_net(arch: str, pretrained: bool = False, **options: Any) -> nn.Module:
    """Any timm classifier; ``pretrained`` downloads its weights."""
    import timm

    if not timm.is_model(arch.partition(".")[0]):
        raise _unknown("timm", arch, timm.list_models())
    if not pretrained:
        return timm.create_model(arch, pretrained=False, **options)
    with hub_at_once() as why:
        try:
            return timm.create_model(arch, pretrained=True, **options)
        except OSError as error:
            if not why:
                raise
            raise ConnectionError(f"{why}, and the weights are not in the hub's cache") from error


def _timm_input(arch: str, img_size: Any = None, in_chans: int = 3, **_: Any) -> dict[str, Any]:
    import timm

    if not timm.is_model(arch.partition(".")[0]):
        raise _unknown("timm", arch, timm.list_models())
    try:
        registered = timm.get_pretrained_cfg(arch)
    except RuntimeError as error:
        raise UserError(f"model.arch: {error}") from error
    if registered is None:
        return {}
    how = timm.data.resolve_data_config({}, pretrained_cfg=registered.to_dict())
    size = list(how["input_size"][1:]) if img_size is None else img_size
    if isinstance(size, (list, tuple)) and len(set(size)) == 1:
        size = size[0]
    known = {"size": size, "mean": list(how["mean"]), "std": list(how["std"]), "interpolation": how["interpolation"]}
    if len(how["mean"]) != in_chans:  # of three colours; timm says nothing of other channels
        del known["mean"], known["std"]
    # ImageTransform can do neither borders nor crops that are not square.
    if how["crop_mode"] == "squash" and how["crop_pct"] == 1:
        known |= {"resize": "squash", "resize_size": None}
    elif how["crop_mode"] == "center" and isinstance(size, int):
        known |= {"resize": "crop", "resize_size": math.floor(size / how["crop_pct"])}
    return known


_INPUT: Mapping[Callable[..., nn.Module], Callable[..., dict[str, Any]]] = {
    torchvision_net: _torchvision_input,
    timm_net: _timm_input,
    hf_image_classifier: hf_input,
    hf_image_text: hf_input,
}


def input_of(builder: Callable[..., Any], **arguments: Any) -> dict[str, Any]:
    """How images are prepared for the net that ``builder(**arguments)`` returns, as far as its library says so.

    The names are the fields of ``datasets.ImageTransform``; what is not known is left out. Where ``weights`` are not
    named, torchvision knows what is the same for all weights of the architecture; timm goes by the tag in the
    name (vit_small_patch16_224.augreg_in1k), or without one by the architecture's default tag.
    """
    known = _INPUT.get(builder)
    return known(**arguments) if known else {}


def _torchvision_classes(arch: str, weights: str | None = None, **_: Any) -> ClassNames | None:
    names = None if weights is None else _torchvision_weights(arch, weights).meta.get("categories")
    return None if names is None else ClassNames.of(names, f"torchvision's weights of {arch}")


def _timm_classes(arch: str, pretrained: bool = False, num_classes: int | None = None, **_: Any) -> ClassNames | None:
    import timm
    from timm.data import ImageNetInfo, infer_imagenet_subset

    about = timm.get_pretrained_cfg(arch) if pretrained and timm.is_model(arch.partition(".")[0]) else None
    if about is None or num_classes not in (None, about.num_classes):  # another head than the weights were made for
        return None
    subset = None if about.label_names else infer_imagenet_subset(about.to_dict())
    names = about.label_names or (ImageNetInfo(subset).label_descriptions() if subset else None)
    return None if names is None else ClassNames.of(list(map(str, names)), f"timm's {arch}")


_CLASSES: Mapping[Callable[..., nn.Module], Callable[..., ClassNames | None]] = {
    torchvision_net: _torchvision_classes,
    timm_net: _timm_classes,
}


def classes_of(builder: Callable[..., Any], **arguments: Any) -> ClassNames | None:
    """What the classes of the net that ``builder(**arguments)`` returns are called, as far as its library says so.

    It says so of the weights that it loads; weights from elsewhere may have other classes.
    """
    known = _CLASSES.get(builder)
    return known(**arguments) if known else None
