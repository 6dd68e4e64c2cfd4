"""The usual methods, each against a slow and obvious derivation; completeness; an oracle; the edges."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from contracts import seeded
from skimage.transform import resize as skimage_resize
from torch import Tensor, nn

from attrib.methods import Method
from attrib.methods.baselines import (
    Deconvolution,
    DeepLiftShap,
    Gradient,
    GuidedBackprop,
    InputXGradient,
    IntegratedGradients,
    Occlusion,
    Random,
    SmoothGrad,
)
from attrib.methods.cam import GradCAM
from attrib.models import Classifier
from attrib.noise import Noise
from attrib.types import Batch, UserError

H, W, K = 8, 10, 5
REDUCE = {
    "sum": lambda a: a.sum(1),
    "abs_sum": lambda a: a.abs().sum(1),
    "abs_max": lambda a: a.abs().max(1).values,
}


def pictures(n: int = 3) -> Batch:
    r = np.random.RandomState(0)
    return Batch(tuple(f"s{i}" for i in range(n)), torch.tensor(r.randn(n, 3, H, W)), torch.tensor(r.randint(0, K, n)))


def streams(batch: Batch) -> Noise:
    return Noise(batch.uids, seed=5, dtype=batch.x.dtype)


def explain(method: Method, net: nn.Module, batch: Batch, layers: dict[str, str] | None = None, rows: int = 7):
    return method.attribute(Classifier(net, layers, rows=rows, dtype=torch.float64), batch, {}, streams(batch))


def same(found: Tensor, expected: Tensor, atol: float = 1e-10) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def smooth_net() -> nn.Module:
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 4, 3, 2, 1), nn.Softplus()]
    return seeded(nn.Sequential(*layers, nn.Flatten(), nn.Linear(80, K)), 0.5)


def relu_net() -> nn.Module:
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, 2, 1), nn.ReLU(), nn.Flatten()]
    return seeded(nn.Sequential(*layers, nn.Linear(80, 12), nn.ReLU(), nn.Linear(12, K)), 0.5)


class Mixed(nn.Module):
    """ReLUs in every form that hooks on modules get wrong.

    In place, used twice, functions, methods, ReLU6; one right behind another or a pooling behind
    it; one whose input goes elsewhere too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.conv3, self.conv4 = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.act, self.act6 = nn.ReLU(inplace=True), nn.ReLU6()
        self.head = nn.Linear(4 * (H // 2) * (W // 2), K)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act6(3 * self.conv1(x))
        x = F.max_pool2d(self.act(self.conv2(x)), 2)
        x = self.conv3(x)
        x = F.relu(x) + torch.relu(x - 0.2) + x / 2
        x = F.relu6((5 * self.conv4(x)).relu())
        return self.head(self.act(x * 4 - 2).flatten(1))


class RuledReLU(torch.autograd.Function):
    """A ReLU up to ``top`` with the backward pass of a paper."""

    @staticmethod
    def forward(ctx, x, top, rule):
        ctx.save_for_backward(x)
        ctx.top, ctx.rule = top, rule
        return x.clamp(0, top)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        passed = (x > 0) * (x < ctx.top) if ctx.rule == "guided" else 1
        return grad * (grad > 0) * passed, None, None


def by_hand(net: Mixed, x: Tensor, rule: str) -> Tensor:
    """The same net with the paper's backward pass written by hand."""

    def relu(x: Tensor, top: float = float("inf")) -> Tensor:
        return RuledReLU.apply(x, top, rule)

    x = relu(3 * net.conv1(x), 6.0)
    x = F.max_pool2d(relu(net.conv2(x)), 2)
    x = net.conv3(x)
    x = relu(x) + relu(x - 0.2) + x / 2
    x = relu(relu(5 * net.conv4(x)), 6.0)
    return net.head(relu(x * 4 - 2).flatten(1))


def score_of(net: nn.Module, target: Tensor) -> Callable[[Tensor], Tensor]:
    """One sample (3, H, W) -> its logit, or the sum of several."""

    def score(x: Tensor) -> Tensor:
        logits = net(x[None])[0]
        return logits[target] if target.ndim == 0 else sum(logits[k] for k in range(K) if target[k])

    return score


def gradient(score: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    score(x).backward()
    return x.grad


def each(batch: Batch, net: nn.Module, one: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]) -> Tensor:
    return torch.stack([one(score_of(net, t), x) for x, t in zip(batch.x, batch.target, strict=True)])


SEVERAL = torch.tensor([[1, 0, 0, 1, 0], [0, 0, 1, 0, 0], [1, 1, 1, 0, 1]])


def at_baseline(x: Tensor, baseline: float | str) -> Tensor:
    """(C, H, W), all numbers alike or those of a channel."""
    if baseline == "mean":
        return torch.stack([torch.full_like(channel, float(channel.mean())) for channel in x])
    return torch.full_like(x, baseline)


def targets(batch: Batch, several: bool) -> Batch:
    return Batch(batch.uids, batch.x, SEVERAL) if several else batch


# ---- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("several", [False, True])
def test_gradient_equals_finite_differences(several):
    batch, net, step = targets(pictures(), several), smooth_net(), 1e-5

    def differences(score, x):
        out = torch.zeros_like(x)
        for i in range(x.numel()):
            e = torch.zeros(x.numel(), dtype=x.dtype)
            e[i] = step
            e = e.view_as(x)
            out.view(-1)[i] = (score(x + e) - score(x - e)) / (2 * step)
        return out

    expected = each(batch, net, differences)
    for name, reduce in REDUCE.items():
        same(explain(Gradient(reduce=name), net, batch)["map"], reduce(expected), 1e-8)


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("reduce", REDUCE)
def test_input_x_gradient(reduce, several):
    batch, net = targets(pictures(), several), relu_net()
    expected = each(batch, net, lambda score, x: x * gradient(score, x))
    same(explain(InputXGradient(reduce=reduce), net, batch)["map"], REDUCE[reduce](expected))


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize(("steps", "baseline"), [(7, 0.0), (20, -0.4), (6, "mean")])
@pytest.mark.parametrize("reduce", REDUCE)
def test_integrated_gradients_equal_the_integral(reduce, steps, baseline, several):
    batch, net = targets(pictures(), several), relu_net()
    nodes, weights = np.polynomial.legendre.leggauss(steps)

    def integral(score, x):
        start = at_baseline(x, baseline)
        total = torch.zeros_like(x)
        for node, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
            total += weight * gradient(score, start + node * (x - start))
        return (x - start) * total

    expected = each(batch, net, integral)
    found = explain(IntegratedGradients(steps, baseline, reduce), net, batch)
    same(found["map"], REDUCE[reduce](expected), 1e-6)  # captum rounds the rule's weights to float32
    change = each(batch, net, lambda score, x: score(x) - score(at_baseline(x, baseline)))
    same(found["delta"], expected.sum((1, 2, 3)) - change, 1e-5)


def test_integrated_gradients_are_complete():
    batch = pictures()
    found = explain(IntegratedGradients(steps=40), smooth_net(), batch)
    assert found["delta"].abs().max() < 1e-6
    change = each(batch, smooth_net(), lambda score, x: score(x) - score(torch.zeros_like(x)))
    same(found["map"].sum((1, 2)), change, 1e-6)
    # Gauss-Legendre against a plain Riemann sum: the same integral, not the same points.
    plain = each(
        batch,
        smooth_net(),
        lambda score, x: sum(x * gradient(score, (k + 0.5) / 400 * x) for k in range(400)) / 400,
    )
    same(found["map"], plain.sum(1), 1e-5)


@pytest.mark.parametrize("reduce", REDUCE)
def test_smooth_grad_is_the_mean_gradient_of_noisy_copies(reduce):
    batch, net = pictures(), relu_net()
    expected = []
    for uid, x, target in zip(batch.uids, batch.x, batch.target, strict=True):
        stream = Noise([uid], seed=5, dtype=torch.float64)
        sigma = 0.3 * (x.max() - x.min())
        copies = [x + sigma * stream.normal(*x.shape)[0] for _ in range(6)]
        expected.append(sum(gradient(score_of(net, target), copy) for copy in copies) / 6)
    found = explain(SmoothGrad(samples=6, sigma=0.3, reduce=reduce), net, batch)
    same(found["map"], REDUCE[reduce](torch.stack(expected)))


# ---- methods that change the backward pass ---------------------------------------------------------


@pytest.mark.parametrize("reduce", REDUCE)
@pytest.mark.parametrize(("method", "rule"), [(GuidedBackprop, "guided"), (Deconvolution, "deconvolution")])
def test_rules_for_relus_equal_their_backward_pass_written_by_hand(method, rule, reduce):
    batch, net = pictures(), seeded(Mixed(), 0.25)
    expected = []
    for x, target in zip(batch.x, batch.target, strict=True):
        x = x.clone().requires_grad_()
        by_hand(net, x[None], rule)[0, target].backward()
        expected.append(x.grad)
    expected = torch.stack(expected)
    assert (expected.abs().sum((1, 2, 3)) > 0).all()
    same(explain(method(reduce=reduce), net, batch)["map"], REDUCE[reduce](expected))
    plain = explain(Gradient(reduce=reduce), net, batch)["map"]
    assert (plain - REDUCE[reduce](expected)).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("method", "name"), [(GuidedBackprop(), "guided backpropagation"), (Deconvolution(), "deconvolution")]
)
def test_rules_for_relus_need_relus(method, name):
    with pytest.raises(UserError, match=f"{name} is defined for ReLUs; Sequential has none"):
        explain(method, smooth_net(), pictures())


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = relu_net()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) if x.isfinite().all() else self.net(x) * 2


