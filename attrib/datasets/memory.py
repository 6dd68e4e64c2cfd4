"""Samples that are in memory already: pictures, sentences, sounds, and tensors as the network reads them.

All take ``labels``, uid -> a class () or a 1 or 0 for each class (K,), and ``regions``, uid -> bool, which may be
empty: a sample without label has the target -1.
"""

from __future__ import annotations

import copy
import dataclasses
import io
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, BinaryIO, ClassVar, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from attrib.classes import Numbering
from attrib.datasets.audio import AudioDataset, WaveTransform
from attrib.datasets.images import ImageDataset
from attrib.datasets.sound import Sound
from attrib.datasets.text import TextDataset
from attrib.datasets.tokens import Encoder
from attrib.datasets.transform import ImageTransform
from attrib.keys import digest, tensor_digest
from attrib.types import UNREADABLE, Batch, SampleError

Labels = Mapping[str, Tensor]
NONE: Labels = types.MappingProxyType({})


class _Labelled:
    """A dataset whose labels are in memory."""

    _labels: Labels

    def label(self, uid: str) -> int:
        """The class; -1 where there is none, or several."""
        value = self._labels.get(uid)
        return -1 if value is None or value.ndim else int(value)

    def batch(self, uids: Sequence[str]) -> Batch:
        """With labels (B, K) where each sample has several."""
        batch: Batch = super().batch(uids)  # type: ignore[misc]  # of the dataset that it stands in front of
        several = [self._labels[uid] for uid in batch.uids if uid in self._labels and self._labels[uid].ndim]
        return dataclasses.replace(batch, target=torch.stack(several)) if len(several) == len(batch) else batch


class _Marked:
    """A dataset whose regions, as the network sees them, are in memory."""

    _regions: Mapping[str, np.ndarray] | None

    def with_regions(self, regions: Mapping[str, np.ndarray]) -> Self:
        other = copy.copy(self)
        other._regions = regions
        return other

    def _in_regions(self, batch: Batch) -> Batch:
        if self._regions is None:
            return batch
        return dataclasses.replace(batch, roi=torch.stack([torch.from_numpy(self._regions[uid]) for uid in batch.uids]))


