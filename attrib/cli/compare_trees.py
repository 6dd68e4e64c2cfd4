"""``attrib compare-trees``: the hierarchies of inputs beside those of slightly perturbed copies."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import numpy as np

from attrib.agglomeration.trees import Tree
from attrib.cli import common
from attrib.cli.parsers import PARSERS
from attrib.config.compose import CommandLine, compose
from attrib.config.objects import experiment, options_of
from attrib.noise import Noise
from attrib.running.plan import make_plan
from attrib.sanity import perturbed_trees
from attrib.types import SampleError, UserError


def main(argv: Sequence[str]) -> int:
    args = PARSERS["compare-trees"]().parse(argv)
    common.prepare()
    return common.guarded(lambda: _compare(args))


def _compare(args: argparse.Namespace) -> int:
    found = compared(args)
    if not found:
        raise UserError("no sample could be compared")
    print(f"{'sample':30} {'scores':>7} {'ranks':>7} {'common':>7}")
    for uid, flipped, agreement in found:
        print(f"{uid:30} " + " ".join(f"{v:7.3f}" for v in agreement) + ("  another class" if flipped else ""))
    mean = np.nanmean([agreement for *_, agreement in found], axis=0)
    print(f"{'mean of ' + str(len(found)):30} " + " ".join(f"{v:7.3f}" for v in mean))
    return 0


def compared(args: argparse.Namespace) -> list[tuple[str, bool, perturbed_trees.TreeAgreement]]:
    """(uid, whether the perturbed copy is taken for another class, how much the two trees have in common)"""
    line = CommandLine.of(["metric=[]", *args.overrides], args.config_dir)
    composition = compose("run", line.cells()[0], line.folder)
    cell, options = experiment(composition.values, composition.files), options_of(composition.values["run"])
    if "tree" not in cell.method.DOCUMENTS:
        raise UserError(f"method {cell.names['method']} makes no trees; take method=acd")
    if cell.method.fit is not None:
        raise UserError(f"method {cell.names['method']} must be fitted first, which this tool does not do")
    found = []
    for batch in cell.samples(make_plan(cell, options).selected[: args.count], options.read):
        noise = Noise(batch.uids, cell.seed, cell.model.device, cell.model.dtype)
        other = perturbed_trees.perturbed(cell.model, batch, args.perturb, args.size, noise.child("twin"))
        try:
            pair = [cell.method.attribute(cell.model, b, {}, noise.child("method"))["tree"] for b in (batch, other)]
        except SampleError as error:
            print(f"left out {', '.join(batch.uids)}: {error}", file=sys.stderr)
            continue
        classes = [perturbed_trees.predicted(cell.model, b) for b in (batch, other)]
        for uid, one, changed, before, after in zip(batch.uids, *pair, *classes, strict=True):
            found.append(
                (uid, before != after, perturbed_trees.tree_agreement(Tree.from_json(one), Tree.from_json(changed)))
            )
    return found
