"""What the classes of a net are called, and which of them a folder, a label or a word on the command line means."""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from attrib.errors import UserError, did_you_mean

# What the numbers of a dataset's classes are: given with the data, or only the places of the names of the folders, or
# of the labels, in the alphabet.
Numbering = Literal["given", "folders", "labels"]

_LISTED = 12  # names that a message shows
_SAME = 0.99  # of ImageNet's names, in their places: some lists write a few names differently


def imagenet_classes() -> dict[int, tuple[str, str]]:
    """Class index -> WordNet id and name, from the tables that timm ships. Raises UserError."""
    spec = importlib.util.find_spec("timm")
    places = (spec.submodule_search_locations if spec else None) or [""]
    tables = Path(places[0]) / "data" / "_info"
    try:
        wnids = (tables / "imagenet_synsets.txt").read_text(encoding="utf-8").split()
        lines = (tables / "imagenet_synset_to_lemma.txt").read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"timm's ImageNet tables are not installed ({error}); give --classes") from error
    names = dict(line.split("\t", 1) for line in lines)
    return {i: (wnid, names[wnid]) for i, wnid in enumerate(wnids)}


def listed(names: Iterable[str]) -> str:
    """The first of many names, for a message."""
    every = list(names)
    return ", ".join(every[:_LISTED]) + (f" and {len(every) - _LISTED} more" if len(every) > _LISTED else "")


def shown_target(name: str, target: int | Sequence[int] | None) -> str:
    """What a sample is explained for, for people: ``zebra (340)``; several labels or a contrast are (K,) numbers."""
    if target is None:
        return name
    if not isinstance(target, list | tuple) or not all(isinstance(v, int) for v in target):  # one class, or anything
        return f"{name} ({target})" if name else f"class {target}"
    numbers = joined(target, lambda i: str(i))
    return f"{name} ({numbers})" if name else f"classes {numbers}"


def joined(target: Sequence[int], word: Callable[[int], str]) -> str:
    """A word for each label, and for the class that is subtracted of a contrast."""
    plus, minus = (", ".join(word(i) for i, v in enumerate(target) if v * sign > 0) for sign in (1, -1))
    return f"{plus} \N{MINUS SIGN} {minus}" if minus else plus


def _plain(name: str) -> str:
    """Without case, and with a space for whatever stands between two words."""
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()


def _spellings(name: str) -> set[str]:
    """ImageNet's names are lists: "tench, Tinca tinca"."""
    return {plain for part in (name, *name.split(",")) if (plain := _plain(part))}


@dataclass(frozen=True)
class ClassNames:
    """The classes of a net.

    names   in the order of its outputs; one that has several names separates them by commas, one that nobody names
            is ""
    source  who says so, for messages
    wnids   their WordNet ids or other ids, if there are any; "" for a class without one
    """

    names: tuple[str, ...]
    source: str
    wnids: tuple[str, ...] = ()

    @classmethod
    def of(cls, names: Sequence[str], source: str) -> ClassNames:
        """With the WordNet ids of ImageNet's classes, if 99 of 100 names stand where ImageNet has them."""
        if len(names) != 1000:
            return cls(tuple(names), source)
        table = imagenet_classes()
        same = sum(bool(_spellings(name) & _spellings(table[i][1])) for i, name in enumerate(names))
        wnids = tuple(wnid for wnid, _ in table.values()) if same >= _SAME * len(names) else ()
        return cls(tuple(names), source, wnids)

    @classmethod
    def imagenet(cls, source: str) -> ClassNames:
        wnids, names = zip(*imagenet_classes().values(), strict=True)
        return cls(names, source, wnids)

    def __len__(self) -> int:
        return len(self.names)

    def __str__(self) -> str:
        return listed(self.shown(i) or str(i) for i in range(len(self)))

    def shown(self, index: int) -> str:
        """The first of a class's names, as far as it tells the class from all others; "" if it has none."""
        first = self.names[index].split(",")[0].strip() or self.names[index]
        return first if len(self._meant.get(_plain(first), ())) == 1 else self.names[index]

    @cached_property
    def _meant(self) -> Mapping[str, set[int]]:
        found: dict[str, set[int]] = {}
        for i, name in enumerate(self.names):
            for spelling in _spellings(name):
                found.setdefault(spelling, set()).add(i)
        for i, wnid in enumerate(self.wnids):
            for spelling in _spellings(_lemmas().get(wnid, "")):
                found.setdefault(spelling, set()).add(i)
        return found

    @cached_property
    def _exact(self) -> Mapping[str, set[int]]:
        found: dict[str, set[int]] = {}
        for i, name in enumerate(self.names):
            if name:
                found.setdefault(name, set()).add(i)
        return found | {wnid: {i} for i, wnid in enumerate(self.wnids) if wnid}

    def called(self, name: str) -> set[int]:
        """The classes that a WordNet id or a name may mean. Case, and "_" or "-" for a space, make no difference."""
        return self._exact.get(name) or self._meant.get(_plain(name)) or set()

    def find(self, text: str) -> int | str:
        """The class that a WordNet id, a name or a number means, or what is wrong with ``text``."""
        meant = self.called(text)
        number = int(text) if text.isdecimal() else None
        if len(meant) > 1:
            ids = self.wnids or [""] * len(self)
            some = ", ".join(f"{i} ({ids[i]})" if ids[i] else str(i) for i in sorted(meant))
            return f"{text!r} is the name of classes {some}: give its {'WordNet id' if self.wnids else 'number'}"
        if meant:
            (index,) = meant
            if number is not None and number != index and number < len(self):
                return f"{text!r} is the number of one class and the name of another, class {index}"
            return index
        if number is not None and number < len(self):
            return number
        return f"{text!r} is none of the net's classes{self.near(text)}"

    def near(self, text: str) -> str:
        """A hint at classes that may be meant; "" if there are none."""
        words = [self.shown(i) for i in range(len(self)) if _plain(text) in _plain(self.names[i]).split(" ")]
        return f"; is it {listed(words[:4])}?" if words else did_you_mean(text, self.names)

    def match(
        self,
        names: Mapping[int, str],
        numbering: Numbering = "given",
        wnids: Mapping[int, str] | None = None,
    ) -> tuple[dict[int, int], dict[int, str]]:
        """Number of a dataset's class -> of the net's class that it is, and -> why there is none.

        names, wnids   of the dataset's classes. Where the data number their classes themselves, a class with the same
                       number and a name in common is the one, and a name is never a number
        """
        found: dict[int, int] = {}
        problems: dict[int, str] = {}
        for i, name in names.items():
            texts = [wnids[i], name] if wnids and i in wnids else [name]
            if numbering == "given":
                if any(i in self.called(text) for text in texts):
                    found[i] = i
                    continue
                texts = [text for text in texts if self.called(text)]
            meant = self.find(texts[0]) if texts else f"{name!r} is none of the net's classes{self.near(name)}"
            if isinstance(meant, str):
                problems[i] = meant
            else:
                found[i] = meant
        return found, problems


@functools.cache
def _lemmas() -> Mapping[str, str]:
    """WordNet id -> name, of ImageNet's classes."""
    return dict(imagenet_classes().values())
