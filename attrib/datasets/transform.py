"""From an image file's pixels to a network's input, and boxes along with them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from attrib.keys import HOW
from attrib.types import UserError

_INTERPOLATION = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


class Box(NamedTuple):
    """Edges in pixels: (0, 0, width, height) is the whole image. Pixel j spans j to j + 1."""

    x1: float
    y1: float
    x2: float
    y2: float

    def clipped(self, width: float, height: float) -> Box | None:
        """The part inside an image, None if there is none."""
        x1, y1, x2, y2 = max(self.x1, 0.0), max(self.y1, 0.0), min(self.x2, width), min(self.y2, height)
        return Box(x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None


def _pixels(low: float, high: float, count: int) -> slice:
    """The pixels whose centre lies in [low, high), but at least the one that holds the middle."""
    first, last = math.ceil(low - 0.5), math.ceil(high - 0.5)
    if first >= last:
        first = min(int((low + high) / 2), count - 1)
        last = first + 1
    return slice(first, last)


@dataclass(frozen=True)
class ImageTransform:
    """Resize, crop at the centre, scale to 0..1 and normalise; boxes are moved along.

    size           of the network's input: one number, or (height, width); afterwards always the pair
    mean, std      per channel; one channel makes the image grayscale
    resize         "squash": to ``size``, whatever the aspect ratio; "crop": the shorter side to ``resize_size``,
                   then the centre; "none": images must have ``size`` already
    resize_size    for "crop"; by default round(longer side of ``size`` / 0.875), 256 for 224
    interpolation  "bilinear" or "bicubic", antialiased, by Pillow
    max_pixels     larger stored images cost their sample, as they would take the machine's memory
    max_boxes      and so do images with more boxes

    Equal, bit for bit, to torchvision's Resize, CenterCrop, ToTensor and Normalize of a PIL image.
    """

    NAME: ClassVar[str] = "attrib.datasets.transform.ImageTransform"
    size: int | tuple[int, int] = 224
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    resize: str = "squash"
    resize_size: int | None = None
    interpolation: str = "bilinear"
    max_pixels: int = field(default=100_000_000, metadata=HOW)
    max_boxes: int = field(default=1000, metadata=HOW)

    def __post_init__(self) -> None:
        # One form for each meaning, so that 224 and [224, 224] have the same key.
        size = (self.size, self.size) if isinstance(self.size, int) else tuple(self.size)
        mean, std = tuple(map(float, self.mean)), tuple(map(float, self.std))
        if len(size) != 2 or not all(isinstance(n, int) and n > 0 for n in size):
            raise UserError(f"transform.size must be one or two positive integers, not {self.size!r}")
        if len(mean) not in (1, 3) or len(mean) != len(std) or not all(s > 0 for s in std):
            raise UserError(f"transform.mean and .std need 1 or 3 numbers each, std > 0, not {mean} and {std}")
        if self.resize not in ("squash", "crop", "none"):
            raise UserError(f'transform.resize must be "squash", "crop" or "none", not {self.resize!r}')
        if self.interpolation not in _INTERPOLATION:
            raise UserError(f'transform.interpolation must be "bilinear" or "bicubic", not {self.interpolation!r}')
        for name in ("max_pixels", "max_boxes"):
            if getattr(self, name) < 1:
                raise UserError(f"transform.{name} must be at least 1, not {getattr(self, name)}")
        resize_size = self.resize_size
        if self.resize == "crop":
            resize_size = round(max(size) / 0.875) if resize_size is None else resize_size
            if resize_size < max(size):
                raise UserError(f"transform.resize_size is {resize_size}, smaller than the crop {size}")
        elif resize_size is not None:
            raise UserError(f'transform.resize_size is for resize="crop", not for {self.resize!r}')
        values = {"size": size, "mean": mean, "std": std, "resize_size": resize_size}
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @property
    def _size(self) -> tuple[int, int]:
        assert isinstance(self.size, tuple)  # __post_init__ makes it one
        return self.size

    def _geometry(self, width: int, height: int) -> tuple[int, int, int, int]:
        """Width and height after resizing, then left and top of the crop; rounded as torchvision does."""
        out_h, out_w = self._size
        if self.resize == "squash":
            return out_w, out_h, 0, 0
        if self.resize == "none":
            if (height, width) != (out_h, out_w):
                raise ValueError(
                    f'is {height}x{width} pixels (height x width), not {out_h}x{out_w}, with resize="none"'
                )
            return width, height, 0, 0
        assert self.resize_size is not None  # __post_init__ fills it in for resize="crop"
        shorter, longer = self.resize_size, int(self.resize_size * max(width, height) / min(width, height))
        new_w, new_h = (shorter, longer) if width <= height else (longer, shorter)
        return new_w, new_h, round((new_w - out_w) / 2.0), round((new_h - out_h) / 2.0)

    def picture(self, image: Image.Image) -> Image.Image:
        """What the network sees of an RGB image, before normalisation: mode RGB, or L for one channel.

        Raises ValueError if resize="none" and the image has another size.
        """
        width, height, left, top = self._geometry(*image.size)
        image = image.convert("L") if len(self.mean) == 1 else image
        if image.size != (width, height):
            image = image.resize((width, height), _INTERPOLATION[self.interpolation])
        out_h, out_w = self._size
        return image.crop((left, top, left + out_w, top + out_h))

    def tensor(self, image: Image.Image) -> Tensor:
        """(C, H, W) float32, normalised. Raises like ``picture``."""
        # By numpy: images are read by many threads, and for each of these steps torch would employ all cores.
        pixels = np.array(self.picture(image)).reshape(*self._size, len(self.mean))
        x = np.ascontiguousarray(pixels.transpose(2, 0, 1)).astype(np.float32)
        mean, std = (np.array(v, np.float32).reshape(-1, 1, 1) for v in (self.mean, self.std))
        x /= 255
        x -= mean
        x /= std
        return torch.from_numpy(x)

    def units(self, labels: np.ndarray) -> Tensor:
        """(H, W) int64: an image of labels (h, w), where 0 is none, as units 0, 1, 2, ... and -1 for none.

        The nearest label counts. Labels that are cut off leave no gap. Raises like ``picture``.
        """
        width, height, left, top = self._geometry(*labels.shape[::-1])
        image = Image.fromarray(labels.astype(np.int32)).resize((width, height), Image.Resampling.NEAREST)
        out_h, out_w = self._size
        cut = np.asarray(image)[top : top + out_h, left : left + out_w]
        known = np.unique(cut[cut > 0])
        return torch.from_numpy(np.where(cut > 0, np.searchsorted(known, cut), -1)).long()

    def region(self, inside: np.ndarray) -> Tensor:
        """(H, W) bool: a region (h, w) bool of the stored image. The nearest pixel counts. Raises like ``picture``.

        A region that is thinner than the distance between two pixels of the result may vanish.
        """
        width, height, left, top = self._geometry(*inside.shape[::-1])
        image = Image.fromarray(inside.astype(np.uint8)).resize((width, height), Image.Resampling.NEAREST)
        out_h, out_w = self._size
        return torch.from_numpy(np.array(image.crop((left, top, left + out_w, top + out_h)), dtype=bool))

    def mask(self, boxes: Iterable[Box], size: Sequence[int]) -> Tensor:
        """(H, W) bool: the union of boxes that are given in pixels of an image of ``size`` (width, height).

        Boxes are clipped; one that falls outside vanishes. A pixel belongs to a box if its centre
        lies inside; whatever is left of a box after clipping covers at least one pixel.
        """
        width, height, left, top = self._geometry(*size)
        sx, sy = width / size[0], height / size[1]
        out_h, out_w = self._size
        mask = torch.zeros(out_h, out_w, dtype=torch.bool)
        for box in boxes:
            moved = Box(box.x1 * sx - left, box.y1 * sy - top, box.x2 * sx - left, box.y2 * sy - top)
            seen = moved.clipped(out_w, out_h)
            if seen is not None:
                mask[_pixels(seen.y1, seen.y2, out_h), _pixels(seen.x1, seen.x2, out_w)] = True
        return mask