@pytest.mark.parametrize("method", [GuidedBackprop(), Deconvolution(), DeepLiftShap(samples=1)])
def test_methods_that_replace_activations_need_a_net_that_can_be_traced(method):
    with pytest.raises(UserError, match="cannot export Untraceable"):
        explain(method, Untraceable(), pictures())
    assert explain(Gradient(), Untraceable(), pictures())["map"].isfinite().all()


def multipliers(net: nn.Sequential, x: Tensor, baseline: Tensor, target: int) -> Tensor:
    """DeepLIFT's rescale rule (Shrikumar et al., 2017, section 3.5.2), backwards through ``relu_net``."""
    ins = [(x[None], baseline[None])]
    for module in net:
        ins.append((module(ins[-1][0]), module(ins[-1][1])))
    m = torch.zeros(1, K, dtype=x.dtype)
    m[0, target] = 1
    for module, (a, a0), (b, b0) in reversed(list(zip(net, ins, ins[1:]))):
        if isinstance(module, nn.Linear):
            m = m @ module.weight
        elif isinstance(module, nn.Conv2d):
            left_over = [(n + 2 - 3) % module.stride[0] for n in a.shape[2:]]
            m = F.conv_transpose2d(m, module.weight, stride=module.stride, padding=1, output_padding=left_over)
        elif isinstance(module, nn.ReLU):
            m = m * (b - b0) / (a - a0)
        else:
            m = m.reshape(a.shape)
    return (m * (x - baseline))[0]


