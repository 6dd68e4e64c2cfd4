"""``attrib.results``: a work directory as tables of pandas and arrays of numpy.

The readers are those of ``attrib table`` and ``attrib report``, so the rows are theirs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd

from attrib.api.stored import Part, Place, Stored
from attrib.errors import UserError, printable
from attrib.results import formats, labels, tables
from attrib.results.labels import Labelled, ScoreFolder
from attrib.store.cell import cells as cell_folders
from attrib.store.files import Key

log = logging.getLogger(__name__)

T = TypeVar("T")
Names = str | Sequence[str] | None  # one name, several, or all


class Results:
    """What a work directory holds: scores, maps, curves, failures, and the tables made of them.

    Nothing is read before it is asked for, and what was read is kept: call ``attrib.results`` again to see what a
    run has added since. Maps and curves are read one at a time, when they are taken out.

    Conditions (``dataset=``, ``model=``, ``method=``, ``metric=``, ``map=``, ``column=``) are those of
    ``attrib table --where``: a label, or the name that it begins with (``iba`` is every ``iba (...)``), or several.
    A name that nothing has raises UserError, which says what there is.

    folder      a work directory, as ``run.root`` names it
    confidence  of intervals and tests

    Files that cannot be read are left out, named in ``broken`` and reported by a warning.
    Raises UserError if the folder holds no results.

    >>> results = attrib.results("workdirs/demo")  # doctest: +SKIP
    >>> results.table(column="insertion")  # doctest: +SKIP
    >>> results.maps(method="iba", uid="coffee").array  # doctest: +SKIP
    """

    def __init__(self, folder: str | Path, *, confidence: float = 0.95) -> None:
        if not 0 < confidence < 1:
            raise UserError(f"confidence={confidence}: expected a number between 0 and 1, such as 0.95")
        self.root, self.confidence = Path(folder).expanduser(), confidence
        self.broken: list[str] = []
        if not cell_folders(self.root):
            labels.labelled(self.root)  # raises and says what is missing

    # ---- what there is ----------------------------------------------------------------------------

    @cached_property
    def cells(self) -> pd.DataFrame:
        """One row per cell: its folder's name, labels, maps, metrics, layers, seed and numbers of samples.

        ``samples``: how many it is about, or missing where nobody has said; ``stored``: how many have maps.
        """
        found = []
        for item in self._cells:
            found.append(
                {
                    "cell": item.cell.folder.name,
                    **{axis: getattr(item, axis) for axis in labels.AXES},
                    "maps": tuple(item.spec["maps"]),
                    "metrics": tuple(folder.label for folder in self._metrics.get(item.cell.folder.name, ())),
                    "layers": dict(item.spec["layers"]),
                    "seed": item.spec["seed"],
                    "samples": pd.NA if item.samples is None else len(item.samples),
                    "stored": len({uid for uid, _ in item.maps()}),
                }
            )
        self._warn()
        return pd.DataFrame(found).astype({"samples": "Int64"})

    @cached_property
    def _cells(self) -> list[Labelled]:
        return self._read(lambda: labels.labelled(self.root, self.broken))

    @cached_property
    def _metrics(self) -> dict[str, list[ScoreFolder]]:
        return self._read(lambda: labels.metrics((item.cell for item in self._cells), self.broken))

    @cached_property
    def _rows(self) -> pd.DataFrame:
        return self._read(lambda: tables.rows(self.root, self.broken))

    # ---- scores -----------------------------------------------------------------------------------

    def scores(
        self,
        *,
        dataset: Names = None,
        model: Names = None,
        method: Names = None,
        metric: Names = None,
        map: Names = None,
        column: Names = None,
        uid: Names = None,
    ) -> pd.DataFrame:
        """One row per sample, cell, map, metric and column: the rows of ``attrib table --rows``.

        A row without a value is a sample that failed (``stage``, ``reason``), or one that has no score yet; ``state``
        says which. The columns are described at :func:`attrib.results.tables.rows`.
        """
        frame = self._where(dataset=dataset, model=model, method=method, metric=metric, map=map, column=column)
        if uid is None:
            return frame
        wanted = _known_uids(uid, frame["uid"])
        return frame[frame["uid"].isin(wanted)].reset_index(drop=True)

    def table(self, **conditions: Names) -> pd.DataFrame:
        """One row per cell, map and column: n, failures, mean with its interval, best, costs.

        The rows of ``attrib table --format csv``, see :func:`attrib.results.tables.summary`; ``conditions`` as in
        :meth:`scores`, without ``uid``.
        """
        return tables.summary(self._where(**conditions), self.confidence)

    def ranks(self, **conditions: Names) -> pd.DataFrame:
        """Mean ranks of the methods on their common samples, as ``attrib table --ranks``."""
        return tables.ranks(self._where(**conditions), self.confidence)

    def compare(self, a: str | None = None, b: str | None = None, **conditions: Names) -> pd.DataFrame:
        """Paired tests on common samples, one row per pair and column, as ``attrib table --pairs``.

        a, b  two methods (labels, or names that labels begin with); every difference is then a - b. Without them,
              all pairs.

        ``p_holm`` is corrected over all pairs of methods that meet the conditions, not only over those two: who looks
        at one pair of many has still had the choice of many. Raises UserError for methods that have no column in
        common.
        """
        frame = self._where(**conditions)
        pairs = tables.all_paired(frame, confidence=self.confidence)
        if a is None and b is None:
            return pairs
        if a is None or b is None:
            raise UserError("compare takes two methods, or none for all pairs")
        contenders = [str(name) for name in frame["contender"].cat.categories]
        first, second = (_named(name, contenders) for name in (a, b))
        forward = pairs["a"].isin(first) & pairs["b"].isin(second)
        backward = pairs["a"].isin(second) & pairs["b"].isin(first) & ~forward
        both = pd.concat([pairs[forward], _mirrored(pairs[backward])]).sort_index(kind="stable")
        if both.empty:
            raise UserError(f"{a} and {b} have no scores of one dataset, model, metric and column that could be paired")
        return both.reset_index(drop=True)

    def failures(self, **conditions: Names) -> pd.DataFrame:
        """One row per sample and reason why it failed, as the report lists them: stage, reason, uid."""
        return tables.failed(self._where(**conditions))

    # ---- arrays -----------------------------------------------------------------------------------

    def maps(
        self,
        *,
        dataset: Names = None,
        model: Names = None,
        method: Names = None,
        map: Names = None,
        uid: Names = None,
    ) -> Stored:
        """The stored maps as a mapping from :class:`Place` to an array, each of which is read when it is taken out.

        The map of an image is (H, W), of a text (T,), of a sound (L,). ``maps(method="iba", uid="coffee").array`` is
        a single one.
        """
        parts = []
        for item in self._chosen(dataset=dataset, model=model, method=method):
            keys = self._current(item)
            for name in _chosen_names(map, item.spec["maps"]):
                place = Place(item.dataset, item.model, item.method, name)
                parts.append(Part.of(place, item.cell.maps, name, keys.values()))
        if not parts:
            known = _listed(name for item in self._cells for name in item.spec["maps"])
            raise UserError(f"no map is called {map}; there are: {known}")
        return self._stored(parts, uid)

    def curves(
        self,
        *,
        dataset: Names = None,
        model: Names = None,
        method: Names = None,
        map: Names = None,
        metric: Names = None,
        curve: Names = None,
        uid: Names = None,
    ) -> Stored:
        """The curves behind scores, as :meth:`maps`: (S,) each. ``place.curve`` is its name, as in ``axes``."""
        parts, there = [], set()
        for item in self._chosen(dataset=dataset, model=model, method=method):
            for folder in self._metrics.get(item.cell.folder.name, ()):
                names = [(m, c) for m in item.spec["maps"] for c in folder.curves]
                there |= {(folder.label, m, c) for m, c in names}
                arrays = item.cell.curves(folder.folder)
                for m, c in names:
                    if _is_one(folder.label, metric) and _is_one(m, map) and _is_one(c, curve):
                        place = Place(item.dataset, item.model, item.method, m, folder.label, c)
                        parts.append(Part.of(place, arrays, f"{m}/{c}", self._scored(item, folder.label, m)))
        if not parts:
            known = _listed(f"{label} · {m}/{c}" for label, m, c in sorted(there))
            raise UserError(f"no curves meet the conditions; there are (metric · map/curve): {known}")
        return self._stored(parts, uid)

    def _stored(self, parts: Sequence[Part], uid: Names) -> Stored:
        if uid is not None:
            wanted = _known_uids(uid, [u for part in parts for u in part.keys])
            parts = [part.only(wanted) for part in parts]
        return Stored([part for part in parts if part.keys])

    def _current(self, item: Labelled) -> dict[str, Any]:
        from attrib.report.gallery import current_keys  # see ``report``

        keys = current_keys(item, self._rows)
        self._warn()
        return keys

    def _scored(self, item: Labelled, metric: str, map: str) -> list[Key]:
        """The samples of a cell that have scores, under the fingerprints that count."""
        rows = self._rows
        mine = rows[(rows["cell"] == item.cell.folder.name) & (rows["metric"] == metric) & (rows["map"] == map)]
        mine = mine[mine["state"] == "ok"]
        return list(dict.fromkeys(zip(mine["uid"], mine["fingerprint"], strict=True)))

    def _chosen(self, **names: Names) -> list[Labelled]:
        """The cells that meet all conditions."""
        found = self._cells
        for axis, wanted in names.items():
            known = list(dict.fromkeys(getattr(item, axis) for item in self._cells))
            for name in _names(wanted):
                _named(name, known, axis)
            found = [item for item in found if _is_one(getattr(item, axis), wanted)]
        if not found:
            raise UserError("no results meet all conditions at once")
        return found

    # ---- the page ---------------------------------------------------------------------------------

    def report(self, out: str | Path | None = None, *, samples: int = 12) -> Path:
        """Writes the HTML page of ``attrib report``; ``out`` is ``report.html`` in the work directory by default."""
        from attrib import report  # brings torch, which nothing else here needs

        out = self.root / "report.html" if out is None else Path(out).expanduser()
        if out.is_dir():
            raise UserError(f"{out} is a folder; give the file that the page shall be, such as {out / 'report.html'}")
        command = f"attrib.results({str(self.root)!r}).report()"
        return self._read(
            lambda: report.write(
                self.root, out, samples=samples, confidence=self.confidence, command=command, broken=self.broken
            )
        )

    def __repr__(self) -> str:
        kinds = (f"{len({getattr(c, axis) for c in self._cells})} {axis}s" for axis in labels.AXES)
        problem = f"; {len(self.broken)} files cannot be read, see .broken" if self.broken else ""
        return printable(f"Results of {self.root}: {len(self._cells)} cells, {', '.join(kinds)}{problem}")

    # ---- helpers ----------------------------------------------------------------------------------

    def _where(self, **conditions: Names) -> pd.DataFrame:
        given = {name: list(_names(value)) for name, value in conditions.items() if value is not None}
        return tables.where(self._rows, given) if given else self._rows.copy()

    def _read(self, read: Callable[[], T]) -> T:
        try:
            return read()
        finally:
            self._warn()

    def _warn(self) -> None:
        """Once for every file."""
        self.broken[:] = dict.fromkeys(self.broken)
        for line in self.broken[self._warned :]:
            log.warning("left out: %s", printable(line))
        self._warned = len(self.broken)

    _warned = 0


def _names(names: Names) -> Iterable[str]:
    return () if names is None else (names,) if isinstance(names, str) else names


def _is_one(label: str, wanted: Names) -> bool:
    return wanted is None or any(tables.named(label, name) for name in _names(wanted))


def _chosen_names(wanted: Names, known: Iterable[str]) -> list[str]:
    return [name for name in known if _is_one(name, wanted)]


def _named(name: str, known: Sequence[str], axis: str = "method") -> list[str]:
    """The labels that a name means. A contender with a map (``fisher · var_grad``) is also its method."""
    found = [
        label for label in known if tables.named(label, name) or tables.named(label.split(formats.BETWEEN)[0], name)
    ]
    if not found:
        raise UserError(f"no results have {axis}={name}; there are: {_listed(known)}")
    return found


def _listed(names: Iterable[str]) -> str:
    return ", ".join(printable(name) for name in dict.fromkeys(names)) or "none"


def _known_uids(wanted: Names, known: Iterable[str]) -> set[str]:
    there = dict.fromkeys(known)
    for uid in _names(wanted):
        if uid not in there:
            some = [printable(name) for name in list(there)[:5]]
            more = f", and {len(there) - len(some)} more" if len(there) > len(some) else ""
            raise UserError(f"no results have the sample {uid!r}; there are: {', '.join(some) or 'none'}{more}")
    return set(_names(wanted))


def _mirrored(pairs: pd.DataFrame) -> pd.DataFrame:
    """The same tests with a and b in each other's place."""
    swapped = {"a": "b", "b": "a", "n_a": "n_b", "n_b": "n_a", "lo": "hi", "hi": "lo"}
    turned = pairs.rename(columns=swapped)[list(pairs.columns)]
    signed = ["difference", "lo", "hi", "effect", "rank_biserial"]
    return turned.assign(**{name: -turned[name] for name in signed})
