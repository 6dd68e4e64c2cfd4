"""Every rule of contextual decomposition against its formula, element by element in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from contracts import seeded
from torch import Tensor, nn

from attrib.decomposition import Decomposer
from attrib.types import UserError

F64 = torch.float64
Parts = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # what becomes of (relevant, irrelevant)


class Op(nn.Module):
    """One operation as a net; modules that it needs are registered."""

    def __init__(self, run: Callable[..., Tensor], *modules: nn.Module) -> None:
        super().__init__()
        self.parts, self.run = nn.ModuleList(modules), run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x, *self.parts)


def net(op: nn.Module | Callable[..., Tensor]) -> nn.Module:
    module = op if isinstance(op, nn.Module) else Op(op)
    return seeded(nn.Sequential(nn.Identity(), module).to(F64), 0.7).eval()


def pair(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two samples and three splits of each: inputs (2, *shape), factors (6, *shape), not in [0, 1] to be general."""
    r = np.random.RandomState(seed)
    x, factors = r.randn(2, *shape), 1.3 * r.randn(6, *shape)
    factors[0, ..., :2], factors[1, ..., -1:] = 0, 1
    return torch.tensor(x), torch.tensor(factors)


OF = torch.tensor([0, 0, 0, 1, 1, 1])


def rule(op: nn.Module | Callable[..., Tensor], x: Tensor, factors: Tensor, both: bool) -> tuple[Tensor, Tensor]:
    """What the engine makes of it: relevant and irrelevant."""
    relevant, whole = Decomposer(op if isinstance(op, nn.Module) else net(op)).rows(x, factors, OF, both)
    return relevant, whole - relevant


def check(
    op: nn.Module, x: Tensor, factors: Tensor, expected: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
) -> None:
    """In both forms of the engine: each row against ``expected(relevant, irrelevant)`` of one row (1, *shape)."""
    for both in (False, True):
        relevant, irrelevant = rule(op, x, factors, both)
        with torch.no_grad():
            assert torch.allclose(relevant + irrelevant, op(x)[OF], rtol=1e-12, atol=1e-12)
            for i, s in enumerate(OF):
                r, q = expected((x[s] * factors[i])[None], (x[s] * (1 - factors[i]))[None])
                torch.testing.assert_close(relevant[i : i + 1], r, rtol=1e-10, atol=1e-10)
                torch.testing.assert_close(irrelevant[i : i + 1], q, rtol=1e-10, atol=1e-10)


def share(a: Tensor, b: Tensor, bias: Tensor, tie: float) -> tuple[Tensor, Tensor]:
    one, other = a.clone(), b.clone()
    for k, (p, q) in enumerate(zip(a.flatten().tolist(), b.flatten().tolist(), strict=True)):
        part = tie if p == q == 0 else abs(p) / (abs(p) + abs(q))
        one.view(-1)[k] += part * bias.flatten()[k]
        other.view(-1)[k] += (1 - part) * bias.flatten()[k]
    return one, other


