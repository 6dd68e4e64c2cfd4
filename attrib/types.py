"""The nouns that every part of attrib passes around: a batch, and (from ``errors``) the two kinds of failure."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attrib.errors import UNREADABLE, SampleError, UserError, did_you_mean

__all__ = ["UNREADABLE", "Batch", "SampleError", "UserError", "did_you_mean"]


@dataclass(frozen=True)
class Batch:
    """B samples. Every tensor has the samples along its first dimension.

    uids     B stable names such as ``val/n01440764/000293``, never positions
    x        (B, *input): image (B, C, H, W), sound (B, C, L), text (B, T) token ids
    target   (B,) class index, or (B, K) for multi-label: 1 for the labels, else 0; of a contrast, the class that is
             subtracted is -1
    roi      (B, H, W) bool, of sounds (B, L), region of interest; a sample without one is all False
    lengths  (B,) number of real tokens, special ones included; text only
    words    (B, T) number 0, 1, 2 ... of the word that a token belongs to, -1 for special tokens and
             padding; text only
    units    (B, *places) number 0, 1, 2 ... of the user's own unit that a pixel belongs to, -1 for none
    logits   (B, K) what the net that is asked says of x, where that is known: for metrics (``Metric.NEEDS_LOGITS``)

    A text is padded on the right, so its real tokens are the first ``lengths`` of its row.

    >>> texts, target = torch.tensor([[5, 7, 0], [5, 7, 9]]), torch.tensor([0, 1])
    >>> batch = Batch(("a", "b"), texts, target, lengths=torch.tensor([2, 3]))
    >>> batch.mask.tolist()
    [[True, True, False], [True, True, True]]
    >>> batch[:1].cut(2).x.tolist()
    [[5, 7]]
    """

    uids: tuple[str, ...]
    x: Tensor
    target: Tensor
    roi: Tensor | None = None
    lengths: Tensor | None = None
    words: Tensor | None = None
    units: Tensor | None = None
    logits: Tensor | None = None

    def __post_init__(self) -> None:
        for field, value in self._tensors():
            if value.shape[:1] != (len(self.uids),):
                raise ValueError(
                    f"Batch.{field} has shape {tuple(value.shape)}, expected {len(self.uids)} rows, one per uid"
                )

    def __len__(self) -> int:
        return len(self.uids)

    def _tensors(self) -> list[tuple[str, Tensor]]:
        return [(name, value) for name, value in vars(self).items() if isinstance(value, Tensor)]

    @property
    def mask(self) -> Tensor | None:
        """(B, T) bool, True on real tokens; None for images and sounds."""
        if self.lengths is None:
            return None
        return torch.arange(self.x.shape[1], device=self.lengths.device) < self.lengths[:, None]

    def cut(self, length: int) -> Batch:
        """Texts that are no longer than ``length`` tokens, without the padding behind it."""
        words, units = (None if field is None else field[:, :length] for field in (self.words, self.units))
        return dataclasses.replace(self, x=self.x[:, :length], words=words, units=units)

    def by_length(self) -> Iterator[tuple[list[int], Batch]]:
        """The rows of texts of equal length, and their batch without padding, for each length."""
        assert self.lengths is not None
        lengths = self.lengths.tolist()
        for length in dict.fromkeys(lengths):
            rows = [i for i, other in enumerate(lengths) if other == length]
            yield rows, self[rows].cut(length)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Batch:
        """The batch on a device; floating-point inputs also in ``dtype``."""
        soon = torch.device(device).type == "cuda"  # what comes next there waits for it anyway
        moved = {name: value.to(device, non_blocking=soon) for name, value in self._tensors()}
        if dtype is not None and moved["x"].is_floating_point():
            moved["x"] = moved["x"].to(dtype)
        if all(value is moved[name] for name, value in self._tensors()):
            return self  # it is there already
        return dataclasses.replace(self, uids=self.uids, **moved)

    @property
    def bytes(self) -> int:
        return sum(value.numel() * value.element_size() for _, value in self._tensors())

    def pinned(self) -> Batch:
        """In memory from which a GPU copies while the CPU goes on; what lies on a GPU stays there."""
        moved = {name: t.pin_memory() if t.device.type == "cpu" else t for name, t in self._tensors()}
        return dataclasses.replace(self, uids=self.uids, **moved)

    @staticmethod
    def joined(parts: Sequence[Batch]) -> Batch:
        """Batches one behind the other.

        Raises ValueError if some of them lack a field that others have, RuntimeError if their samples have different
        shapes.
        """
        names = [name for name, _ in parts[0]._tensors()]
        if any([name for name, _ in part._tensors()] != names for part in parts):
            raise ValueError("some of the batches lack a field that others have")
        fields: dict[str, Any] = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
        return dataclasses.replace(parts[0], uids=tuple(uid for part in parts for uid in part.uids), **fields)

    def __getitem__(self, rows: Sequence[int] | slice) -> Batch:
        """The sub-batch at these positions."""
        rows = range(len(self))[rows] if isinstance(rows, slice) else rows
        index = torch.as_tensor(list(rows), dtype=torch.long, device=self.x.device)
        picked = {name: value[index.to(value.device)] for name, value in self._tensors()}
        return dataclasses.replace(self, uids=tuple(self.uids[i] for i in rows), **picked)
