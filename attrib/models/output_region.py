"""The output of a segmentation map: logits over a region of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, fx, nn

from attrib.keys import tensor_digest
from attrib.models.output_kind import OutputKind, keep, like
from attrib.types import UserError


@dataclass(frozen=True, eq=False)
class Region(OutputKind):
    """Of a segmentation map (N, C, H, W), the logits of each class over a region. There are no probabilities.

    region  a box (x1, y1, x2, y2), whose edges are pixels of the map: (0, 0, W, H) is all of it; or a mask (H, W), a
            file (.png, where it is not 0, or .npy) or a tensor; or "predicted": for each class the pixels where it
            has the largest logit, for the sample that is explained. Of its perturbed copies the same pixels count
    reduce  "sum" or "mean" over the region
    """

    READ: ClassVar[str] = "region"
    LEAST: ClassVar[int] = 1
    region: Any = None
    reduce: Literal["sum", "mean"] = "sum"
    _mask: Tensor | None = dataclasses.field(init=False, default=None, repr=False)
    _pixels: int = dataclasses.field(init=False, default=0, repr=False)  # in the mask

    def __post_init__(self) -> None:
        region = self.region
        if self.reduce not in ("sum", "mean"):
            raise UserError(f"model.output: reduce must be sum or mean, not {self.reduce!r}")
        if region is None:
            raise UserError("model.output: read=region wants region: a box [x1, y1, x2, y2], a mask or predicted")
        if isinstance(region, str | Path) and region != "predicted":
            object.__setattr__(self, "_mask", _mask_of(Path(region).expanduser()))
        elif isinstance(region, Tensor | np.ndarray):
            object.__setattr__(self, "_mask", _checked_mask(torch.as_tensor(region), "model.output: the mask"))
        elif region != "predicted":
            whole = isinstance(region, Sequence) and all(type(edge) is int for edge in region)
            if not whole or len(region) != 4 or not (0 <= region[0] < region[2] and 0 <= region[1] < region[3]):
                raise UserError(
                    f"model.output: region {region!r} must be a box of four whole numbers x1 < x2, y1 < y2 "
                    "([x1, y1, x2, y2]), a mask or predicted"
                )
            object.__setattr__(self, "region", tuple(region))
        if self._mask is not None:
            object.__setattr__(self, "_pixels", int(self._mask.sum()))

    @property
    def per_sample(self) -> bool:
        return isinstance(self.region, str) and self.region == "predicted"

    @property
    def decides(self) -> bool:
        return not self.per_sample  # sums over regions of different sizes cannot be compared

    @property
    def spec(self) -> dict[str, Any]:
        region = self.region if self._mask is None else tensor_digest({"mask": self._mask})
        return {"region": region, "reduce": self.reduce}

    def link_of(self, net: nn.Module) -> None:
        return None

    def prepare(self, net: nn.Module) -> None:
        if self._mask is not None:
            keep(net, "output_outside", ~self._mask.to(like(net).device))
        if self.per_sample:
            net.output_first = None  # type: ignore[assignment]

    def scores(self, net: nn.Module, raw: Any, x: Tensor) -> Any:
        raw = self._tensor(raw, "a map (N, C, H, W) of logits", (4,))
        traced = isinstance(raw, fx.Proxy)
        if self.per_sample:
            if traced:  # the region would become a part of the graph, which is cut by hooks instead
                raise TypeError("a graph cannot hold the region of a sample")
            inside = self._inside(net, raw)
            total = raw.masked_fill(~inside, 0.0).sum((2, 3))
            return total if self.reduce == "sum" else total / inside.sum((2, 3)).clamp(min=1)
        if self._mask is not None:
            outside: Any = net.output_outside
            if not traced and outside.shape != raw.shape[2:]:
                raise UserError(
                    f"model.output: the mask has {_size(outside)} pixels, and the map that the net returns "
                    f"{_size(raw)} (height x width); give a mask of the map"
                )
            # Not by a product: outside, a net may say -inf.
            total, count = raw.masked_fill(outside, 0.0).sum((2, 3)), self._pixels
        else:
            x1, y1, x2, y2 = self.region
            if not traced and (x2 > raw.shape[3] or y2 > raw.shape[2]):
                raise UserError(
                    f"model.output: the box {list(self.region)} is not inside the map that the net returns, which has "
                    f"{_size(raw)} pixels (height x width)"
                )
            total, count = raw[:, :, y1:y2, x1:x2].sum((2, 3)), (x2 - x1) * (y2 - y1)
        return total if self.reduce == "sum" else total / count

    def _inside(self, net: nn.Module, raw: Tensor) -> Tensor:
        """(1 or N, C, H, W): the pixels that each class has."""
        first: Any = net.output_first
        if first is None:
            raise UserError(
                "model.output: the predicted region is that of the sample that is explained, and it is not known which "
                "that is; compute this within Classifier.explaining(x)"
            )
        if raw.shape[1] < 2:
            raise UserError("model.output: a map of one class has no predicted region; give a box or a mask")
        if isinstance(first, list):  # see ``Output.alone``
            first.append(raw.detach().argmax(1))
            first = first[-1]
        return first[:, None] == torch.arange(raw.shape[1], device=raw.device)[:, None, None]


def _size(map: Tensor) -> str:
    return "x".join(str(side) for side in map.shape[-2:])


def _checked_mask(mask: Tensor, where: str) -> Tensor:
    mask = mask != 0
    if mask.ndim != 2 or not mask.any():
        why = "has no pixel" if mask.ndim == 2 else f"has the shape {tuple(mask.shape)}, not (H, W)"
        raise UserError(f"{where} {why}")
    return mask.cpu()


def _mask_of(path: Path) -> Tensor:
    """A mask (H, W) bool from a file. Raises UserError that names it."""
    try:
        if path.suffix == ".npy":
            array = np.load(path, allow_pickle=False)
        else:
            with Image.open(path) as image:
                array = np.asarray(image if image.mode in ("L", "1", "P", "I;16", "I") else image.convert("L"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"model.output: region: {path} cannot be read as a mask: {error}") from error
    if array.dtype.kind not in "biuf":
        raise UserError(f"model.output: region: {path} holds {array.dtype}, not the numbers of a mask")
    return _checked_mask(torch.from_numpy(np.array(array != 0)), f"model.output: region: {path}")
