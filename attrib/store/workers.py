"""Who works, or worked, on a cell: read from ``runs/<writer>/``, without asking the machines themselves.

A worker writes ``progress.json`` every ten seconds while it lives (``attrib.running.hooks.Heartbeat``) and
``summary.json`` when it ends. Ages are those of files, so they are told by the clock of the file server; see
:func:`clock`.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from msgspec import UNSET

from attrib.errors import printable
from attrib.store.reading import document, regular
from attrib.store.schemas import Environment, Progress, RunConfig, RunOptions, RunSummary
from attrib.store.temporary import identity, temporary

T = TypeVar("T")

BEAT = 10.0  # seconds between two signs of life
SILENT = 120.0  # seconds without one after which a worker on another machine counts as dead
PROGRESS, SUMMARY = "progress.json", "summary.json"
RUNNING, FINISHED, STOPPED, FAILED, DEAD = "running", "finished", "stopped", "failed", "dead"
_ENTRY = re.compile(r"\d{4}/\d\d/\d\d \d\d:\d\d:\d\d - ")
_WRITER = re.compile(r"\d{8}-\d{6}-(?P<pid>\d+)-(?P<shard>\d+)-\w+")


@dataclass(frozen=True)
class Worker:
    """One run of a cell, as its folder tells.

    state    running; finished: it left nothing over; stopped: it was told to, and left work; failed: it ended with an
             error; dead: no sign of life for a while and no summary, or its process is gone from this machine
    why      one line about the state, "" where there is nothing to say
    refused  why what it was asked for cannot be done, "" if that is not what ended it
    broken   files of it that cannot be read, each with the reason
    shard, shards, limit   its part of the cell, -1 and 0 where it does not say
    stage, done, total     what it does (did) last, in samples; ``failed`` samples in the whole run
    rate     samples per second of the stage, over the last minutes; None before the first batch
    left     samples without a map and samples x metrics without a score that it left; None if it does not say
    age      seconds since the last sign of life
    seconds  how long it has been running, or ran
    metrics  score folders it was asked for; None if it does not say
    """

    cell: str
    name: str
    folder: Path
    state: str
    why: str = ""
    shard: int = -1
    shards: int = 0
    limit: int | None = None
    stage: str = ""
    done: int = 0
    total: int = 0
    failed: int = 0
    rate: float | None = None
    left: int | None = None
    age: float = 0.0
    seconds: float = 0.0
    metrics: tuple[str, ...] | None = None
    host: str = ""
    pid: int = 0
    job: str = ""
    broken: tuple[str, ...] = ()
    refused: str = ""

    @property
    def eta(self) -> float | None:
        """Seconds until the stage is done."""
        return (self.total - self.done) / self.rate if self.rate and self.state == RUNNING else None

    def log_lines(self, count: int) -> list[str]:
        """The newest lines of its log, without control characters and without what mmengine says of its hooks."""
        kept, ours = [], True
        for line in tail(self.folder / f"{self.name}.log"):
            if _ENTRY.match(line):  # else it goes on with what was said before
                ours = " - mmengine - INFO - " not in line
            if ours:
                kept.append(line)
        return kept[-count:] if count > 0 else []


def workers(cell: Path, now: float, silent: float = SILENT) -> list[Worker]:
    """Every run of a cell, oldest first. Folders and files that are not ours, or half written, are passed over."""
    try:
        folders = [entry for entry in os.scandir(cell / "runs") if not entry.name.startswith(".")]
    except OSError:
        return []
    found = [_worker(cell.name, Path(f.path), now, silent) for f in folders if f.is_dir(follow_symlinks=False)]
    return sorted((worker for worker in found if worker is not None), key=lambda worker: worker.name)


def current(found: Sequence[Worker]) -> list[Worker]:
    """Those that matter now: the running ones, and the last of each shard.

    A run of a shard takes the place of the earlier ones of that shard, and of those of another number of shards.
    """
    shown: list[Worker] = []
    taken: set[tuple[int, int]] = set()
    shards: int | None = None  # of the newest run
    for worker in sorted(found, key=lambda worker: worker.name, reverse=True):
        shards = worker.shards if shards is None else shards
        newest = worker.shards == shards and (worker.shard, shards) not in taken
        if newest or worker.state == RUNNING:
            shown.append(worker)
        taken.add((worker.shard, worker.shards))
    return sorted(shown, key=lambda worker: (worker.shards, worker.shard, worker.name))


def refusal(found: Sequence[Worker]) -> str:
    """Why what was asked for cannot be done, as the newest of the runs that matter says; "" if one is at work."""
    now = current(found)
    if any(worker.state == RUNNING for worker in now):
        return ""
    return next((worker.refused for worker in reversed(now) if worker.refused), "")


def asked(found: Sequence[Worker]) -> set[str] | None:
    """The score folders that the newest run was asked for, and those of the running ones; None if none says so."""
    said = [worker for worker in found if worker.metrics is not None]
    names = {name for worker in said if worker.state == RUNNING for name in worker.metrics or ()}
    return names | set(said[-1].metrics or ()) if said else None


def _worker(cell: str, folder: Path, now: float, silent: float) -> Worker | None:
    named = _WRITER.fullmatch(folder.name)
    broken: list[str] = []
    progress = _read(folder / PROGRESS, Progress, broken)
    summary = _read(folder / SUMMARY, RunSummary, broken)
    if named is None and progress is None and summary is None and not broken:
        return None
    born, seen = _times(folder)
    said, end = progress or Progress(), summary or RunSummary()
    shard, pid = (int(named["shard"]), int(named["pid"])) if named else (-1, 0)
    worker = Worker(
        cell,
        folder.name,
        folder,
        RUNNING,
        shard=shard if said.shard is None else said.shard,
        shards=said.shards or 0,
        limit=said.limit or None,
        stage=printable(said.stage),
        done=said.done,
        total=said.total,
        failed=said.failed if end.failed is None else end.failed,
        rate=said.rate or None,
        age=max(0.0, now - seen),
        seconds=end.seconds or max(0.0, seen - born),
        metrics=None if said.metrics is None else tuple(map(printable, said.metrics)),
        host=printable(said.host),
        pid=pid if said.pid is None else said.pid,
        job=printable(said.job or ""),
    )
    if said.shards is None:  # of a version without signs of life, or killed before the first
        options = (_read(folder / "config.json", RunConfig, broken) or RunConfig()).run or RunOptions()
        machine = printable((_read(folder / "environment.json", Environment, broken) or Environment()).machine)
        host = worker.host or machine.split(",")[0]
        worker = replace(worker, shards=options.shards or 0, limit=options.limit or None, host=host)
    worker = replace(worker, broken=tuple(broken))
    if summary is not None:
        signal = None if summary.stopped is UNSET else summary.stopped
        if summary.finished:
            state, why = (STOPPED, "") if summary.left else (FINISHED, "")
        elif signal or summary.stopped is UNSET:  # which earlier versions do not say
            state, why = STOPPED, printable(signal or "")
        else:
            state, why = FAILED, "refused" if summary.refused else "ended by an error"
        refused = "\n".join(map(printable, (summary.refused or "").splitlines()))
        return replace(worker, state=state, why=why, left=summary.left, refused=refused)
    here = _lives(said.process, worker.host, worker.pid)
    if here is False:
        return replace(worker, state=DEAD, why="its process is gone")
    if worker.age > silent and here is None:
        return replace(worker, state=DEAD, why="no sign of life")
    why = "its process is there, but it is silent" if worker.age > silent else ""
    return replace(worker, why=why, seconds=max(0.0, now - born))


def _read(path: Path, kind: type[T], broken: list[str]) -> T | None:
    """None if it is not there, or is something else, which is then a line in ``broken``."""
    try:
        return document(path, kind)
    except FileNotFoundError:
        return None
    except OSError as error:
        broken.append(str(error))
        return None


def _times(folder: Path) -> tuple[float, float]:
    """When the run's first file was written, and when its last sign of life came."""
    found = []
    try:
        for entry in os.scandir(folder):
            if entry.is_file(follow_symlinks=False):
                found.append(entry.stat(follow_symlinks=False).st_mtime)
        found = found or [folder.stat().st_mtime]
    except OSError:
        return 0.0, 0.0
    return min(found), max(found)