@pytest.mark.parametrize("reduce", REDUCE)
def test_deep_lift_equals_its_multipliers(reduce):
    batch, net = pictures(), relu_net()
    expected = []
    for uid, x, target in zip(batch.uids, batch.x, batch.target.tolist(), strict=True):
        stream = Noise([uid], seed=5, dtype=torch.float64)
        baselines = [0.5 * stream.normal(*x.shape)[0] for _ in range(4)]
        expected.append(sum(multipliers(net, x, b, target) for b in baselines) / 4)
    found = explain(DeepLiftShap(samples=4, sigma=0.5, reduce=reduce), net, batch)
    same(found["map"], REDUCE[reduce](torch.stack(expected)))
    assert found["delta"].abs().max() < 1e-10


class FusedGates(nn.Module):
    """Activations other than ReLU, as modules, functions and methods."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.act, self.head = nn.SiLU(inplace=True), nn.Linear(4, K)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.act(self.conv1(x)), approximate="tanh")
        x = F.hardswish(input=self.act(self.conv2(x))).tanh() + F.leaky_relu(x, 0.2)
        return self.head(F.adaptive_avg_pool2d(torch.sigmoid(x) + F.elu(x), 1).flatten(1))


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("build", [Mixed, FusedGates])
def test_deep_lift_is_complete_whatever_the_activations_look_like(build, several):
    batch, net = targets(pictures(), several), seeded(build(), 0.5)
    found = explain(DeepLiftShap(samples=3, sigma=0.7), net, batch)
    assert found["delta"].abs().max() < 1e-9
    change = torch.zeros(3, dtype=torch.float64)
    noise = streams(batch)
    for _ in range(3):
        baseline = 0.7 * noise.normal(3, H, W)
        for i, (x, target) in enumerate(zip(batch.x, batch.target, strict=True)):
            change[i] += (score_of(net, target)(x) - score_of(net, target)(baseline[i])) / 3
    assert change.abs().min() > 1e-3
    same(found["map"].sum((1, 2)), change, 1e-9)


class Pooled(nn.Module):
    """A max-pooling behind a ReLU."""

    def __init__(self, pool: Callable[[Tensor], Tensor], side: tuple[int, int]) -> None:
        super().__init__()
        self.conv, self.pool, self.act = nn.Conv2d(3, 2, 3, padding=1), pool, nn.ReLU()
        self.head = nn.Linear(2 * side[0] * side[1], K)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.act(self.conv(x))).flatten(1))


POOLS = [
    (nn.MaxPool2d(2), (4, 5)),
    (nn.MaxPool2d(3, 2, 1), (4, 5)),
    (nn.MaxPool2d(3, 2, ceil_mode=True), (4, 5)),
    (nn.MaxPool2d((3, 2), (1, 2), (1, 0)), (8, 5)),
    (nn.MaxPool2d(2, 1, dilation=2), (6, 8)),
    (nn.MaxPool2d(2, 2, dilation=2), (3, 4)),
    (nn.MaxPool2d(4, 3, 2, ceil_mode=True), (4, 4)),
    (lambda x: F.max_pool2d(x, 3, stride=2, padding=1), (4, 5)),
]


@pytest.mark.parametrize(("pool", "side"), POOLS)
def test_deep_lift_is_complete_with_any_max_pooling(pool, side):
    """captum's own rule forgets what overlapping windows share."""
    batch, net = pictures(), seeded(Pooled(pool, side))
    found = explain(DeepLiftShap(samples=2, sigma=0.7), net, batch)
    assert found["map"].abs().max() > 0.1
    assert found["delta"].abs().max() < 1e-10


