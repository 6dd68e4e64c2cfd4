"""Transforms of torchvision as what they do to an image: only what can be described has a key of its own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from attrib.datasets import ImageTransform
from attrib.types import UserError

_INSTEAD = (
    "give an attrib.datasets.ImageTransform, its fields ({'size': 224, 'mean': ..., 'std': ...}), or tensors: "
    "x = torch.stack([transform(image) for image in images])"
)
_BYTES = ("PILToTensor", "ToImage")  # what makes a tensor of 8 bits
_FLOATS = ("ToTensor", "ConvertImageDtype", "ToDtype")  # what makes numbers in 0 .. 1 of 8 bits


def image_transform(given: Any) -> ImageTransform:
    """``weights.transforms()`` of a classifier of torchvision, or a Compose of its steps. Raises UserError."""
    from torchvision.transforms import _presets, transforms, v2

    if type(given) is _presets.ImageClassification and len(given.crop_size) == len(given.resize_size) == 1:
        return ImageTransform(
            size=given.crop_size[0],
            mean=tuple(given.mean),
            std=tuple(given.std),
            resize="crop",
            resize_size=given.resize_size[0],
            interpolation=given.interpolation.value,
        )
    if type(given) not in (transforms.Compose, v2.Compose):
        raise UserError(
            f"transform is {type(given).__name__}; give an attrib.datasets.ImageTransform or WaveTransform, its "
            "fields, weights.transforms() of a classifier of torchvision, or a Compose of Resize, CenterCrop, ToTensor "
            "and Normalize. What other transforms make of an image can be handed over as a tensor"
        )
    return _described(_flat(given, (transforms.Compose, v2.Compose)))


def _flat(given: Any, kinds: tuple[type, ...]) -> list[Any]:
    if type(given) not in kinds:
        return [given]
    return [step for part in given.transforms for step in _flat(part, kinds)]


def _described(steps: Iterable[Any]) -> ImageTransform:
    """The steps in their order: gray, resize, crop, to numbers, normalise."""
    fields: dict[str, Any] = {}
    reached, gray = "", False
    for step in steps:
        name = type(step).__name__ if type(step).__module__.startswith("torchvision.transforms.") else ""
        if (name == "RGB" and not reached and not gray) or (name == "ToPureTensor" and reached):
            continue  # images are RGB here, and tensors pure
        if name in _BYTES and reached in ("", *_BYTES):
            reached = name
        elif name == "Grayscale" and step.num_output_channels == 1 and not reached and not fields:
            gray = True
        elif name == "Resize" and not reached and not fields:
            fields = _resized(step)
        elif name == "CenterCrop" and not reached and set(fields) == {"resize_size", "interpolation"}:
            fields |= {"resize": "crop", "size": tuple(step.size)}
        elif name in ("Resize", "CenterCrop", "Grayscale") and reached in _BYTES:
            raise UserError(
                f"transform: {name} stands behind {reached}; torchvision resizes a tensor by arithmetic of its own, "
                f"and attrib as it does a PIL image. Put {name} before {reached} (for a trained net the difference is "
                f"rounding), or {_INSTEAD}"
            )
        elif name in _FLOATS and reached in ("", *_BYTES) and _to_unit(step, name, reached):
            reached = name
        elif name == "Normalize" and reached in _FLOATS:
            fields |= {"mean": tuple(map(float, step.mean)), "std": tuple(map(float, step.std))}
            reached = name
        else:
            what = f"{type(step).__name__}{'' if name else ' (not of torchvision)'}"
            where = f" behind {reached}" if reached else ""
            raise UserError(f"transform: what {what}{where} does to an image cannot be described; {_INSTEAD}")
    if reached not in (*_FLOATS, "Normalize"):
        raise UserError(
            "transform: it makes no floating-point numbers of an image; end it with ToTensor() and Normalize(...)"
        )
    if "size" not in fields:
        has = "Resize of the shorter side alone" if "resize_size" in fields else "no Resize"
        raise UserError(
            f"transform: it has {has}, so that the size of the net's input is not known; say Resize((height, width)), "
            f"or Resize(shorter side) and CenterCrop(size), or {_INSTEAD}"
        )
    channels = 1 if gray else 3
    fields = {"mean": (0.0,) * channels, "std": (1.0,) * channels, **fields}
    if len(fields["mean"]) != channels:
        raise UserError(f"transform: Normalize has {len(fields['mean'])} channels, and the image {channels}")
    return ImageTransform(**fields)


def _resized(step: Any) -> dict[str, Any]:
    size = [step.size] if isinstance(step.size, int) else list(step.size)
    way = str(getattr(step.interpolation, "value", step.interpolation))
    if step.max_size is not None or way not in ("bilinear", "bicubic"):
        raise UserError(
            f"transform: Resize with max_size={step.max_size}, interpolation={way}; only bilinear and bicubic without "
            f"max_size can be described. Else {_INSTEAD}"
        )
    if len(size) == 1:
        return {"resize_size": size[0], "interpolation": way}
    return {"resize": "squash", "size": tuple(size), "interpolation": way}


def _to_unit(step: Any, name: str, reached: str) -> bool:
    """Whether 8 bits become float32 in 0 .. 1."""
    if name == "ToTensor":
        return not reached
    return bool(reached) and step.dtype is torch.float32 and (name == "ConvertImageDtype" or step.scale)
