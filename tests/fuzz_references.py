"""What methods must give on a generated net, the slow and obvious way: loops, autograd, and rules of a line."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from generated_nets import Generated, Place
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from attrib.methods.parts.layout import resize
from attrib.noise import Noise

SEED = 3


def noise_of(uids: tuple[str, ...]) -> Noise:
    return Noise(uids, SEED, dtype=torch.float64)


def score(net: Callable[[Tensor], Tensor], x: Tensor, target: Tensor) -> Tensor:
    """(N,) the target's logit; a copy goes in, as some nets write into what they are given."""
    return net(x.clone()).gather(1, target[:, None])[:, 0]


def gradient(net: Callable[[Tensor], Tensor], x: Tensor, target: Tensor) -> Tensor:
    with torch.enable_grad():
        leaf = x.clone().requires_grad_()
        (found,) = torch.autograd.grad(score(net, leaf, target).sum(), leaf)
    return found


def integrated_gradients(net: nn.Module, x: Tensor, target: Tensor, steps: int) -> Tensor:
    points, weights = np.polynomial.legendre.leggauss(steps)
    total = torch.zeros_like(x)
    for point, weight in zip((points + 1) / 2, weights / 2, strict=True):
        total += weight * gradient(net, point * x, target)
    return x * total


def _range(x: Tensor) -> Tensor:
    return (x.flatten(1).amax(1) - x.flatten(1).amin(1)).view(-1, 1, 1, 1)


def smooth_grad(net: nn.Module, x: Tensor, target: Tensor, uids: tuple[str, ...], samples: int, sigma: float) -> Tensor:
    noise = noise_of(uids)
    copies = [x + sigma * _range(x) * noise.normal(*x.shape[1:]) for _ in range(samples)]
    return torch.stack([gradient(net, copy, target) for copy in copies]).mean(0)


def gradient_shap(
    net: nn.Module, x: Tensor, target: Tensor, uids: tuple[str, ...], samples: int, sigma: float, spread: float
) -> Tensor:
    noise, total = noise_of(uids), torch.zeros_like(x)
    for _ in range(samples):
        base = spread * _range(x) * noise.normal(*x.shape[1:])
        change = x + sigma * _range(x) * noise.normal(*x.shape[1:]) - base
        at = base + noise.uniform().view(-1, 1, 1, 1) * change
        total += change * gradient(net, at, target)
    return total / samples


