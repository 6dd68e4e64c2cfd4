"""Contextual decomposition: many masks of an image at once, as a ratio to one mask at a time as the original works.

    python tools/bench_cd.py --arch vgg16 --size 224 --masks 200 --loop 3
    python tools/bench_cd.py --arch acd_cnn --masks 600 --loop 100

"One at a time" is the loop that the released code runs for each mask: relevant and irrelevant part and the bias go
through each layer on their own, and maximum pooling picks its values channel by channel in Python. It is
timed over ``--loop`` masks and scaled to all. Both work on the same net and give the same numbers.
Weights are random: they do not change the time.
"""

from __future__ import annotations

import argparse
import platform
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attrib.decomposition import Decomposer, decompose
from attrib.models import AcdCNN, Classifier, torchvision_net
from attrib.noise import Noise

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="vgg16", help="acd_cnn, or torchvision's alexnet or vgg without batch norm")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--masks", type=int, default=200)
    parser.add_argument("--loop", type=int, default=3, help="masks that are timed one at a time")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--both", action="store_true", help="both parts on their own, rounding as the original")
    arguments = parser.parse_args()
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
    main()
