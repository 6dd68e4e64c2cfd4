"""Samples by name: the names that were given or are made of the contents, and the label of each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch

from attrib.datasets import Dataset, Encoder, ImageTransform, WaveTransform
from attrib.datasets.memory import Labels
from attrib.types import UserError

Input = ImageTransform | WaveTransform | Encoder | None  # how a net wants its data


class Given(NamedTuple):
    """Samples by name, in the order in which they were given (a dataset sorts its own)."""

    dataset: Dataset
    uids: tuple[str, ...]


def named(uids: Sequence[str] | None, contents: Sequence[str]) -> tuple[str, ...]:
    """The names that were given, or those made of the contents; what comes twice gets a number."""
    if uids is not None:
        found = (uids,) if isinstance(uids, str) else tuple(map(str, uids))
        if len(found) != len(contents):
            raise UserError(f"uids: {len(found)} names for {len(contents)} samples")
        if len(set(found)) < len(found):
            raise UserError("uids: a name stands for two samples; random numbers belong to names")
        return writable(found)
    return numbered(contents)


def numbered(names: Iterable[str], alike: Callable[[str], str] = str) -> tuple[str, ...]:
    """The names, where what is ``alike`` an earlier one has a number.

    >>> numbered(["a", "b", "a", "A"]), numbered(["a", "A"], str.lower)
    (('a', 'b', 'a-2', 'A'), ('a', 'A-2'))
    """
    made: dict[str, str] = {}  # what is alike -> the name
    for own in names:
        name, times = own, 1
        while alike(name) in made:
            times += 1
            name = f"{own}-{times}"
        made[alike(name)] = name
    return tuple(made.values())


def writable(uids: Sequence[str]) -> tuple[str, ...]:
    """The names. Raises UserError for one that no file can hold."""
    for uid in uids:
        try:
            str(uid).encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"uids: {uid!r} has a character that no text file can hold (a lone surrogate); give the sample another "
                "name"
            ) from error
    return tuple(uids)


def labels_of(labels: Any, uids: Sequence[str]) -> Labels:
    if labels is None:
        return {}
    try:
        values = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"target: one for each sample must be a list of numbers of classes, not {labels!r}") from error
    if values.ndim == 2 and values.shape[1] == 1:  # a column of classes
        values = values[:, 0]
    if values.is_floating_point() or values.ndim not in (1, 2) or len(values) != len(uids):
        raise UserError(
            f"target: {len(uids)} samples need as many classes (N,), or a 1 or 0 for each class (N, K), not "
            f"{values.dtype} {tuple(values.shape)}"
        )
    return dict(zip(uids, values.cpu().long()))
