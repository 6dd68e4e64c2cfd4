"""What runs in a task of an array that ``submission`` submitted: one shard of one cell, and how it ended.

submitit unpickles a :class:`Computation` there and calls it. It would report every task as COMPLETED that raised
nothing, so a task leaves its exit status in a file beside its log, and ends with that status itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import submitit  # an extra, so import this module only where something is submitted, or was

from attrib.process import exit_status
from attrib.process.signals import leave
from attrib.store.files import write_json
from attrib.types import UserError

if TYPE_CHECKING:
    from attrib.running.loop import Summary


class Compute(Protocol):
    """Computes one cell. It is pickled by name, so it must be a function of an installed module."""

    def __call__(self, overrides: Sequence[str], folder: Path | None, /) -> tuple[int, Summary | None, str]:
        """folder: Hydra's --config-dir. Returns the exit status, what was done (None if nothing could be), and that
        in words."""


def status_file(folder: Path, job: str) -> Path:
    """Where a task leaves how it ended. job: its number as Slurm writes it, such as 12_3."""
    return folder / f"{job}_status.json"


@dataclass(frozen=True)
class Computation(submitit.helpers.Checkpointable):
    """``compute`` as a task. When the time limit comes near, submitit requeues it (Checkpointable) as it was: the work
    directory knows what is done."""

    compute: Compute

    def __call__(self, overrides: Sequence[str], folder: Path | None) -> None:
        """Ends the process."""
        job = submitit.JobEnvironment()
        file = status_file(job.paths.folder, job.job_id)
        file.unlink(missing_ok=True)  # of a task that starts again, what it left before is no longer true
        try:
            status, summary, text = self.compute(overrides, folder)
        except Exception as error:
            kind = "error" if isinstance(error, UserError) else type(error).__name__
            status, summary, text = exit_status.told(error), None, f"{kind}: {error}"
        done = {} if summary is None else dataclasses.asdict(summary)
        write_json(file, {"status": status, "summary": done, "said": text})
        leave(status)
