"""What runs in a task of an array that ``submission`` submitted: one shard of one cell.

submitit unpickles a :class:`Computation` there and calls it. The task leaves its exit status in a file beside its log
and ends with that status; submitit knows only whether something was raised.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import submitit  # an extra: import this module only where tasks are submitted or run

from attrib.process import exit_status
from attrib.process.signals import exit_process
from attrib.store.files import write_json
from attrib.types import UserError

if TYPE_CHECKING:
    from attrib.running.summary import Summary


# Computes one cell, given its overrides and --config-dir; returns the exit status, what was done (None if nothing could
# be), and that in words. It is pickled by name, so it must be a function of an installed module.
Compute = Callable[[Sequence[str], Path | None], "tuple[int, Summary | None, str]"]


def status_file(folder: Path, job: str) -> Path:
    """Where a task leaves how it ended. job: its number as Slurm writes it, such as 12_3."""
    return folder / f"{job}_status.json"


@dataclass(frozen=True)
class Computation(submitit.helpers.Checkpointable):
    """``compute`` as a task. Near the time limit submitit requeues it as it was, because it is Checkpointable; the work
    directory records what is done."""

    compute: Compute

    def __call__(self, overrides: Sequence[str], folder: Path | None) -> None:
        """Ends the process."""
        job = submitit.JobEnvironment()
        file = status_file(job.paths.folder, job.job_id)
        file.unlink(missing_ok=True)  # from before a requeue; this time the task may be killed
        try:
            status, summary, text = self.compute(overrides, folder)
        except Exception as error:
            kind = "error" if isinstance(error, UserError) else type(error).__name__
            status, summary, text = exit_status.report_error(error), None, f"{kind}: {error}"
        done = {} if summary is None else dataclasses.asdict(summary)
        write_json(file, {"status": status, "summary": done, "said": text})
        exit_process(status)
