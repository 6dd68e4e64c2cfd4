"""Results that seem lost because a class of the user's moved: its path is part of the key of what it computed.

A class enters keys under its own ``NAME``, by default its path (:func:`attrib.keys.stable_name`). Moved to another
module without one, it makes new cells, or new score folders, beside the old ones. Here the old ones are found: they
have the same fields, and a class that is called differently. Only what runs wrote is read (``spec.json``,
``metric.json``, what is noted beside fitted states); no code of the user's is imported.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attrib.store.workers import read_object

# What two cells must have in common beside the method. The fitted state is looked at apart: its key names a class too.
_SAME = ("dataset_key", "model_key", "layers", "seed")


@dataclass(frozen=True)
class Older:
    """A cell, or a score folder, that differs from a newer one by the paths of classes alone.

    folder   of the cell below the work directory, or of the scores below the cell
    names    path now -> path then
    fit      path then of the class of the fitted state, where nobody knows its path now; "" where neither is known;
             None where the state says nothing against it, or there is none
    """

    folder: str
    names: Mapping[str, str]
    fit: str | None = None


@dataclass(frozen=True)
class MovedClass:
    """Results that a class left under its old path, for people: see :class:`Older`.

    cell   the cell that lacks results
    part   "maps", or the score folder that lacks them
    done   how many samples the older one has
    """

    cell: str
    part: str
    older: Older
    done: int

    @property
    def new(self) -> str:
        """The folder that lacks results, below the work directory."""
        return self.cell if self.part == "maps" else f"{self.cell}/scores/{self.part}"

    @property
    def old(self) -> str:
        """The folder that has them, below the work directory."""
        return self.older.folder if self.part == "maps" else f"{self.cell}/scores/{self.older.folder}"

    @property
    def advice(self) -> list[str]:
        """How to keep the old results, line by line."""
        lines = [
            f"{self.old} holds {self.done} samples computed with the same fields, by a class of another path.",
            "If it is the same class, moved, write its old path into its body:",
            *(f'    {now}:  NAME: ClassVar[str] = "{then}"' for now, then in self.older.names.items()),
        ]
        if self.older.fit:
            lines.append(f'    the class of its fit:  NAME: ClassVar[str] = "{self.older.fit}"')
        elif self.older.fit is not None:
            lines.append("    the class of its fit, if that was moved too:  NAME in the same way")
        return [*lines, f"The next run then goes on with the old folder, and {self.new} can be deleted."]

    def record(self) -> dict[str, Any]:
        """For scripts: what JSON can hold."""
        about = {"cell": self.cell, "part": self.part, "new": self.new, "old": self.old, "done": self.done}
        return {**about, "names": dict(self.older.names), "fit": self.older.fit}


def older_cells(root: Path, cell: str, specs: Mapping[str, Mapping[str, Any]]) -> Iterator[Older]:
    """The cells that may be an earlier form of ``cell``. ``specs``: what ``spec.json`` says, by cell."""
    spec = specs.get(cell, {})
    for folder, other in specs.items():
        if folder == cell or not spec or any(spec.get(name) != other.get(name) for name in _SAME):
            continue
        names = _differing_classes(spec.get("method"), other.get("method"))
        if names is None or not (_labels(spec, other) or _same_last_names(names)):
            continue
        fit = None
        if spec.get("state_key") != other.get("state_key"):
            of_fit = _older_fit(root, spec.get("state_key"), other.get("state_key"), moved=bool(names))
            if of_fit is None:
                continue
            names, fit = {**names, **of_fit.names}, of_fit.fit
        if names:
            yield Older(folder, names, fit)


def older_scores(cell: Path, folders: Sequence[str]) -> Iterator[tuple[str, Older]]:
    """(score folder, an earlier form of it) of one cell's score ``folders``."""
    specs = {name: read_object(cell / "scores" / name / "metric.json").get("spec") for name in folders}
    for name, spec in specs.items():
        for other, then in specs.items():
            names = _differing_classes(spec, then) if name != other and isinstance(spec, dict) else None
            if names and (name.rpartition(".")[0] == other.rpartition(".")[0] or _same_last_names(names)):
                yield name, Older(other, names)


def _labels(spec: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether people call both methods alike. Many methods have no fields: those alone do not make them one."""
    labels = [one["names"].get("method") if isinstance(one.get("names"), Mapping) else None for one in (spec, other)]
    return labels[0] is not None and labels[0] == labels[1]


def _same_last_names(names: Mapping[str, str]) -> bool:
    """Whether only modules differ."""
    return all(now.rpartition(".")[2] == then.rpartition(".")[2] for now, then in names.items())


def _older_fit(root: Path, now: Any, then: Any, *, moved: bool) -> Older | None:
    """How two fitted states differ, given their keys; None if not by the paths of classes alone.

    ``moved``: whether the method's class did, so that its fit's is likely to have.
    """
    if not (isinstance(now, str) and isinstance(then, str)):
        return None
    after, before = (read_object(root / "state" / f"{key[:8]}.json") for key in (now, then))
    if after and before:
        names = _differing_classes(after.get("fit"), before.get("fit"))
        return Older("", names) if names and after.get("samples") == before.get("samples") else None
    # Not fitted yet, or pruned. A fit of attrib's own keeps its name, so that its samples must be others.
    fit = before.get("fit")
    path = str(fit.get("class", "")) if isinstance(fit, Mapping) else ""
    return Older("", {}, path) if moved and not path.startswith("attrib.") else None


def _differing_classes(now: Any, then: Any) -> dict[str, str] | None:
    """The classes (path now -> path then) by which two specs differ; None if they differ in anything else.

    A class stands in ``class``, at any depth: a field may hold a dataclass.
    """
    names: dict[str, str] = {}
    return names if _alike(now, then, names) else None


def _alike(now: Any, then: Any, names: dict[str, str]) -> bool:
    if isinstance(now, Mapping) and isinstance(then, Mapping):
        return now.keys() == then.keys() and all(
            names.setdefault(value, then[key]) == then[key]
            if key == "class" and isinstance(value, str) and isinstance(then[key], str) and value != then[key]
            else _alike(value, then[key], names)
            for key, value in now.items()
        )
    if isinstance(now, list) and isinstance(then, list):
        return len(now) == len(then) and all(_alike(a, b, names) for a, b in zip(now, then))
    return type(now) is type(then) and now == then
