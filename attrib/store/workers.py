"""Who works, or worked, on a cell: read from ``runs/<writer>/``, without asking the machines themselves.

A worker writes ``progress.json`` every ten seconds while it lives (``attrib.running.hooks.Heartbeat``) and
``summary.json`` when it ends. Ages are those of files, so they are told by the clock of the file server; see
:func:`clock`.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

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


def asked(found: Sequence[Worker]) -> set[str] | None:
    """The score folders that the newest run was asked for, and those of the running ones; None if none says so."""
    said = [worker for worker in found if worker.metrics is not None]
    names = {name for worker in said if worker.state == RUNNING for name in worker.metrics or ()}
    return names | set(said[-1].metrics or ()) if said else None


def _worker(cell: str, folder: Path, now: float, silent: float) -> Worker | None:
    named = _WRITER.fullmatch(folder.name)
    progress, summary = read_object(folder / PROGRESS), read_object(folder / SUMMARY)
    if named is None and not progress and not summary:
        return None
    born, seen = _times(folder)
    worker = Worker(
        cell,
        folder.name,
        folder,
        RUNNING,
        shard=_whole(progress.get("shard"), int(named["shard"]) if named else -1),
        shards=_whole(progress.get("shards")),
        limit=_whole(progress.get("limit")) or None,
        stage=_text(progress.get("stage")),
        done=_whole(progress.get("done")),
        total=_whole(progress.get("total")),
        failed=_whole(summary.get("failed"), _whole(progress.get("failed"))),
        rate=_number(progress.get("rate")) or None,
        age=max(0.0, now - seen),
        seconds=_number(summary.get("seconds")) or max(0.0, seen - born),
        metrics=_texts(progress.get("metrics")),
        host=_text(progress.get("host")),
        pid=_whole(progress.get("pid"), int(named["pid"]) if named else 0),
        job=_text(progress.get("job")),
    )
    if "shards" not in progress:  # of a version without signs of life, or killed before the first
        options = read_object(folder / "config.json").get("run")
        options = options if isinstance(options, Mapping) else {}
        shards, limit = _whole(options.get("shards")), _whole(options.get("limit")) or None
        machine = _text(read_object(folder / "environment.json").get("machine"))
        worker = replace(worker, shards=shards, limit=limit, host=worker.host or machine.split(",")[0])
    if summary:
        left = None if summary.get("left") is None else _whole(summary.get("left"))
        signal = _text(summary.get("stopped"))
        if summary.get("finished"):
            state, why = (STOPPED, "") if left else (FINISHED, "")
        elif signal or "stopped" not in summary:  # which earlier versions do not say
            state, why = STOPPED, signal
        else:
            state, why = FAILED, "ended by an error"
        return replace(worker, state=state, why=why, left=left)
    here = _lives(progress, worker.host, worker.pid)
    if here is False:
        return replace(worker, state=DEAD, why="its process is gone")
    if worker.age > silent and here is None:
        return replace(worker, state=DEAD, why="no sign of life")
    why = "its process is there, but it is silent" if worker.age > silent else ""
    return replace(worker, why=why, seconds=max(0.0, now - born))


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


def identity(pid: int | str = "self") -> str | None:
    """What tells a process of this machine from every other: boot, namespace of process numbers, number, start.

    A number alone comes again, and containers of one machine have the same numbers. None where there is no such
    process, or no /proc.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        space = os.readlink(f"/proc/{pid}/ns/pid") if pid == "self" else os.readlink("/proc/self/ns/pid")
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        number = os.getpid() if pid == "self" else int(pid)
    except (OSError, ValueError):
        return None
    if fields[0] in "ZX":
        return None  # dead, and nobody has asked for its exit status
    return f"{boot} {space} {number} {fields[19]}"


def slurm_job(environment: Mapping[str, str]) -> dict[str, Any]:
    """The Slurm job as squeue names it, 123_4 for task 4 of an array, and how often it was requeued."""
    array, task = environment.get("SLURM_ARRAY_JOB_ID"), environment.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{task}" if array and task else environment.get("SLURM_JOB_ID")
    if job is None:
        return {}
    about: dict[str, Any] = {"job": job, "slurm_job_id": environment.get("SLURM_JOB_ID")}
    restarts = environment.get("SLURM_RESTART_COUNT", "")
    return about | ({"restarts": int(restarts)} if restarts.isdigit() else {})


def _lives(progress: Mapping[str, Any], host: str, pid: int) -> bool | None:
    """Whether the worker's process is on this machine and alive; None if it is not for us to say."""
    own, said = identity(), _text(progress.get("process"))
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
    except OSError:
        pass
    return None  # there is a process of that number


def clock(root: Path) -> float:
    """What the file server of a work directory takes for now, by a file that is written there and removed.

    Where nothing can be written, this machine's time.
    """
    probe = root / f".clock.{os.getpid()}-{secrets.token_hex(4)}.tmp"
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
    try:
        found = json.loads(path.read_text(errors="replace"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def tail(path: Path, most: int = 65536) -> list[str]:
    """The lines, printable and not empty, of a text file's last ``most`` bytes; none if there is no file."""
    try:
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


def printable(text: str) -> str:
    """Without the control characters by which a text could move the cursor or write to the terminal's title."""
    return "".join(c if c.isprintable() else " " if c == "\t" else "\ufffd" for c in text)


def _whole(value: Any, default: int = 0) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else default


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) and 0 <= value < float("inf") else 0.0


def _text(value: Any) -> str:
    return printable(value) if isinstance(value, str) else ""


def _texts(value: Any) -> tuple[str, ...] | None:
    return tuple(map(_text, value)) if isinstance(value, list) else None