class Gate(nn.Module):
    def __init__(self, act: Callable[[Tensor], Tensor] = lambda x: x * torch.sigmoid(x)) -> None:
        super().__init__()
        self.conv, self.head, self.act = nn.Conv2d(3, 4, 3), nn.Linear(4, K), act

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.conv(x)).mean((2, 3)))


class Two(nn.Module):
    """A function of two convolutions of the image."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.a, self.b, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.Linear(4, K)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.function(self.a(x), self.b(x)).mean((2, 3)))


def _half(a: Tensor) -> Tensor:
    return torch.full((), 0.5, dtype=a.dtype)


def _spectrum(a: Tensor) -> Tensor:
    return torch.fft.fft2(a)


# What is computed, and the same in functions that have had rules before.
SAME = {
    "step": (lambda a, b: torch.heaviside(a, _half(a)), lambda a, b: (a > 0).to(a.dtype)),
    "a step as a gate": (lambda a, b: b * torch.heaviside(a, _half(a)), lambda a, b: b * (a > 0).to(a.dtype)),
    "a ReLU by a step": (lambda a, b: a * torch.heaviside(a, _half(a)), lambda a, b: a.relu()),
    "between two": (lambda a, b: torch.lerp(a, b, 0.3), lambda a, b: a + 0.3 * (b - a)),
    "between three": (
        lambda a, b: torch.lerp(a, 2 * b, b.tanh().roll(1, 1)), lambda a, b: a + b.tanh().roll(1, 1) * (2 * b - a),
    ),
    "magnitudes": (
        lambda a, b: _spectrum(a).abs(), lambda a, b: (_spectrum(a).real ** 2 + _spectrum(a).imag ** 2).sqrt(),
    ),
    "a complex square": (
        lambda a, b: (_spectrum(a) * _spectrum(a)).real,
        lambda a, b: _spectrum(a).real * _spectrum(a).real.clone() - _spectrum(a).imag * _spectrum(a).imag.clone(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SAME)
@pytest.mark.quick("a step as a gate", "between three", "magnitudes")
def test_deep_lift_through_steps_interpolation_and_complex_numbers(name):
    batch = pictures()
    found, expected = (explain(DeepLiftShap(samples=1), seeded(Two(f)), batch)["map"] for f in SAME[name])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (lambda a, b: (0.01 * _spectrum(a)).exp().real, "exp"),
        (lambda a, b: (_spectrum(a) / (_spectrum(b) + 9)).real, "div"),
        (lambda a, b: torch.heaviside(a, b), "heaviside"),
    ],
)
def test_deep_lift_refuses_functions_of_complex_numbers_by_name(function, name):
    with pytest.raises(UserError, match=f"DeepLIFT has no rule for {name} in its forward .Two."):
        explain(DeepLiftShap(samples=1), seeded(Two(function)), pictures())


def test_deep_lift_of_an_activation_written_out_is_that_of_the_activation():
    batch, net = pictures(), seeded(Gate())
    found = explain(DeepLiftShap(samples=3, sigma=0.7), net, batch)
    expected = explain(DeepLiftShap(samples=3, sigma=0.7), seeded(Gate(F.silu)), batch)
    same(found["map"], expected["map"])
    assert found["delta"].max() < 1e-9


def test_one_baseline_without_spread_is_deep_lift_from_the_mean_colour():
    batch, net = pictures(), relu_net()
    found = explain(DeepLiftShap(samples=1, sigma=0.0), net, batch)
    expected = [
        multipliers(net, x, torch.zeros_like(x), t).sum(0) for x, t in zip(batch.x, batch.target.tolist(), strict=True)
    ]
    same(found["map"], torch.stack(expected))


# ---- Grad-CAM --------------------------------------------------------------------------------------


def cam_by_hand(net: nn.Module, layer: str, x: Tensor, target: int, relu: bool) -> Tensor:
    kept: list[Tensor] = []
    handle = net.get_submodule(layer).register_forward_hook(lambda _m, _i, out: kept.append(out) or out.clone())
    logit = net(x[None].clone().requires_grad_())[0, target]
    handle.remove()
    (grad,) = torch.autograd.grad(logit, kept[0])
    total = sum(grad[0, c].mean() * kept[0][0, c] for c in range(grad.shape[1])).detach()
    return total.clamp(min=0) if relu else total


class ReluBehind(nn.Module):
    """As in DenseNet: what follows the layer overwrites its output."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.head = nn.Conv2d(3, 4, 3, 2, 1), nn.Linear(80, K)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.features(x), inplace=True).flatten(1))


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize(
    ("net", "layer"), [(relu_net(), "2"), (relu_net(), "0"), (seeded(ReluBehind(), 0.5), "features")]
)
def test_grad_cam_equals_its_formula(net, layer, relu):
    batch = pictures()
    found = explain(GradCAM(relu=relu), net, batch, {"cam": layer})
    assert found["map"].shape == (3, H, W)
    for i, (x, target) in enumerate(zip(batch.x, batch.target.tolist(), strict=True)):
        expected = cam_by_hand(net, layer, x, target, relu)
        same(found["cam"][i], expected)
        same(found["map"][i], torch.tensor(skimage_resize(expected.numpy(), (H, W), order=1)))


