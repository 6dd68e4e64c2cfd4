"""How a layer's output lies on the input: as a conv map, as tokens of an image or text, along time, or as a vector."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from attrib.models import Classifier
from attrib.models.reading import FIELDS, Name, Reading, only
from attrib.types import Batch, UserError


@dataclass(frozen=True)
class Layout:
    """How a layer's output (B, *layer) lies on an image, see ``attrib.models.reading``.

    A vector has one place, the whole image; tokens in front of a grid (class token, registers) have none.
    """

    name: Name
    shape: tuple[int, ...]  # of the layer, without B
    image: tuple[int, int]
    tokens: tuple[int, int] = (1, 1)  # the grid of tokens, which their number does not tell
    real: ClassVar[None] = None  # every unit counts; see ``TextLayout``

    @classmethod
    def of(cls, z: Tensor, image: tuple[int, int], said: str | Reading = "auto") -> Layout:
        """Of a reading that was found, or that a user says. Raises UserError if the layer does not have it.

        With "auto", a layer that can be read in one way only; where sizes would have to decide, UserError.
        """
        shape = tuple(z.shape[1:])
        reading = said if isinstance(said, Reading) else only(shape) if said == "auto" else Reading.said(said, shape)
        if reading is None:
            raise UserError(
                f"which axes of a layer whose output is {tuple(z.shape)} are space cannot be told from their sizes; "
                f"set layout to {FIELDS}"
            )
        return cls(reading.name, shape, image, reading.grid)

    @property
    def grid(self) -> tuple[int, int]:
        """How many places from top to bottom, and from left to right."""
        if self.name == "channels_first":
            return self.shape[1], self.shape[2]
        if self.name == "channels_last":
            return self.shape[0], self.shape[1]
        return self.tokens if self.name == "tokens" else (1, 1)

    def to_grid(self, z: Tensor) -> Tensor:
        """(B, *layer) -> (B, C, h, w), without the tokens before the grid."""
        if self.name == "channels_first":
            return z
        if self.name == "channels_last":
            return z.movedim(-1, 1)
        h, w = self.grid
        if self.name == "vector":
            return z[..., None, None]
        return z[:, -h * w :].transpose(1, 2).reshape(len(z), -1, h, w)

    def from_grid(self, grid: Tensor, like: Tensor) -> Tensor:
        """The inverse; the tokens before the grid are taken from ``like`` (B, *layer)."""
        if self.name == "channels_first":
            return grid
        if self.name == "channels_last":
            return grid.movedim(1, -1)
        if self.name == "vector":
            return grid[..., 0, 0]
        h, w = self.grid
        return torch.cat((like[:, : -h * w], grid.flatten(2).transpose(1, 2)), dim=1)

    def smooth(self, z: Tensor, sigma: float | None) -> Tensor:
        """Gaussian smoothing of each channel over the places; unchanged if sigma is None or 0, or for a single place.

        The kernel has 2 * round(2 * sigma) + 1 places and the borders are reflected (IBA, section 3.2
        and its code); on maps too small for that the kernel is shortened to what fits.
        """
        grid = self.to_grid(z)
        if not sigma or grid.shape[-2:] == (1, 1):
            return z
        channels = grid.shape[1]
        for dim in (-2, -1):
            radius = min(round(2 * sigma), grid.shape[dim] - 1)
            if radius < 1:
                continue
            offsets = torch.arange(-radius, radius + 1, device=z.device, dtype=z.dtype)
            kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
            kernel = kernel / kernel.sum()
            shape, pad = ((-1, 1), (0, 0, radius, radius)) if dim == -2 else ((1, -1), (radius, radius, 0, 0))
            weight = kernel.reshape(1, 1, *shape).expand(channels, 1, -1, -1)
            grid = F.conv2d(F.pad(grid, pad, mode="reflect"), weight, groups=channels)
        return self.from_grid(grid, like=z)

    def bits(self, capacity: Tensor) -> Tensor:
        """(B, *layer) nats -> (B, h, w) bits per place, summed over channels."""
        return self.to_grid(capacity).sum(1) / math.log(2)

    def spread(self, bits: Tensor) -> Tensor:
        """(B, h, w) bits per place -> (B, H, W) bits per pixel.

        A place's bits are divided among its pixels, so the sum over the image stays the same except for an
        effect of the border: interpolation mirrors there, so that along each axis the outermost places count
        7/8 and their inner neighbours 9/8 (when upsampled by a whole number).
        """
        (h, w), (height, width) = bits.shape[-2:], self.image
        return resize(bits, self.image) * (h * w) / (height * width)


@dataclass(frozen=True)
class TextLayout:
    """How a layer's output lies on B texts: a place for each token, (B, T, C), or one for the whole text, (B, C).

    mask   (B, T), see ``Batch.mask``
    real   (B, T, 1) in the layer's dtype: 1, but 0 on padding, whose units do not count; None for a vector
    """

    mask: Tensor
    real: Tensor | None

    @classmethod
    def of(cls, z: Tensor, mask: Tensor) -> TextLayout:
        """By its shape; raises UserError for a layer that has neither a place for each token nor one for the text."""
        if z.ndim == 3 and z.shape[:2] == mask.shape:
            return cls(mask, mask.unsqueeze(2).to(z.dtype))
        if z.ndim == 2:
            return cls(mask, None)
        raise UserError(
            f"a layer whose output is {tuple(z.shape)} has no place for each of the {mask.shape[1]} tokens; "
            "take one that gives (B, T, C), or (B, C)"
        )

    @classmethod
    def found(cls, model: Classifier, role: str, batch: Batch, z: Tensor) -> TextLayout:
        """Of what the layer with this role gives. Raises UserError, also for channels in the place of tokens."""
        assert batch.mask is not None  # they are texts
        found = cls.of(z, batch.mask)
        if found.real is not None:
            model.roles.check_tokens(role, batch.x)
        return found

    def smooth(self, z: Tensor, sigma: float | None) -> Tensor:
        """Unchanged: neighbouring words are not similar as neighbouring pixels are."""
        return z

    def bits(self, capacity: Tensor) -> Tensor:
        """(B, *layer) nats -> (B, T) bits per token, summed over channels; those of a vector are divided equally."""
        bits = capacity.sum(-1) / math.log(2)
        return bits if self.real is not None else bits[:, None] * self.mask / self.mask.sum(1, keepdim=True)

    def spread(self, bits: Tensor) -> Tensor:
        """Unchanged: each token has its place."""
        return bits


@dataclass(frozen=True)
class SoundLayout:
    """How a layer's output lies on B sounds: (B, C, l), or (B, l, C) as tokens, each like an image of one row.

    A vector (B, C) has one place, the whole sound.

    row    the layout on that image
    last   whether the channels are the last dimension
    """

    row: Layout
    last: bool
    real: ClassVar[None] = None  # every unit counts; see ``TextLayout``

    @classmethod
    def of(cls, z: Tensor, length: int, said: str) -> SoundLayout:
        """Raises UserError for a layer that has neither places along time nor one for the whole sound."""
        name = "vector" if said == "auto" and z.ndim == 2 else said
        known = ("vector",) if z.ndim == 2 else ("channels_first", "channels_last", "tokens")
        if z.ndim not in (2, 3) or name not in known:
            raise UserError(
                f"a layer whose output is {tuple(z.shape)} has no layout {said!r} on a sound; take one that gives "
                "(B, C, l), which is channels_first, or (B, l, C), which is tokens, or (B, C), a vector"
            )
        last = name in ("tokens", "channels_last")
        channels, *places = z.shape[1:][::-1] if last else z.shape[1:]
        return cls(Layout("channels_first", (channels, 1, *(places or (1,))), (1, length)), last)

    def _to_row(self, z: Tensor) -> Tensor:
        """(B, *layer) -> (B, C, 1, l)."""
        return (z.movedim(-1, 1) if self.last else z).reshape(len(z), *self.row.shape)

    def smooth(self, z: Tensor, sigma: float | None) -> Tensor:
        """Gaussian smoothing of each channel over time; see ``Layout.smooth``."""
        smoothed = self.row.smooth(self._to_row(z), sigma).squeeze(2)
        return (smoothed.movedim(1, -1) if self.last else smoothed).reshape(z.shape)

    def bits(self, capacity: Tensor) -> Tensor:
        """(B, *layer) nats -> (B, l) bits per place, summed over channels."""
        return self.row.bits(self._to_row(capacity)).squeeze(1)

    def spread(self, bits: Tensor) -> Tensor:
        """(B, l) bits per place -> (B, L) bits per sample; see ``Layout.spread``."""
        return self.row.spread(bits.unsqueeze(1)).squeeze(1)


Places = Layout | TextLayout | SoundLayout


def on_image(model: Classifier, role: str, x: Tensor, z: Tensor, said: str = "auto") -> Layout:
    """How the output z of the layer with this role lies on images x (B, C, H, W).

    With "auto" it is found out (``Classifier.reading``), with "tokens" the grid of the tokens is; else the user knows.
    Raises UserError, also if it cannot be found out.
    """
    image = image_size(x)
    if said not in ("auto", "tokens") or only(z.shape[1:]) is not None:
        return Layout.of(z, image, said)
    return Layout.of(z, image, model.roles.reading(role, tuple(x.shape[1:]), said))


def places(model: Classifier, role: str, batch: Batch, z: Tensor, said: str = "auto") -> Places:
    """How a layer's output lies on images (``on_image``), on sounds, or on texts, where ``said`` does not count."""
    if batch.mask is not None:
        return TextLayout.found(model, role, batch, z)
    if batch.x.ndim == 4:
        return on_image(model, role, batch.x, z, said)
    if said == "auto" and z.ndim == 3:
        said = model.roles.reading(role, tuple(batch.x.shape[1:])).name
    return SoundLayout.of(z, batch.x.shape[2], said)


