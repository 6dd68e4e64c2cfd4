"""``attrib precision``: what it changes to explain and score samples in another arithmetic than float32."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from attrib.cli import common
from attrib.cli.parsers import PARSERS
from attrib.cli.run import computed, options
from attrib.config.compose import Composition
from attrib.config.objects import experiment
from attrib.models.precision import Precision
from attrib.process.signals import LEFT
from attrib.running.plan import Plan, make_plan, metric_folder
from attrib.sanity.precision import changes, table
from attrib.types import UserError


def main(argv: Sequence[str]) -> int:
    args = PARSERS["precision"]().parse(argv)
    common.prepare()
    return common.grid("run", args, _compared)


def _compared(composition: Composition) -> int:
    """Both cells are computed as far as they are not there, and compared on the samples that they share."""
    asked = Precision.of(composition.values.get("precision"))
    if asked == Precision():
        raise UserError("precision=float32 is what others are compared with; set precision=bfloat16, tf32 or float16")
    settings, plans = options(composition.values["run"]), list[Plan]()
    for precision in (Precision(), asked):
        values = {**composition.values, "precision": dataclasses.asdict(precision)}
        made = experiment(values, composition.files, composition.assumed)
        outcome = computed(made, settings)
        if outcome.summary is None or outcome.status == LEFT:
            return outcome.status
        plans.append(make_plan(made, settings))
    fine, coarse = plans
    folders = {
        name: (metric_folder(fine.experiment, name), metric_folder(coarse.experiment, name))
        for name in fine.experiment.metrics
    }
    keys = [fine.key(uid) for uid in fine.uids]
    found = changes(fine.cell, coarse.cell, keys, tuple(fine.experiment.method.MAPS), folders)
    told = table(
        [fine.experiment.names[part] for part in ("dataset", "model", "method")],
        {what: how for what, how in zip(("explained", "scored"), dataclasses.astuple(asked)) if how != "float32"},
        found,
    )
    common.show([told])
    return 0
