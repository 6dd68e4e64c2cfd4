"""Rules for recurrent layers. Papers: see ``rules_linear``.

The steps of a sentence run in a Python loop, since each needs the one before it. Everything else runs at once: all rows
(spans and samples) and all hidden units take a step together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from attrib.decomposition.call import Call, lifted
from attrib.decomposition.rules_linear import summed
from attrib.decomposition.values import PlainValue, TensorPair, leaves, proportion


class _Three(NamedTuple):
    """f(relevant + irrelevant + bias) as three contributions; the irrelevant one is the rest of the whole."""

    relevant: Tensor  # (R, H)
    bias: Tensor  # (H,)
    whole: Tensor  # (S, H)


def _three(pair: TensorPair, bias: Tensor, f: Callable[[Tensor], Tensor]) -> _Three:
    """Murdoch 2018, section 3.2.2, as its code does it: the bias first, the others averaged over both orders."""
    at_bias, whole = f(bias), f(pair.whole + bias)
    relevant = (f(pair.relevant + bias) - at_bias + pair.spread(whole) - f(pair.irrelevant + bias)) / 2
    return _Three(relevant, at_bias, whole)


def _two(pair: TensorPair) -> TensorPair:
    """tanh(relevant + irrelevant) as two contributions, the mean over both orders (Murdoch 2018)."""
    whole = pair.whole.tanh()
    return pair.rows.pair((pair.relevant.tanh() + pair.spread(whole) - pair.irrelevant.tanh()) / 2, whole)


class _State(NamedTuple):
    h: TensorPair
    c: TensorPair


class _Step(NamedTuple):
    """The inputs of one step, for every kind of cell. H hidden units."""

    x: TensorPair  # the input's contribution to the gates, without biases (rows, gates * H)
    inside: Tensor  # (R, 1) how much of the step's input is relevant: 1 inside the span, 0 outside
    x_bias: Tensor
    h_weight: Tensor
    h_bias: Tensor

    def gates(self, h: TensorPair, part: slice) -> TensorPair:
        weight = self.h_weight[part]
        back = h.linear(lambda value, _: F.linear(value, weight))
        return summed(self.x.linear(lambda value, _: value[:, part]), back)


def _lstm_step(step: _Step, state: _State) -> _State:
    """Murdoch 2018, section 3.2.2, with the output gate of the whole, as in the authors' code.

    Products of relevant with relevant or bias are relevant; that of bias with bias is relevant if the word that is
    read is (the released code leaves out the last word of a span; the paper does not).
    """
    size, bias = state.h.whole.shape[-1], step.x_bias + step.h_bias
    sizes = [slice(i * size, (i + 1) * size) for i in range(4)]
    i, f = (_three(step.gates(state.h, s), bias[s], torch.sigmoid) for s in sizes[:2])
    g = _three(step.gates(state.h, sizes[2]), bias[sizes[2]], torch.tanh)
    o = (step.gates(state.h, sizes[3]).whole + bias[sizes[3]]).sigmoid()
    relevant = i.relevant * (g.relevant + g.bias) + i.bias * g.relevant + step.inside * (i.bias * g.bias)
    relevant = relevant + (f.relevant + f.bias) * state.c.relevant
    c = state.c.rows.pair(relevant, i.whole * g.whole + f.whole * state.c.whole)
    return _State(_two(c).linear(lambda part, spread: spread(o) * part), c)


def _gru_step(step: _Step, state: _State) -> _State:
    """No paper defines it; gates and products are as for the LSTM."""
    size = state.h.whole.shape[-1]
    r_, z_, n_ = (slice(i * size, (i + 1) * size) for i in range(3))
    bias, h = step.x_bias + step.h_bias, state.h
    r, z = (_three(step.gates(h, s), bias[s], torch.sigmoid) for s in (r_, z_))
    weight, inner = step.h_weight[n_], step.h_bias[n_]
    back = h.linear(lambda value, _: F.linear(value, weight))
    reset = h.rows.pair(
        r.relevant * (back.relevant + inner) + r.bias * back.relevant, r.whole * (back.whole + inner) - r.bias * inner
    )
    news = summed(step.x.linear(lambda value, _: value[:, n_]), reset)
    n = _three(news, step.x_bias[n_] + r.bias * inner, torch.tanh)
    relevant = -z.relevant * (n.relevant + n.bias) + (1 - z.bias) * (n.relevant + step.inside * n.bias)
    relevant = relevant + (z.relevant + z.bias) * h.relevant
    new = h.rows.pair(relevant, (1 - z.whole) * n.whole + z.whole * h.whole)
    return _State(new, new)


def _rnn_step(f: Callable[[Tensor], Tensor]) -> Callable[[_Step, _State], _State]:
    """No paper defines it: three contributions, of which f(bias) is relevant if the word that is read is."""

    def run(step: _Step, state: _State) -> _State:
        three = _three(step.gates(state.h, slice(None)), step.x_bias + step.h_bias, f)
        h = state.h.rows.pair(three.relevant + step.inside * three.bias, three.whole)
        return _State(h, h)

    return run


_STEPS: dict[str, Callable[[_Step, _State], _State]] = {
    "lstm": _lstm_step, "gru": _gru_step, "rnn_tanh": _rnn_step(torch.tanh), "rnn_relu": _rnn_step(torch.relu),
}  # fmt: skip


def _inside(z: TensorPair, first: bool) -> Tensor:
    """(R, T, 1) how much of each step is relevant; for a word whose vector is zero only the mask can tell."""
    relevant, rest = (part.abs().sum(-1, keepdim=True) for part in (z.relevant, z.irrelevant))
    share, mask = proportion(relevant, rest), z.rows.mask
    if not first or mask is None or mask.shape != share.shape[:2]:
        return share
    return torch.where(relevant + rest == 0, mask[..., None].to(share.dtype), share)


class _Layers(NamedTuple):
    """All layers and directions of a call. D = layers * directions, layer by layer."""

    step: Callable[[_Step, _State], _State]
    weights: list[list[Tensor]]  # D times: of the input, of the state, and with biases those of both
    ways: int  # directions
    starts: list[_State] | None = None  # D states before the first step; None: zeros


def _direction(z: TensorPair, inside: Tensor, layers: _Layers, number: int) -> tuple[TensorPair, _State]:
    """One direction of one layer: (rows, T, E) -> (rows, T, H) and the state after the last step."""
    x_weight, h_weight, *biases = layers.weights[number]
    x_bias, h_bias = biases or [x_weight.new_zeros(len(x_weight))] * 2
    x = z.linear(lambda part, _: F.linear(part, x_weight))
    zero = x.linear(lambda part, _: part.new_zeros(len(part), h_weight.shape[1]))
    state, outputs = layers.starts[number] if layers.starts else _State(zero, zero), []
    for t in range(z.whole.shape[1]):
        state = layers.step(_Step(_at(x, t), inside[:, t], x_bias, h_weight, h_bias), state)
        outputs.append(state.h)
    return _joined(outputs, lambda values: torch.stack(values, 1)), state


def _at(x: TensorPair, t: int) -> TensorPair:
    return x.linear(lambda part, _: part[:, t])


def _turned(z: TensorPair, lengths: PlainValue | None) -> TensorPair:
    """The steps in reverse order; in padded rows, the real steps in reverse order."""
    if lengths is None:
        return z.linear(lambda part, _: _turn(part))
    return _by_length(z, lengths, _turn)


def _turn(value: Tensor, length: Tensor | None = None) -> Tensor:
    if length is None:
        return value.flip(1)
    t = torch.arange(value.shape[1], device=value.device)[None]
    order = torch.where(t < length[:, None], length[:, None] - 1 - t, t)
    return value.gather(1, order[:, :, None].expand_as(value))


def _by_length(z: TensorPair, lengths: PlainValue, function: Callable[[Tensor, Tensor], Tensor]) -> TensorPair:
    """Both parts through ``function(part, lengths)``, which must be linear in the part."""
    relevant = function(z.relevant, lengths.part)
    if z.other is not None:
        return z.rows.sum(relevant, function(z.other, lengths.part))
    return z.rows.pair(relevant, function(z.whole, lengths.whole))


def _all_layers(z: TensorPair, layers: _Layers, lengths: PlainValue | None) -> tuple[TensorPair, list[_State]]:
    """(rows, T, E) -> (rows, T, H * directions), and the D states after the last step."""
    states: list[_State] = []
    while len(states) < len(layers.weights):
        outputs, inside = [], _inside(z, not states)
        for back in (False, True)[: layers.ways]:
            if back:
                turned = _turned(z, lengths), _turn(inside, None if lengths is None else lengths.part)
            h, state = _direction(*(turned if back else (z, inside)), layers, len(states))
            outputs.append(_turned(h, lengths) if back else h)
            states.append(state)
        z = _joined(outputs, lambda values: torch.cat(values, -1))
    return z, states


def _joined(pairs: list[TensorPair], function: Callable[[list[Tensor]], Tensor]) -> TensorPair:
    rows, relevant = pairs[0].rows, function([p.relevant for p in pairs])
    if rows.both:
        return rows.sum(relevant, function([p.irrelevant for p in pairs]))
    return rows.pair(relevant, function([p.whole for p in pairs]))


def recurrent(call: Call) -> tuple[TensorPair, ...]:
    """LSTM, GRU, plain recurrence: sequences (rows, T, E) or (T, rows, E).

    With several layers and in both directions. In deeper layers a step's input is partly relevant; the product of
    bias with bias is then shared out by the magnitudes of its parts (no paper defines it). A state that it begins with
    has the parts that it comes with; a constant one is irrelevant.
    """
    z, params, hx = call.args.get("input"), call.args["params"], call.args["hx"]
    if not isinstance(z, TensorPair) or leaves(params, TensorPair):
        raise call.refuse("packed by hand, or with weights that depend on the input; see attrib.models.Recurrent")
    size, ways = 4 if call.args["has_biases"] else 2, 2 if call.args["bidirectional"] else 1
    if len(params) != size * ways * call.args["num_layers"]:
        raise call.refuse("with projections")
    if z.whole.ndim != 3:
        raise call.refuse("without a batch dimension")
    z = z if call.args["batch_first"] else z.linear(lambda part, _: part.transpose(0, 1))
    weights = [list(params[i : i + size]) for i in range(0, len(params), size)]
    given = [_started(call, state) for state in (hx if call.name == "lstm" else [hx])]
    starts = [_State(*(_layer(state, i) for state in (given[0], given[-1]))) for i in range(len(weights))]
    out, states = _all_layers(z, _Layers(_STEPS[call.name], weights, ways, starts), None)
    out = out if call.args["batch_first"] else out.linear(lambda part, _: part.transpose(0, 1))
    h = _joined([state.h for state in states], torch.stack)
    return (out, h, _joined([state.c for state in states], torch.stack)) if call.name == "lstm" else (out, h)


def _layer(states: TensorPair, number: int) -> TensorPair:
    """(D, rows, H) -> (rows, H)."""
    return states.linear(lambda part, _: part[number])


def _started(call: Call, state: Any) -> TensorPair:
    """(D, rows, H) the states that a call begins with."""
    if isinstance(state, TensorPair):
        return state
    part, whole = (state.part, state.whole) if isinstance(state, PlainValue) else (state, state)
    return call.rows.pair(torch.zeros_like(part), whole)


def padded_recurrent(call: Call) -> TensorPair:
    """``attrib.models.Recurrent``: padded sequences (rows, T, E) and their lengths; the output is zero on padding."""
    z, lengths, weights = call.args["z"], call.args["lengths"], call.args["weights"]
    if not isinstance(z, TensorPair) or leaves(weights, TensorPair):
        raise call.refuse("whose sequence does not depend on the input, or whose weights do")
    lengths = lifted(lambda value: value.clamp(min=1), lengths)
    if isinstance(lengths, Tensor):  # of a net that does not look for padding
        same = lengths
        lengths = PlainValue(same, lambda: same)
    ways = 2 if call.args["both_ways"] else 1
    size = len(weights) // (ways * call.args["layers"])
    each = [list(weights[i : i + size]) for i in range(0, len(weights), size)]
    out, _ = _all_layers(z, _Layers(_lstm_step, each, ways), lengths)

    def real(value: Tensor, length: Tensor) -> Tensor:
        padding = torch.arange(value.shape[1], device=value.device) >= length[:, None]
        return value.masked_fill(padding[:, :, None], 0.0)

    return _by_length(out, lengths, real)
