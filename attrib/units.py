"""Units: parts of a sample that are kept, removed or scored as a whole, such as words, tiles and superpixels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from attrib.checks import require
from attrib.types import Batch, SampleError, UserError

Kind = Literal["auto", "words", "tiles", "superpixels", "windows", "given"]


@dataclass(frozen=True, eq=False)
class Units:
    """Which unit each place (token, pixel or moment) of B samples belongs to."""

    of: Tensor  # (B, *places) int64: the number of the place's unit, 0 .. n-1, or -1 if it belongs to none
    n: Tensor  # (B,) how many units each sample has

    @classmethod
    def words(cls, batch: Batch) -> Units:
        """The words of texts; special tokens and padding belong to none."""
        if batch.words is None:
            raise ValueError("a batch of texts needs Batch.words")
        return cls(batch.words, batch.words.amax(1) + 1)

    @classmethod
    def tiles(cls, batch: Batch, side: int) -> Units:
        """A grid of ``side`` x ``side`` tiles, numbered row by row; fewer along an axis that has fewer pixels."""
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
        """About ``segments`` connected regions of similar colour (Achanta et al., *SLIC*, 2012).

        Computed by scikit-image on the normalised image, rescaled to 0 .. 1. ``compactness`` is weighed against
        distances of colours in Lab, where black and white are 100 apart. An image of one channel is taken as grey;
        with another number of channels the distance between all 0 and all 1 counts as 100. Raises SampleError for
        an image with NaN or infinite values.
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
        """From unit numbers (B, *places), 0 .. n-1 in each sample, -1 where there is no unit."""
        return cls(of.long(), of.flatten(1).amax(1).long().clamp(min=-1) + 1)

    @classmethod
    def _same(cls, batch: Batch, of: Tensor, n: int) -> Units:
        """The same units for all samples."""
        device = batch.x.device
        return cls(of.to(device).expand(len(batch), *of.shape), torch.full((len(batch),), n, device=device))

    @cached_property
    def most(self) -> int:
        """The largest number of units of any sample, at least 1. The device is asked once."""
        return max(1, int(self.n.max()))

    @property
    def exist(self) -> Tensor:
        """(B, 1, n) bool: which of the ``most`` units each sample has."""
        return (torch.arange(self.most, device=self.n.device) < self.n[:, None]).unsqueeze(1)

    @property
    def masks(self) -> Tensor:
        """(B, n, *places) bool: the places of each unit; all False for units that the sample does not have."""
        number = torch.arange(self.most, device=self.of.device).view(1, -1, *[1] * (self.of.ndim - 1))
        return self.of.unsqueeze(1) == number

    def sum(self, values: Tensor) -> Tensor:
        """(B, *places) -> (B, n): the sum over each unit's places."""
        flat = self.of.flatten(1)
        inside = values.flatten(1) * (flat >= 0)
        return values.new_zeros(len(flat), self.most).scatter_add_(1, flat.clamp(min=0), inside)

    def paint(self, values: Tensor) -> Tensor:
        """(B, n) values of the units -> (B, *places): each place gets its unit's value, or 0 if it has no unit."""
        flat = self.of.flatten(1)
        return (values.gather(1, flat.clamp(min=0)) * (flat >= 0)).view(self.of.shape)

    def spread(self, values: Tensor) -> Tensor:
        """(B, n) values of the units -> (B, *places): each value divided equally among its unit's places."""
        places = self.sum(torch.ones_like(self.of, dtype=values.dtype))
        return self.paint(values / places.clamp(min=1))


@dataclass(frozen=True)
class Partition:
    """How samples are divided into units.

    kind          auto: words of texts, windows of sounds, tiles of images; given: the units that the dataset
                  comes with, see ``Batch.units``
    side          number of tiles along each side of an image
    segments      number of windows, or about the number of superpixels
    compactness   of superpixels, as in scikit-image: the higher, the squarer

    >>> batch = Batch(("a",), torch.rand(1, 3, 4, 4), torch.tensor([0]))
    >>> Partition(side=2).of(batch).of[0].tolist()
    [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]
    """

    NAME: ClassVar[str] = "attrib.units.Partition"
    kind: Kind = "auto"
    side: int = 7
    segments: int = 50
    compactness: float = 10.0

    def __post_init__(self) -> None:
        require(self, "kind", one_of=get_args(Kind))
        require(self, "side", "segments", at_least=1)
        require(self, "compactness", above=0)

    def of(self, batch: Batch) -> Units:
        """The units of these samples. Raises UserError for a kind of units that such samples do not have."""
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
