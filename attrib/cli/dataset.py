"""``attrib dataset``: what a dataset holds, and whether its labels mean what the net's classes mean."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from attrib.cli import common
from attrib.cli.parsers import PARSERS
from attrib.config.compose import CommandLine, Composition, spelled
from attrib.config.objects import experiment, options_of
from attrib.experiment.cell import Experiment
from attrib.keys import digest
from attrib.process.signals import Stop
from attrib.report.dataset import file_name, look, page
from attrib.store.files import write_atomic
from attrib.types import UserError


def main(argv: Sequence[str]) -> int:
    args = PARSERS["dataset"]().parse(argv)
    common.prepare()

    def work(stop: Stop) -> int:
        line = CommandLine.of(_overrides(args.overrides), args.config_dir)
        # What explains and scores the samples makes no difference, and must not get in the way.
        about = {k: o for k, o in line.overrides.items() if k.split(".")[0] not in ("method", "metric", "paper")}
        line = dataclasses.replace(line, overrides=about)
        overrides = [*line.cells()[0], "method=random", "metric=[]"]
        return common.each("run", line, [overrides], lambda composition: _written(composition, args.out))

    return common.watched(work)


def _overrides(given: Sequence[str]) -> list[str]:
    """A folder or shard alone is the root of the dataset, whose layout is found out if none is named."""
    roots = [text for text in given if not text.startswith("~") and ("=" not in text or Path(text).exists())]
    others = [text for text in given if text not in roots]
    if len(roots) > 1 or not all(Path(root).exists() for root in roots):
        wrong = next((root for root in roots if not Path(root).exists()), " ".join(roots))
        raise UserError(f"{wrong}: give one folder (or shard) that exists, and overrides KEY=VALUE")
    named = any(text.startswith("dataset=") for text in others)
    return [*([] if named or not roots else ["dataset=auto"]), *others, *(f"dataset.root={spelled(r)}" for r in roots)]


def _written(composition: Composition, out: Path | None) -> int:
    options = options_of(composition.values["run"])
    cell = experiment(composition.values, composition.files)
    title = mark = ""
    if composition.files.get("dataset", "").endswith("/auto.yaml"):  # a page says of which folder, and is its own file
        place = Path(composition.values["dataset"]["root"]).resolve()
        title, mark = "/".join(place.parts[-2:]).lstrip("/")[-80:], f"-{digest(str(place))[:6]}"
    found = look(_called(cell, title), options.read)
    for name, value in found.facts:
        print(f"{name:24} {value}")
    for problem in found.problems:
        print(f"WARNING {problem}")
    file = Path(options.root) / file_name(_called(cell, title and title + mark)) if out is None else out
    with common.writing(file):
        write_atomic(file, page(found).encode())
    print(f"wrote {file}")
    return 0


def _called(cell: Experiment, name: str) -> Experiment:
    """With another name of the dataset, unless that is empty."""
    return dataclasses.replace(cell, names={**cell.names, "dataset": name}) if name else cell
