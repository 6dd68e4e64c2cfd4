"""Submitting a grid through Hydra's submitit launcher, waiting for it, and saying how it ended.

The launcher as it comes waits for each task's pickled result, asks ``sacct`` about tasks that have none (for ever where
there is no accounting), raises at the first that failed and says nothing of the others. So it only submits here
(``collected``). Each task leaves its exit status in a file beside its log (``hand_in``), ``squeue`` says when all have
ended, and then the files are read: one that is missing belongs to a task that was killed.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException

from attrib.process import exit_status
from attrib.process.signals import LEFT, Interrupted, Stop
from attrib.store.files import write_json
from attrib.types import UserError

PATIENCE = 10.0  # seconds that a file of another machine may take to be seen here (NFS)


# ---- where the grid is submitted ---------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """``id`` as Slurm writes it (12_3); ``file``: where it leaves how it ended; ``log``: what it printed."""

    id: str
    file: Path
    log: Path


def check() -> None:
    """Raises UserError if nothing can be submitted from here."""
    if importlib.util.find_spec("submitit") is None or importlib.util.find_spec("hydra_plugins") is None:
        raise UserError("run=slurm needs hydra-submitit-launcher: pip install 'attrib[slurm]' (or add run.dry=true)")
    if missing := [name for name in ("sbatch", "srun", "squeue") if shutil.which(name) is None]:
        raise UserError(f"run=slurm: this machine has no {missing[0]}; run.dry=true prints a script for one that has")


@contextmanager
def collected() -> Iterator[list[Task]]:
    """The tasks that the launcher submits inside; it does not wait for them."""
    import submitit  # an extra

    tasks: list[Task] = []

    def results(job: submitit.SlurmJob) -> list[JobReturn]:
        tasks.append(Task(job.job_id, _file(job.paths.folder, job.job_id), Path(job.paths.stdout)))
        done = JobReturn()
        done.status, done.return_value = JobStatus.COMPLETED, None
        return [done]

    plain = mock.patch.dict(os.environ, {"HYDRA_FULL_ERROR": "1"})  # errors come here; and are whole in the tasks' logs
    try:
        with plain, mock.patch.object(submitit.SlurmJob, "results", results):
            yield tasks
    except (submitit.core.utils.FailedJobError, HydraException, ValueError) as error:
        raise UserError(f"run=slurm: nothing was submitted: {error}") from error


def submit(launch: Callable[[], object], root: str, stop: Stop) -> int:
    """``launch`` a grid, wait until Slurm has none of its tasks any more, and print how it ended.

    Returns the exit status: the worst of the tasks', 1 if one ended without a word, and 75 if it is this process that
    was told to stop; the tasks then go on. Raises UserError if Slurm refuses.
    """
    try:
        with stop.held():  # between sbatch's answer and telling it nothing may be lost
            with collected() as tasks:
                launch()
            ids = sorted({task.id.split("_")[0] for task in tasks})
            cancel = f"scancel {' '.join(ids)}"
            print(f"submitted {len(tasks)} tasks, job {', '.join(ids)}; logs: {tasks[0].log.parent}")
            print(f"to watch them: tools/status.py {root}; to stop them: {cancel}", flush=True)
        with stop.at_once():
            wait(ids)
    except Interrupted:
        print(f"no longer waiting; the tasks go on in Slurm. To stop them: {cancel}", flush=True)
        return LEFT
    outcomes = ended(tasks)
    print(said(tasks, outcomes), flush=True)
    return worst(outcomes)


def queued(ids: Sequence[str]) -> Counter[str] | None:
    """States of the tasks that Slurm still has; None if it does not answer."""
    command = ["squeue", "--noheader", "--array", "--format=%T", f"--jobs={','.join(ids)}"]
    found = subprocess.run(command, capture_output=True, text=True)
    if found.returncode:  # long after its end Slurm has forgotten a job
        return Counter() if "Invalid job id" in found.stderr else None
    return Counter(found.stdout.split())


def wait(ids: Sequence[str], shortest: float = 2.0, longest: float = 30.0) -> None:
    """Until Slurm has none of these jobs; a controller that does not answer for a while is waited for as well."""
    start, before = time.monotonic(), None
    while (now := queued(ids)) is None or now:
        if now != before:
            states = "Slurm does not answer" if now is None else ", ".join(f"{n} {s.lower()}" for s, n in now.items())
            print(f"{time.strftime('%H:%M:%S')} {states}", flush=True)
        before = now
        time.sleep(min(longest, max(shortest, (time.monotonic() - start) / 20)))


def ended(tasks: Sequence[Task], patience: float = PATIENCE) -> list[Mapping[str, Any] | None]:
    """What each task wrote at its end; None for one that was killed before it could."""
    until = time.monotonic() + patience
    while not all(task.file.exists() for task in tasks) and time.monotonic() < until:
        time.sleep(0.5)
        for folder in {task.file.parent for task in tasks}:
            if folder.is_dir():
                os.listdir(folder)  # makes NFS look again
    return [json.loads(task.file.read_text()) if task.file.exists() else None for task in tasks]


def said(tasks: Sequence[Task], outcomes: Sequence[Mapping[str, Any] | None]) -> str:
    """How many tasks ended how, with the samples of those that told; and where to look for the others."""
    words = {0: "done", LEFT: "stopped with work left", exit_status.FAILED: "with failed samples"}
    counts = Counter(None if o is None else o["status"] for o in outcomes)
    parts = [f"{n} {words.get(s, f'ended with status {s}')}" for s, n in counts.items() if s is not None]
    total = {
        name: sum(int(o["summary"].get(name, 0)) for o in outcomes if o and o["summary"])
        for name in ("maps_computed", "maps_present", "scores_computed", "scores_present", "left", "failed")
    }
    lines = [
        f"{total['maps_computed'] + total['maps_present']} maps, "
        f"{total['scores_computed'] + total['scores_present']} scores, {total['left']} left, {total['failed']} failed"
    ]
    killed = [task for task, o in zip(tasks, outcomes) if o is None]
    if killed:
        parts.append(f"{len(killed)} ended without a word (killed, cancelled, or unable to start)")
        lines[0] += f", and what {len(killed)} killed tasks had to do" if len(killed) > 1 else ", and a killed task's"
    lines.append(f"tasks: {', '.join(parts)}")
    errors = [(task, o["said"] if o else "killed") for task, o in zip(tasks, outcomes) if not o or o["status"]]
    lines += [f"  {task.id}: {why}; {task.log}" for task, why in errors[:10]]
    lines += [f"  and {len(errors) - 10} more"] if len(errors) > 10 else []
    if killed or counts[LEFT]:
        lines.append("the same command computes what is missing")
    return "\n".join(lines)


def worst(outcomes: Sequence[Mapping[str, Any] | None]) -> int:
    return exit_status.worst(exit_status.UNEXPECTED if o is None else o["status"] for o in outcomes)


# ---- in a task ---------------------------------------------------------------------------------


def in_task() -> bool:
    """Whether this process is a task that was submitted here."""
    return os.environ.get("SUBMITIT_EXECUTOR") == "slurm"


def _file(folder: Path, task: str) -> Path:
    return folder / f"{task}_status.json"


def _mine() -> Path:
    import submitit

    job = submitit.JobEnvironment()
    return _file(job.paths.folder, job.job_id)


def begin() -> None:
    """Of a task that starts again, what it said before is no longer true."""
    _mine().unlink(missing_ok=True)


def hand_in(status: int, summary: Any, line: str) -> None:
    """Say how the task ended, and end it with that status: submitit would have Slurm call every task COMPLETED."""
    write_json(
        _mine(),
        {"status": status, "summary": dataclasses.asdict(summary) if summary is not None else {}, "said": line},
    )
    if status:
        sys.exit(status)
