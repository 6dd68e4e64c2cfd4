"""What a DataLoader does with its dataset: which samples it draws, and what it makes of each."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils import data as torch_data

from attrib.types import UserError

_AS_THEY_ARE = (torch_data.default_collate, torch_data.default_convert)
_INSTEAD = "give the samples themselves, such as a torch.utils.data.Subset"


def places_of(loader: torch_data.DataLoader[Any], what: str) -> list[int]:
    """The places in its dataset that a pass of the loader goes through; of one that shuffles, in order.

    Where it shuffles and leaves out an unfinished batch, that is another one in each pass, so all of them count.

    Raises UserError for a loader that draws in a way of its own.
    """
    if type(loader).__iter__ is not torch_data.DataLoader.__iter__:
        raise UserError(
            f"{what}: {type(loader).__name__} gives out batches in a way of its own (__iter__), which cannot be asked "
            f"for one sample; {_INSTEAD}"
        )
    batches: Any = loader.batch_sampler
    if isinstance(batches, list | tuple):  # the batches themselves
        return _whole([place for batch in batches for place in _several(batch, what)], what)
    if batches is None:
        return _drawn(loader.sampler, what)
    if type(batches) is not torch_data.BatchSampler:
        raise UserError(f"{what}: its DataLoader draws batches by {type(batches).__name__}; {_INSTEAD}")
    places, random = _drawn(batches.sampler, what), type(batches.sampler) in _SHUFFLING
    unfinished = len(places) % batches.batch_size if batches.drop_last and not random else 0
    return places[: len(places) - unfinished]


_SHUFFLING = (torch_data.RandomSampler, torch_data.SubsetRandomSampler)


def _drawn(sampler: Any, what: str) -> list[int]:
    if isinstance(sampler, list | tuple | range):
        return _whole(sampler, what)
    kind = type(sampler)  # a class made of one of these draws in its own way
    if kind is torch_data.SubsetRandomSampler:
        return _whole(sampler.indices, what)
    if kind is torch_data.SequentialSampler:
        return list(range(len(sampler.data_source)))
    if kind is not torch_data.RandomSampler:
        raise UserError(f"{what}: its DataLoader draws by {kind.__name__}; {_INSTEAD}")
    size = len(sampler.data_source)
    if sampler.replacement or sampler.num_samples != size:
        how = "with replacement" if sampler.replacement else f"{sampler.num_samples} of {size} samples"
        raise UserError(f"{what}: its DataLoader draws {how} by chance, others in each pass; {_INSTEAD}")
    return list(range(size))


def _several(batch: Any, what: str) -> Iterable[Any]:
    if not isinstance(batch, Iterable):
        raise UserError(f"{what}: its DataLoader's batch_sampler holds {type(batch).__name__}, not lists of places")
    return batch


def _whole(places: Iterable[Any], what: str) -> list[int]:
    found = []
    for place in places:
        try:
            found.append(operator.index(place))
        except TypeError as error:
            raise UserError(
                f"{what}: its DataLoader draws {type(place).__name__}, and samples are asked for by whole numbers; "
                f"{_INSTEAD}"
            ) from error
    return found


@dataclass(frozen=True)
class Collated:
    """What the loader's own ``collate_fn`` makes of one sample, as a batch of one, without the axis of the batch.

    alone   the loader makes no batches (``batch_size=None``), so that the function gets each sample as it is
    """

    function: Any
    alone: bool
    what: str

    def __call__(self, one: Any, place: int) -> Any:
        """Raises UserError for a function that makes no batch of one sample."""
        try:
            made = self.function(one if self.alone else [one])
        except UserError:
            raise
        except Exception as error:  # a user's function may raise anything
            raise self._refused(f"does not take sample {place} alone ({type(error).__name__}: {error})") from error
        if self.alone:
            return made
        if not isinstance(made, Tensor | list | tuple):
            raise self._refused(f"makes {type(made).__name__} of sample {place}, not a tensor, or that and labels")
        parts = [made] if isinstance(made, Tensor) else list(made)
        for part in parts:
            rows = isinstance(part, list | tuple) or (isinstance(part, Tensor) and part.ndim > 0)
            if part is not None and not (rows and len(part) == 1):
                shape = f" {tuple(part.shape)}" if isinstance(part, Tensor) else ""
                raise self._refused(f"makes {type(part).__name__}{shape} of sample {place}, not one row for it")
        return [None if part is None else part[0] for part in parts]

    def _refused(self, why: str) -> UserError:
        name = getattr(self.function, "__name__", type(self.function).__name__)
        return UserError(
            f"{self.what}: its DataLoader's collate_fn ({name}) {why}; give a dataset whose samples are a tensor as "
            "the net reads it, or that and a label"
        )


def collate_of(loader: torch_data.DataLoader[Any], what: str) -> Collated | None:
    """None where the loader changes nothing of a tensor and its label."""
    function = loader.collate_fn
    return None if function in _AS_THEY_ARE else Collated(function, loader.batch_sampler is None, what)
