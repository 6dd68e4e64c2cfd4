"""Whether the places of a layer lie on the whole image, from one border to the other, as its map is drawn.

A layer's *reading* says which axes are places and in which order (``attrib.models.reading``). That a net crops its
input, or pads it, changes neither, and yet a map that is stretched over the image shows every place where it is not.
A reading is right only if

- the layer sees the image up to its borders. Strided layers may leave out pixels at the end that make no place more,
- and, at the distance of the places in the middle, the first and the last of them stand on the image. What sees far
  beyond the border stands there too: only a net that pads more than its layers take away has places outside.

Layers without padding have their first place further inside. They touch the border, so that is no crop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from attrib.noise import Noise
from attrib.types import UserError

IMAGES = 4  # noise images of which each may show that a border is seen, or that the places stand inside
OF_SOUNDS = 16  # of sounds, of whose borders a few samples decide
FIRST = 0.25  # the most that may be left out before the first place, as a share of the distance of two places
OUTSIDE = 0.06  # how far the places may reach over each end, by those in the middle; at least one place's width
INSIDE = (0.2, 0.8)  # places between these stand where they see: behind them the border cuts off a part
FAINT = 0.05  # a place that answers less than this share of what the strongest answers sees nothing
_SIDES = {(2, 0): "top", (2, 1): "bottom", (3, 0): "left", (3, 1): "right"}


class PartialImageError(UserError):
    """A layer's places do not lie on the whole image."""


def noise_image(number: int, input_shape: Sequence[int], like: Tensor) -> tuple[Tensor, Tensor]:
    """An image (1, C, H, W) of noise, and another to change it with; sounds (C, L) are images of one row."""
    size = (input_shape[0], 1, *input_shape[1:]) if len(input_shape) == 2 else tuple(input_shape)
    noise = Noise([f"reading/{number}"], device=like.device, dtype=like.dtype)
    return noise.normal(*size), noise.normal(*size)


@torch.no_grad()
def check_seen(
    front: Callable[[Tensor], Tensor], input_shape: Sequence[int], like: Tensor, grid: tuple[int, int], what: str
) -> None:
    """Raises PartialImageError unless a layer of a grid of places sees the image up to all borders.

    front  inputs (N, *input) to the layer's output (N, *layer); gradients do not flow
    """
    unseen = [*_strips(input_shape, grid)]
    for image in range(images(input_shape)):
        old, new = noise_image(image, input_shape, like)
        rows = [old]
        for axis, start, stop in unseen:
            rows.append(old.clone())
            rows[-1].narrow(axis, start, stop - start).copy_(new.narrow(axis, start, stop - start))
        plain, *changed = front(torch.cat(rows).reshape(-1, *input_shape)).flatten(1).double()
        rounding = 64 * torch.finfo(like.dtype).eps * plain.abs().max()
        unseen = [
            strip for strip, z in zip(unseen, changed, strict=True) if not bool(((z - plain).abs() > rounding).any())
        ]
        if not unseen:
            return
    axis, start, stop = unseen[0]
    side = _SIDES[axis, int(start > 0)] if len(input_shape) == 3 else ("end" if start else "beginning")
    sees = {2: "row", 3: "column"}[axis] if len(input_shape) == 3 else "sample"
    some = f"{stop - start} {sees}{'s' * (stop - start > 1)}"
    raise PartialImageError(
        f"{what} does not see the whole input: nothing changes with its {some} at the {side}, as if "
        "the net cropped what it is given. Its map would be stretched over what it does not see. Crop the inputs "
        "before the net gets them, or take a method whose map is of the input itself, such as integrated_gradients"
    )


def _strips(input_shape: Sequence[int], grid: tuple[int, int]) -> Iterator[tuple[int, int, int]]:
    """(axis, from, to): what is seen at both ends of each axis by a layer that sees the whole of it."""
    for axis, length, places in zip((2, 3)[-(len(input_shape) - 1) :], input_shape[1:], _on_axes(input_shape, grid)):
        yield axis, 0, min(length, int(FIRST * length / places) + 1)
        # What is seen has room for so many places, and what is left out for none: length - seen < seen / places.
        yield axis, length - -(-length // (places + 1)), length


def _on_axes(input_shape: Sequence[int], grid: tuple[int, int]) -> tuple[int, ...]:
    return grid[-(len(input_shape) - 1) :]


def images(input_shape: Sequence[int]) -> int:
    return IMAGES if len(input_shape) == 3 else OF_SOUNDS


def check_inside(energies: Iterable[Tensor], input_shape: Sequence[int], grid: tuple[int, int], what: str) -> None:
    """Raises PartialImageError where places lie on more than the image, by the distance of those in the middle.

    That they lie elsewhere is no matter: those of a causal net, which pads on one side, answer to what came before.

    energies  (2, BANDS, h, w) each, of one image after the other: with which the places answer to bands of rows and of
              columns. One image may mislead where few units are active; they are added up until the places fit
    """
    total: Tensor | float = 0.0
    for energy in energies:
        total = total + energy / energy.mean().clamp(min=torch.finfo(energy.dtype).tiny)
        ends = outer(total)
        margins = [max(OUTSIDE, 1 / places) for places in grid]
        outside = [(i, *end) for i, (end, margin) in enumerate(zip(ends, margins)) if end[1] - end[0] > 1 + 2 * margin]
        if not outside:
            return
    axis, first, last = outside[0]
    way = ("from top to bottom", "from left to right")[axis] if len(input_shape) == 3 else "along time"
    raise PartialImageError(
        f"{what} has {grid[axis]} places {way}, of which those in the middle lie so far apart that the first stands at "
        f"{first:.0%} of the input and the last at {last:.0%}: the net pads what it is given, and its map would be "
        "squeezed onto the input with what it pads. Pad the inputs before the net gets them, or take a method whose "
        "map is of the input itself, such as integrated_gradients"
    )


def outer(energy: Tensor) -> list[tuple[float, float]]:
    """Where the first and the last place of both axes stand if all lie as far apart as those in the middle.

    In shares of the image; those in the middle of their own share of it if an axis has too few places to tell.
    """
    return [_outer(of_axis if axis == 0 else of_axis.mT) for axis, of_axis in enumerate(energy.double().cpu())]


def _outer(energy: Tensor) -> tuple[float, float]:
    """Of energies (BANDS, places, others) along one axis."""
    bands, places = energy.shape[:2]
    inside = 0.5 / places, 1 - 0.5 / places
    weight = energy - energy.amin((1, 2), keepdim=True)  # what all places answer to says nothing of where they are
    total = weight.sum((0, 2)).clamp(min=torch.finfo(energy.dtype).tiny)
    centre = (torch.arange(bands, dtype=energy.dtype) + 0.5) / bands
    stand = ((weight.sum(2) * centre[:, None]).sum(0) / total).numpy()
    known = (total.numpy() > FAINT * total.max().item()) & (stand > INSIDE[0]) & (stand < INSIDE[1])
    at = np.flatnonzero(known)
    if len(at) < 2:
        return inside
    slope, offset = np.polyfit(at, stand[at], 1)
    return float(offset), float(offset + slope * (places - 1))
