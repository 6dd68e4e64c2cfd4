"""LRP through recurrent layers, step by step: what is gated takes all relevance, and the gates get none.

Arras et al., *Explaining Recurrent Neural Network Predictions in Sentiment Analysis*, WASSA 2017, section 3.2, and
*Explaining and Interpreting LSTMs*, 2019, section 2.3 (LRP-all). Gates are therefore constants, and a cell is linear
layers, sums and functions of one value, which have their rules:

    lstm  g = tanh(Wx x + Wh h + b), c = f c + i g, h = o tanh(c)
    gru   n = tanh(Wx x + bx + r (Wh h + bh)), h = (1 - z) n + z h
    rnn   h = f(Wx x + Wh h + b)

with x and h as the one input of a layer, and f c and i g, or (1 - z) n and z h, as the summands of a sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from attrib.models.calls import operation
from attrib.relevance.operations import Back, by_rule, held, moved, passed, shared
from attrib.relevance.rules import Layer, Rule

PADDED = "attrib::padded_lstm"
RECURRENT = frozenset(("lstm", "gru", "rnn_tanh", "rnn_relu", PADDED))

# (compute, back, *sources) -> the result of compute, whose relevance goes back by the rule
Apply = Callable[..., Tensor]
State = tuple[Tensor, ...]


def given(node: fx.Node) -> tuple[fx.Node, ...]:
    """The sequence and the states that a recurrent call reads; none of one that reads packed sequences."""
    if operation(node) == PADDED:
        found: list[Any] = [node.args[0]]
    elif getattr(node.target, "_overloadname", "") == "input":
        states = node.args[1]
        found = [node.args[0], *(states if isinstance(states, list | tuple) else [states])]
    else:
        found = []
    return tuple(value for value in found if isinstance(value, fx.Node))


@dataclass(frozen=True)
class _Weights:
    """Of one layer in one direction: (gates * H, E), (gates * H, H), (gates * H,) twice, and (P, H) of a projection."""

    x: Tensor
    h: Tensor
    x_bias: Tensor
    h_bias: Tensor
    projection: Tensor | None

    @classmethod
    def of(cls, values: Sequence[Tensor], biases: bool) -> _Weights:
        x, h, *others = values
        none = x.new_zeros(len(x))
        x_bias, h_bias = others[:2] if biases else (none, none)
        return cls(x, h, x_bias, h_bias, others[-1] if len(others) % 2 else None)


@dataclass(frozen=True)
class _Cell:
    """A step of one layer in one direction."""

    kind: str
    weights: _Weights
    rule: Rule
    epsilon: float
    apply: Apply

    def __call__(self, x: Tensor, state: State) -> State:
        """(N, E) and the state before -> the state after, of which the first is the output."""
        if self.kind == "lstm":
            return self._lstm(x, *state)
        return (self._gru(x, *state),) if self.kind == "gru" else (self._plain(x, *state),)

    def _lstm(self, x: Tensor, h: Tensor, c: Tensor) -> State:
        at = self._parts(4)
        with torch.no_grad():
            i, f, o = (self._before(x, h, at[part]).sigmoid() for part in (0, 1, 3))
        g = self._layer(x, h, at[2], torch.tanh)
        c = self._sum(lambda c, g: f * c + i * g, c, g)
        h = self.apply(lambda c: o * c.tanh(), passed, c)
        if self.weights.projection is not None:
            layer = Layer(F.linear, self.weights.projection, None)
            h = self.apply(layer, by_rule(self.rule, layer), h)
        return h, c

    def _gru(self, x: Tensor, h: Tensor) -> Tensor:
        at = self._parts(3)
        with torch.no_grad():
            r, z = (self._before(x, h, at[part]).sigmoid() for part in (0, 1))
        n = self._layer(x, h, at[2], torch.tanh, r)
        return self._sum(lambda n, h: (1 - z) * n + z * h, n, h)

    def _plain(self, x: Tensor, h: Tensor) -> Tensor:
        return self._layer(x, h, slice(None), torch.relu if self.kind == "rnn_relu" else torch.tanh)

    def _parts(self, gates: int) -> list[slice]:
        size = len(self.weights.x) // gates
        return [slice(i * size, (i + 1) * size) for i in range(gates)]

    def _before(self, x: Tensor, h: Tensor, part: slice) -> Tensor:
        """What the gates are sigmoids of."""
        own = self.weights
        return F.linear(x, own.x[part], own.x_bias[part]) + F.linear(h, own.h[part], own.h_bias[part])

    def _layer(
        self, x: Tensor, h: Tensor, part: slice, function: Callable[[Tensor], Tensor], gate: Tensor | float = 1.0
    ) -> Tensor:
        """``function(Wx x + bx + gate (Wh h + bh))``, whose function passes relevance on."""
        own, sizes = self.weights, (x.shape[1], h.shape[1])

        def compute(both: Tensor, weight: Tensor) -> Tensor:
            (x, h), (x_weight, h_weight) = both.split(sizes, 1), weight.split(sizes, 1)
            return F.linear(x, x_weight) + gate * F.linear(h, h_weight)

        layer = Layer(compute, torch.cat((own.x[part], own.h[part]), 1), own.x_bias[part] + gate * own.h_bias[part])
        return self.apply(lambda both: function(layer(both)), by_rule(self.rule, layer), torch.cat((x, h), 1))

    def _sum(self, compute: Callable[..., Tensor], *sources: Tensor) -> Tensor:
        return self.apply(compute, shared(compute, self.epsilon), *sources)


def recurrent(
    node: fx.Node, args: tuple[Any, ...], sources: Sequence[fx.Node], rule: Rule, epsilon: float, apply: Apply
) -> Any:
    """What a recurrent call gives, in several layers and both directions.

    sources  the nodes of its arguments that carry relevance; what another begins with or reads keeps its own
    """
    kind, biases, first, lengths = operation(node), True, True, None
    if kind == PADDED:
        z, lengths, params, layers, both_ways = args
        kind, lengths, states = "lstm", lengths.clamp(min=1), []
    else:
        z, states, params, biases, layers, _, _, both_ways, first = args
    states = list(states) if isinstance(states, list | tuple) else [states]
    arguments = dict(zip(given(node), [v for v in (z, *states) if isinstance(v, Tensor)], strict=True))
    way = arguments[sources[0]]  # the way to the start, for the books

    def constant(value: Tensor) -> Tensor:
        return apply(lambda _: value.clone(), held, way)

    z, *states = (value if used in sources else constant(value) for used, value in arguments.items())
    z = z if first else z.transpose(0, 1)
    ways = 1 + both_ways
    size = len(params) // (ways * layers)
    cells = [
        _Cell(kind, _Weights.of(params[i : i + size], biases), rule, epsilon, apply)
        for i in range(0, len(params), size)
    ]
    if not states:
        zeros = z.new_zeros(len(cells), len(z), params[1].shape[1])
        states = [constant(zeros), constant(zeros)]
    ends: list[State] = []
    while len(ends) < len(cells):
        outputs = []
        for back in (False, True)[:ways]:
            cell, state = cells[len(ends)], tuple(value[len(ends)] for value in states)
            out = []
            for x in (_turned(z, lengths) if back else z).unbind(1):
                state = cell(x, state)
                out.append(state[0])
            outputs.append(_turned(torch.stack(out, 1), lengths) if back else torch.stack(out, 1))
            ends.append(state)
        z = torch.cat(outputs, -1)
    if lengths is not None:
        padding = (torch.arange(z.shape[1], device=z.device) >= lengths[:, None])[:, :, None]
        return _hidden(z, padding, apply)
    return z if first else z.transpose(0, 1), *(torch.stack(values) for values in zip(*ends, strict=True))


def _hidden(z: Tensor, padding: Tensor, apply: Apply) -> Tensor:
    def compute(z: Tensor) -> Tensor:
        return z.masked_fill(padding, 0.0)

    back: Back = moved(compute)
    return apply(compute, back, z)


def _turned(z: Tensor, lengths: Tensor | None) -> Tensor:
    """(N, T, E) the steps in reverse order; of padded rows the real steps, before the padding."""
    if lengths is None:
        return z.flip(1)
    t = torch.arange(z.shape[1], device=z.device)[None]
    order = torch.where(t < lengths[:, None], lengths[:, None] - 1 - t, t)
    return z.gather(1, order[:, :, None].expand_as(z))
