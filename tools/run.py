"""Run one experiment, or with -m a grid of them, or what a paper's table still misses (-m paper=NAME).

See configs/run.yaml, configs/paper and README.md.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import hydra
from omegaconf import DictConfig

from attrib import paper
from attrib.config import build, experiment, options_of, resolved
from attrib.memory import keep_freed_memory
from attrib.plan import Options, plan
from attrib.run import run
from attrib.types import UserError

status = 0  # of the process: a grid goes on after a failure, but does not hide it


def _options(config: dict) -> Options:
    extras = {
        name: [build(node, f"run.{name}") if "_target_" in node else node for node in config[name]]
        for name in ("hooks", "vis_backends")
    }
    return options_of({**config, **extras})


@hydra.main(version_base="1.3", config_path=str(Path(__file__).resolve().parent.parent / "configs"), config_name="run")
def one(config: DictConfig) -> None:
    global status
    try:
        plain = resolved(config)
        options = _options(plain["run"])
        cell = experiment(plain)
        if options.dry:
            print(plan(cell, options))
            return
        summary = run(cell, options)
        print(f"{cell.names['dataset']} {cell.names['model']} {cell.names['method']}: {summary}", flush=True)
        nothing = not (summary.maps_computed or summary.maps_present)
        if summary.failed and (options.strict or nothing):
            status = max(status, 3)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        status = max(status, 2)


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
        return [list(arguments)]
    if not known.multirun:
        if any(a.startswith("paper.") for a in rest):
            raise UserError("paper.* says what a table is; add -m to run it")
        return [list(arguments)]
    if strange := [a for a in rest if a.startswith(("-", "hydra"))]:
        raise UserError(
            f"-m paper={names[-1]} runs one cell after the other and knows no {strange[0]}; for a cluster, "
            f"tools/table.py paper={names[-1]} --commands prints the command of each"
        )
    preset = paper.load(names[-1], [a for a in rest if not a.startswith("paper=")], known.config_dir)
    return [preset.arguments(job) for job in preset.jobs]


def main() -> None:
    global status
    program, *arguments = sys.argv
    try:
        lines = commands(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        status = 2
        return
    for line in lines:
        sys.argv = [program, *line]
        one()


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    logging.getLogger("attrib").setLevel(logging.INFO)
    keep_freed_memory()
    # A polite kill flushes what is finished; an impolite one loses at most a few seconds.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.path.append(str(Path.cwd()))  # so that _target_: my_module.MyMethod finds a file beside you
    main()
    sys.exit(status)