def image_size(x: Tensor) -> tuple[int, int]:
    """Height and width of images (..., H, W)."""
    height, width = x.shape[-2:]
    return height, width


@cache
def _resize_matrix(size: int, new: int) -> np.ndarray:
    """(new, size): skimage.transform.resize(order=1) along one axis, as a matrix; the border is mirrored.

    What shrinks is smoothed first. As resizing is linear, resizing the identity gives the matrix.
    """
    from scipy import ndimage  # takes a while to import

    unit = np.eye(size)
    if new < size:
        unit = ndimage.gaussian_filter1d(unit, (size / new - 1) / 2, axis=0, mode="mirror")
    if new == size:
        return unit
    return ndimage.zoom(unit, (new / size, 1), order=1, mode="mirror", grid_mode=True)


def resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, h, w) -> (B, H, W), linear; the same numbers as skimage.transform.resize(order=1)."""
    return resizing(image_size(maps), size, maps)(maps)


def resizing(old: tuple[int, int], new: tuple[int, int], like: Tensor) -> Callable[[Tensor], Tensor]:
    """``resize`` from one size to another for tensors like ``like``; made once where it is needed often."""
    rows, columns = (torch.from_numpy(_resize_matrix(a, b)).to(like) for a, b in zip(old, new, strict=True))
    return lambda maps: rows @ maps @ columns.T
