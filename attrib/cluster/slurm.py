"""A grid for a Slurm cluster: what its command line asks for, how long it will take, and a plain ``sbatch`` script.

``run=slurm`` submits through submitit (``attrib.cluster.submission``); with ``run.dry=true`` the script here is
printed instead, for people who would rather read and submit it themselves.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from attrib.config.compose import CommandLine, RangeSweep, compose, compose_node
from attrib.config.objects import experiment, options_of
from attrib.running.plan import Plan, make_plan
from attrib.types import UserError

SHARD, SHARDS, DRY = "run.shard", "run.shards", "run.dry"
# What sbatch calls some of the fields of configs/hydra/launcher/slurm.yaml; the others keep their names.
SBATCH = {"name": "job-name", "timeout_min": "time", "mem_gb": "mem", "tasks_per_node": "ntasks-per-node"}
NOT_SBATCH = (
    *("submitit_folder", "max_num_timeout", "signal_delay_s", "array_parallelism"),
    *("stderr_to_stdout", "additional_parameters", "setup", "teardown"),
)


# ---- the command line --------------------------------------------------------------------------


def with_shards(line: CommandLine) -> CommandLine:
    """``-m run.shard=range(N)`` says by itself that there are N shards; any other sweep has to.

    Raises UserError if the number of shards is not said, or is swept.
    """
    if not line.multirun or SHARD not in line.overrides:
        return line
    if SHARDS in line.overrides:
        if line.overrides[SHARDS].is_sweep_override():
            raise UserError("run.shards is one number for all jobs, the number of parts that the samples are cut into")
        return line
    shard = line.overrides[SHARD]
    if not shard.is_sweep_override():
        return line
    sweep = shard.value()
    if shard.is_range_sweep() and isinstance(sweep, RangeSweep) and (sweep.start, sweep.step) == (0, 1):
        return line.with_override(f"{SHARDS}={int(sweep.stop or 0)}")
    raise UserError(f"{shard.input_line}: of how many? Add run.shards=N, or say run.shard=range(N) for all of them")


@dataclass(frozen=True)
class Grid:
    """What a cluster is to compute: the shards ``chosen`` of every cell; and what a job asks for (``launcher``)."""

    cells: tuple[tuple[str, ...], ...]
    shards: int
    chosen: tuple[int, ...]
    dry: bool
    folder: Path | None
    launcher: Mapping[str, Any]
    root: str  # run.root

    @property
    def tasks(self) -> list[int]:
        """The array's indices: shard + shards · cell."""
        return [cell * self.shards + shard for cell in range(len(self.cells)) for shard in self.chosen]

    @property
    def overrides(self) -> list[list[str]]:
        """The overrides of each of the ``tasks``."""
        return [[*cell, f"{SHARDS}={self.shards}", f"{SHARD}={i}"] for cell in self.cells for i in self.chosen]


def grid(line: CommandLine, environment: Mapping[str, str]) -> Grid | None:
    """What a command line wants from Slurm; None if it does not ask for Slurm (``run=slurm``).

    Raises UserError if it asks for something that Slurm or the runner cannot do.
    """
    if not line.overrides.keys() & {"run", "hydra/launcher"}:
        return None
    cells = line.cells(without=(SHARD, SHARDS, DRY))
    config = compose_node("run", cells[0], line.folder)
    if "submitit_folder" not in config.hydra.launcher:
        return None
    node = OmegaConf.to_container(config.hydra.launcher, resolve=True)
    assert isinstance(node, dict)
    launcher = {str(name): value for name, value in node.items()}
    if launcher.get("nodes", 1) != 1 or launcher.get("tasks_per_node", 1) != 1:
        raise UserError(
            "hydra.launcher: nodes and tasks_per_node must be 1; a task is one process with one GPU: take more shards"
        )
    dry = (line.values(DRY) or [""])[-1].lower() == "true"
    shards = _number(SHARDS, (line.values(SHARDS) or ["1"])[-1])
    chosen = line.values(SHARD)
    if chosen is None and line.multirun and shards > 1:
        raise UserError(f"run.shards={shards}: add 'run.shard=range({shards})', or only shard 0 is computed")
    numbers = range(shards) if chosen is None else [_number(SHARD, value) for value in chosen]
    if strange := [n for n in numbers if not 0 <= n < shards]:
        raise UserError(f"run.shard must be in 0 .. run.shards - 1, not {strange[0]} of {shards}")
    if not (dry or line.multirun):
        if "SLURM_JOB_ID" in environment:  # a task of the script below
            return None
        raise UserError("run=slurm submits an array: add -m and 'run.shard=range(N)', or run.dry=true to see a script")
    return Grid(tuple(cells), shards, tuple(numbers), dry, line.folder, launcher, str(config.run.root))


def _number(key: str, value: str) -> int:
    try:
        return int(value)
    except ValueError as error:
        raise UserError(f"{key} must be int, not {value!r}") from error


# ---- how long ----------------------------------------------------------------------------------


