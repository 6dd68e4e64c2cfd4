"""``attrib run``: one experiment, with ``-m`` a grid of them, or what a paper's table still misses (-m paper=NAME)."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from attrib.cli import common
from attrib.cli.parsers import PARSERS
from attrib.cluster import slurm, submission
from attrib.cluster.ranks import of_rank
from attrib.config.compose import CommandLine, Composition, compose
from attrib.config.objects import build, experiment, options_of
from attrib.experiment.cell import Experiment
from attrib.papers import presets
from attrib.process import exit_status
from attrib.process.garbage import uncollected
from attrib.process.imports import without
from attrib.process.signals import LEFT, Interrupted, Stop, watching
from attrib.running.options import Options
from attrib.running.plan import make_plan
from attrib.types import UserError

if TYPE_CHECKING:
    from attrib.running.summary import Summary


class Outcome(NamedTuple):
    """How a cell ended: its exit status, what was done (None if nothing could be), and that in words."""

    status: int
    summary: Summary | None
    text: str


def options(node: Mapping[str, Any], environment: Mapping[str, str] = os.environ) -> Options:
    """The node ``run`` as options of this process, with its hooks built. Raises UserError."""
    extras = {
        name: [build(one, f"run.{name}") if "_target_" in one else one for one in node[name]]
        for name in ("hooks", "vis_backends")
    }
    return of_rank(options_of({**node, **extras}), environment)


def cell(composition: Composition) -> Outcome:
    """As ``attempted``; a mistake is printed, too, and no exception."""
    try:
        return attempted(composition)
    except UserError as error:
        said = composition.blamed(error)
        return Outcome(exit_status.report_error(said), None, f"error: {said}")


def attempted(composition: Composition) -> Outcome:
    """Compute one cell, or say what would be computed (``run.dry=true``). Prints as it goes. Raises UserError."""
    with watching() as stop:  # here too, because a launcher may call this in a process of its own, without ``main``
        try:
            with stop.immediately():
                settings = options(composition.values["run"])
                made = experiment(composition.values, composition.files, composition.assumed)
            return computed(made, settings)
        except Interrupted as stopped:
            text = f"{stopped}; the same command goes on"
            print(text, flush=True)
            return Outcome(LEFT, None, text)


def computed(made: Experiment, settings: Options) -> Outcome:
    """Run an experiment, or say what would be computed. Prints as it goes. Raises UserError and Interrupted."""
    if settings.dry:
        print(exit_status.lines(str(make_plan(made, settings))))
        return Outcome(0, None, "dry")
    with uncollected(), without("transformers"):  # which mmengine loads for the sake of one optimiser
        from attrib.running.run import run  # brings mmengine, which takes as long to import as all the rest

    summary = run(made, settings)
    text = f"{made.names['dataset']} {made.names['model']} {made.names['method']}: {summary}"
    print(exit_status.lines(text), flush=True)
    if summary.stopped:
        print(summary.ending, flush=True)
        return Outcome(LEFT, summary, summary.ending)
    failed = summary.all_failed or (settings.strict and summary.failed)
    return Outcome(exit_status.FAILED if failed else 0, summary, text)


def main(argv: Sequence[str]) -> int:
    args = PARSERS["run"]().parse(argv)
    common.prepare()

    def work(stop: Stop) -> int:
        line = slurm.with_shards(CommandLine.of(args.overrides, args.config_dir, args.multirun))
        if args.python:
            return _python(line)
        name = (line.values("paper") or ["None"])[-1]
        if name != "None" and line.multirun:
            return of_paper(name, line)
        if name != "None" and any(key.startswith("paper.") for key in line.overrides):
            raise UserError("paper.* says what a table is; add -m to run it")
        if args.cfg is None and (wanted := slurm.grid(line, os.environ)) is not None:
            return _on_slurm(wanted, stop)
        return common.each("run", line, line.cells(), _status, show=bool(args.cfg))

    return common.watched(work)


def _python(line: CommandLine) -> int:
    """Print what does the same in Python, for one sample. Raises UserError."""
    from attrib.api.lines import python_of

    print(python_of(line), end="")
    return 0


def _status(composition: Composition) -> int:
    return attempted(composition).status


def of_paper(name: str, line: CommandLine) -> int:
    """The runs of a paper's table, one after the other; each computes only what its cell misses. Raises UserError."""
    texts = {key: str(o.input_line) for key, o in line.overrides.items() if key != "paper"}
    if strange := [text for text in texts.values() if text.startswith(("hydra", "run=slurm"))]:
        raise UserError(
            f"-m paper={name} runs one cell after the other and knows no {strange[0]}; for a cluster, "
            f"attrib table paper={name} --commands prints the command of each"
        )
    preset = presets.load(name, list(texts.values()), line.folder)
    return common.each("run", line, [preset.overrides(job) for job in preset.jobs], _status)


def _on_slurm(wanted: slurm.Grid, stop: Stop) -> int:
    """Have Slurm do it, or print the script that would (``run.dry=true``). Raises UserError."""
    if wanted.dry:
        about = slurm.estimate(wanted, slurm.plans(wanted))
        print(slurm.script(wanted, sys.executable, Path.cwd(), about), end="")
        return 0
    return submission.submit(wanted, compute_task, stop)


def compute_task(overrides: Sequence[str], folder: Path | None) -> Outcome:
    """What a task of a Slurm array computes (``attrib.cluster.task.Compute``)."""
    common.prepare()
    return cell(compose("run", overrides, folder))
