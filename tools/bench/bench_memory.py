"""The peak memory that a table shows for each method: in a grid, and alone in a process of its own.

    python tools/bench/bench_memory.py
    python tools/bench/bench_memory.py --methods occlusion,grad_cam --limit 8

The methods of a grid come after each other in one process, which keeps what it frees (``attrib.process.memory``); here
the hungry ones come first. What a line says must be the method's own all the same. Both columns are peaks of the whole
process, libraries and weights included (``attrib.running.costs``).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from attrib.results import tables

METHODS = ("fisher", "occlusion", "iba", "integrated_gradients", "smooth_grad", "cd_occlusion", "lrp", "grad_cam")


def peaks(root: Path, methods: Sequence[str], limit: int) -> list[float]:
    """The bytes that ``attrib table`` has for each method, after they ran in one process."""
    command = ["run", "-m", f"method={','.join(methods)}", "metric=[]", f"run.limit={limit}", f"run.root={root}"]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    done = subprocess.run([sys.executable, "-m", "attrib", *command], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    summary = tables.summary(tables.rows(root))
    return [float(summary.loc[summary["method"].str.split().str[0] == name, "memory"].iloc[0]) for name in methods]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=",".join(METHODS), help="in the order of the grid (%(default)s)")
    parser.add_argument("--limit", type=int, default=4, help="photographs (%(default)s)")
    arguments = parser.parse_args()
    methods = arguments.methods.split(",")
    with tempfile.TemporaryDirectory() as folder:
        together = peaks(Path(folder) / "grid", methods, arguments.limit)
        print(f"{'method':<24}{'in a grid':>14}{'alone':>14}{'ratio':>8}")
        for i, method in enumerate(methods):
            (alone,) = peaks(Path(folder) / str(i), [method], arguments.limit)
            shown = (f"{memory / 2**30:.2f} GiB" for memory in (together[i], alone))
            print(
                "".join([f"{method:<24}", *(f"{text:>14}" for text in shown), f"{together[i] / alone:>8.2f}"]),
                flush=True,
            )


if __name__ == "__main__":
    main()