def test_grad_cam_needs_places():
    with pytest.raises(UserError, match=r"a layer with places; 5 gives \(B, 12\)"):
        explain(GradCAM(), relu_net(), pictures(), {"cam": "5"})


# ---- occlusion and noise ---------------------------------------------------------------------------


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize(
    ("window", "stride", "baseline"), [(4, 2, 0.0), (3, 3, 0.5), (5, 2, -1.0), (1, 1, 0.0), (8, 8, 0.0), (3, 2, "mean")]
)
def test_occlusion_is_the_mean_fall_over_squares(window, stride, baseline, several):
    batch, net = targets(pictures(), several), relu_net()

    def squares(score, x):
        total, count = torch.zeros(H, W, dtype=x.dtype), torch.zeros(H, W, dtype=x.dtype)
        whole, starts = score(x), [[0], [0]]
        for axis, size in enumerate((H, W)):  # until a square reaches the edge; the last may stick out
            while starts[axis][-1] + window < size:
                starts[axis].append(starts[axis][-1] + stride)
        for top in starts[0]:
            for left in starts[1]:
                covered = x.clone()
                square = (slice(None), slice(top, top + window), slice(left, left + window))
                covered[square] = at_baseline(x, baseline)[square]
                total[top : top + window, left : left + window] += whole - score(covered)
                count[top : top + window, left : left + window] += 1
        return total / count

    expected = each(batch, net, squares)
    for rows in (1, 7, 500):
        found = explain(Occlusion(window, stride, baseline), net, batch, rows=rows)
        same(found["map"].double(), expected, 1e-6)  # captum divides in float32


