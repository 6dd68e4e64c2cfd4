"""How fast a causal graph is, as a ratio to one intervention and one sample at a time, in the same process.

python tools/bench/bench_causal.py [--samples 100] [--rows 64 1024] [--share 0.1]

The plain loop sets the weights of a copy, runs one sample through the whole net and sets them back, for every
candidate of every layer. Only ``--share`` of its runs are done and the time is scaled; ``--share 1`` does all of them
and compares the graphs.
"""

from __future__ import annotations

import argparse
import copy
import platform
import time

import torch
from torch import Tensor, nn

from attrib.causal import ClassGraph, Search, Sites, Structure, find
from attrib.causal.graph import FIRST, select
from attrib.models import Classifier, LeNet, load_weights
from attrib.noise import Noise


def plain(net: nn.Module, structure: Structure, graph: ClassGraph, x: Tensor, share: float) -> tuple[float, int, bool]:
    """Seconds for all runs, their number, and whether the causes are the graph's (of what was run completely)."""
    net, target, seconds, runs, same = copy.deepcopy(net), graph.target, 0.0, 0, True
    count = max(1, round(share * len(x)))
    reference = net(x)[:, target]
    for path, found in graph.layers.items():
        if found.how == FIRST:
            continue
        module, effects = net.get_submodule(path), found.effects.nonzero()
        y = torch.empty(len(found.causes), count)
        start = time.perf_counter()
        for i, unit in enumerate(structure.layer(path).units):
            inputs = unit.features
            for j in range(count):
                weight = module.weight.data.clone()
                module.weight.data[effects, inputs] = found.u
                y[i, j] = net(x[j : j + 1])[0, target]
                module.weight.data = weight
        seconds += (time.perf_counter() - start) * len(x) / count
        runs += len(found.causes) * len(x)
        if count == len(x):
            same = same and torch.equal(select(y, reference, Search())[0], found.causes)
    return seconds, runs, same


@torch.no_grad()
def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--samples", type=int, default=100)
    p.add_argument("--rows", type=int, nargs="+", default=[64, 1024])
    p.add_argument("--share", type=float, default=0.1)
    p.add_argument("--checkpoint", help="weights of LeNet; random without")
    args = p.parse_args()
    net = LeNet().eval()
    for i, parameter in enumerate(net.parameters()):
        wave = torch.arange(parameter.numel()).add(7.0 * i).mul(1.7).sin()
        parameter.data = wave.mul(2 / max(parameter[0].numel(), 1) ** 0.5).view_as(parameter)
    if args.checkpoint:
        load_weights(net, args.checkpoint, "name")
    x = Noise([f"bench/{i}" for i in range(args.samples)]).normal(1, 32, 32)
    target = int(net(x).mean(0).argmax())
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    for rows in args.rows:
        model = Classifier(net, rows=rows)
        structure = Structure.of(model, x)
        best, graph = float("inf"), None
        for _ in range(3):
            start = time.perf_counter()
            graph = find(Sites(model, structure), x, target, Search())
            best = min(best, time.perf_counter() - start)
        seconds, runs, same = plain(model.module, structure, graph, x, args.share)
        whole = f", {'the same' if same else 'ANOTHER'} graph" if round(args.share * len(x)) >= len(x) else ", scaled"
        print(
            f"LeNet, n = {len(x)}, rows = {rows}: {best:.3f} s; plain loop of {runs} runs {seconds:.1f} s{whole}: "
            f"{seconds / best:.0f} times faster"
        )


if __name__ == "__main__":
    main()
