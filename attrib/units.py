"""Units: what is kept, removed or scored as a whole, such as words, tiles and superpixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from attrib.types import Batch, SampleError, UserError

Kind = Literal["auto", "words", "tiles", "superpixels", "windows", "given"]


class Units(NamedTuple):
    """Which unit every place of B samples belongs to."""

    of: Tensor  # (B, *places) int64: the unit that a token or pixel belongs to, -1: it belongs to none
    n: Tensor  # (B,) how many units a sample has

    @classmethod
    def words(cls, batch: Batch) -> Units:
        """The words of texts; special tokens and padding belong to none."""
        if batch.words is None:
            raise ValueError("a batch of texts needs Batch.words")
        return cls(batch.words, batch.words.amax(1) + 1)

    @classmethod
    def tiles(cls, batch: Batch, side: int) -> Units:
        """A grid of ``side`` x ``side`` tiles, row by row, fewer along an axis that has fewer pixels."""
        (rows, h), (columns, w) = ((min(side, size), size) for size in batch.x.shape[-2:])
        row, column = torch.arange(h) * rows // h, torch.arange(w) * columns // w
        return cls._same(batch, row[:, None] * columns + column, rows * columns)

    @classmethod
    def windows(cls, batch: Batch, count: int) -> Units:
        """``count`` windows of equal length along the last axis, one after another."""
        length = batch.x.shape[-1]
        count = min(count, length)
        return cls._same(batch, torch.arange(length) * count // length, count)

    @classmethod
    def superpixels(cls, batch: Batch, segments: int, compactness: float) -> Units:
        """About ``segments`` regions of like colour (Achanta et al., *SLIC*, 2012), each in one piece.

        By scikit-image, of the normalised image stretched to 0 .. 1. ``compactness`` is weighed against distances of
        colours in Lab, where black and white are 100 apart. One channel is cut as the gray image that it is; in other
        numbers of channels the distance between all 0 and all 1 counts as 100.
        """
        from skimage.segmentation import slic  # takes a second to import

        found = []
        for uid, image in zip(batch.uids, batch.x.movedim(1, -1).detach().cpu().double().numpy()):
            low, high = image.min(), image.max()
            if not np.isfinite(high - low):
                raise SampleError(f"{uid}: the image has NaN or infinite values")
            unit = (image - low) / (high - low or 1.0)
            unit = unit.repeat(3, axis=-1) if unit.shape[-1] == 1 else unit
            colour = unit.shape[-1] == 3
            weight = compactness if colour else compactness * unit.shape[-1] ** 0.5 / 100
            labels = slic(unit, n_segments=segments, compactness=weight, convert2lab=colour, channel_axis=-1)
            found.append(np.unique(labels, return_inverse=True)[1].reshape(labels.shape))
        return cls.given(torch.from_numpy(np.stack(found)).to(batch.x.device))

    @classmethod
    def given(cls, of: Tensor) -> Units:
        """From the units' numbers (B, *places), 0 .. n-1 for every sample, -1 for none."""
        return cls(of.long(), of.flatten(1).amax(1).long().clamp(min=-1) + 1)

    @classmethod
    def _same(cls, batch: Batch, of: Tensor, n: int) -> Units:
        """The same units for all samples."""
        device = batch.x.device
        return cls(of.to(device).expand(len(batch), *of.shape), torch.full((len(batch),), n, device=device))

    @property
    def most(self) -> int:
        """The largest number of units, at least 1."""
        return max(1, int(self.n.max()))

    @property
    def exist(self) -> Tensor:
        """(B, 1, n) bool."""
        return (torch.arange(self.most, device=self.n.device) < self.n[:, None]).unsqueeze(1)

    @property
    def masks(self) -> Tensor:
        """(B, n, *places) bool: the places of each unit; none of a unit that the sample does not have."""
        number = torch.arange(self.most, device=self.of.device).view(1, -1, *[1] * (self.of.ndim - 1))
        return self.of.unsqueeze(1) == number

    def sum(self, values: Tensor) -> Tensor:
        """(B, *places) -> (B, n): the sum over each unit's places."""
        flat = self.of.flatten(1)
        inside = values.flatten(1) * (flat >= 0)
        return values.new_zeros(len(flat), self.most).scatter_add_(1, flat.clamp(min=0), inside)

    def paint(self, values: Tensor) -> Tensor:
        """(B, n) values of the units -> (B, *places), each place its unit's value, 0 outside all units."""
        flat = self.of.flatten(1)
        return (values.gather(1, flat.clamp(min=0)) * (flat >= 0)).view(self.of.shape)

    def spread(self, values: Tensor) -> Tensor:
        """(B, n) values of the units -> (B, *places), each shared equally among the unit's places."""
        places = self.sum(torch.ones_like(self.of, dtype=values.dtype))
        return self.paint(values / places.clamp(min=1))


@dataclass(frozen=True)
class Partition:
    """How samples are cut into units.

    kind          auto: words of texts, windows of sounds, tiles of images.
                  given: what the dataset says, see ``Batch.units``
    side          tiles along each side of an image
    segments      about how many superpixels; how many windows
    compactness   of superpixels: more makes them squarer (scikit-image's)
    """

    NAME: ClassVar[str] = "attrib.units.Partition"
    kind: Kind = "auto"
    side: int = 7
    segments: int = 50
    compactness: float = 10.0

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise UserError(f"Partition.kind is {self.kind!r}, must be one of {', '.join(get_args(Kind))}")
        for field in ("side", "segments"):
            if getattr(self, field) < 1:
                raise UserError(f"Partition.{field} is {getattr(self, field)}, must be at least 1")
        if self.compactness <= 0:
            raise UserError(f"Partition.compactness is {self.compactness}, must be above 0")

    def of(self, batch: Batch) -> Units:
        """Raises UserError for a kind that such samples do not have."""
        image = batch.lengths is None and batch.x.ndim == 4
        kind = self.kind
        if kind == "auto":
            kind = "tiles" if image else "windows" if batch.lengths is None else "words"
        possible = {"words": batch.lengths is not None, "windows": batch.lengths is None and batch.x.ndim == 3}
        if kind == "given":
            if batch.units is None:
                raise UserError("Partition.kind is 'given', but the dataset gives no units (dataset.units)")
            return Units.given(batch.units)
        if not possible.get(kind, image):
            what = "images" if image else "texts" if batch.lengths is not None else "sounds"
            raise UserError(f"Partition.kind is {kind!r}, which {what} do not have")
        if kind == "words":
            return Units.words(batch)
        if kind == "tiles":
            return Units.tiles(batch, self.side)
        if kind == "windows":
            return Units.windows(batch, self.segments)
        return Units.superpixels(batch, self.segments, self.compactness)
