"""What reads one sample at a time from tensors, a batch or a torch dataset.

An explanation is pickled with it, so these are objects and not functions in a function.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attrib.datasets.memory import Labels
from attrib.types import Batch, SampleError, UserError

Item = Callable[[str], tuple[Tensor, Tensor | None]]  # a sample's input and its label


@dataclass(frozen=True)
class InMemory:
    """Tensors and their labels, by name."""

    rows: Mapping[str, Tensor]
    labels: Labels

    def __call__(self, uid: str) -> tuple[Tensor, Tensor | None]:
        return self.rows[uid], self.labels.get(uid)


@dataclass(frozen=True)
class OfItems:
    """A batch of what ``item`` gives of one sample."""

    item: Item
    modality: str

    def __call__(self, uid: str) -> Batch:
        x, label = self.item(uid)
        target = torch.tensor(-1) if label is None else label
        batch = Batch((uid,), _sane(x, uid)[None], target[None])
        if self.modality == "text":
            words = torch.arange(len(x))[None]  # nothing says which ids are one word
            return dataclasses.replace(batch, lengths=torch.tensor([len(x)]), words=words)
        return batch


@dataclass(frozen=True)
class OfBatch:
    """The row of a batch that has this name, without padding."""

    batch: Batch

    def __call__(self, uid: str) -> Batch:
        row = self.batch[[self.batch.uids.index(uid)]]
        row = dataclasses.replace(row, x=_sane(row.x, uid))
        return row if row.lengths is None else row.cut(int(row.lengths[0]))


@dataclass(frozen=True)
class OfTorch:
    """``places`` in a torch dataset, by name."""

    source: Any
    places: Mapping[str, int]
    labels: Labels
    what: str

    def __call__(self, uid: str) -> tuple[Tensor, Tensor | None]:
        one = self.source[self.places[uid]]
        pair = isinstance(one, list | tuple) and len(one) > 1
        value, label = (one[0], one[1]) if pair else (one[0] if isinstance(one, list | tuple) else one, None)
        if not isinstance(value, Tensor):
            raise UserError(
                f"{self.what}: sample {self.places[uid]} is {type(value).__name__}; a dataset gives a tensor as the "
                "net reads it, or that and a label"
            )
        given = self.labels.get(uid)
        if given is None and label is not None:
            given = torch.as_tensor(label).long()
        return value, given


def _sane(x: Tensor, uid: str) -> Tensor:
    """As it may be computed with: gradients flow from no leaf of the caller's. Raises SampleError for NaN."""
    if x.is_floating_point() and not x.isfinite().all():
        raise SampleError(f"{uid} has NaN or infinite numbers")
    return x.detach().clone() if x.is_inference() else x.detach()
