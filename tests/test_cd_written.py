"""Contextual decomposition of functions and of attention does not depend on how a net writes them."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from contracts import seeded
from torch import Tensor, nn

from attrib.decomposition import Decomposer
from attrib.decomposition.plan import Plan
from attrib.decomposition.table import TRANSFORMER_RULES
from attrib.models.functions import Function, functions
from attrib.models.graph import Graph

F64 = torch.float64
T, D, HEADS = 5, 8, 2
OF = torch.tensor([0, 0, 1, 1])


def parts(net: nn.Module, x: Tensor, tolerance: float = 1e-9, **options) -> Tensor:
    """The relevant parts of two samples under two masks each; their sums with the rest are the net's logits."""
    masks = torch.rand(4, *x.shape[1:], generator=torch.Generator().manual_seed(3)).round().to(F64)
    relevant, whole = Decomposer(net, **options).rows(x, masks, OF)
    with torch.no_grad():
        torch.testing.assert_close(whole, net(x)[OF], rtol=1e-10, atol=1e-10)
        both = Decomposer(net, **options).rows(x, masks, OF, True)
    torch.testing.assert_close(both[1], whole, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(both[0], relevant, rtol=tolerance, atol=tolerance)
    return relevant


# ---- functions of one value -------------------------------------------------------------------------


class Pointwise(nn.Module):
    """A function between two layers."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.function = nn.Linear(6, 8), nn.Linear(8, 3), function

    def forward(self, x: Tensor) -> Tensor:
        value = self.function(self.first(x))
        return self.second(F.pad(value, (0, 8 - value.shape[-1])))


SLOPES = torch.linspace(-0.3, 0.4, 8, dtype=F64)


def new_gelu(x: Tensor) -> Tensor:  # GPT-2's
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def _silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def _of_chunks(a: Tensor, b: Tensor) -> Tensor:
    return _silu(a) * b


FUNCTIONS = {
    "gelu": (F.gelu, [lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))), lambda x: x * torch.special.ndtr(x)]),
    "gelu by tanh": (lambda x: F.gelu(x, approximate="tanh"), [new_gelu]),
    "quick gelu": (lambda x: F.silu(1.702 * x) / 1.702, [lambda x: x * torch.sigmoid(1.702 * x)]),
    "silu": (F.silu, [lambda x: x * torch.sigmoid(x), lambda x: x / (1 + torch.exp(-x))]),
    "mish": (F.mish, [lambda x: x * torch.tanh(F.softplus(x))]),
    "hardswish": (F.hardswish, [lambda x: x * F.relu6(x + 3) / 6, lambda x: x * F.hardsigmoid(x)]),
    "relu": (
        F.relu,
        [
            lambda x: x.clamp(min=0),
            lambda x: torch.maximum(x, torch.zeros(())),
            lambda x: torch.where(x > 0, x, 0.0),
            lambda x: x * (x > 0),
            lambda x: (x + x.abs()) / 2,
            lambda x: F.threshold(x, 0.0, 0.0),
            lambda x: x.masked_fill(x < 0, 0.0),
            lambda x: (x + torch.sqrt(x * x)) / 2,
        ],
    ),
    "relu6": (F.relu6, [lambda x: x.clamp(0, 6), lambda x: F.relu(x).clamp(max=6)]),
    "leaky relu": (
        lambda x: F.leaky_relu(x, 0.2),
        [
            lambda x: torch.maximum(x, 0.2 * x),
            lambda x: torch.where(x > 0, x, 0.2 * x),
        ],
    ),
    "prelu": (
        lambda x: F.prelu(x, SLOPES),
        [
            lambda x: torch.maximum(x, SLOPES * x),
            lambda x: torch.where(x > 0, x, SLOPES * x),
            lambda x: F.relu(x) - SLOPES * F.relu(-x),
        ],
    ),
    "elu": (F.elu, [lambda x: torch.where(x > 0, x, torch.expm1(x)), lambda x: F.relu(x) + torch.expm1(-F.relu(-x))]),
    "softplus": (F.softplus, [lambda x: torch.log1p(torch.exp(x)), lambda x: torch.log(1 + torch.exp(x))]),
    "sigmoid": (torch.sigmoid, [lambda x: 1 / (1 + torch.exp(-x)), lambda x: (1 + torch.exp(-x)).reciprocal()]),
    "tanh": (torch.tanh, [lambda x: (torch.exp(x) - torch.exp(-x)) / (torch.exp(x) + torch.exp(-x))]),
    "square": (torch.square, [lambda x: x**2, lambda x: x * x]),
    "cube": (lambda x: x**3, [lambda x: x * x * x, lambda x: x**2 * x]),
    "swiglu": (
        lambda x: F.silu(x[:, :4]) * x[:, 4:],
        [
            lambda x: x[:, :4] * torch.sigmoid(x[:, :4]) * x[:, 4:],
            lambda x: torch.chunk(x, 2, 1)[0] * torch.sigmoid(torch.chunk(x, 2, 1)[0]) * torch.chunk(x, 2, 1)[1],
            lambda x: _of_chunks(*x.chunk(2, 1)),
        ],
    ),
    "silu twice": (lambda x: F.silu(x) * 2, [lambda x: x * torch.sigmoid(x) + x * torch.sigmoid(x)]),
    "silu of items": (
        lambda x: torch.cat((x[:, :4], F.silu(x[:, 4:])), 1),
        [lambda x: torch.cat((x.chunk(2, 1)[0], _silu(x.chunk(2, 1)[1])), 1)],
    ),
}


@pytest.mark.parametrize("rules", ["singh", "cd_t"])
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.quick(every=3)
def test_a_function_is_the_same_in_several_calls(name: str, rules: str) -> None:
    options = {"rules": TRANSFORMER_RULES} if rules == "cd_t" else {}
    function, others = FUNCTIONS[name]
    x = torch.randn(2, 6, generator=torch.Generator().manual_seed(1)).to(F64)
    expected = parts(seeded(Pointwise(function).to(F64), 0.7).eval(), x, **options)
    assert expected.abs().max() > 0.01
    for at, other in enumerate(others):
        found = parts(seeded(Pointwise(other).to(F64), 0.7).eval(), x, **options)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6, msg=lambda m, at=at: f"form {at}: {m}")


RECTIFY = [F.relu, F.gelu, F.elu, F.selu, F.silu, F.mish, F.hardswish, F.relu6, lambda x: F.leaky_relu(x, 0.9),
           lambda x: -F.relu(-x), lambda x: 3 * x.clamp(min=0)]  # fmt: skip
OTHERS = [torch.tanh, torch.sigmoid, torch.abs, torch.square, torch.exp, torch.expm1, F.softplus, F.softsign, torch.sin,
          lambda x: x.clamp(-1, 1), lambda x: x.clamp(min=0.1)]  # fmt: skip


@pytest.mark.parametrize("function", [*RECTIFY, *OTHERS])
def test_which_functions_are_like_relu(function: Callable[[Tensor], Tensor]) -> None:
    graph = Graph.of(Pointwise(function).to(F64).eval(), torch.randn(2, 6, dtype=F64))
    of = next(node for node in graph.nodes if node.name == "linear")
    end = next(node for node in graph.nodes if node.name.startswith("linear_1"))
    node = end.args[0]
    while "pad" in node.name:
        node = node.args[0]
    assert Function(node, of).rectifies == (function in RECTIFY)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * x.bool(),
        lambda x: x * x.relu().bool().to(F64),
        lambda x: x.float().double() * torch.sigmoid(x),
        lambda x: (x.float() * torch.sigmoid(x).float()).double(),
    ],
)
def test_casts_are_kept(function: Callable[[Tensor], Tensor]) -> None:
    """The sum of the parts is what the net gives, rounding and all (``parts`` looks)."""
    x = torch.randn(2, 6, generator=torch.Generator().manual_seed(1)).to(F64)
    assert parts(seeded(Pointwise(function).to(F64), 0.7).eval(), x, tolerance=1e-6).abs().max() > 0


def test_norms_are_no_functions_of_one_value() -> None:
    def norms(x: Tensor) -> Tensor:
        spread = x.std(-1, keepdim=True)
        size = x.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        rms = (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        return x * (1 / (spread + 1e-5)) + x * size.reciprocal() + x * rms

    assert not functions(Graph.of(Pointwise(norms).to(F64).eval(), torch.randn(2, 6, dtype=F64)))


# ---- attention --------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Two layers with a residual; ``form(scores, values, layer)`` weighs the values (N, HEADS, T, D / HEADS)."""

    def __init__(self, form: Callable[[Tensor, Tensor, Attention], Tensor]) -> None:
        super().__init__()
        self.form, self.norm, self.head = form, nn.LayerNorm(D), nn.Linear(D, 3)
        self.projections = nn.ModuleList(nn.Linear(D, D) for _ in range(6))
        self.heads = nn.Linear(HEADS, HEADS, bias=False)
        self.register_buffer("ones", torch.ones(1, HEADS, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        for first in (0, 3):  # torch 2.4 cannot export a slice of a ModuleList
            three = (self.projections[first + i](self.norm(x)) for i in range(3))
            q, k, v = (value.unflatten(-1, (HEADS, -1)).transpose(1, 2) for value in three)
            found = self.form(q @ k.transpose(-1, -2) / math.sqrt(D / HEADS), v, self)
            x = x + found.transpose(1, 2).flatten(2)
        return self.head(x.mean(1))


def _summed(z: Tensor, v: Tensor, _: Attention) -> Tensor:
    return (z.softmax(-1)[..., None] * v[:, :, None]).sum(3)


def _sliced(z: Tensor, v: Tensor, _: Attention) -> Tensor:
    a = z.softmax(-1)
    return a[..., :1] @ v[..., :1, :] + a[..., 1:] @ v[..., 1:, :]


def _with_sink(z: Tensor, v: Tensor, _: Attention) -> Tensor:
    return torch.cat((z, torch.full_like(z[..., :1], -1e4)), -1).softmax(-1)[..., :-1] @ v


def _written(z: Tensor, v: Tensor, _: Attention) -> Tensor:
    e = (z - z.amax(-1, keepdim=True)).exp()
    return e / e.sum(-1, keepdim=True) @ v


def _divided_after(z: Tensor, v: Tensor, _: Attention) -> Tensor:
    e = z.exp()
    return e @ v / e.sum(-1, keepdim=True)


def _again(z: Tensor, v: Tensor, _: Attention) -> Tensor:
    a = z.softmax(-1)
    return a / (a.sum(-1, keepdim=True) + 1e-12) @ v


FORMS = {
    "einsum": lambda z, v, _: torch.einsum("bhqk,bhkd->bhqd", z.softmax(-1), v),
    "bmm": lambda z, v, _: torch.bmm(z.softmax(-1).flatten(0, 1), v.flatten(0, 1)).unflatten(0, (-1, HEADS)),
    "the right factor": lambda z, v, _: (v.transpose(-1, -2) @ z.softmax(-1).transpose(-1, -2)).transpose(-1, -2),
    "scaled": lambda z, v, _: z.softmax(-1) * 0.5 @ (2 * v),
    "normalised again": _again,
    "F.normalize": lambda z, v, _: F.normalize(z.softmax(-1), p=1, dim=-1) @ v,
    "times a mask": lambda z, v, net: z.softmax(-1) * net.ones @ v,
    "where": lambda z, v, net: torch.where(net.ones.bool(), z.softmax(-1), 0.0) @ v,
    "cleaned": lambda z, v, _: torch.nan_to_num(z.softmax(-1)) @ v,
    "mixed between heads": lambda z, v, net: net.heads(z.softmax(-1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2) @ v,
    "in two parts": _sliced,
    "product and sum": _summed,
    "with a sink": _with_sink,
    "written out": _written,
    "divided after the product": _divided_after,
    "exp of log_softmax": lambda z, v, _: z.log_softmax(-1).exp() @ v,
    "exp less logsumexp": lambda z, v, _: (z - z.logsumexp(-1, keepdim=True)).exp() @ v,
}


def attention(form: Callable[..., Tensor]) -> nn.Module:
    net = seeded(Attention(form).to(F64), 0.7).eval()
    net.heads.weight.data.copy_(torch.eye(HEADS))
    net.ones.fill_(1)
    return net


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.quick(every=3)
def test_attention_is_the_same_in_other_words(name: str) -> None:
    x = torch.randn(2, T, D, generator=torch.Generator().manual_seed(1)).to(F64)
    expected = parts(attention(lambda z, v, _: z.softmax(-1) @ v), x)
    torch.testing.assert_close(parts(attention(FORMS[name]), x), expected, rtol=1e-6, atol=1e-6)


def test_attention_pooling() -> None:
    """By a matrix product, or by a product and a sum: each part is weighed by the weights of the whole."""

    class Pooled(nn.Module):
        def __init__(self, summed: bool) -> None:
            super().__init__()
            self.score, self.summed = nn.Linear(D, 1), summed

        def forward(self, x: Tensor) -> Tensor:
            weights = self.score(x).softmax(1)
            return (weights * x).sum(1) if self.summed else (weights.transpose(1, 2) @ x).squeeze(1)

    x = torch.randn(2, T, D, generator=torch.Generator().manual_seed(1)).to(F64)
    masks = torch.rand(4, T, D, generator=torch.Generator().manual_seed(3)).to(F64)
    for summed in (True, False):
        net = seeded(Pooled(summed).to(F64), 0.7).eval()
        found, _ = Decomposer(net).rows(x, masks, OF)
        weights = net.score(x).softmax(1)[OF]
        torch.testing.assert_close(found, (weights * x[OF] * masks).sum(1))


@pytest.mark.parametrize(
    "gate",
    [
        lambda x, layer: x * x.softmax(-1),  # summed over nothing
        lambda x, layer: layer(x.softmax(-1)) @ x.transpose(-1, -2) @ x,  # features of a softmax, no weights
        lambda x, layer: x + x.softmax(-1),
    ],
)
def test_a_softmax_that_does_not_weigh_is_a_function(gate: Callable[..., Tensor]) -> None:
    """Its relevant part depends on the mask, where that of weights is the same under every mask."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(D, D)

        def forward(self, x: Tensor) -> Tensor:
            return gate(x, self.layer).mean(1)

    net = seeded(Gated().to(F64), 0.7).eval()
    graph = Graph.of(net, torch.randn(2, T, D, dtype=F64))
    (softmax,) = (node for node in graph.nodes if node.name == "softmax")
    assert softmax not in Plan.of(graph).constant
