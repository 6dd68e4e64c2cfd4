"""Nets prepared for those methods of captum that change the backward pass: guided backpropagation, DeepLIFT, ..."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from attrib.models import Classifier
from attrib.models.activations import separated


class Windows(nn.Module):
    """Lays the windows of a max-pooling side by side: (N, C, H, W) -> (N, C, h, w * places in a window)."""

    def __init__(self, pool: nn.MaxPool2d) -> None:
        super().__init__()
        sizes = (pool.kernel_size, pool.stride, pool.padding, pool.dilation)
        self.kernel, self.stride, self.padding, self.dilation = (_pair(size) for size in sizes)
        self.ceil = pool.ceil_mode

    def forward(self, x: Tensor) -> Tensor:
        options = (self.kernel, self.stride, self.padding, self.dilation, self.ceil)
        h, w = F.max_pool2d(x.detach(), *options).shape[-2:]
        # By how much the last window reaches beyond the image along each axis; with ceil_mode more than the padding.
        beyond = [
            max(0, (n - 1) * s + d * (k - 1) + 1 - size - p)
            for n, size, k, s, p, d in zip((h, w), x.shape[-2:], *options[:4], strict=True)
        ]
        edges = (self.padding[1], beyond[1], self.padding[0], beyond[0])
        padded = F.pad(x, edges, value=torch.finfo(x.dtype).min)
        places = F.unfold(padded, self.kernel, self.dilation, stride=self.stride)
        return places.reshape(len(x), x.shape[1], -1, h, w).permute(0, 1, 3, 4, 2).flatten(3)


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def without_overlap(net: fx.GraphModule) -> fx.GraphModule:
    """Replace max-poolings whose windows overlap by ``Windows`` and a pooling without overlap; changes ``net``.

    Where windows overlap, captum's rule keeps one window's share of a pixel and drops those of the others.
    """
    for node in list(net.graph.nodes):
        pool = net.get_submodule(node.target) if node.op == "call_module" else None
        if type(pool) is nn.MaxPool2d:
            windows = Windows(pool)
            reach = [d * (k - 1) for d, k in zip(windows.dilation, windows.kernel, strict=True)]
            if any(r >= s for r, s in zip(reach, windows.stride, strict=True)):
                places = windows.kernel[0] * windows.kernel[1]
                net.add_submodule(node.target, nn.Sequential(windows, nn.MaxPool2d((1, places))))
    return net


def hookable(model: Classifier, as_relu: tuple[type[nn.Module], ...]) -> fx.GraphModule:
    """The net with every activation a module of its own (``separated``), and a copied input for each module
    without parameters.

    captum's hooks rewrite the gradient of the tensor that enters a module. If that tensor is also read
    elsewhere (a residual) or is another activation's output (max-pooling after a ReLU), captum mixes up
    the gradients, and DeepLIFT is not complete.
    """
    net = separated(model.module, as_relu)
    for node in list(net.graph.nodes):
        if node.op == "call_module" and not any(True for _ in net.get_submodule(node.target).parameters()):
            with net.graph.inserting_before(node):
                for shared in node.all_input_nodes:
                    node.replace_input_with(shared, net.graph.call_method("clone", (shared,)))
    net.recompile()
    return net