def plans(wanted: Grid) -> list[Plan]:
    """What every cell of the grid misses, over all shards. Computes no maps. Raises UserError."""
    found = []
    for overrides in wanted.cells:
        composition = compose("run", overrides, wanted.folder)
        options = options_of({**composition.values["run"], "hooks": [], "vis_backends": []})
        found.append(make_plan(experiment(composition.values, composition.files, composition.assumed), options))
    return found


def seconds_due(plan: Plan) -> float | None:
    """Seconds that one process needs for what is missing, by recorded times; None if some of it has none."""
    parts = [(len(plan.uids) - len(plan.present), plan.seconds)]
    parts += [(len(plan.uids) - len(done), plan.score_seconds.get(name)) for name, done in plan.scored.items()]
    if any(due and each is None for due, each in parts):
        return None
    return sum(due * (each or 0.0) for due, each in parts)


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds >= 3600 else f"{seconds / 60:.1f} minutes"


def estimate(wanted: Grid, found: Sequence[Plan]) -> list[str]:
    """What is missing and what it will cost, in lines to print."""
    lines = [text for plan in found for text in str(plan).splitlines()]
    known = [seconds for plan in found if (seconds := seconds_due(plan)) is not None]
    if len(known) < len(found):
        return [*lines, "no time recorded yet for some of this: run it once with run.limit=16, and ask again"]
    launcher, tasks = wanted.launcher, len(wanted.tasks)
    total = sum(known) * len(wanted.chosen) / wanted.shards
    together = min(tasks, launcher.get("array_parallelism") or tasks)
    kind = "GPU" if any(launcher.get(name) for name in ("gpus_per_node", "gres", "gpus_per_task")) else "CPU"
    lines.append(
        f"about {total / 3600:.2f} {kind} hours: {tasks} tasks of about {_hours(total / tasks)}, {together} at a time, "
        f"{_hours(total / together)} in all; recorded times of other machines are a guess; start-up is not counted"
    )
    limit = launcher.get("timeout_min")
    if limit and total / tasks > 60 * limit:
        lines.append(
            f"a task takes longer than its {limit} minutes: it is requeued and goes on; more shards avoid that"
        )
    return lines


# ---- the script --------------------------------------------------------------------------------


def script(wanted: Grid, python: str, where: Path, about: Sequence[str] = ()) -> str:
    """A script for ``sbatch`` that computes the grid as one array, task by task what ``run=slurm`` would do.

    python   the interpreter of an environment that has attrib
    where    the directory to run in; paths of the command line are relative to it
    about    lines for its head, such as those of ``estimate``
    """
    launcher, config = wanted.launcher, ["--config-dir", str(wanted.folder)] if wanted.folder else []
    logs = shlex.quote(f"{wanted.root}/.slurm")
    names = "".join(
        f"    {i}) arguments=({shlex.join([*config, *overrides])}) ;;\n" for i, overrides in enumerate(wanted.cells)
    )
    head = "".join(f"# {line}".rstrip() + "\n" for line in about)
    options = "".join(f"#SBATCH {option}\n" for option in _options(wanted, where))
    setup, teardown = ("".join(f"{line}\n" for line in launcher.get(name) or ()) for name in ("setup", "teardown"))
    return f"""#!/bin/bash
# Submit with sbatch. Exit status of a task: 0 done, 75 stopped with work left, else see docs/how-to/cluster.md.
{head}{options}
task=${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID
mkdir -p {logs} && exec >>{logs}/"$task.log" 2>&1 </dev/null
{setup}
case $((SLURM_ARRAY_TASK_ID / {wanted.shards})) in
{names}esac
srun --unbuffered {shlex.quote(python)} -m attrib run "${{arguments[@]}}" \\
    {SHARDS}={wanted.shards} {SHARD}=$((SLURM_ARRAY_TASK_ID % {wanted.shards}))
{teardown}"""


def _options(wanted: Grid, where: Path) -> list[str]:
    launcher = wanted.launcher
    together = launcher.get("array_parallelism")
    array = ranges(wanted.tasks) + (f"%{min(together, len(wanted.tasks))}" if together else "")
    given = {SBATCH.get(k, k.replace("_", "-")): v for k, v in launcher.items() if k not in NOT_SBATCH}
    given["mem"] = f"{round(given['mem'] * 1024)}M" if given.get("mem") else None
    given |= {
        "array": array,
        "signal": f"USR1@{launcher.get('signal_delay_s', 120)}",
        "requeue": True,
        "output": "/dev/null",  # the folder of the log may not exist yet
        "chdir": str(where),
        **(launcher.get("additional_parameters") or {}),
    }
    return [
        f"--{name}" if value is True else f"--{name}={shlex.quote(str(value))}"
        for name, value in given.items()
        if value is not None and value is not False
    ]


def ranges(numbers: Iterable[int]) -> str:
    """0, 1, 2, 5 as 0-2,5: how sbatch wants an array's indices."""
    parts: list[list[int]] = []
    for n in sorted(set(numbers)):
        if parts and n == parts[-1][1] + 1:
            parts[-1][1] = n
        else:
            parts.append([n, n])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)