def affine(op: nn.Module, tie: float = 0.5) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The matrix of the operation from its values at unit vectors, and the bias in proportion."""

    def expected(r: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        bias = op(torch.zeros_like(r))
        units = torch.eye(r.numel(), dtype=F64).reshape(-1, *r.shape[1:])
        matrix = (torch.cat([op(u[None]) for u in units]) - bias).flatten(1)
        a, b = ((part.flatten() @ matrix).reshape(bias.shape) for part in (r, q))
        # Where no input is read, nothing but rounding is left.
        a, b = (torch.where(part.abs() < 1e-13, 0.0, part) for part in (a, b))
        return share(a, b, bias, tie)

    return expected


WEIGHT = torch.ones(2, 3, 2, 2, dtype=F64)
AFFINE = {
    "conv1d dilated": (nn.Conv1d(4, 6, 3, dilation=2, groups=2), (4, 9)),
    "conv1d circular": (nn.Conv1d(2, 3, 3, padding=2, padding_mode="circular"), (2, 7)),
    "conv2d": (nn.Conv2d(3, 4, 3, padding=1), (3, 5, 4)),
    "conv2d grouped, strided": (nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=4), (4, 5, 5)),
    "conv2d without bias": (nn.Conv2d(3, 2, (2, 3), bias=False), (3, 4, 4)),
    "conv2d reflect": (nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (2, 4, 4)),
    "conv2d same": (nn.Conv2d(2, 3, 3, dilation=2, padding="same"), (2, 5, 4)),
    "conv3d": (nn.Conv3d(2, 3, 2, stride=(1, 2, 1)), (2, 3, 4, 3)),
    "transposed 1d": (nn.ConvTranspose1d(3, 2, 3, stride=2), (3, 4)),
    "transposed 2d": (nn.ConvTranspose2d(4, 4, 3, stride=2, padding=1, output_padding=1, groups=2), (4, 3, 3)),
    "transposed 3d": (nn.ConvTranspose3d(2, 2, 2, bias=False), (2, 2, 2, 3)),
    "linear": (nn.Linear(5, 3), (5,)),
    "linear on a sequence": (nn.Linear(5, 3, bias=False), (4, 5)),
    "average pooling": (nn.AvgPool2d(3, 2, padding=1, count_include_pad=False), (2, 5, 5)),
    "adaptive average": (nn.AdaptiveAvgPool2d((2, 3)), (2, 5, 4)),
    "upsampling": (nn.Upsample(scale_factor=2, mode="bilinear"), (2, 3, 2)),
    "bicubic upsampling": (nn.Upsample(scale_factor=1.5, mode="bicubic"), (2, 4, 4)),
    "dropout in eval": (nn.Dropout(0.5), (7,)),
    "functional conv": (lambda x: F.conv2d(x, WEIGHT, torch.tensor([0.3, -2.0]).double()), (3, 3, 3)),
    "functional linear, by name": (lambda x: F.linear(x, torch.ones(2, 5).double(), bias=torch.ones(2).double()), (5,)),
    "adding a constant": (lambda x: 0.7 - 2 * x + torch.arange(3.0, dtype=F64), (2, 3)),
}  # fmt: skip


@pytest.mark.parametrize("name", AFFINE)
@pytest.mark.quick(every=3)
def test_linear_operations(name: str) -> None:
    op, shape = AFFINE[name]
    module = net(op)
    if name == "adding a constant":  # two biases, one after the other
        ramp = torch.arange(3.0, dtype=F64).expand(1, *shape)

        def expected(r: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
            return share(*share(-2 * r, -2 * q, torch.full_like(r, 0.7), 0.5), ramp, 0.5)

        check(module, *pair(*shape), expected)
        return
    check(module, *pair(*shape), affine(module))


NORMS = [
    (nn.BatchNorm1d(4), (4,)),
    (nn.BatchNorm2d(3), (3, 2, 3)),
    (nn.BatchNorm3d(2), (2, 2, 2, 2)),
    (nn.BatchNorm2d(3, affine=False), (3, 2, 2)),
]


@pytest.mark.parametrize(("norm", "shape"), NORMS)
def test_batch_norm(norm: nn.Module, shape: tuple[int, ...]) -> None:
    """A tie gives all of the bias to the irrelevant part, other than for convolutions."""
    norm.running_mean = torch.randn(shape[0], generator=torch.Generator().manual_seed(1))
    norm.running_var = 1 + torch.rand(shape[0], generator=torch.Generator().manual_seed(2))
    module = nn.Sequential(nn.Identity(), norm).to(F64).eval()
    x, factors = pair(*shape)
    x[..., -1:] = 0
    check(module, x, factors, affine(module, tie=0.0))


def erf(v: float) -> float:
    return math.erf(v)


RELU_LIKE: dict[str, tuple[Callable, Callable[[float], float]]] = {
    "relu": (nn.ReLU(), lambda v: max(v, 0.0)),
    "relu6": (nn.ReLU6(), lambda v: min(max(v, 0.0), 6.0)),
    "leaky": (nn.LeakyReLU(0.1), lambda v: v if v > 0 else 0.1 * v),
    "elu": (nn.ELU(0.8), lambda v: v if v > 0 else 0.8 * math.expm1(v)),
    "gelu": (nn.GELU(), lambda v: v * (1 + erf(v / math.sqrt(2))) / 2),
    "silu": (nn.SiLU(), lambda v: v / (1 + math.exp(-v))),
    "hardswish": (nn.Hardswish(), lambda v: v * min(max(v + 3, 0.0), 6.0) / 6),
    "mish": (nn.Mish(), lambda v: v * math.tanh(math.log1p(math.exp(v)))),
    "torch.relu": (torch.relu, lambda v: max(v, 0.0)),
    "x.relu_()": (lambda x: (x + 0).relu_(), lambda v: max(v, 0.0)),
    "F.relu in place": (lambda x: F.relu(x + 0, True), lambda v: max(v, 0.0)),
    "F.gelu": (F.gelu, lambda v: v * (1 + erf(v / math.sqrt(2))) / 2),
}
SQUASHING: dict[str, tuple[Callable, Callable[[float], float]]] = {
    "tanh": (nn.Tanh(), math.tanh),
    "sigmoid": (nn.Sigmoid(), lambda v: 1 / (1 + math.exp(-v))),
    "hardsigmoid": (nn.Hardsigmoid(), lambda v: min(max(v / 6 + 0.5, 0.0), 1.0)),
    "softplus": (nn.Softplus(), lambda v: math.log1p(math.exp(v))),
    "clamp": (lambda x: x.clamp(0.2, 1.0), lambda v: min(max(v, 0.2), 1.0)),
    "torch.sigmoid": (torch.sigmoid, lambda v: 1 / (1 + math.exp(-v))),
}


def each(f: Callable[[float], float], values: Tensor) -> Tensor:
    return torch.tensor([f(v) for v in values.flatten().tolist()], dtype=F64).reshape(values.shape)


@pytest.mark.parametrize("name", RELU_LIKE)
@pytest.mark.quick(every=3)
def test_activations_that_are_zero_at_zero(name: str) -> None:
    op, f = RELU_LIKE[name]
    check(net(op), *pair(3, 4), lambda r, q: (each(f, r), each(f, r + q) - each(f, r)))


@pytest.mark.parametrize("name", SQUASHING)
def test_squashing_functions_take_the_mean_of_both_orders(name: str) -> None:
    op, f = SQUASHING[name]

    def expected(r: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        at, zero = (lambda v: each(f, v)), f(0.0)
        a = (at(r) - zero + at(r + q) - at(q)) / 2
        b = (at(q) - zero + at(r + q) - at(r)) / 2
        # A factor of zero leaves exactly zero of one part; the other order's difference is only rounding.
        return share(torch.where(r == 0, 0.0, a), torch.where(q == 0, 0.0, b), torch.full_like(r, zero), 0.5)

    x, factors = pair(3, 4)
    check(net(op), x, torch.where(factors == 0, 0.3, factors), expected)


def windows(x: Tensor, kernel: int, stride: int, padding: int) -> list[list[tuple[int, int]]]:
    height, width = x.shape[-2:]
    found = []
    for top in range(-padding, height + padding - kernel + 1, stride):
        for left in range(-padding, width + padding - kernel + 1, stride):
            places = [(top + i, left + j) for i in range(kernel) for j in range(kernel)]
            found.append([(i, j) for i, j in places if 0 <= i < height and 0 <= j < width])
    return found


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(2, 2, 0), (3, 2, 1), (3, 1, 1)])
def test_max_pooling_takes_both_parts_where_their_sum_is_largest(kernel: int, stride: int, padding: int) -> None:
    module = net(nn.MaxPool2d(kernel, stride, padding))
    x, factors = pair(2, 6, 5)

    def expected(r: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        out = module(r + q)
        parts = torch.empty(2, *out.shape, dtype=F64)
        for c in range(2):
            whole = (r + q)[0, c]
            best = [max(w, key=lambda p: whole[p]) for w in windows(x, kernel, stride, padding)]
            for part, values in zip(parts, (r, q), strict=True):
                part[0, c] = torch.stack([values[0, c][p] for p in best]).reshape(out.shape[2:])
        return parts[0], parts[1]

    check(module, x, factors, expected)


def test_of_equal_maxima_the_first_counts() -> None:
    x, masks = torch.ones(1, 1, 2, 2, dtype=F64), torch.tensor([[[[1.0, 0], [0, 0]], [[0, 1.0], [1, 1]]]])
    parts = Decomposer(net(nn.MaxPool2d(2))).decompose(x, masks)
    assert parts.relevant.flatten().tolist() == [1, 0]


GLOBAL = [
    lambda x: x.amax((2, 3)),
    lambda x: F.adaptive_max_pool2d(x, 1).flatten(1),
    lambda x: torch.max(x.flatten(2), 2)[0],
    lambda x: F.max_pool1d(x.flatten(2), 12).flatten(1),
]


@pytest.mark.parametrize("op", GLOBAL)
def test_global_maxima(op: Callable[[Tensor], Tensor]) -> None:
    def expected(r: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        best = [(r + q)[0, c].flatten().argmax() for c in range(2)]
        return tuple(torch.stack([v[0, c].flatten()[b] for c, b in enumerate(best)])[None] for v in (r, q))

    check(net(op), *pair(2, 3, 4), expected)


def normed(
    groups: list[list[int]], shape: tuple[int, ...], gain: Tensor, bias: Tensor, eps: float, centred: bool = True
):
    """Groups of flat positions, each less its own mean, over the deviation of the whole."""

    def expected(r: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        parts = [torch.empty(r.numel(), dtype=F64) for _ in range(2)]
        whole = (r + q).flatten()
        for group in groups:
            mean = whole[group].mean() if centred else 0.0
            scale = 1 / math.sqrt(((whole[group] - mean) ** 2).mean() + eps)
            for out, values in zip(parts, (r, q), strict=True):
                v = values.flatten()[group]
                out[group] = (v - (v.mean() if centred else 0.0)) * scale
        a, b = (p.reshape(1, *shape) * gain for p in parts)
        return share(a, b, bias.expand(1, *shape).contiguous(), 0.5)

    return expected


def test_norms_over_the_sample() -> None:
    index = np.arange(24).reshape(4, 6)
    layer = net(nn.LayerNorm(6))
    gain, bias = layer[1].weight.detach(), layer[1].bias.detach()
    check(layer, *pair(4, 6), normed([row.tolist() for row in index], (4, 6), gain, bias, 1e-5))
    root = net(nn.RMSNorm(6, eps=1e-3))
    groups = [row.tolist() for row in index]
    check(root, *pair(4, 6), normed(groups, (4, 6), root[1].weight.detach(), torch.zeros(6, dtype=F64), 1e-3, False))
    group = net(nn.GroupNorm(2, 4))
    gain, bias = (v.detach()[:, None] for v in (group[1].weight, group[1].bias))
    check(
        group,
        *pair(4, 6),
        normed([index[:2].flatten().tolist(), index[2:].flatten().tolist()], (4, 6), gain, bias, 1e-5),
    )
    instance = net(nn.InstanceNorm1d(4, affine=True))
    gain, bias = (v.detach()[:, None] for v in (instance[1].weight, instance[1].bias))
    check(instance, *pair(4, 6), normed(groups, (4, 6), gain, bias, 1e-5))
    functional = net(lambda x: F.group_norm(F.layer_norm(x, (6,)), 4))
    relevant, irrelevant = rule(functional, *pair(4, 6), True)
    torch.testing.assert_close(relevant + irrelevant, functional(pair(4, 6)[0])[OF])


def test_products() -> None:
    """Relevant times relevant; everything else is irrelevant. With a constant, each part."""
    check(net(lambda x: x[:, :2] * x[:, 2:]), *pair(4, 3), lambda r, q: (
        r[:, :2] * r[:, 2:], (r + q)[:, :2] * (r + q)[:, 2:] - r[:, :2] * r[:, 2:]))  # fmt: skip
    check(net(lambda x: x.transpose(1, 2) @ x), *pair(4, 3), lambda r, q: (
        r.transpose(1, 2) @ r, (r + q).transpose(1, 2) @ (r + q) - r.transpose(1, 2) @ r))  # fmt: skip
    check(net(lambda x: 3 * x / 2 * torch.arange(4.0).double()[:, None]), *pair(4, 3), lambda r, q: tuple(
        v * 1.5 * torch.arange(4.0).double()[:, None] for v in (r, q)))  # fmt: skip


def shapes(x: Tensor) -> Tensor:
    n = x.shape[0]
    a, b = x.flatten(2).permute(0, 2, 1).contiguous().view(n, -1, x.size(1)).chunk(2, dim=1)
    y = torch.stack((a, b), 1).unsqueeze(1).squeeze(1).reshape(n, 2, 3, 2).transpose(1, 3)
    y = torch.cat((y, y[:, :1].expand(-1, 2, -1, -1)), dim=1)[..., 1:].mean(-1)
    first = y.split((2, 2), 1)[0]
    return first.sum((1, 2), keepdim=True).squeeze(-1) - y.mean(2)


def test_shapes_sums_and_parts_of_tensors() -> None:
    module = net(shapes)
    check(module, *pair(2, 3, 2), affine(module))


def test_constants_beside_parts_are_irrelevant() -> None:
    """Class tokens, borders that are not zero, values that are filled in."""

    def op(x: Tensor) -> Tensor:
        x = torch.cat((x.new_ones(x.shape[0], 1, 3), x), 1)
        x = F.pad(x, (1, 0), value=2.0)
        return x.masked_fill(torch.arange(4) == 3, 5.0)

    def expected(r: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        a, b = torch.zeros(1, 3, 4, dtype=F64), torch.zeros(1, 3, 4, dtype=F64)
        b[:, 0], b[:, :, 0] = 1, 2
        a[:, 1:, 1:], b[:, 1:, 1:] = r, q
        a[..., 3], b[..., 3] = 0, 5
        return a, b

    check(net(op), *pair(2, 3), expected)


def test_softmax_as_output_and_as_attention() -> None:
    def soft(v: Tensor) -> Tensor:
        return torch.stack([v[0].exp() / v[0].exp().sum()])

    def expected(r: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        zero = soft(torch.zeros_like(r))
        a, b = (soft(r) - zero + soft(r + q) - soft(q)) / 2, (soft(q) - zero + soft(r + q) - soft(r)) / 2
        return share(a, b, zero, 0.5)

    check(net(nn.Softmax(-1)), *pair(4), expected)

    def attention(r: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        x = (r + q)[0]
        weights = torch.stack([(x[i] @ x.T / 2).exp() / (x[i] @ x.T / 2).exp().sum() for i in range(len(x))])
        return (weights @ r[0])[None], (weights @ q[0])[None]

    written_out = net(lambda x: torch.softmax(x @ x.transpose(1, 2) / 2, -1) @ x)
    check(written_out, *pair(3, 4), attention)
    check(net(lambda x: F.scaled_dot_product_attention(x, x, x)), *pair(3, 4), attention)


@pytest.mark.parametrize("first", [True, False])
def test_multihead_attention(first: bool) -> None:
    """Attention weights of the whole, value and output projection as linear layers; by loops over heads."""
    layer = nn.MultiheadAttention(6, 2, batch_first=first)

    def run(x: Tensor, attention: nn.Module) -> Tensor:
        x = x if first else x.transpose(0, 1)
        y = attention(x, x, x, need_weights=False)[0]
        return y if first else y.transpose(0, 1)

    module = seeded(Op(run, layer).to(F64), 0.7).eval()
    weight, bias = layer.in_proj_weight.detach(), layer.in_proj_bias.detach()

    def expected(r: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        x = (r + q)[0]
        query, key = ((x @ weight[i * 6 : i * 6 + 6].T + bias[i * 6 : i * 6 + 6]) for i in range(2))
        values = share(r[0] @ weight[12:].T, q[0] @ weight[12:].T, bias[12:].expand(4, 6).contiguous(), 0.5)
        parts = []
        for value in values:
            heads = []
            for h in (slice(0, 3), slice(3, 6)):
                heads.append(torch.softmax(query[:, h] @ key[:, h].T / math.sqrt(3), -1) @ value[:, h])
            parts.append(torch.cat(heads, 1) @ layer.out_proj.weight.detach().T)
        a, b = share(*parts, layer.out_proj.bias.detach().expand(4, 6).contiguous(), 0.5)
        return a[None], b[None]

    check(module, *pair(4, 6), expected)


ELEMENTWISE = {
    "threshold": lambda x: F.threshold(x, 0.1, -0.2), "rrelu": F.rrelu, "tanhshrink": F.tanhshrink,
    "clamp_min": lambda x: x.clamp_min(0.1), "softshrink": lambda x: F.softshrink(x, 0.2),
    "hardshrink": lambda x: F.hardshrink(x, 0.2), "softsign": F.softsign,
    "abs": torch.abs, "square": torch.square, "pow": lambda x: x**3, "exp": torch.exp, "expm1": torch.expm1,
    "sin": torch.sin, "cos": torch.cos, "atan": torch.atan, "erf": torch.erf,
}  # fmt: skip


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("name", ELEMENTWISE)
@pytest.mark.quick(every=3)
def test_elementwise_functions_by_the_values_of_shapley(name: str, both: bool) -> None:
    """A player's value is the mean of what it adds when it comes first and last; f(0) is shared by magnitude."""
    f, (x, factors) = ELEMENTWISE[name], pair(4)
    relevant = x[OF] * factors
    irrelevant, whole, zero = x[OF] - relevant, x[OF], f(torch.zeros(4, dtype=F64))
    ours = ((f(relevant) - zero) + (f(whole) - f(irrelevant))) / 2
    theirs = f(whole) - zero - ours
    share = torch.where(ours.abs() + theirs.abs() == 0, 0.5, ours.abs() / (ours.abs() + theirs.abs()))
    got = rule(f, x, factors, both)
    torch.testing.assert_close(got[0], ours + share * zero, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(got[0] + got[1], f(whole), rtol=1e-10, atol=1e-12)


def test_an_exponent_that_depends_on_the_input() -> None:
    """Two to the power of both parts, by the values of Shapley; of a base that is no positive number, none."""
    x, factors = pair(4)
    relevant, irrelevant = x[OF] * factors, x[OF] * (1 - factors)
    ours = (2**relevant - 1 + 2 ** x[OF] - 2**irrelevant) / 2
    theirs = 2 ** x[OF] - 1 - ours
    share = torch.where(ours.abs() + theirs.abs() == 0, 0.5, ours.abs() / (ours.abs() + theirs.abs()))
    got = rule(lambda x: 2**x, x, factors, False)
    torch.testing.assert_close(got[0], ours + share, rtol=1e-10, atol=1e-12)
    with pytest.raises(UserError, match="not a positive number"):
        rule(lambda x: x.abs() ** x.flip(1), x, factors, False)
