"""Submitting a grid as one array with submitit, waiting for it, and saying how it ended.

submitit only submits. Its own way to wait reads a pickled result of each task, and asks ``sacct`` about tasks that left
none (for ever where there is no accounting). Here each task leaves its exit status in a file beside its log
(``attrib.cluster.task``), ``squeue`` says when all have ended, and then the files are read: where one is missing, the
task was killed.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from attrib.cluster.slurm import Grid
from attrib.process import exit_status
from attrib.process.signals import LEFT, Interrupted, Stop
from attrib.store.reading import document
from attrib.types import UserError

if TYPE_CHECKING:
    from attrib.cluster.task import Compute


# ---- submitting --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """``id`` as Slurm writes it (12_3); ``file``: where it leaves how it ended; ``log``: what it printed."""

    id: str
    file: Path
    log: Path


def submit(wanted: Grid, compute: Compute, stop: Stop) -> int:
    """Submit a grid, wait until Slurm has none of its tasks any more, and print how it ended.

    compute   what a task calls with the overrides of its cell and shard, and with ``wanted.folder``

    Returns the exit status: the worst of the tasks', 1 if one was killed, and 75 if it is this process that was told
    to stop; the tasks then go on. Raises UserError if nothing can be submitted from here, or Slurm refuses.
    """
    check()
    try:
        with stop.deferred():  # between sbatch's answer and printing it nothing may be lost
            tasks = submit_array(wanted, compute)
            array = tasks[0].id.split("_")[0]
            print(f"submitted {len(tasks)} task{'s' * (len(tasks) > 1)}, job {array}; logs: {tasks[0].log.parent}")
            print(f"to watch them: attrib status {wanted.root}; to stop them: scancel {array}", flush=True)
        with stop.immediately():
            wait(array)
    except Interrupted:
        print(f"no longer waiting; the tasks go on in Slurm. To stop them: scancel {array}", flush=True)
        return LEFT
    outcomes = read_outcomes(tasks)
    print(describe(tasks, outcomes), flush=True)
    return worst_status(outcomes)


def check() -> None:
    """Raises UserError if nothing can be submitted from here."""
    if importlib.util.find_spec("submitit") is None:
        raise UserError("run=slurm needs submitit: pip install 'attrib[slurm]' (or add run.dry=true)")
    if missing := [name for name in ("sbatch", "srun", "squeue") if shutil.which(name) is None]:
        raise UserError(f"run=slurm: this machine has no {missing[0]}; run.dry=true prints a script for one that has")


def submit_array(wanted: Grid, compute: Compute) -> list[Task]:
    """Hand a grid to Slurm as one array. Raises UserError if it refuses."""
    import submitit

    from attrib.cluster.task import Computation, status_file

    given = {name: value for name, value in wanted.launcher.items() if value is not None}
    if not isinstance(given.get("timeout_min"), int):  # submitit tells a timeout from a preemption by it
        raise UserError("hydra.launcher.timeout_min must be a number of minutes (or add run.dry=true)")
    folder, requeues = given.pop("submitit_folder"), given.pop("max_num_timeout", 0)
    given.setdefault("array_parallelism", len(wanted.overrides))
    try:
        executor = submitit.AutoExecutor(folder, cluster="slurm", slurm_max_num_timeout=requeues)
        executor.update_parameters(**{f"slurm_{name}": value for name, value in given.items()})
        jobs = executor.map_array(Computation(compute), wanted.overrides, itertools.repeat(wanted.folder))
    except (OSError, RuntimeError, NameError, TypeError, ValueError) as error:
        raise UserError(f"run=slurm: nothing was submitted: {error}") from error
    return [Task(job.job_id, status_file(job.paths.folder, job.job_id), job.paths.stdout) for job in jobs]


# ---- waiting -----------------------------------------------------------------------------------


def count_states(array: str) -> Counter[str] | None:
    """How many tasks Slurm still has in which state; None if it does not answer."""
    command = ["squeue", "--noheader", "--array", "--format=%T", f"--jobs={array}"]
    found = subprocess.run(command, capture_output=True, text=True)
    if found.returncode:  # long after its end Slurm has forgotten a job
        return Counter() if "Invalid job id" in found.stderr else None
    return Counter(found.stdout.split())


def wait(array: str, shortest: float = 2.0, longest: float = 30.0) -> None:
    """Until Slurm has no task of this array; a controller that does not answer for a while is waited for as well."""
    start, before = time.monotonic(), None
    while (now := count_states(array)) is None or now:
        if now != before:
            states = "Slurm does not answer" if now is None else ", ".join(f"{n} {s.lower()}" for s, n in now.items())
            print(f"{time.strftime('%H:%M:%S')} {states}", flush=True)
        before = now
        time.sleep(min(longest, max(shortest, (time.monotonic() - start) / 20)))


# ---- how it ended ------------------------------------------------------------------------------


class Outcome(TypedDict):
    """What a task's status file holds."""

    status: int
    summary: dict[str, Any]
    said: str


def read_outcomes(tasks: Sequence[Task], patience: float = 10.0) -> list[Outcome | None]:
    """What each task wrote at its end; None for one that was killed before it could.

    patience   seconds that a file of another machine may take to be seen here (NFS)
    """
    until = time.monotonic() + patience
    while not all(task.file.exists() for task in tasks) and time.monotonic() < until:
        time.sleep(0.5)
        for folder in {task.file.parent for task in tasks}:
            if folder.is_dir():
                os.listdir(folder)  # makes NFS look again
    return [_outcome(task.file) for task in tasks]


def _outcome(path: Path) -> Outcome | None:
    try:
        return document(path, Outcome)
    except FileNotFoundError:
        return None
    except OSError as error:
        return {"status": exit_status.UNEXPECTED, "summary": {}, "said": str(error)}


def describe(tasks: Sequence[Task], outcomes: Sequence[Outcome | None]) -> str:
    """What the tasks have done together, how many ended how, and where to look for those that did not end well."""
    total = {
        name: sum(int(o["summary"].get(name, 0)) for o in outcomes if o)
        for name in ("maps_computed", "maps_present", "scores_computed", "scores_present", "left", "failed")
    }
    work = (
        f"{total['maps_computed'] + total['maps_present']} maps, "
        f"{total['scores_computed'] + total['scores_present']} scores, {total['left']} left, {total['failed']} failed"
    )
    words = {0: "done", LEFT: "stopped with work left", exit_status.FAILED: "with failed samples"}
    counts = Counter(None if o is None else o["status"] for o in outcomes)
    parts = [f"{n} {words.get(s, f'ended with status {s}')}" for s, n in counts.items() if s is not None]
    if killed := counts[None]:
        work += f" (without what {killed} killed task{'s' * (killed > 1)} did)"
        parts.append(f"{killed} killed, cancelled or unable to start")
    lines = [work, f"tasks: {', '.join(parts)}"]
    errors = [(task, o["said"] if o else "killed") for task, o in zip(tasks, outcomes) if not o or o["status"]]
    lines += [f"  {task.id}: {why}; {task.log}" for task, why in errors[:10]]
    lines += [f"  and {len(errors) - 10} more"] if len(errors) > 10 else []
    if killed or counts[LEFT]:
        lines.append("the same command computes what is missing")
    return "\n".join(lines)


def worst_status(outcomes: Sequence[Outcome | None]) -> int:
    return exit_status.worst(exit_status.UNEXPECTED if o is None else o["status"] for o in outcomes)