# ---- processes --------------------------------------------------------------------------------------


def slurm_job(environment: Mapping[str, str]) -> dict[str, Any]:
    """The Slurm job as squeue names it, 123_4 for task 4 of an array, and how often it was requeued."""
    array, task = environment.get("SLURM_ARRAY_JOB_ID"), environment.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{task}" if array and task else environment.get("SLURM_JOB_ID")
    if job is None:
        return {}
    about: dict[str, Any] = {"job": job, "slurm_job_id": environment.get("SLURM_JOB_ID")}
    restarts = environment.get("SLURM_RESTART_COUNT", "")
    return about | ({"restarts": int(restarts)} if restarts.isdigit() else {})


def _lives(said: str | None, host: str, pid: int) -> bool | None:
    """Whether the worker's process, which calls itself ``said``, is here and alive; None if it is not for us to say."""
    own = identity()
    if own and said:
        if own.split()[:2] != said.split()[:2]:
            return None
        return identity(pid) == said
    if host != platform.node() or not pid:
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        pass
    return None  # there is a process of that number


def clock(root: Path) -> float:
    """What the file server of a work directory takes for now, by a file that is written there and removed.

    Where nothing can be written, this machine's time.
    """
    probe = temporary(root / "clock")
    try:
        with open(probe, "wb") as file:
            file.write(b"\n")
        return probe.stat().st_mtime
    except OSError:
        return time.time()
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)


# ---- reading what others write -----------------------------------------------------------------------


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object; empty if the file is not there, or is something else."""
    return _read(path, dict[str, Any], []) or {}


def tail(path: Path, most: int = 65536) -> list[str]:
    """The lines, printable and not empty, of a text file's last ``most`` bytes; none if there is no file."""
    try:
        regular(path)
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - most))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    lines = [printable(line).rstrip() for line in text.split("\n")]
    return [line for line in lines if line]


def counted(number: int, what: str) -> str:
    """``1 cell``, ``2 cells``."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
