"""What the memory format and fused convolutions gain: the folded net, forwards, and forwards and backwards.

    python tools/bench/bench_fused.py
    python tools/bench/bench_fused.py resnet18 timm:convmixer_768_32 --rows 4 --turns 12

Names without ``timm:`` are torchvision's. Weights are random. See docs/performance.md.
"""

from __future__ import annotations

import argparse
from functools import partial

import timm
import torch
import torchvision
from bench_fisher import clock
from bench_peers import multiplies_half
from torch import nn

from attrib.models.fast import _Way
from attrib.models.folding import channels_last, folded, graph_of
from attrib.process.memory import keep_freed_memory

NETS = ("timm:tf_efficientnet_lite0", "resnet50", "vgg16", "densenet121", "timm:mobilenetv3_large_100")


def net_of(name: str) -> nn.Module:
    library, _, rest = name.rpartition(":")
    made = timm.create_model(rest) if library else torchvision.models.get_model(rest, weights=None)
    return made.eval().requires_grad_(False)


def ways(net: nn.Module, two: torch.Tensor) -> dict[str, _Way]:
    new, _ = folded(graph_of(net), two[:1])
    last = channels_last(new)
    found = {"contiguous": _Way(new, False, True), "channels_last": _Way(last, True, True)}
    found["channels_last, fused"] = fused = _Way(last, True, True)
    fused.fuse([two])
    return found


def gradient(way: _Way, x: torch.Tensor, half: bool) -> None:
    leaf = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        logits = way(leaf)
    logits.float().sum().backward()


def logits(way: _Way, x: torch.Tensor, half: bool) -> None:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half):
        way(x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nets", nargs="*", default=NETS, help="(%(default)s)")
    parser.add_argument("--rows", type=int, default=11, help="of 224 px (%(default)s)")
    parser.add_argument("--turns", type=int, default=4, help="of which the best counts (%(default)s)")
    given = parser.parse_args()
    keep_freed_memory()
    x = torch.randn(given.rows, 3, 224, 224)
    print("| net | arithmetic | way | ms per row: forward | forward and backward |\n|---|---|---|---|---|")
    for name in given.nets:
        made = ways(net_of(name), torch.randn(2, 3, 224, 224))
        for half in (False, True)[: 1 + multiplies_half(x.device)]:
            best = dict.fromkeys(made, (float("inf"), float("inf")))
            for _ in range(given.turns):  # in turns, as neighbours on a host come and go
                for what, way in made.items():
                    here = way.within(torch.bfloat16) if half else way
                    took = (clock(x.device, partial(work, here, x, half), 1) for work in (logits, gradient))
                    best[what] = tuple(map(min, best[what], took))
            for what, seconds in best.items():
                times = " | ".join(f"{1000 * second / given.rows:.1f}" for second in seconds)
                print(f"| {name} | {'bfloat16' if half else 'float32'} | {what} | {times} |", flush=True)


if __name__ == "__main__":
    main()
