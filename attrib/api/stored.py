"""Arrays of a work directory, each read when it is taken out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import pandas as pd

from attrib.errors import UserError, printable
from attrib.store.cell import Arrays
from attrib.store.files import Key


class Place(NamedTuple):
    """What an array is of, by the labels of the tables. ``metric`` and ``curve`` are empty for a map."""

    dataset: str
    model: str
    method: str
    map: str
    metric: str = ""
    curve: str = ""
    uid: str = ""


@dataclass(frozen=True)
class Part:
    """The arrays of one kind in one cell: ``name`` in the chunks ``arrays``, of the samples ``keys`` (uid -> key)."""

    place: Place
    arrays: Arrays
    name: str
    keys: Mapping[str, Key]

    @classmethod
    def of(cls, place: Place, arrays: Arrays, name: str, keys: Iterable[Key]) -> Part:
        """Of those of ``keys`` that are stored. Raises UserError if the folder cannot be read."""
        try:
            index = arrays.index()
        except OSError as error:
            raise UserError(f"{printable(str(arrays.folder))} cannot be read: {printable(str(error))}") from error
        return cls(place, arrays, name, {key[0]: key for key in keys if key in index and name in index[key].names})

    def only(self, uids: set[str]) -> Part:
        return replace(self, keys={uid: key for uid, key in self.keys.items() if uid in uids})


class Stored(Mapping[Place, np.ndarray]):
    """A mapping from :class:`Place` to a stored array.

    Iterating over ``items()`` holds one array at a time. An array that is damaged on disk raises UserError, which
    names the file.

    >>> maps = attrib.results("workdirs/demo").maps(method="iba")  # doctest: +SKIP
    >>> {place.uid: maps[place].max() for place in maps}  # doctest: +SKIP
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = {part.place: part for part in parts}

    @property
    def array(self) -> np.ndarray:
        """The only array there is. Raises UserError if there are several, or none."""
        if len(self) != 1:
            places = "; ".join(printable(" · ".join(filter(None, part))) for part in list(self._parts)[:8])
            raise UserError(f"there are {len(self)} arrays, not one ({places or 'nothing is stored'}); say which")
        return self[next(iter(self))]

    @property
    def index(self) -> pd.DataFrame:
        """What there is: one row per array, with the fields of :class:`Place`."""
        return pd.DataFrame(iter(self), columns=list(Place._fields))

    def __getitem__(self, place: Place) -> np.ndarray:
        if not isinstance(place, Place):
            raise KeyError(place)
        part = self._parts[place._replace(uid="")]
        try:
            return part.arrays.read(part.keys[place.uid], [part.name])[part.name]
        except OSError as error:
            raise UserError(f"{printable(str(error))}; `attrib cache verify` lists what is damaged") from error

    def __iter__(self) -> Iterator[Place]:
        for place, part in self._parts.items():
            yield from (place._replace(uid=uid) for uid in part.keys)

    def __len__(self) -> int:
        return sum(len(part.keys) for part in self._parts.values())

    def __repr__(self) -> str:
        return f"{len(self)} stored arrays of {len(self._parts)} kinds"
