"""Batches to train on: the samples of one split in memory, in an order that (seed, epoch) determines."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from attrib.datasets import Dataset
from attrib.keys import stable_hash
from attrib.noise import Noise
from attrib.types import SampleError, UserError

READ_AT_ONCE = 256
BUCKET = 32  # batches whose texts are sorted by length together

Augment = Literal["crop_flip"]


def uid_fraction(uid: str, name: str = "") -> float:
    """A hash of the uid as a number in [0, 1), the same in every process; another ``name`` gives another number."""
    return stable_hash(f"{name}\0{uid}") / 2**64


class LoadedSamples:
    """Samples of a dataset, read once and kept in memory.

    uids        as asked for
    targets     (N,) long
    lengths     (N,) numbers of real tokens; None for images and sounds
    are_images  whether they are images

    Raises UserError, naming the sample, for one that cannot be read or has no label.
    """

    def __init__(self, dataset: Dataset, uids: Sequence[str], *, pad: int = 0) -> None:
        if not uids:
            raise UserError("there are no samples to train or test on; check the dataset's split and train.limit")
        self.uids, self._pad = tuple(uids), pad
        self._texts: list[Tensor] = []
        arrays, targets, lengths = [], [], []
        for start in range(0, len(self.uids), READ_AT_ONCE):
            try:
                batch = dataset.batch(self.uids[start : start + READ_AT_ONCE])
            except SampleError as error:
                raise UserError(f"a sample cannot be read, so nothing is trained: {error}") from error
            for uid, target in zip(batch.uids, batch.target.tolist()):
                if not isinstance(target, int) or target < 0:
                    raise UserError(f"{uid} has no label (target {target}); training needs one class per sample")
            targets.append(batch.target)
            if batch.lengths is None:
                arrays.append(batch.x)
            else:
                lengths.append(batch.lengths)
                self._texts += [row[:n].clone() for row, n in zip(batch.x, batch.lengths.tolist())]
        self.targets = torch.cat(targets)
        self._arrays = torch.cat(arrays) if arrays else None  # images or sounds
        self.lengths = torch.cat(lengths) if lengths else None
        self.are_images = self._arrays is not None and self._arrays.ndim == 4

    def __len__(self) -> int:
        return len(self.uids)

    def pick(self, positions: Sequence[int]) -> tuple[Tensor, Tensor]:
        """x (B, *input), with texts padded to the longest of them, and targets (B,)."""
        index = torch.as_tensor(positions)
        if self._arrays is not None:
            return self._arrays[index], self.targets[index]
        texts = [self._texts[i] for i in positions]
        return pad_sequence(texts, batch_first=True, padding_value=self._pad), self.targets[index]

    def portions(self, size: int) -> Iterator[list[int]]:
        """All positions, ``size`` at a time; texts of similar length come together."""
        order = list(range(len(self))) if self.lengths is None else self.lengths.argsort(stable=True).tolist()
        for start in range(0, len(order), size):
            yield order[start : start + size]


def crop_flip(x: Tensor, noise: Noise, margin: int = 4) -> Tensor:
    """(B, C, H, W) -> each image shifted by up to ``margin`` pixels (mirrored at its edges), half of them flipped."""
    height, width = x.shape[2:]
    padded = torch.nn.functional.pad(x, (margin,) * 4, mode="reflect")
    down, right = noise.integers(2 * margin + 1, 2).unbind(1)
    flip = noise.integers(2, 1).bool()
    rows = down[:, None] + torch.arange(height)
    columns = right[:, None] + torch.arange(width)
    columns = torch.where(flip, columns.flip(1), columns)
    pictures = torch.arange(len(x))[:, None, None]
    moved = padded.permute(0, 2, 3, 1)[pictures, rows[:, :, None], columns[:, None, :]]
    return moved.permute(0, 3, 1, 2).contiguous()


AUGMENT: dict[str, Callable[[Tensor, Noise], Tensor]] = {"crop_flip": crop_flip}


class EpochBatches:
    """The training batches of the epoch number ``epoch``, with what mmengine asks of a data loader.

    The samples are in the order of a stable hash of (seed, epoch, uid), so that a resumed training sees what the
    uninterrupted one would have seen. Texts are sorted by length within groups of ``BUCKET`` batches, which saves
    padding, and the batches are then shuffled.
    """

    metainfo: dict = {}  # mmengine asks for it

    def __init__(self, samples: LoadedSamples, *, size: int, seed: int, augment: Augment | None = None) -> None:
        self.samples, self.epoch = samples, 0
        self._size, self._seed, self._augment = size, seed, augment
        if augment is not None and not samples.are_images:
            raise UserError(f"train.augment={augment} is for images; set train.augment=null")

    @property
    def dataset(self) -> EpochBatches:
        return self  # mmengine looks for ``metainfo`` there

    def __len__(self) -> int:
        """Batches per epoch. A last sample alone joins the batch before it: batch norm needs two."""
        whole, left = divmod(len(self.samples), self._size)
        return max(1, whole + (left > 1 or (left == 1 and self._size == 1)))

    def order(self, epoch: int) -> list[list[int]]:
        """The positions of each batch of an epoch."""
        place = [stable_hash(f"{self._seed}/{epoch}/{uid}") for uid in self.samples.uids]
        order = sorted(range(len(place)), key=place.__getitem__)
        if self.samples.lengths is not None:
            lengths, group = self.samples.lengths.tolist(), BUCKET * self._size
            groups = [order[i : i + group] for i in range(0, len(order), group)]
            order = [i for g in groups for i in sorted(g, key=lengths.__getitem__)]
        batches = [order[i * self._size : (i + 1) * self._size] for i in range(len(self))]
        batches[-1] += order[len(self) * self._size :]
        return sorted(batches, key=lambda b: place[b[0]]) if self.samples.lengths is not None else batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for positions in self.order(self.epoch):
            x, target = self.samples.pick(positions)
            if self._augment is not None:
                noise = Noise([f"{self.samples.uids[i]}\0epoch{self.epoch}" for i in positions], self._seed)
                x = AUGMENT[self._augment](x, noise)
            yield x, target


def learning_rate_factor(step: int, steps: int, *, warmup: int, schedule: Literal["constant", "cosine"]) -> float:
    """The share of the full learning rate at update ``step`` of ``steps``: it rises linearly, then is 1 or a cosine."""
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
