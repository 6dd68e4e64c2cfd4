"""Contextual decomposition: many masks of an image at once, as a ratio to one mask at a time as the original works.

    python tools/bench/bench_cd.py --arch vgg16 --size 224 --masks 200 --loop 3
    python tools/bench/bench_cd.py --arch acd_cnn --masks 600 --loop 100
    python tools/bench/bench_cd.py --acd --rows 256

"One at a time" is the loop that the released code runs for each mask: relevant and irrelevant part and the bias go
through each layer on their own, and maximum pooling picks its values channel by channel in Python. It is
timed over ``--loop`` masks and scaled to all. Both work on the same net and give the same numbers.
Weights are random: they do not change the time.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attrib.agglomeration import Rules, agglomerate, drive
from attrib.agglomeration.trees import Tree, grow
from attrib.decomposition import Decomposer, decompose
from attrib.methods.acd import ACD
from attrib.models import AcdCNN, Classifier, torchvision_net
from attrib.noise import Noise
from attrib.process.memory import keep_freed_memory
from attrib.types import Batch
from attrib.units import Partition

Two = tuple[Tensor, Tensor]


def affine(a: Tensor, b: Tensor, layer: nn.Module) -> Two:
    bias = layer(torch.zeros_like(b))
    a, b = layer(a) - bias, layer(b) - bias
    p, q = a.abs() + 1e-20, b.abs() + 1e-20
    return a + p / (p + q) * bias, b + q / (p + q) * bias


def pooled(a: Tensor, b: Tensor, layer: nn.MaxPool2d) -> Two:
    _, places = F.max_pool2d(a + b, layer.kernel_size, layer.stride, layer.padding, return_indices=True)

    def pick(part: Tensor) -> Tensor:
        out = torch.ones(places.shape, dtype=part.dtype, device=part.device)
        for i in range(len(places)):
            for c in range(places.shape[1]):
                out[i, c] = part[i, c].flatten()[places[i, c].flatten()].reshape(places.shape[2:])
        return out

    return pick(a), pick(b)


def one_mask(layers: list[nn.Module], x: Tensor, mask: Tensor) -> Two:
    """A chain of layers on one image (1, C, H, W) and one mask (H, W)."""
    a, b = x * mask, x * (1 - mask)
    for layer in layers:
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            a, b = affine(a, b, layer)
        elif isinstance(layer, nn.MaxPool2d):
            a, b = pooled(a, b, layer)
        elif isinstance(layer, nn.ReLU):
            a, b = F.relu(a), F.relu(a + b) - F.relu(a)
        else:
            a, b = layer(a), layer(b)
    return a, b


def chain(net: nn.Module) -> list[nn.Module]:
    """The layers of VGG, AlexNet and plain chains, in the order of their calls."""
    if isinstance(net, nn.Sequential):
        return list(net)
    return [*net.features, net.avgpool, nn.Flatten(), *net.classifier]


def tiles(count: int, size: int) -> Tensor:
    """Squares that wander over the image, (count, size, size)."""
    side, places = max(1, size // 7), torch.arange(count)
    row, column = places * 37 % (size - side), places * 101 % (size - side)
    t = torch.arange(size)
    rows = (t >= row[:, None]) & (t < row[:, None] + side)
    columns = (t >= column[:, None]) & (t < column[:, None] + side)
    return rows[:, :, None] & columns[:, None, :]


def both_ways(
    rows: int, percentile: float = 99.0, steps: int = 5, released: bool = False, device: str = "cpu"
) -> tuple[Callable[[], dict[str, Any]], Callable[[], tuple[Tree, int]]]:
    """The hierarchy of one digit, pixel by pixel: by the method ``acd``, and by the same walk with one set at a time.

    The first is the document that the method stores. The second also says how many sets those were.
    """
    torch.manual_seed(0)
    module = AcdCNN().eval().requires_grad_(False)
    model = Classifier(module, rows=rows, device=device)
    # A flat background with a figure on it, as a digit has.
    image = torch.zeros(1, 1, 28, 28) - 0.4242
    image[..., 5:23, 12:16] = 2.5
    image[..., 5:9, 8:20] = 1.8
    batch = Batch(("digit",), image.to(model.device), model.logits(image.to(model.device)).argmax(1))
    method = ACD(units=Partition(side=28), percentile=percentile, steps=steps, as_released=released)
    layers = [module.conv1, nn.MaxPool2d(2), nn.ReLU(), module.conv2, nn.MaxPool2d(2), nn.ReLU()]
    layers += [nn.Flatten(), module.fc1, nn.ReLU(), module.fc2]
    weights = np.eye(10)[int(batch.target)]

    def together() -> dict[str, Any]:
        found = method.attribute(model, batch, {}, Noise(batch.uids, 0, device=model.device))
        document: dict[str, Any] = found["tree"][0]
        return document

    @torch.no_grad()
    def one_at_a_time() -> tuple[Tree, int]:
        asked = 0

        def scores(_: np.ndarray, sets: np.ndarray) -> np.ndarray:
            nonlocal asked
            asked += len(sets)
            masks = torch.from_numpy(sets).view(-1, 28, 28).to(batch.x)
            return torch.cat([one_mask(layers, batch.x, mask)[0] for mask in masks]).double().cpu().numpy()

        walk = agglomerate((28, 28), weights, Rules(percentile, steps))
        (found,) = drive([walk], scores)
        tree = grow((28, 28), found.units, found.levels, found.whole, weights, range(10), int(batch.target), None)
        return tree, asked

    return together, one_at_a_time


def acd(arguments: argparse.Namespace) -> None:
    """Prints how long both ways take."""
    fast, slow = both_ways(arguments.rows, arguments.percentile, arguments.steps, arguments.both, arguments.device)
    fast()  # warm
    start = time.perf_counter()
    document = fast()
    together_s = time.perf_counter() - start
    start = time.perf_counter()
    theirs, asked = slow()
    slow_s = time.perf_counter() - start
    names = [{node.id for node in tree.nodes[tree.n :]} for tree in (Tree.from_json(document), theirs)]
    print(
        f"acd of a 28 px digit, percentile {arguments.percentile:g}, {arguments.steps} steps, {asked} sets, "
        f"{platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments.device}: one "
        f"at a time {slow_s:.2f} s, method=acd {together_s:.2f} s with rows={arguments.rows}: "
        f"{slow_s / together_s:.1f} times; {len(names[0] & names[1])} of {len(names[1])} components are the same"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="vgg16", help="acd_cnn, or torchvision's alexnet or vgg without batch norm")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--masks", type=int, default=200)
    parser.add_argument("--loop", type=int, default=3, help="masks that are timed one at a time")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--both", action="store_true", help="both parts on their own, rounding as the original")
    parser.add_argument("--acd", action="store_true", help="the hierarchy of one digit instead, on acd_cnn")
    parser.add_argument("--percentile", type=float, default=99.0, help="of --acd")
    parser.add_argument("--steps", type=int, default=5, help="of --acd")
    arguments = parser.parse_args()
    if arguments.acd:
        return acd(arguments)
    if arguments.arch == "acd_cnn":
        net, channels, size = AcdCNN(), 1, 28
    else:
        net, channels, size = torchvision_net(arguments.arch, num_classes=10), 3, arguments.size
    model = Classifier(net, rows=arguments.rows, device=arguments.device)
    x = Noise(["bench"], device=arguments.device).normal(channels, size, size)
    masks = tiles(arguments.masks, size).to(arguments.device)
    layers = chain(model.module)

    def seconds(start: float) -> float:
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    with torch.no_grad():
        one_mask(layers, x, masks[0].float())  # warm
        start = time.perf_counter()
        loop = [one_mask(layers, x, mask.float())[0] for mask in masks[: arguments.loop]]
        slow = seconds(start) / len(loop) * arguments.masks
    decomposer = Decomposer(model.module)
    decompose(model, x, masks[None, :1], decomposer=decomposer)
    start = time.perf_counter()
    found = decompose(model, x, masks[None], decomposer=decomposer, both=arguments.both)
    fast = seconds(start)
    off = (found.relevant[0, : len(loop)] - torch.cat(loop)).abs().max() / torch.cat(loop).abs().max()
    print(
        f"{arguments.arch} {size} px, {arguments.masks} masks, {platform.machine()}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads, {model.device}: one at a time {slow:.1f} s (from {len(loop)}), together "
        f"{fast:.1f} s with rows={model.rows}: {slow / fast:.1f} times; relevant parts differ by {off:.1e}, "
        f"completeness {found.error.max():.1e}"
    )


if __name__ == "__main__":
    keep_freed_memory()  # as tools/run.py; the plain loops profit from it too
    main()
