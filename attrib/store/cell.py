"""The work directory: append-only, atomic, shared by any number of writers.

Three kinds of file hold everything that is computed, and each is written under a temporary
name, fsynced and renamed, so a reader never sees half a file and a killed writer loses only
what it had not flushed:

* chunks of arrays (``*.safetensors``): maps and curves of some samples;
* chunks of rows (``*.parquet``): scores of some samples;
* single documents (``*.json``, states).

Nothing is ever changed in place or deleted. Several writers need no coordination: each has a
name of its own, and a sample that two of them computed is simply there twice, with the same
numbers. A sample counts as present only under its current *fingerprint* (content of the file,
target, boxes), so data that changed on disk is computed anew.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from attrib.errors import UNREADABLE, GoneError, UserError
from attrib.store.arrays import READING, Arrays, DamagedError, Record, described
from attrib.store.files import Key, key8, write_atomic, write_json
from attrib.store.ledger import Ledger
from attrib.store.reading import LISTING, UnreadableError, document, reason
from attrib.store.rows import ScoreRows, read_rows
from attrib.store.schemas import SampleList

__all__ = [
    "READING",
    "UNASKED",
    "Arrays",
    "Cell",
    "DamagedError",
    "Key",
    "Ledger",
    "Record",
    "ScoreRows",
    "cells",
    "counts",
    "described",
    "read_rows",
    "write_atomic",
    "write_json",
]

UNASKED = ""  # in the place of the fingerprint of a sample that no run was asked for (``limit``)
FORMAT = 1  # of a cell's folder, see docs/work-directory.md; a cell that does not say has this one, too


class Cell:
    """One folder of the work directory: one dataset, model and method."""

    def __init__(self, folder: Path, writer: str = "", *, flush_seconds: float = 5.0) -> None:
        self.folder, self.writer, self._flush_seconds = Path(folder), writer, flush_seconds
        self._begun = False
        self.maps = Arrays(self.folder / "maps", writer, background=True, **self._how)
        self.ledger = Ledger(self.folder, writer, self.check)

    @property
    def _how(self) -> dict[str, Any]:
        return {"seconds": self._flush_seconds, "before": self.check}

    def begin(self) -> None:
        """From now on the cell is described, and whatever is written looks first whether it still is."""
        self._begun = True

    def check(self) -> None:
        """Raises GoneError if the folder was deleted since ``begin``: half a cell must not take its place."""
        if self._begun and not os.path.lexists(self.folder / "spec.json"):
            raise GoneError(
                f"{self.folder} was deleted, or its spec.json was, while this process was at work; nothing more is "
                "written. The same command computes what is missing"
            )

    @property
    def spec(self) -> dict[str, Any]:
        """Raises UnreadableError, also for a cell of a later format, or another cell's; FileNotFoundError."""
        path = self.folder / "spec.json"
        spec = document(path, dict[str, Any])
        if isinstance(found := spec.get("format", FORMAT), int) and found > FORMAT:
            raise UnreadableError(
                f"{path}: format {found}, but this version of attrib reads {FORMAT}; take a newer one"
            )
        key = spec.get("key")
        if isinstance(key, str) and not key.startswith(key8(self.folder)):
            raise UnreadableError(f"{path}: describes the cell with the key {key[:8]}, not this one")
        return spec

    def write_spec(self, spec: Mapping[str, Any]) -> None:
        """Once: every writer of a cell would write the same."""
        if not (self.folder / "spec.json").exists():
            write_json(self.folder / "spec.json", spec)

    def write_samples(
        self, uids: Sequence[str], fingerprints: Mapping[str, str], asked: Collection[str] | None = None
    ) -> None:
        """Which samples the cell is about now: the whole selection, each with the fingerprint that counts.

        ``fingerprints`` holds those known now. For other uids, and for files that cannot be read now, the
        fingerprint noted earlier stays. Data that was taken away or changed later is not in the cell's table.
        ``asked``: those within the run's limit, default all. What an earlier run was asked for stays asked for.
        """
        # Two shards that write in the same instant may lose each other's fingerprints. Then the latest
        # result of those samples counts, until the next run.
        before = self.samples()
        readable = {uid: value for uid, value in fingerprints.items() if value != UNREADABLE}
        mine = set(uids if asked is None else asked)
        after = {uid: readable.get(uid, before.get(uid, UNASKED)) for uid in uids}
        after |= {uid: None for uid, value in after.items() if value == UNASKED and uid in mine}
        if after != before or not self._samples_path.exists():
            write_json(self._samples_path, after)

    def samples(self) -> dict[str, str | None]:
        """uid -> fingerprint that counts, None for a sample no run has looked at yet (of a shard that has not begun),
        ``UNASKED`` for one that no run was asked for.

        Empty where nobody has written it. Raises UserError if the file is damaged.
        """
        if not os.path.lexists(self._samples_path):
            return {}
        try:
            return document(self._samples_path, SampleList, LISTING)
        except OSError as error:
            raise UserError(
                f"{self._samples_path} does not map samples to fingerprints ({reason(self._samples_path, error)}); "
                "delete it, the next run of the cell writes it anew"
            ) from error

    def about(self) -> dict[str, str | None] | None:
        """As ``samples``, but None where nobody has written it: then all that is stored counts, see ``counts``."""
        return self.samples() if os.path.lexists(self._samples_path) else None

    @property
    def _samples_path(self) -> Path:
        return self.folder / "samples.json"

    def scores(self, metric: str) -> ScoreRows:
        """``metric`` is the folder's name, ``<name>.<key8>``."""
        return ScoreRows(self.folder / "scores" / metric, self.writer, **self._how)

    def curves(self, metric: str) -> Arrays:
        return Arrays(self.folder / "scores" / metric, self.writer, **self._how)

    def metrics(self) -> list[str]:
        """Names of the score folders that exist."""
        return sorted(p.name for p in (self.folder / "scores").glob("*") if p.is_dir())

    def misplaced(self) -> list[Path]:
        """What lies in the place of the cell's folders of scores and failures, but is no folder."""
        places = [self.folder / "scores", self.folder / "failures", *(self.folder / "scores").glob("[!.]*")]
        return [path for path in places if os.path.lexists(path) and not path.is_dir()]


def counts(about: Mapping[str, str | None] | None, uid: str, fingerprint: str) -> bool:
    """Whether a stored result is of a sample as it is now. ``about``: see ``Cell.about``."""
    return about is None or (uid in about and about[uid] in (None, UNASKED, fingerprint))


def cells(root: Path) -> list[Cell]:
    """Every cell below a work directory, in the order of their names: a folder with a spec.json, whatever that is."""
    try:
        folders = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [Cell(Path(root, name)) for name in folders if os.path.lexists(Path(root, name, "spec.json"))]
