"""Random nets against every method: ``make fuzz N=1000``.

python tests/fuzz.py --count 1000 --start 0 --jobs 2    a table: right, due (refused as it must be),
                                                        refused and why, wrong and why
python tests/fuzz.py --seed 17 --method grad_cam        one net, to read, and what became of it
"""

from __future__ import annotations

import argparse
import sys
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import get_args

import torch
from fuzz_checks import CHECKS, Case, Judge, Outcome, Verdict
from tqdm import tqdm

SHOWN = 3  # seeds of each reason


def judge(seed: int, methods: Sequence[str]) -> list[Verdict]:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    judge = Judge(seed)
    return [judge.verdict(method) for method in methods]


def judged(seeds: Sequence[int], methods: Sequence[str], jobs: int) -> Iterable[list[Verdict]]:
    if jobs == 1:
        yield from (judge(seed, methods) for seed in seeds)
        return
    with ProcessPoolExecutor(jobs) as pool:
        yield from pool.map(judge, seeds, [methods] * len(seeds), chunksize=4)


def table(verdicts: Sequence[Verdict], methods: Sequence[str]) -> str:
    counts = Counter((v.method, v.outcome) for v in verdicts)
    outcomes = get_args(Outcome)
    lines = [f"{'method':<22}" + "".join(f"{outcome:>9}" for outcome in outcomes)]
    for method in methods:
        lines.append(f"{method:<22}" + "".join(f"{counts[method, outcome]:>9}" for outcome in outcomes))
    total = [sum(counts[m, outcome] for m in methods) for outcome in outcomes]
    lines.append(f"{'all':<22}" + "".join(f"{count:>9}" for count in total))
    lines.append(f"{'':<22}" + "".join(f"{count / max(1, len(verdicts)):>9.1%}" for count in total))
    for outcome in ("due", "refused", "wrong"):
        seeds: dict[tuple[str, str], list[int]] = defaultdict(list)
        for v in verdicts:
            if v.outcome == outcome:
                seeds[v.kind, v.method].append(v.seed)
        by_kind: dict[str, list[tuple[str, list[int]]]] = defaultdict(list)
        for (kind, method), found in seeds.items():
            by_kind[kind].append((method, found))
        lines += ["", f"{outcome}:" if by_kind else f"nothing {outcome}"]
        for kind, of in sorted(by_kind.items(), key=lambda item: -sum(len(found) for _, found in item[1])):
            lines.append(f"  {sum(len(found) for _, found in of):>5}  {kind}")
            for method, found in sorted(of, key=lambda item: -len(item[1])):
                some = ", ".join(map(str, found[:SHOWN]))
                lines.append(f"         {len(found):>5}  {method}: seed{'s' * (len(found) > 1)} {some}")
    return "\n".join(lines)


def show(seed: int, methods: Sequence[str]) -> list[Verdict]:
    """The program, the layers that are looked at, and every verdict in full; of a crash, the traceback."""
    found = Judge(seed)
    print("\n".join(found.given.lines))
    case = Case(found.given)
    print(f"# layers: {case.layers}, features: {sorted(found.given.program.features)}\n")
    verdicts = []
    for method in methods:
        verdict = found.verdict(method)
        verdicts.append(verdict)
        print(f"{method}: {verdict.outcome}" + (f": {verdict.text or verdict.kind}" if verdict.kind else ""))
        if verdict.outcome == "wrong" and len(methods) == 1:
            try:
                CHECKS[method](case)
            except Exception:
                traceback.print_exc()
    return verdicts


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000, help="how many nets (default 1000)")
    parser.add_argument("--start", type=int, default=0, help="the first seed")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default 2)")
    parser.add_argument("--seed", type=int, help="show this net")
    parser.add_argument("--method", action="append", choices=tuple(CHECKS), help="only this one; may be repeated")
    given = parser.parse_args(arguments)
    methods = given.method or list(CHECKS)
    if given.seed is not None:
        verdicts = show(given.seed, methods)
    else:
        seeds = range(given.start, given.start + given.count)
        found = tqdm(judged(seeds, methods, given.jobs), total=len(seeds), unit="net", mininterval=1)
        verdicts = [verdict for of_net in found for verdict in of_net]
        print(table(verdicts, methods))
    return int(any(verdict.outcome == "wrong" for verdict in verdicts))


if __name__ == "__main__":
    sys.exit(main())
