"""The status of a work directory: samples done, to do and failed, the workers that run, their speed, the time left.

Everything is read from the files that runs write; no machine is asked, and nothing is computed. A cell that is half
written or damaged is shown as far as it can be read, with the names of the files that cannot.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from attrib.errors import UNREADABLE, UserError, printable
from attrib.process.exit_status import DAMAGED
from attrib.process.signals import LEFT
from attrib.store.arrays import mean_seconds
from attrib.store.cell import UNASKED, Cell, Record, ScoreRows, cells, counts
from attrib.store.files import Key
from attrib.store.ledger import Ledger
from attrib.store.reading import document
from attrib.store.schemas import MetricNote
from attrib.store.workers import RUNNING, SILENT, Worker, asked, clock, current, read_object, refusal, workers
from attrib.upkeep.moved import MovedClass, Older, older_cells, older_scores

DONE, WORKED_ON = 0, 10  # exit status of ``attrib status``, beside LEFT
RECENT = 1000  # samples whose recorded seconds are averaged

T = TypeVar("T")


@dataclass(frozen=True)
class StageStatus:
    """Maps, or one metric's scores, of a cell, counted in samples.

    name      "maps" or the score folder, ``<name>.<key8>``
    todo      samples that lack it and did not fail; no run has looked at ``unseen`` of them yet (of a shard that
              has not begun)
    asked     whether the newest run computes it; scores of an earlier configuration are not waited for
    rate      samples per second of all workers that are running this stage; None if there are none
    seconds   of one worker per sample: as measured now, else as recorded; None if neither is known
    """

    name: str
    done: int
    todo: int
    failed: int
    unseen: int = 0
    asked: bool = True
    rate: float | None = None
    seconds: float | None = None

    @property
    def label(self) -> str:
        return self.name.rpartition(".")[0] or self.name


@dataclass(frozen=True)
class Failure:
    uid: str
    stage: str
    reason: str
    time: float


@dataclass(frozen=True)
class CellStatus:
    """``samples`` are those that runs were asked for (None: the cell does not say, all that is stored counts).

    ``broken`` names files that could not be read, each with the error; what they held counts as to do. ``readable``:
    whether spec.json and, if there is one, samples.json could be read. ``workers`` are the running ones and the last of
    each shard (:func:`attrib.store.workers.current`); ``runs`` counts all runs there ever were.
    """

    name: str
    samples: int | None
    stages: tuple[StageStatus, ...]
    workers: tuple[Worker, ...]
    runs: int
    failures: tuple[Failure, ...]
    broken: tuple[str, ...]
    eta: float | None = None
    readable: bool = True
    unasked: int = 0  # selected samples without maps that no run was asked for (run.limit)
    refused: str = ""  # why what is left cannot be done, as the last run said

    @property
    def left(self) -> bool:
        """Whether work is left. Failed samples do not count as work, although the next run tries them again."""
        return not self.readable or any(stage.todo for stage in self.stages if stage.asked)

    @property
    def running(self) -> list[Worker]:
        return [worker for worker in self.workers if worker.state == RUNNING]

    @property
    def seconds(self) -> float | None:
        """How long a single worker would take for the rest; None if that is not known for every stage."""
        due = [stage for stage in self.stages if stage.asked and stage.todo]
        if any(stage.seconds is None for stage in due):
            return None
        return sum(stage.todo * (stage.seconds or 0.0) for stage in due)


@dataclass(frozen=True)
class UnfinishedFit:
    """A state that is being fitted, or was when its worker ended: ``state/<key8>.partial.safetensors``."""

    name: str
    cells: tuple[str, ...]  # that need it
    size: int
    age: float


@dataclass(frozen=True)
class Status:
    root: Path
    time: float
    cells: tuple[CellStatus, ...]
    fits: tuple[UnfinishedFit, ...] = ()
    moved: tuple[MovedClass, ...] = ()

    @property
    def exit(self) -> int:
        """DONE; WORKED_ON: work is left, and every cell with work left has a running worker; LEFT: one has none.

        DAMAGED: nothing is left, but a file cannot be read.
        """
        due = [cell for cell in self.cells if cell.left]
        if any(not cell.running for cell in due):
            return LEFT
        if due or any(cell.running for cell in self.cells):
            return WORKED_ON
        return DAMAGED if any(cell.broken for cell in self.cells) else DONE

    def record(self, lines: int = 5) -> dict[str, Any]:
        """For scripts: what JSON can hold."""

        def worker(one: Worker) -> dict[str, Any]:
            more = {"folder": str(one.folder), "eta": one.eta, "log": one.log_lines(lines)}
            return {**dataclasses.asdict(one), **more}

        listed = [
            {
                "name": cell.name,
                "samples": cell.samples,
                "left": cell.left,
                "refused": cell.refused or None,
                "eta": cell.eta,
                "seconds": cell.seconds,
                "stages": [dataclasses.asdict(one) for one in cell.stages],
                "workers": [worker(one) for one in cell.workers],
                "runs": cell.runs,
                "failures": [dataclasses.asdict(one) for one in cell.failures],
                "broken": list(cell.broken),
            }
            for cell in self.cells
        ]
        about = {"root": str(self.root), "time": self.time, "exit": self.exit}
        fits = [dataclasses.asdict(one) for one in self.fits]
        return {**about, "cells": listed, "fits": fits, "moved": [one.record() for one in self.moved]}


class Observer:
    """Reads the status of a work directory repeatedly; files that it has read before are not read again.

    filters   words that a cell's name must hold, all of them; a word with ``*`` or ``?`` must match a part between
              dots, or the whole name
    silent    seconds without a sign of life after which a worker on another machine counts as dead
    """

    def __init__(self, root: Path | str, filters: Sequence[str] = (), silent: float = SILENT) -> None:
        self.root, self._filters, self._silent = Path(root), tuple(filters), silent
        self._cells: dict[str, Cell] = {}
        self._rows: dict[Path, ScoreRows] = {}
        self._specs: dict[str, dict[str, Any]] = {}

    def look(self) -> Status:
        """Raises UserError if there is no cell, or none that the filters let through."""
        found = cells(self.root)
        if not found:
            raise UserError(no_cells(self.root))
        chosen = [cell for cell in found if matches(cell.folder.name, self._filters)]
        if not chosen:
            raise UserError(f"none of the {len(found)} cells in {self.root} matches {' and '.join(self._filters)}")
        now = clock(self.root)
        statuses = tuple(self._cell(self._known(cell), now) for cell in chosen)
        moved = tuple(self._moved({cell.folder.name: cell for cell in found}, statuses))
        return Status(self.root, now, statuses, tuple(fits(self.root, now)), moved)

    def _moved(self, every: Mapping[str, Cell], statuses: Sequence[CellStatus]) -> Iterator[MovedClass]:
        """For each stage that lacks results, the folder that has more of them under an older path of the class."""
        for status in statuses:
            maps, *scores = status.stages
            if maps.todo or status.unasked or not maps.done:
                for folder in every.keys() - self._specs.keys():
                    self._specs[folder] = read_object(every[folder].folder / "spec.json")
                known = {folder: self._specs[folder] for folder in every}
                olders = older_cells(self.root, status.name, known)
                yield from _most(status.name, maps, ((self._mapped(every[one.folder]), one) for one in olders))
            done = {stage.name: stage.done for stage in scores}
            if any(stage.todo and stage.asked for stage in scores):
                pairs = list(older_scores(every[status.name].folder, list(done)))
                for stage in scores:
                    found = ((done[one.folder], one) for name, one in pairs if name == stage.name)
                    yield from _most(status.name, stage, found if stage.todo and stage.asked else ())

    def _mapped(self, cell: Cell) -> int:
        """How many samples that the cell is about have maps."""
        said = _tried(cell.about, None, [], cell.folder)
        nothing: Mapping[Key, Record] = {}
        index = _tried(self._known(cell).maps.index, nothing, [], cell.folder)
        return len({uid for uid, fingerprint in index if counts(said, uid, fingerprint)})

    def _known(self, cell: Cell) -> Cell:
        """The object that read this cell before; a new one where files were broken, which may be repaired by now."""
        before = self._cells.get(cell.folder.name)
        if before is None or before.maps.broken:
            self._cells[cell.folder.name] = cell
        return self._cells[cell.folder.name]

    def _cell(self, cell: Cell, now: float) -> CellStatus:
        broken: list[str] = []
        said = _tried(cell.about, None, broken, cell.folder / "samples.json")
        unsaid: dict[str, Any] = {}
        if not _tried(lambda: cell.spec, unsaid, broken, cell.folder / "spec.json") and not broken:
            broken.append(f"{cell.folder / 'spec.json'}: not the description of a cell")
        readable = not broken

        def counted(keys: Iterable[Key]) -> set[str]:
            return {uid for uid, fingerprint in keys if counts(said, uid, fingerprint)}

        nothing: Mapping[Key, Record] = {}
        index = _tried(cell.maps.index, nothing, broken, cell.maps.folder)
        broken += cell.maps.broken
        mapped = counted(index)
        due = mapped if said is None else mapped | {uid for uid, f in said.items() if f != UNASKED}
        failures = _failures(cell.ledger, said, broken)
        runs = workers(cell.folder, now, self._silent)
        broken += [line for worker in runs for line in worker.broken]
        running = [worker for worker in runs if worker.state == RUNNING]
        lost = {uid: failure for uid, failure in _merged(failures).items() if uid in due and uid not in mapped}
        unseen = 0 if said is None else sum(f is None and u not in mapped and u not in lost for u, f in said.items())
        recorded = mean_seconds(list(index.values())[-RECENT:])
        rate, measured = _speed(running, "maps")
        todo = len(due) - len(mapped) - len(lost)
        stages = [StageStatus("maps", len(mapped), todo, len(lost), unseen, True, rate, measured or recorded)]
        named = list(lost.values())
        wanted = asked(runs)
        unread: list[str] = []
        stored = _tried(cell.metrics, unread, broken, cell.folder)
        broken += [f"{path}: not a folder" for path in cell.misplaced()]
        for name in dict.fromkeys((*stored, *sorted(wanted or ()), *failures)):
            if name in ("load", "maps"):
                continue
            rows = self._rows.setdefault(cell.folder / name, cell.scores(name))
            stored_rows: Set[Key] = _tried(rows.present, set(), broken, rows.folder)
            if _curves(cell, name, broken):
                stored_rows = stored_rows & _tried(cell.curves(name).index, nothing, broken, rows.folder).keys()
            scored = counted(stored_rows) & due
            broken += rows.broken
            bad = {uid: f for uid, f in failures.get(name, {}).items() if uid in due and uid not in scored}
            todo = len(due - scored - bad.keys() - lost.keys())
            wants = wanted is None or name in wanted
            rate, measured = _speed(running, name.rpartition(".")[0])
            cost = measured or (_score_seconds(cell, name) if todo and wants else None)
            stages.append(StageStatus(name, len(scored), todo, len(bad), 0, wants, rate, cost))
            named += bad.values()
        found = CellStatus(
            name=cell.folder.name,
            samples=None if said is None else len(due),
            stages=tuple(stages),
            workers=tuple(current(runs)),
            runs=len(runs),
            failures=tuple(sorted(named, key=lambda failure: -failure.time)),
            broken=tuple(printable(line) for line in dict.fromkeys(broken)),
            readable=readable,
            unasked=0 if said is None else len(said) - len(due & said.keys()),
            refused=refusal(runs),
        )
        if not running or found.seconds is None:
            return found
        return dataclasses.replace(found, eta=found.seconds / len(running))


def _most(cell: str, stage: StageStatus, olders: Iterable[tuple[int, Older]]) -> Iterator[MovedClass]:
    """The one of ``olders`` (samples done, folder) that has most, if that is more than the stage has."""
    done, older = max(olders, key=lambda pair: pair[0], default=(0, None))
    if older is not None and done > stage.done:
        yield MovedClass(cell, stage.name, older, done)


def _curves(cell: Cell, name: str, broken: list[str]) -> bool:
    """Whether the metric keeps curves, without which a score does not count as done."""
    try:
        return bool(document(cell.folder / "scores" / name / "metric.json", MetricNote).curves)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        broken.append(str(error))
        return False


def _score_seconds(cell: Cell, name: str) -> float | None:
    """Mean seconds per sample that the metric recorded beside its curves."""
    curves = cell.curves(name)
    unread: list[Record] = []
    return mean_seconds(_tried(curves.sampled, unread, [], curves.folder))


def matches(name: str, filters: Sequence[str]) -> bool:
    """Whether a cell's name meets every filter, see :class:`Observer`."""
    parts = (name, *name.split("."))
    return all(
        any(fnmatch.fnmatchcase(part, word) for part in parts) if set(word) & set("*?[") else word in name
        for word in filters
    )


