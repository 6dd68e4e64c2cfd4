"""Run one experiment, or with -m a grid of them, or what a paper's table still misses (-m paper=NAME).

See configs/run.yaml, configs/paper and README.md.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from omegaconf import DictConfig

from attrib.cluster import slurm, submission
from attrib.cluster.ranks import of_rank
from attrib.config.objects import build, experiment, options_of, resolved
from attrib.papers import presets
from attrib.process import exit_status
from attrib.process.signals import LEFT, Interrupted, ended, leave, watching
from attrib.running.options import Options
from attrib.running.plan import plan
from attrib.types import UserError

if TYPE_CHECKING:
    from attrib.running.loop import Summary

status = 0  # of the process: a grid goes on after a failure, but does not hide it


def _options(config: dict) -> Options:
    extras = {
        name: [build(node, f"run.{name}") if "_target_" in node else node for node in config[name]]
        for name in ("hooks", "vis_backends")
    }
    return of_rank(options_of({**config, **extras}), os.environ)


def _cell(config: DictConfig) -> tuple[int, Summary | None, str]:
    """One cell: the exit status, what was done, and that in words. Prints as it goes."""
    with watching() as stop:  # here too, because a launcher may call this in a process of its own, without ``main``
        try:
            with stop.at_once():
                plain = resolved(config)
                options = _options(plain["run"])
                cell = experiment(plain)
                if options.dry:
                    print(plan(cell, options))
                    return 0, None, "dry"
            from attrib.running.run import run  # brings mmengine, which takes as long to import as all the rest

            summary = run(cell, options)
        except UserError as error:
            return exit_status.told(error), None, f"error: {error}"
        except Interrupted as stopped:
            said = f"{stopped}; the same command goes on"
            print(said, flush=True)
            return LEFT, None, said
        said = f"{cell.names['dataset']} {cell.names['model']} {cell.names['method']}: {summary}"
        print(said, flush=True)
        if summary.stopped:
            print(summary.ending, flush=True)
            return LEFT, summary, summary.ending
        nothing = not (summary.maps_computed or summary.maps_present)
        return 3 if summary.failed and (options.strict or nothing) else 0, summary, said


@hydra.main(
    version_base="1.3", config_path=str(Path(__file__).resolve().parent.parent.parent / "configs"), config_name="run"
)
def one(config: DictConfig) -> None:
    global status
    try:
        code, _, _ = _cell(config)
    except Exception as error:
        code = exit_status.told(error)
    status = exit_status.worst((status, code))
    if code == LEFT:
        sys.exit(LEFT)  # ends a grid as a whole


def compute_task(overrides: Sequence[str], folder: Path | None) -> tuple[int, Summary | None, str]:
    """What a task of a Slurm array computes (``attrib.cluster.task.Compute``)."""
    exit_status.ready()
    return _cell(presets.composed(overrides, folder))


def commands(arguments: Sequence[str]) -> list[list[str]]:
    """The command lines for Hydra: one for each run of a paper's table, else the one that was given.

    A run computes what its cell misses and nothing else, so a table that is complete costs no computation.
    Raises UserError.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-m", "--multirun", action="store_true")
    parser.add_argument("-cd", "--config-dir", type=Path)
    known, rest = parser.parse_known_args(arguments)
    names = [a.removeprefix("paper=") for a in rest if a.startswith("paper=")]
    if not names or names[-1] == "null":
        return [slurm.with_shards(arguments)]
    if not known.multirun:
        if any(a.startswith("paper.") for a in rest):
            raise UserError("paper.* says what a table is; add -m to run it")
        return [list(arguments)]
    if strange := [a for a in rest if a.startswith(("-", "hydra", "run=slurm"))]:
        raise UserError(
            f"-m paper={names[-1]} runs one cell after the other and knows no {strange[0]}; for a cluster, "
            f"tools/table.py paper={names[-1]} --commands prints the command of each"
        )
    preset = presets.load(names[-1], [a for a in rest if not a.startswith("paper=")], known.config_dir)
    return [preset.arguments(job) for job in preset.jobs]


def _launched(tool: str, arguments: Sequence[str]) -> int | None:
    """Have Slurm do it, or print how (``run.dry=true``): the exit status. None where Slurm is not asked for.

    Raises UserError.
    """
    grid = slurm.grid(arguments, os.environ)
    if grid is None:
        return None
    if grid.dry:
        about = slurm.estimate(grid, slurm.plans(grid))
        print(slurm.script(grid, sys.executable, str(Path(tool).resolve()), Path.cwd(), about), end="")
        return 0
    from attrib.cli.run import compute_task  # by the name under which a task finds it: this module may be __main__

    with watching() as stop:
        return submission.submit(grid, compute_task, stop)


def main() -> None:
    global status
    tool, *arguments = sys.argv
    with watching() as stop:
        try:
            with stop.at_once():
                for line in commands(arguments):
                    sys.argv = [tool, *line]
                    code = _launched(tool, line)
                    if code is None:
                        one()
                    else:
                        status = exit_status.worst((status, code))
        except UserError as error:
            status = exit_status.told(error)
        except Interrupted as stopped:  # between two cells
            print(f"{stopped}; the same command goes on", flush=True)
            sys.exit(LEFT)


if __name__ == "__main__":
    exit_status.ready()
    leave(ended(main) or status)
