"""``attrib paper``: a paper's table in one command, and a finished study as a preset of its own."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from attrib.cli import common, run
from attrib.cli.parsers import PARSERS
from attrib.cli.table import write
from attrib.config.compose import CommandLine
from attrib.config.places import checked_folder
from attrib.config.places import presets as presets_of
from attrib.process import exit_status
from attrib.process.signals import LEFT, Stop
from attrib.results import formats
from attrib.store.files import write_atomic
from attrib.types import UserError

if TYPE_CHECKING:
    from attrib.papers.study import Study


def main(argv: Sequence[str]) -> int:
    args = PARSERS["paper"]().parse(argv)
    if args.export:
        return common.guarded(lambda: _export(args))
    common.prepare()
    return common.watched(lambda stop: _compute(args, stop))


def _compute(args: argparse.Namespace, stop: Stop) -> int:
    common.check_confidence(args.confidence)
    from attrib.papers import comparison, figure, presets, study

    folder = checked_folder(args.config_dir)
    known = presets_of("paper", folder)
    if study.is_study(args.name, folder):
        if args.name in known:
            raise UserError(f"{args.name} is the name of a study and of a table; give one of them another")
        return _study(args, study.load(args.name, args.words, folder))
    if args.name not in known:
        hint = study.hint(args.name, folder)
        names = [*known, *study.names(folder)]
        raise UserError(f"there is no paper {args.name!r}{hint} (there are: {', '.join(names)})")
    line = CommandLine.of([f"paper={args.name}", *args.words], args.config_dir, multirun=True)
    status = run.of_paper(args.name, line)
    if status == LEFT:
        return status
    preset = presets.load(args.name, args.words, folder)
    found = comparison.table(preset, preset.root, args.confidence)
    text = comparison.drawn(preset, found, args.confidence)
    print(write([text], "terminal"), end="")
    place = preset.root / "papers" / args.name
    place.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(place.with_suffix(".md"), formats.to_markdown(text).encode())
    drawn = figure.draw(preset, found, place.with_suffix(".png"))
    print(f"wrote {place.with_suffix('.md')}" + (f" and {place.with_suffix('.png')}" if drawn else ""))
    return status


def _study(args: argparse.Namespace, wanted: Study) -> int:
    """Every command of every part, then the document."""
    from attrib.cli import sanity, train  # which bring what trains and what compares
    from attrib.papers import findings

    mains = {"train": train.main, "run": run.main, "sanity": sanity.main}
    config = ["--config-dir", str(args.config_dir)] if args.config_dir else []
    statuses = []
    for part in (part for part in wanted.parts if part.chosen):
        for command in part.commands:
            print(f"{part.name}: {command}", flush=True)
            statuses.append(mains[command.tool]([*config, *command.arguments]))
            if statuses[-1] == LEFT:
                return LEFT
    try:
        written = findings.write(wanted, args.confidence)
    except OSError as error:
        raise UserError(f"what was found cannot be written: {error}") from error
    print(exit_status.lines(f"wrote {written.path}"))
    statuses += [exit_status.report_error(UserError(problem)) for problem in written.problems]
    return exit_status.worst([*statuses, exit_status.report_broken(written.broken)])


def _export(args: argparse.Namespace) -> int:
    from attrib.papers import export

    if len(args.words) != 1:
        raise UserError("--export NAME takes one work directory: attrib paper --export my_study workdirs/x")
    if not args.name.isidentifier():
        raise UserError(f"--export {args.name}: a preset's name has letters, digits and underscores only")
    folder = checked_folder(args.config_dir)
    path = (folder or Path("configs")) / "paper" / f"{args.name}.yaml"
    if path.exists():
        raise UserError(f"{path} is there already; take another name")
    text = export.as_preset(args.name, Path(args.words[0]), folder, args.confidence)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, text.encode())
    print(exit_status.lines(f"wrote {path}; attrib paper -cd {path.parent.parent} {args.name} computes it again"))
    return 0
