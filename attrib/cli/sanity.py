"""``attrib sanity``: explain networks with randomised layers, and compare the maps with the original's."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from attrib import sanity
from attrib.cli import common
from attrib.cli.parsers import PARSERS
from attrib.cli.run import computed
from attrib.config.compose import Composition
from attrib.config.objects import build, experiment, options_of
from attrib.experiment.samples import example
from attrib.models.randomise import weighted_layers
from attrib.models.variant import Randomise
from attrib.process import exit_status
from attrib.process.signals import LEFT
from attrib.report.agreement import tables
from attrib.types import UserError


def main(argv: Sequence[str]) -> int:
    args = PARSERS["sanity"]().parse(argv)
    common.prepare()
    roots: dict[str, None] = {}  # work directories whose agreements are to be drawn
    status = common.grid("sanity", args, lambda composition: check(composition, roots))
    if status == LEFT or args.cfg:
        return status
    try:
        draw(list(roots))
    except UserError as error:
        return exit_status.worst((status, exit_status.report_error(error)))
    return status


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


def check(composition: Composition, roots: dict[str, None]) -> int:
    """The original, then each randomised copy; then what the maps have in common. The exit status.

    The work directory is added to ``roots`` once there is something to draw.
    """
    config = composition.values
    agreement, layers, how = _grid(config["sanity"])
    plain = {name: value for name, value in config.items() if name != "sanity"}
    plain["model"] = {name: value for name, value in plain["model"].items() if name != "randomise"}
    options = options_of(plain["run"])

    original = experiment(plain, composition.files)
    x = example(original.dataset)
    x = x.to(original.model.device, original.model.dtype if x.is_floating_point() else None)
    known = weighted_layers(original.model.module, x)
    if layers is None:
        layers = list(range(1, len(known) + 1))
    variants = [Randomise(layers=one, **how) for one in (layers if isinstance(layers, list) else [layers])]
    for variant in variants:
        variant.chosen(known)  # before anything is computed
    statuses = [computed(original, options).status]
    for variant in variants:
        if LEFT in statuses:
            return LEFT
        copy = {**plain, "model": {**plain["model"], "randomise": dataclasses.asdict(variant)}}
        statuses.append(computed(experiment(copy, composition.files), options).status)
    if not options.dry:
        found = sanity.compare(options.root, agreement)
        print(f"{found} samples compared with the original's", flush=True)
        roots[options.root] = None
    return exit_status.worst(statuses)


def draw(roots: Sequence[str]) -> None:
    """The tables of everything that was checked. Raises UserError if there is nothing to compare yet."""
    for root in roots:
        common.show(tables(root))