def test_random_is_uniform_and_each_samples_own():
    batch = pictures()
    found = explain(Random(), relu_net(), batch)["map"]
    assert 0 <= found.min() < 0.05
    assert 0.95 < found.max() < 1
    for i, uid in enumerate(batch.uids):
        assert torch.equal(found[i], Noise([uid], seed=5, dtype=torch.float64).uniform(H, W)[0])


# ---- oracle ----------------------------------------------------------------------------------------

IMPORTANT = torch.zeros(H, W, dtype=torch.bool)
IMPORTANT[2, 3] = IMPORTANT[2, 4] = IMPORTANT[7, 0] = IMPORTANT[0, 9] = True


class Linear(nn.Module):
    """Every logit is a weighted sum of a few pixels; the ReLU is always open. The cam is as fine as the image."""

    def __init__(self) -> None:
        super().__init__()
        self.shift, self.act, self.head = nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Linear(3 * H * W, K, bias=False)
        with torch.no_grad():
            self.shift.weight.copy_(torch.eye(3)[:, :, None, None])
            self.shift.bias.fill_(100.0)
            self.head.weight.copy_(torch.arange(1.0, K + 1)[:, None] * IMPORTANT.repeat(3, 1, 1).flatten())

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.shift(x)).flatten(1))


@pytest.mark.parametrize(
    "method",
    [
        Gradient(reduce="abs_max"),
        InputXGradient(reduce="abs_sum"),
        IntegratedGradients(steps=3, reduce="abs_sum"),
        SmoothGrad(samples=2),
        GuidedBackprop(),
        Deconvolution(),
        DeepLiftShap(samples=2, reduce="abs_sum"),
        Occlusion(window=1, stride=1, baseline=9.0),
    ],
    ids=lambda m: type(m).__name__,
)
def test_the_pixels_that_count_come_first(method):
    found = explain(method, Linear(), pictures())["map"].abs()
    for one in found:
        assert one[IMPORTANT].min() > 0
        assert one[~IMPORTANT].max() < 1e-9 * one[IMPORTANT].min()


# ---- edges -----------------------------------------------------------------------------------------


def test_fields_that_make_no_sense_are_errors():
    for method in (
        Gradient,
        InputXGradient,
        IntegratedGradients,
        SmoothGrad,
        GuidedBackprop,
        Deconvolution,
        DeepLiftShap,
    ):
        with pytest.raises(
            UserError, match=rf"{method.__name__}.reduce is 'abs', must be one of sum, abs_sum, abs_max"
        ):
            method(reduce="abs")
    for method, field in ((IntegratedGradients, "steps"), (SmoothGrad, "samples"), (DeepLiftShap, "samples")):
        with pytest.raises(UserError, match=f"{field} is 0, must be at least 1"):
            method(**{field: 0})
    for fields, message in (({"stride": 0}, "stride is 0"), ({"window": 4, "stride": 5}, "larger than window, 4")):
        with pytest.raises(UserError, match=message):
            Occlusion(**fields)
    with pytest.raises(UserError, match=r"larger than the input, \(8, 10\)"):
        explain(Occlusion(window=9, stride=2), relu_net(), pictures())


