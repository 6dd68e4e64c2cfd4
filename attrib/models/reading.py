"""Which axes of a layer's output are space, found out by changing the input and seeing which places answer.

Sizes prove nothing: (7, 7, 768) may be 7 channels of 7 x 768 places or 7 x 7 places of 768 channels, and 1037 tokens
28 x 37 places behind a class token or 26 x 38 behind 49 others. So bands of a noise image are replaced by other noise,
one after the other. Every place of the layer answers most to the bands that it looks at, which says where on the image
it stands. A *reading* is right if the places that it names stand where it says, row by row and column by column.
Attention mixes places, but a place still answers most to its own part of the image.

What a net says of its tokens itself (the configurations of Hugging Face, the fields of timm's nets) is a second
witness: it decides where the places do not, and where the two contradict each other, nothing is decided.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from attrib.models.extent import check_inside, check_seen, images, noise_image
from attrib.types import UserError

Name = Literal["channels_first", "channels_last", "tokens", "vector"]

RANKS: dict[Name, int] = {"channels_first": 3, "channels_last": 3, "tokens": 2, "vector": 1}  # of a layer, without B
FIELDS = "channels_first, channels_last, vector or tokens:HxW+P (a grid of H rows and W columns behind P other tokens)"
_SAID = re.compile(
    r"auto|channels_first|channels_last|vector|tokens(:(?P<h>[1-9]\d*)x(?P<w>[1-9]\d*)(\+(?P<prefix>\d+))?)?"
)

BANDS = 8  # per axis of the image
IMAGES = 4  # noise images that are asked at most, one after the other while there is doubt
ENOUGH = 0.5  # least share of the variance of where the places stand that a reading must explain, ...
EACH = 0.25  # ... and along each axis that it has
AHEAD = 0.99  # the next best reading must explain less than this share of what the best one explains
# Few places lie in some order by chance, so a reading of few must explain more, and twice.
FEW, ENOUGH_OF_FEW = 32, 0.8

_OF_IMAGES: dict[Name, tuple[int, ...]] = {"channels_first": (1, 2), "channels_last": (0, 1), "tokens": (0,)}
_OF_SOUNDS: dict[Name, tuple[int, ...]] = {"channels_first": (1,), "channels_last": (0,)}


@dataclass(frozen=True)
class Reading:
    """How the output (B, *layer) of a layer is to be read.

    ``grid`` counts the places from top to bottom and from left to right; ``prefix`` the tokens in front of them
    (a class token, registers), which stand nowhere.
    """

    name: Name
    grid: tuple[int, int]
    prefix: int = 0

    def __str__(self) -> str:
        return f"tokens:{self.grid[0]}x{self.grid[1]}+{self.prefix}" if self.name == "tokens" else self.name

    @classmethod
    def said(cls, text: str, shape: Sequence[int]) -> Reading:
        """What a user says of a layer (B, *shape): see ``FIELDS``. Raises UserError if the layer is not like that."""
        check_layout("method", text)
        wrong = f"a layer whose output is (B, {', '.join(map(str, shape))}) has no layout {text!r}"
        name = next((name for name in RANKS if text.startswith(name)), None)
        if name is None or len(shape) != RANKS[name]:
            raise UserError(f"{wrong}; layouts are {FIELDS}")
        if name != "tokens":
            h, w = {"channels_first": shape[1:], "channels_last": shape[:2], "vector": (1, 1)}[name]
            return cls(name, (h, w))
        size = _SAID.fullmatch(text)
        if size is None or size["h"] is None:
            raise UserError(f"{wrong}: the grid of its tokens must be known; layouts are {FIELDS}")
        h, w, prefix = (int(size[part] or 0) for part in ("h", "w", "prefix"))
        if h * w + prefix != shape[0]:
            raise UserError(f"{wrong}: {h} x {w} + {prefix} is {h * w + prefix}, but it has {shape[0]} tokens")
        return cls("tokens", (h, w), prefix)


def check_layout(owner: str, text: str) -> None:
    """Raises UserError for a field ``layout`` that says no layout, neither "auto" nor what a user may know."""
    if not _SAID.fullmatch(text):
        raise UserError(f"{owner}.layout is {text!r}, must be auto, {FIELDS}")


def only(shape: Sequence[int]) -> Reading | None:
    """The one reading that a layer (B, *shape) has, or None if there are several."""
    if len(shape) == 1:
        return Reading("vector", (1, 1))
    if len(shape) == 2 and shape[0] == 1:
        return Reading("tokens", (1, 1))
    return None


def taken_before(reading: Reading, image: tuple[int, int]) -> bool:
    """Whether versions that went by sizes alone, before there were readings, took the layer to be read like this.

    Numbers of these layers are what they were, and keep their keys; those of others get new ones.
    """
    if reading.name != "tokens":
        return reading.name != "channels_last"
    (h, w), (height, width) = reading.grid, image
    tokens = h * w + reading.prefix
    rows = min(tokens, max(1, math.isqrt(tokens * height // width)))
    return reading.grid == (rows, min(tokens // rows, max(1, rows * width // height)))


def find(
    front: Callable[[Tensor], Tensor],
    input_shape: Sequence[int],
    like: Tensor,
    among: Sequence[Name],
    what: str,
    described: Callable[[Sequence[int]], Reading | None] = lambda shape: None,
) -> Reading:
    """The reading of a layer, for inputs (C, H, W) or sounds (C, L), which lie as images of one row.

    front   inputs (N, *input) to the layer's output (N, *layer); gradients do not flow
    like    a tensor of the device and the dtype of the inputs
    among   the readings to decide between; those of another rank than the layer's do not count
    what    the layer, for messages
    described   what the net itself says of a layer (B, *shape), which decides where the places do not

    Raises UserError where no reading, or more than one, explains which places answer, where the net says otherwise of
    its tokens, and where its places do not lie on the whole input (``attrib.models.extent``).
    """
    votes: dict[Reading, int] = {}
    found: dict[Reading, float] = {}
    ranked: list[Reading] = []
    shape: tuple[int, ...] = ()
    for image in range(IMAGES):
        shape, answers = _answers(front, input_shape, like, image, among)
        if (reading := only(shape)) and reading.name in among:
            return reading
        found = {reading: share for name, energy in answers.items() for reading, share in _explained(name, energy)}
        ranked = sorted(found, key=lambda reading: found[reading], reverse=True)
        if not ranked or any(found[reading] >= AHEAD * found[ranked[0]] for reading in ranked[1:2]):
            continue
        best = ranked[0]
        few = best.grid[0] * best.grid[1] < FEW
        if found[best] >= (ENOUGH_OF_FEW if few else ENOUGH):
            votes[best] = votes.get(best, 0) + 1
            if votes[best] == (2 if few else 1):
                best = _agreed(best, described(shape), what)
                others = (i for i in range(images(input_shape)) if i != image)
                more = (_answers(front, input_shape, like, i, among)[1] for i in others)
                energies = (_on_grid(best, each[best.name]) for each in chain([answers], more))
                check_inside(energies, input_shape, best.grid, what)
                check_seen(front, input_shape, like, best.grid, what)
                return best
    # Nothing is told apart by where it stands. A single place (after global pooling, say) stands everywhere.
    for name, space in _space(input_shape, shape, among).items():
        if name != "tokens" and all(shape[axis] == 1 for axis in space):
            return Reading(name, (1, 1))
    if (reading := described(shape)) and reading.name in among:
        check_seen(front, input_shape, like, reading.grid, what)
        return reading
    best_two = ", ".join(f"{reading} ({found[reading]:.2f})" for reading in ranked[:2]) or "none"
    raise UserError(
        f"{what} gives (B, {', '.join(map(str, shape))}), and changing parts of the input does not tell which axes "
        f"are space (best readings, with the share of the answers that they explain: {best_two}). If you know, set "
        f"layout to {FIELDS} where the method is configured; else take another layer"
    )


def _space(input_shape: Sequence[int], shape: Sequence[int], among: Sequence[Name]) -> dict[Name, tuple[int, ...]]:
    """The readings that a layer (B, *shape) may have by its number of dimensions -> which of those are places."""
    known = _OF_SOUNDS if len(input_shape) == 2 else _OF_IMAGES
    return {name: space for name, space in known.items() if name in among and len(shape) == len(space) + 1}


def _agreed(found: Reading, said: Reading | None, what: str) -> Reading:
    if said is None or said.name != "tokens" or found.name != "tokens" or said == found:
        return found
    raise UserError(
        f"{what}: changing parts of the input shows its tokens to be {found}, but by what the net says of itself they "
        f"are {said}. Set layout to the one that is right where the method is configured; else take another layer"
    )


def described(net: nn.Module, path: str, shape: Sequence[int], image: tuple[int, int]) -> Reading | None:
    """What is known of a layer's output (B, *shape): by PyTorch's definition of its class, or by what the net says.

    timm's nets say how many tokens stand in front of the grid, and how large it is; Hugging Face's configurations give
    the size of a patch, and their nets hold the tokens in front as parameters. Either counts only if it makes the
    number of tokens that the layer has.
    """
    layer = net.get_submodule(path)
    if len(shape) == 3:
        # Subclasses of these two may permute, as timm's LayerNorm2d does.
        if type(layer) is nn.Linear or (type(layer) is nn.LayerNorm and len(layer.normalized_shape) == 1):
            return Reading("channels_last", (shape[0], shape[1]))
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d)):
            return Reading("channels_first", (shape[1], shape[2]))
    if len(shape) != 2:
        return None
    around = (module for parent, module in net.named_modules() if not parent or path.startswith(f"{parent}."))
    readings = (says(module, image) for module in around for says in (_timm_says, _hugging_face_says))
    fitting = (r for r in readings if r and r.grid[0] * r.grid[1] + r.prefix == shape[0])
    return next(fitting, None)


def _timm_says(net: nn.Module, image: tuple[int, int]) -> Reading | None:
    prefix, embed = getattr(net, "num_prefix_tokens", None), getattr(net, "patch_embed", None)
    size = getattr(embed, "dynamic_feat_size", None)
    if not isinstance(prefix, int) or not callable(size):
        return None
    h, w = size(image)
    return Reading("tokens", (h, w), prefix) if h * w else None


# The parameters that transformers' vision nets put in front of the patches. ``mask_token`` is none: it replaces some.
_TOKENS_IN_FRONT = ("cls_token", "distillation_token", "register_tokens")


def _hugging_face_says(net: nn.Module, image: tuple[int, int]) -> Reading | None:
    config = getattr(net, "config", None)
    patch = getattr(config, "patch_size", None) if hasattr(config, "model_type") else None
    sides = (patch, patch) if isinstance(patch, int) else patch
    if not isinstance(sides, list | tuple) or len(sides) != 2 or not all(isinstance(s, int) and s > 0 for s in sides):
        return None
    h, w = (length // side for length, side in zip(image, sides, strict=True))
    front = {name.rpartition(".")[2]: value.shape[-2] for name, value in net.named_parameters() if value.ndim == 3}
    counts = {name: front.get(name, 0) for name in _TOKENS_IN_FRONT}
    if getattr(config, "num_register_tokens", None) not in (None, counts["register_tokens"]):
        return None
    return Reading("tokens", (h, w), sum(counts.values())) if h * w else None


@torch.no_grad()
def _answers(
    front: Callable[[Tensor], Tensor], input_shape: Sequence[int], like: Tensor, image: int, among: Sequence[Name]
) -> tuple[tuple[int, ...], dict[Name, Tensor]]:
    """The layer's shape, and for each reading the energy (2, BANDS, *places) with which its places answer.

    First to bands of rows, then to bands of columns. An axis that is shorter has some bands twice.
    """
    old, new = noise_image(image, input_shape, like)
    plain = front(old.reshape(1, *input_shape))
    shape = tuple(plain.shape[1:])
    spaces = _space(input_shape, shape, among)
    found: dict[Name, list[Tensor]] = {name: [] for name in spaces}
    for axis in (2, 3):
        length = old.shape[axis]
        at = torch.arange(length, device=like.device)
        bands = torch.arange(BANDS, device=like.device).unsqueeze(1)
        inside = at * BANDS // length == bands if length >= BANDS else at == bands * length // BANDS
        changed = torch.where(inside.view(BANDS, 1, *((-1, 1) if axis == 2 else (1, -1))), new, old)
        answers = front(changed.reshape(BANDS, *input_shape))
        for name, space in spaces.items():
            channels = [axis + 1 for axis in range(len(shape)) if axis not in space]
            found[name].append((answers - plain).square().sum(channels, dtype=torch.float64))
    return shape, {name: torch.stack(axes) for name, axes in found.items()}


def _stand(energy: Tensor) -> np.ndarray:
    """(2, BANDS, *places) -> (2, *places): where each place stands between the first and the last band.

    From top to bottom and from left to right. A place that answers to nothing counts as one in the middle.
    """
    # One band may change the whole net more than another does; and what all places answer to is no sign.
    mean = energy.flatten(2).sqrt().mean(2).square().clamp(min=torch.finfo(energy.dtype).tiny)
    weight = energy / mean.view(*mean.shape, *[1] * (energy.ndim - 2))
    centre = ((torch.arange(BANDS, device=weight.device) + 0.5) / BANDS).to(weight)
    total = (weight * centre.view(1, -1, *[1] * (weight.ndim - 2))).sum(1)
    stand = (total / weight.sum(1)).cpu().numpy()
    return np.where(np.isfinite(stand), stand, 0.5)


def _on_grid(reading: Reading, energy: Tensor) -> Tensor:
    """(2, BANDS, *places) -> (2, BANDS, h, w), without the tokens in front."""
    return energy[..., reading.prefix :].unflatten(-1, reading.grid) if energy.ndim == 3 else energy


def _explained(name: Name, energy: Tensor) -> Iterator[tuple[Reading, float]]:
    """Every reading of this name that fits along both axes, with the share of the variance that it explains."""
    stand = _stand(energy)
    h, w = stand.shape[1:] if stand.ndim == 3 else (1, stand.shape[1])
    readings = _grids(w) if name == "tokens" else [Reading(name, (h, w))]
    stand = stand.reshape(2, -1)
    stand -= stand.mean(1, keepdims=True)
    for reading in readings:
        if share := _share(stand, reading):
            yield reading, share


def _grids(tokens: int) -> Iterator[Reading]:
    for prefix in range(tokens):
        count = tokens - prefix
        for h in range(1, count + 1):
            if count % h == 0:
                yield Reading("tokens", (h, count // h), prefix)


def _share(stand: np.ndarray, reading: Reading) -> float:
    """Of the variance of ``stand`` (2, places), that which the reading explains; 0 if it fails along an axis."""
    h, w = reading.grid
    on_grid = stand[:, reading.prefix :].reshape(2, h, w)
    explained = 0.0
    for axis, (count, other) in enumerate(((h, w), (w, h))):
        if count == 1:
            continue
        # Equal steps, and the tokens in front in the middle: a regression on this by one factor.
        said = np.arange(count) - (count - 1) / 2
        along = on_grid[axis].sum(1 - axis)
        slope = said @ along
        part = slope * abs(slope) / (other * (said @ said))
        if part < EACH * (stand[axis] ** 2).sum():
            return 0.0
        explained += part
    return float(explained / max((stand**2).sum(), np.finfo(float).tiny))