def no_cells(root: Path) -> str:
    """The message for a folder without cells."""
    if not root.is_dir():
        return f"{root} is no folder; give the work directory (run.root) that `attrib run` writes to"
    below = sorted({path.parent.parent.name for path in root.glob("*/*/spec.json")})
    if below:
        return f"{root} holds no cells, but work directories: {', '.join(below)}; give one of them"
    return f"{root} holds no cells: no <dataset>.<model>.<method>.<key>/spec.json there"


def fits(root: Path, now: float) -> list[UnfinishedFit]:
    """Unfinished states below ``state/``, and the cells that wait for each."""
    found = []
    try:
        entries = [e for e in os.scandir(root / "state") if e.name.endswith(".partial.safetensors")]
    except OSError:
        return []
    specs = (
        {path.parent.name: read_object(path).get("state_key") for path in root.glob("*/spec.json")} if entries else {}
    )
    for entry in sorted(entries, key=lambda e: e.name):
        key8 = entry.name.split(".")[0]
        try:
            stat = entry.stat(follow_symlinks=False)
        except OSError:  # published this moment
            continue
        needing = tuple(sorted(name for name, key in specs.items() if isinstance(key, str) and key[:8] == key8))
        found.append(UnfinishedFit(key8, needing, stat.st_size, max(0.0, now - stat.st_mtime)))
    return found