@torch.no_grad()
def occlusion(net: nn.Module, x: Tensor, target: Tensor, window: int, stride: int) -> Tensor:
    total, covered = torch.zeros_like(x[:, 0]), torch.zeros_like(x[:, 0])
    whole = score(net, x, target)
    starts = [range(0, (-(-(side - window) // stride) + 1) * stride, stride) for side in x.shape[2:]]
    for top in starts[0]:
        for left in starts[1]:
            mask = torch.zeros_like(x[:, 0])
            mask[:, top : top + window, left : left + window] = 1
            fall = whole - score(net, x * (1 - mask[:, None]), target)
            total, covered = total + fall[:, None, None] * mask, covered + mask
    return total / covered


class _ConstantDivisors(TorchFunctionMode):
    """Meanwhile no gradient flows through what divides."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.softsign:  # written as a quotient
            return args[0] / (1 + args[0].abs()).detach()
        if func.__name__ in ("div", "__truediv__") and isinstance(args[1], Tensor):
            args = (args[0], args[1].detach(), *args[2:])
        return func(*args, **kwargs or {})


def lrp_zero(net: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """LRP-0 on a net of linear operations, ReLUs, maxima and quotients: input times gradient, where what divides counts
    as a weight, as in Bach et al. (2015) and AttnLRP: a norm's deviation scales relevance and gets none."""
    with _ConstantDivisors():
        return x * gradient(net, x, target)


# ---- rules for ReLUs and for elementwise functions ----------------------------------------------------


class _ByRule(torch.autograd.Function):
    """A ReLU whose way back is guided backpropagation's, or deconvolution's."""

    @staticmethod
    def forward(ctx, x, top, guided):
        ctx.save_for_backward((x > 0) & (x < top) if guided else torch.ones_like(x, dtype=torch.bool))
        return x.clamp(0, top)

    @staticmethod
    def backward(ctx, grad):
        (open_units,) = ctx.saved_tensors
        return (grad * open_units).clamp(min=0), None, None


def through_relus(given: Generated, x: Tensor, target: Tensor, guided: bool) -> Tensor:
    def each(kind: str, function: Callable[[Tensor], Tensor], value: Tensor) -> Tensor:
        top = {"relu": math.inf, "relu6": 6.0}.get(kind)
        return function(value) if top is None else _ByRule.apply(value, top, guided)

    return gradient(given.reference(each), x, target)


class _Rescale(torch.autograd.Function):
    """Rows are those of x, then the baseline's: a slope is the change of the output per change of the input."""

    @staticmethod
    def forward(ctx, x, function):
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            y = function(leaf)
            (slope,) = torch.autograd.grad(y.sum(), leaf)
        dx, dy = (t.detach()[: len(x) // 2] - t.detach()[len(x) // 2 :] for t in (x, y))
        near = dx.abs() < 1e-10
        rescaled = torch.where(near, slope[: len(x) // 2], dy / torch.where(near, 1.0, dx))
        ctx.save_for_backward(rescaled.repeat(2, *[1] * (x.ndim - 1)))
        return y.detach()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0], None


def rescale(given: Generated, x: Tensor, baseline: Tensor, target: Tensor) -> Tensor:
    """DeepLIFT's rescale rule on a net whose only other operations are linear."""
    net = given.reference(lambda kind, function, value: _Rescale.apply(value, function))
    with torch.enable_grad():
        leaf = torch.cat((x, baseline)).requires_grad_()
        (found,) = torch.autograd.grad(score(net, leaf, target.repeat(2))[: len(x)].sum(), leaf)
    return found[: len(x)] * (x - baseline)


# ---- layers ------------------------------------------------------------------------------------------


@contextmanager
def _recorded(net: nn.Module, path: str) -> Iterator[list[Tensor]]:
    """What the layer gives, kept apart from what is written into it later."""
    found: list[Tensor] = []

    def hook(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        if not output.requires_grad and torch.is_grad_enabled():
            output.requires_grad_()
        found.append(output)
        return output.clone()

    handle = net.get_submodule(path).register_forward_hook(hook)
    try:
        yield found
    finally:
        handle.remove()


def layer_and_gradient(net: nn.Module, path: str, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(N, *layer) the layer's output, and the gradient of the target's logit there."""
    with torch.enable_grad(), _recorded(net, path) as found:
        value = score(net, x.clone().requires_grad_(), target)
        (grad,) = torch.autograd.grad(value.sum(), found[0], allow_unused=True)
    return found[0].detach(), torch.zeros_like(found[0]) if grad is None else grad


def on_grid(z: Tensor, place: Place) -> Tensor:
    """(N, *layer) -> (N, C, h, w)."""
    if place.layout == "channels_first":
        return z
    if place.layout == "channels_last":
        return z.permute(0, 3, 1, 2)
    return z[:, place.prefix :].transpose(1, 2).unflatten(2, place.grid)


def grad_cam(a: Tensor, g: Tensor) -> Tensor:
    """(N, C, h, w) activations and their gradients -> (N, h, w) at the layer's resolution; so are those below."""
    return (g.mean((2, 3), keepdim=True) * a).sum(1).relu()


def grad_cam_plus_plus(a: Tensor, g: Tensor) -> Tensor:
    alpha = g**2 / (2 * g**2 + g**3 * a.sum((2, 3), keepdim=True))
    weights = torch.where(g > 0, alpha * g, 0.0).sum((2, 3), keepdim=True)
    return (weights * a).sum(1).relu()


def layer_cam(a: Tensor, g: Tensor) -> Tensor:
    return (g.relu() * a).sum(1).relu()


def xgrad_cam(a: Tensor, g: Tensor) -> Tensor:
    share = (a / a.sum((2, 3), keepdim=True)).nan_to_num(0.0)  # of a channel that is 0
    return ((g * share).sum((2, 3), keepdim=True) * a).sum(1).relu()


def hires_cam(a: Tensor, g: Tensor) -> Tensor:
    return (g * a).sum(1)


def eigen_cam(a: Tensor, g: Tensor) -> Tensor:
    maps = []
    for one in a.flatten(2):
        first = torch.linalg.eigh(one @ one.T)[1][:, -1] @ one
        maps.append(first * first[first.abs().argmax()].sign())
    return torch.stack(maps).unflatten(1, a.shape[2:])


@torch.no_grad()
def score_cam(net: nn.Module, a: Tensor, x: Tensor, target: Tensor) -> Tensor:
    total, weights = torch.zeros_like(a[:, 0]), torch.zeros_like(a[:, 0, :1, :1])
    for channel in a.unbind(1):
        mask = resize(channel, (x.shape[2], x.shape[3]))[:, None]
        low, high = mask.amin((2, 3), keepdim=True), mask.amax((2, 3), keepdim=True)
        weight = score(net, x * (mask - low) / (high - low), target).exp().view(-1, 1, 1)
        weight = torch.where((high - low)[:, 0] > 1e-12 * mask.abs().amax((1, 2, 3)).view(-1, 1, 1), weight, 0.0)
        total, weights = total + weight * channel, weights + weight
    return (total / weights).relu()


@torch.no_grad()
def ablation_cam(net: nn.Module, path: str, place: Place, x: Tensor, target: Tensor) -> Tensor:
    def without(channel: int) -> Tensor:
        def hook(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
            output = output.clone()
            first, kept = place.layout == "channels_first", place.prefix  # which tokens have, in front
            output[(slice(None), channel) if first else (slice(None), slice(kept, None), ..., channel)] = 0
            return output

        handle = net.get_submodule(path).register_forward_hook(hook)
        try:
            return score(net, x, target)
        finally:
            handle.remove()

    a, whole = on_grid(layer_and_gradient(net, path, x, target)[0], place), score(net, x, target)
    falls = [(whole - without(k)).view(-1, 1, 1) * a[:, k] for k in range(a.shape[1])]
    return torch.stack(falls).sum(0).relu()


def first_bits(net: nn.Module, path: str, place: Place, x: Tensor, many: Tensor, alpha: float) -> Tensor:
    """(N, h, w) bits of IBA's bottleneck before its first step; ``many`` are the inputs of the estimation set."""
    z, all_z = (layer_and_gradient(net, path, t, torch.zeros(len(t), dtype=torch.long))[0] for t in (x, many))
    mean, std = all_z.mean(0).float().double(), all_z.std(0).float().double().clamp(min=0.01)
    active = (all_z != 0).double().mean(0) > 0.01
    lam = torch.sigmoid(torch.tensor(alpha, dtype=torch.float64))
    nats = 0.5 * ((lam * (z - mean) / std) ** 2 + (1 - lam) ** 2 - 1 - 2 * (1 - lam).log()) * active
    return on_grid(nats, place).sum(1) / math.log(2)