class Pictures(_Labelled, ImageDataset):
    """Pictures as the bytes of image files; ``regions``: (h, w) bool in pixels of the picture."""

    NAME: ClassVar[str] = "Pictures"

    def __init__(
        self,
        images: Mapping[str, bytes],
        transform: ImageTransform,
        labels: Labels = NONE,
        regions: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        super().__init__(images, transform, boxed=regions is not None)
        self._images, self._labels, self._regions = images, labels, regions or {}

    def open(self, uid: str) -> BinaryIO:
        return io.BytesIO(self._images[uid])

    def region(self, uid: str) -> np.ndarray | None:
        return self._regions.get(uid)

    def with_regions(self, regions: Mapping[str, np.ndarray]) -> Self:
        other = copy.copy(self)
        other._regions, other._boxed, other.fingerprints = regions, True, {}
        return other


class Sentences(_Labelled, TextDataset):
    """Texts."""

    NAME: ClassVar[str] = "Sentences"

    def __init__(self, texts: Mapping[str, str], encoder: Encoder | None, labels: Labels = NONE) -> None:
        super().__init__(texts, encoder)
        self._texts, self._labels = texts, labels

    def text(self, uid: str) -> str:
        return self._texts[uid]


class Waves(_Labelled, _Marked, AudioDataset):
    """Sounds, or why a sound cannot be read; ``regions``: (length,) bool over what the network hears."""

    NAME: ClassVar[str] = "Waves"

    def __init__(
        self,
        sounds: Mapping[str, Sound | str],
        transform: WaveTransform,
        labels: Labels = NONE,
        regions: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        super().__init__(sounds, transform)
        self._sounds, self._labels, self._regions = sounds, labels, regions

    def sound(self, uid: str) -> Sound:
        found = self._sounds[uid]
        if isinstance(found, str):
            raise SampleError(found)
        return found

    def batch(self, uids: Sequence[str]) -> Batch:
        return self._in_regions(super().batch(uids))


class Tensors(_Marked):
    """Inputs as the network reads them: images (C, H, W), sounds (C, L), or ids of texts (T,).

    read    uid -> a batch of this one sample; it is called whenever the sample is asked for
    transform   how images or sounds were prepared; it is used to draw them, and for nothing else
    pad     id that texts of different lengths are padded with; None: they must have equal lengths
    width   how many places the texts had that were handed over, padding included; their maps get as many

    A batch is made of samples of equal shape. Raises SampleError otherwise.
    """

    NAME: ClassVar[str] = "Tensors"

    def __init__(
        self,
        uids: Sequence[str],
        read: Callable[[str], Batch],
        modality: str,
        transform: ImageTransform | WaveTransform | None = None,
        pad: int | None = None,
        regions: Mapping[str, np.ndarray] | None = None,
        width: int = 0,
    ) -> None:
        self.uids, self.modality, self.transform, self.width = tuple(sorted(uids)), modality, transform, width
        self.names: Mapping[int, str] = {}
        self.label_problems: Mapping[str, str] = {}  # uid -> why it has no label
        self.numbering: Numbering = "given"
        self.key = digest("Tensors", modality)
        self._read, self._pad, self._regions = read, pad, regions

    def batch(self, uids: Sequence[str]) -> Batch:
        rows = [self._read(uid) for uid in uids]
        if self.modality == "text" and self._pad is not None:
            rows = [_padded(row, max(row.x.shape[1] for row in rows), self._pad) for row in rows]
        shapes = {tuple(row.x.shape[1:]): row.uids[0] for row in rows}
        if len(shapes) > 1:
            (one, a), (other, b) = list(shapes.items())[:2]
            hint = "; texts are padded if the net says with what (its attribute pad_id)" * (self.modality == "text")
            raise SampleError(f"{a} is {one} and {b} is {other}; samples of one batch must have the same shape{hint}")
        fields: dict[str, Any] = {}
        for name in ("x", "target", "roi", "lengths", "words", "units"):
            values = [getattr(row, name) for row in rows]
            fields[name] = None if any(value is None for value in values) else torch.cat(values)
        return self._in_regions(Batch(tuple(uids), **fields))

    def fingerprint(self, uid: str) -> str:
        """Of a text without the padding behind it."""
        try:
            row = self.batch([uid])
            row = row if row.lengths is None else row.cut(int(row.lengths[0]))
        except Exception:  # whoever asks for the sample will be told
            return UNREADABLE
        return tensor_digest({k: v for k, v in vars(row).items() if isinstance(v, Tensor)})[:16]

    def box_area(self, uid: str) -> float | None:
        roi = self.batch([uid]).roi
        return float(roi.float().mean()) if roi is not None and roi.any() else None

    # ---- for people -----------------------------------------------------------------------------

    def picture(self, uid: str) -> np.ndarray:
        """(H, W, 3) uint8; where it is not known how the image was prepared, from its least to its greatest value."""
        x = self.batch([uid]).x[0].detach().cpu().double()
        how = self.transform
        if isinstance(how, ImageTransform) and len(how.mean) == len(x):
            x = x * torch.tensor(how.std)[:, None, None] + torch.tensor(how.mean)[:, None, None]
        else:
            x = (x - x.min()) / (x.max() - x.min()).clamp(min=1e-12)
        x = x[:3] if len(x) >= 3 else x[:1].expand(3, -1, -1)
        return (x.clamp(0, 1) * 255 + 0.5).byte().permute(1, 2, 0).contiguous().numpy()

    @property
    def rate(self) -> int:
        """Samples per second; 16,000 where nothing says so, which a picture of a sound needs for its window only."""
        return self.transform.rate if isinstance(self.transform, WaveTransform) else 16_000

    def wave(self, uid: str) -> np.ndarray:
        x = self.batch([uid]).x[0].detach().cpu().float().mean(0)
        how = self.transform
        return (x * how.std + how.mean if isinstance(how, WaveTransform) else x).numpy()

    def tokens(self, uid: str) -> tuple[str, ...]:
        row = self.batch([uid])
        return tuple(map(str, row.x[0, : None if row.lengths is None else int(row.lengths[0])].tolist()))


def _padded(row: Batch, length: int, pad: int) -> Batch:
    """A text (1, T) with padding behind it."""
    more = length - row.x.shape[1]
    lengths = torch.tensor([row.x.shape[1]]) if row.lengths is None else row.lengths
    words, units = (None if t is None else F.pad(t, (0, more), value=-1) for t in (row.words, row.units))
    return dataclasses.replace(row, x=F.pad(row.x, (0, more), value=pad), lengths=lengths, words=words, units=units)
