"""The sanity check of a method, or with -m of several: explain nets with randomised layers and compare the maps.

See configs/sanity.yaml and docs/how-to/check-sanity.md.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig
from rich.console import Console
from rich.text import Text

from attrib import sanity
from attrib.config.objects import build, example, experiment, options_of, resolved
from attrib.models.randomise import weighted_layers
from attrib.models.variant import Randomise
from attrib.process import exit_status
from attrib.process.signals import LEFT, Interrupted, ended, leave, watching
from attrib.report.agreement import tables
from attrib.results.formats import to_terminal
from attrib.running.options import Options
from attrib.running.plan import plan
from attrib.running.run import run
from attrib.types import UserError

status = 0  # of the process: a grid goes on after a failure, but does not hide it
roots: dict[str, None] = {}  # work directories whose agreements are to be drawn


def _grid(settings: Mapping[str, Any]) -> tuple[sanity.Agreement, Any, dict[str, Any]]:
    """What is compared, which layers, and how the others of ``Randomise`` are."""
    names = [field.name for field in dataclasses.fields(sanity.Agreement)]
    measured = {name: value for name, value in settings.items() if name in names}
    rest = {name: value for name, value in settings.items() if name not in names}
    layers = rest.pop("layers", None)
    build({"_target_": "attrib.models.Randomise", **rest}, "sanity")  # names a wrong field before anything is done
    agreement = build({"_target_": "attrib.sanity.Agreement", "_convert_": "all", **measured}, "sanity")
    if layers is not None and not isinstance(layers, (int, str, list)):
        raise UserError(f"sanity.layers must be null, or numbers and paths of modules, not {layers!r}")
    return agreement, layers, rest


def check(config: Mapping[str, Any]) -> None:
    """The original, then each randomised copy; then what the maps have in common."""
    global status
    agreement, layers, how = _grid(config["sanity"])
    plain = {name: value for name, value in config.items() if name != "sanity"}
    plain["model"] = {name: value for name, value in plain["model"].items() if name != "randomise"}
    options: Options = options_of(plain["run"])

    def explain(cell: Any) -> None:
        global status
        if options.dry:
            print(plan(cell, options))
            return
        summary = run(cell, options)
        print(f"{cell.names['dataset']} {cell.names['model']} {cell.names['method']}: {summary}", flush=True)
        if summary.stopped:
            print(summary.ending, flush=True)
            sys.exit(LEFT)
        if summary.failed and (options.strict or not (summary.maps_computed or summary.maps_present)):
            status = exit_status.worst((status, exit_status.FAILED))

    original = experiment(plain)
    x = example(original.dataset)
    x = x.to(original.model.device, original.model.dtype if x.is_floating_point() else None)
    known = weighted_layers(original.model.module, x)
    if layers is None:
        layers = list(range(1, len(known) + 1))
    variants = [Randomise(layers=one, **how) for one in (layers if isinstance(layers, list) else [layers])]
    for variant in variants:
        variant.chosen(known)  # before anything is computed
    explain(original)
    for variant in variants:
        explain(experiment({**plain, "model": {**plain["model"], "randomise": dataclasses.asdict(variant)}}))
    if not options.dry:
        found = sanity.compare(options.root, agreement)
        print(f"{found} samples compared with the original's", flush=True)
        roots[options.root] = None


@hydra.main(
    version_base="1.3", config_path=str(Path(__file__).resolve().parent.parent.parent / "configs"), config_name="sanity"
)
def main(config: DictConfig) -> None:
    global status
    try:
        with watching() as stop, stop.at_once():
            check(resolved(config))
    except Interrupted as stopped:
        print(f"{stopped}; the same command goes on", flush=True)
        sys.exit(LEFT)
    except Exception as error:
        status = exit_status.worst((status, exit_status.told(error)))


def draw() -> None:
    """The tables of everything that was checked. Raises UserError if there is nothing to compare yet."""
    console = Console(width=None if sys.stdout.isatty() else 200)
    for root in roots:
        for table in tables(root):
            console.print(Text(table.title, style="bold"))
            console.print(to_terminal(dataclasses.replace(table, title="", notes=())))
            for note in table.notes:
                console.print(Text(note))


if __name__ == "__main__":
    exit_status.ready()
    if code := ended(main):
        leave(code)
    try:
        draw()
    except UserError as error:
        status = exit_status.worst((status, exit_status.told(error)))
    leave(status)