def _tried(read: Callable[[], T], otherwise: T, broken: list[str], what: Path) -> T:
    """What ``read`` returns; for a file that cannot be understood, ``otherwise`` and a line in ``broken``."""
    try:
        return read()
    except UserError as error:
        broken.append(str(error))
    except OSError as error:
        broken.append(f"{what}: {str(error).removeprefix(f'{what}: ')}")
    return otherwise


def _failures(
    ledger: Ledger, said: Mapping[str, str | None] | None, broken: list[str]
) -> dict[str, dict[str, Failure]]:
    """stage -> uid -> the newest entry that is about the sample as it is now."""
    found: dict[str, dict[str, Failure]] = {}
    entries = ledger.entries()
    broken += ledger.broken
    for entry in entries:
        uid, stage = entry["uid"], entry["stage"]
        if said is None or (uid in said and (not said[uid] or entry["fingerprint"] in (said[uid], UNREADABLE))):
            found.setdefault(stage, {})[uid] = Failure(uid, stage, entry["reason"], entry["time"])
    return found


def _merged(failures: Mapping[str, Mapping[str, Failure]]) -> dict[str, Failure]:
    """uid -> why it has no map: it could not be read, or not be explained, whichever came last."""
    found: dict[str, Failure] = {}
    for one in (*failures.get("load", {}).values(), *failures.get("maps", {}).values()):
        if one.uid not in found or one.time >= found[one.uid].time:
            found[one.uid] = one
    return found


def _speed(running: Sequence[Worker], stage: str) -> tuple[float | None, float | None]:
    """Samples per second of all workers that run a stage, and seconds per sample of one of them."""
    rates = [worker.rate for worker in running if worker.stage == stage and worker.rate]
    return (sum(rates), len(rates) / sum(rates)) if rates else (None, None)
