"""What reads one sample at a time from tensors, a batch or a torch dataset.

An explanation is pickled with it, so these are objects and not functions in a function.
"""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attrib.api.loaders import Collated
from attrib.datasets.memory import Labels
from attrib.models.text import real_tokens
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
    """A batch of what ``item`` gives of one sample.

    pad   id that stands behind a text and is no word of it; None: all that is given are words
    """

    item: Item
    modality: str
    pad: int | None = None

    def __call__(self, uid: str) -> Batch:
        x, label = self.item(uid)
        target = torch.tensor(-1) if label is None else label
        batch = Batch((uid,), _sane(x, uid)[None], target[None])
        if self.modality == "text":
            length = real_length(x, self.pad)
            words = torch.arange(len(x))  # nothing says which ids are one word
            words[length:] = -1
            return dataclasses.replace(batch, lengths=torch.tensor([length]), words=words[None])
        return batch


def real_length(x: Tensor, pad: int | None) -> int:
    """How many of the ids (T,) are a text's, and not padding behind it; as a net counts them, at least one."""
    return len(x) if pad is None or not len(x) else int(real_tokens(x[None], pad).sum())


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
    """``places`` in a torch dataset, by name; ``collate`` is what a loader makes of each.

    problems   name -> why what stands beside the input is no label; it is filled as samples are read
    """

    source: Any
    places: Mapping[str, int]
    labels: Labels
    what: str
    collate: Collated | None = None
    problems: dict[str, str] = field(default_factory=dict)

    def __call__(self, uid: str) -> tuple[Tensor, Tensor | None]:
        place = self.places[uid]
        one = self.source[place]
        if self.collate is not None:
            one = self.collate(one, place)
        parts = list(one) if isinstance(one, list | tuple) else [one]
        if len(parts) not in (1, 2):
            kinds = ", ".join(type(part).__name__ for part in parts)
            raise UserError(
                f"{self.what}: sample {place} has {len(parts)} parts ({kinds}), and nothing says which is the label; a "
                "dataset gives a tensor as the net reads it, or that and a label"
            )
        value, label = (*parts, None)[:2]
        if not isinstance(value, Tensor):
            raise UserError(
                f"{self.what}: sample {place} is {type(value).__name__}; a dataset gives a tensor as the net reads it, "
                "or that and a label"
            )
        given = self.labels.get(uid)
        if given is None and label is not None:
            given = _class(label)
            if given is None:
                shape = tuple(getattr(label, "shape", ()))
                what = f"{type(label).__name__} {shape}" if shape else reprlib.repr(label)
                self.problems[uid] = f"beside its input stands {what}, no number of a class nor a 1 or 0 for each class"
        return value, given


def _class(label: Any) -> Tensor | None:
    """A class () or (1,), or a 1 or 0 for each class (K,); None for what is neither, such as a regression's value."""
    try:
        value = torch.as_tensor(label).cpu()
    except (TypeError, ValueError, RuntimeError):  # it is no number
        return None
    if value.ndim > 1 or not value.numel() or value.is_complex():
        return None
    value = value.squeeze(0) if value.shape == (1,) else value  # a list of one number is that number
    whole = value.long()
    return whole if torch.equal(whole.to(value.dtype), value) else None


def _sane(x: Tensor, uid: str) -> Tensor:
    """As it may be computed with: gradients flow from no leaf of the caller's. Raises SampleError for NaN."""
    if x.is_floating_point() and not x.isfinite().all():
        raise SampleError(f"{uid} has NaN or infinite numbers")
    return x.detach().clone() if x.is_inference() else x.detach()