class Watch(nn.Module):
    """Notes how many rows come in at a time (on the class: a Classifier copies its module)."""

    seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Tensor) and type(x) is Tensor:
            self.seen.append(len(x))
        return x


@pytest.mark.parametrize("rows", [1, 4, 10])
@pytest.mark.parametrize(
    "method",
    [Gradient(), InputXGradient(), IntegratedGradients(steps=6), SmoothGrad(samples=2), Occlusion(2, 2), GradCAM()],
    ids=lambda m: type(m).__name__,
)
def test_never_more_rows_than_the_limit_and_all_are_counted(method, rows):
    batch = pictures()
    model = Classifier(nn.Sequential(Watch(), *relu_net()), {"cam": "3"}, rows=rows, dtype=torch.float64)
    model.examine(batch.x)
    Watch.seen.clear()
    method.attribute(model, batch, {}, streams(batch))
    assert max(Watch.seen) <= rows
    assert rows == 1 or max(Watch.seen) > 1
    if not method.roles:
        assert model.passed == sum(Watch.seen)
        return
    # How the net is cut at a layer, and read, is found out once, and is no cost of the samples. Then the front of the
    # net, which watches here only as itself, and the rear run once each.
    assert model.passed == 2 * len(batch)


class Overwrites(nn.Module):
    """Normalises the image where it lies."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.mul_(0.5).add_(0.1))


class Normalises(Overwrites):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x * 0.5 + 0.1)


@pytest.mark.parametrize(
    "method",
    [
        Gradient(), InputXGradient(), IntegratedGradients(steps=4), SmoothGrad(samples=2), Occlusion(4, 3),
        GuidedBackprop(), Deconvolution(), GradCAM(layer="conv"),
    ],
    ids=lambda method: type(method).__name__,
)  # fmt: skip
def test_a_net_may_write_into_its_input(method):
    batch, layers = pictures(), {"conv": "net.0"}
    before = batch.x.clone()
    found, expected = (explain(method, net(relu_net()), batch, layers)["map"] for net in (Overwrites, Normalises))
    same(found, expected)
    assert torch.equal(batch.x, before)


def test_a_sum_that_cancels_everywhere_is_refused():
    class Normed(nn.Module):
        """Behind a LayerNorm over channels, the gradients of a place add up to zero."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.fc = nn.Linear(3 * 8 * 10, K)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(nn.functional.layer_norm(x.movedim(1, -1), (3,)).flatten(1))

    with pytest.raises(UserError, match=r"reduce=sum leaves nothing: .*method.reduce=abs_sum"):
        explain(Gradient(), Normed(), pictures())
    assert (explain(Gradient(reduce="abs_sum"), Normed(), pictures())["map"] > 0).all()
    assert explain(InputXGradient(), Normed(), pictures())["map"].any()


class Stops(nn.Module):
    """A net that stops the gradient of a part of what it computes."""

    def __init__(self, function) -> None:
        super().__init__()
        self.net, self.function = relu_net(), function

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.function(x))


class _TwiceBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * torch.tensor([1.0, 2.0, 3.0], dtype=grad.dtype).view(1, 3, 1, 1)


def without_gradient(x: Tensor) -> Tensor:
    with torch.no_grad():
        mean = x.mean(1, keepdim=True)
    return x - mean


@pytest.mark.parametrize("function", [lambda x: x + x.mul(2).detach(), without_gradient, _TwiceBack.apply])
@pytest.mark.parametrize("method", [GuidedBackprop(), Deconvolution()])
def test_nets_that_stop_gradients_are_refused_where_rules_replace_them(method, function):
    with pytest.raises(UserError, match="Stops stops gradients"):
        explain(method, Stops(function), pictures())
