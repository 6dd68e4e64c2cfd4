"""Compare the hierarchies of images and their perturbed twins: which hold still?

python tools/compare_trees.py [--twin noise|fgsm] [--size 0.1] [--count 20] dataset=... model=... method=acd ...
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException

from attrib.agglomeration.trees import Tree
from attrib.config.objects import experiment, options_of, resolved
from attrib.noise import Noise
from attrib.process.memory import keep_freed_memory
from attrib.running.plan import plan
from attrib.sanity import perturbed_trees
from attrib.types import SampleError, UserError

CONFIGS = str(Path(__file__).resolve().parent.parent.parent / "configs")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--twin", choices=("noise", "fgsm"), default="noise", help="uniform noise, or one step against the class"
    )
    p.add_argument("--size", type=float, default=0.1, help="largest change of a normalised number (0.1)")
    p.add_argument("--count", type=int, default=20, help="samples (20)")
    p.add_argument("overrides", nargs="*", help="as for tools/run.py")
    return p


def compared(args: argparse.Namespace) -> list[tuple[str, bool, perturbed_trees.Agreement]]:
    """(uid, whether the twin is taken for another class, how much the two trees have in common)"""
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        config = resolved(compose("run", ["metric=[]", *args.overrides]))
    cell, options = experiment(config), options_of(config["run"])
    if "tree" not in cell.method.DOCUMENTS:
        raise UserError(f"method {cell.names['method']} makes no trees; take method=acd")
    if cell.method.fit is not None:
        raise UserError(f"method {cell.names['method']} must be fitted first, which this tool does not do")
    found = []
    for batch in cell.samples(plan(cell, options).selected[: args.count], options.read):
        noise = Noise(batch.uids, cell.seed, cell.model.device, cell.model.dtype)
        other = perturbed_trees.twin(cell.model, batch, args.twin, args.size, noise.child("twin"))
        try:
            pair = [cell.method.attribute(cell.model, b, {}, noise.child("method"))["tree"] for b in (batch, other)]
        except SampleError as error:
            print(f"left out {', '.join(batch.uids)}: {error}", file=sys.stderr)
            continue
        classes = [perturbed_trees.predicted(cell.model, b) for b in (batch, other)]
        for uid, one, changed, before, after in zip(batch.uids, *pair, *classes, strict=True):
            found.append(
                (uid, before != after, perturbed_trees.agreement(Tree.from_json(one), Tree.from_json(changed)))
            )
    return found


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        found = compared(args)
        if not found:
            raise UserError("no sample could be compared")
    except (UserError, HydraException) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{'sample':30} {'scores':>7} {'ranks':>7} {'common':>7}")
    for uid, flipped, agreement in found:
        print(f"{uid:30} " + " ".join(f"{v:7.3f}" for v in agreement) + ("  another class" if flipped else ""))
    mean = np.nanmean([agreement for *_, agreement in found], axis=0)
    print(f"{'mean of ' + str(len(found)):30} " + " ".join(f"{v:7.3f}" for v in mean))
    return 0


if __name__ == "__main__":
    keep_freed_memory()
    sys.exit(main())
