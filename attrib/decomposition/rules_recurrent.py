"""Rules for recurrent layers. Papers: see ``rules_linear``.

The steps of a sentence run in a Python loop, since each needs the one before it. Everything else runs at once: all rows
(spans and samples) and all hidden units take a step together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attrib.decomposition.call import Call
from attrib.decomposition.values import PlainValue, TensorPair, proportion


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
        return _plus(self.x.linear(lambda value, _: value[:, part]), back)


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
    news = _plus(step.x.linear(lambda value, _: value[:, n_]), reset)
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
    "LSTM": _lstm_step, "GRU": _gru_step, "RNN_TANH": _rnn_step(torch.tanh), "RNN_RELU": _rnn_step(torch.relu),
}  # fmt: skip


def _inside(z: TensorPair, first: bool) -> Tensor:
    """(R, T, 1) how much of each step is relevant; for a word whose vector is zero only the mask can tell."""
    relevant, rest = (part.abs().sum(-1, keepdim=True) for part in (z.relevant, z.irrelevant))
    share, mask = proportion(relevant, rest), z.rows.mask
    if not first or mask is None or mask.shape != share.shape[:2]:
        return share
    return torch.where(relevant + rest == 0, mask[..., None].to(share.dtype), share)


def _direction(z: TensorPair, inside: Tensor, module: nn.RNNBase, suffix: str) -> tuple[TensorPair, _State]:
    """One direction of one layer: (rows, T, E) -> (rows, T, H) and the state after the last step."""
    x_weight, h_weight = (getattr(module, f"weight_{of}_{suffix}") for of in ("ih", "hh"))
    zero = x_weight.new_zeros(len(x_weight))
    x_bias, h_bias = (getattr(module, f"bias_{of}_{suffix}", zero) for of in ("ih", "hh"))
    x = z.linear(lambda part, _: F.linear(part, x_weight))
    start = x.linear(lambda part, _: part.new_zeros(len(part), module.hidden_size))
    state, outputs = _State(start, start), []
    for t in range(z.whole.shape[1]):
        state = _STEPS[module.mode](_Step(_at(x, t), inside[:, t], x_bias, h_weight, h_bias), state)
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


def _layers(z: TensorPair, module: nn.RNNBase, lengths: PlainValue | None) -> tuple[TensorPair, list[_State]]:
    """All layers and directions: (rows, T, E) -> (rows, T, H * directions), states in torch's order."""
    states = []
    for layer in range(module.num_layers):
        ways, inside = [], _inside(z, layer == 0)
        for suffix in ("", "_reverse")[: 2 if module.bidirectional else 1]:
            back = bool(suffix)
            start = (
                (_turned(z, lengths), _turn(inside, None if lengths is None else lengths.part)) if back else (z, inside)
            )
            h, state = _direction(*start, module, f"l{layer}{suffix}")
            ways.append(_turned(h, lengths) if back else h)
            states.append(state)
        z = _joined(ways, lambda values: torch.cat(values, -1))
    return z, states


def _joined(pairs: list[TensorPair], function: Callable[[list[Tensor]], Tensor]) -> TensorPair:
    rows, relevant = pairs[0].rows, function([p.relevant for p in pairs])
    if rows.both:
        return rows.sum(relevant, function([p.irrelevant for p in pairs]))
    return rows.pair(relevant, function([p.whole for p in pairs]))


def _plus(a: TensorPair, b: TensorPair) -> TensorPair:
    return _joined([a, b], lambda values: values[0] + values[1])


def recurrent(call: Call) -> Any:
    """``nn.LSTM``, ``nn.GRU``, ``nn.RNN``: sequences (rows, T, E) or (T, rows, E), from a state of zeros.

    With several layers and in both directions. In deeper layers a step's input is partly relevant; the product of
    bias with bias is then shared out by the magnitudes of its parts (no paper defines it).
    """
    module, (z, *others) = call.module_as(nn.RNNBase), call.args
    if not isinstance(z, TensorPair) or any(o is not None for o in (*others, *call.kwargs.values())):
        raise call.refuse("with an initial state, or packed by hand; use attrib.models.Recurrent for padded texts")
    if getattr(module, "proj_size", 0) or z.whole.ndim != 3:
        raise call.refuse("with projections, or without a batch dimension")
    z = z if module.batch_first else z.linear(lambda part, _: part.transpose(0, 1))
    out, states = _layers(z, module, None)
    out = out if module.batch_first else out.linear(lambda part, _: part.transpose(0, 1))
    h = _joined([state.h for state in states], torch.stack)
    if module.mode != "LSTM":
        return out, h
    return out, (h, _joined([state.c for state in states], torch.stack))


def padded_recurrent(call: Call) -> TensorPair:
    """``attrib.models.Recurrent``: padded sequences (rows, T, E) and their lengths; the output is zero on padding."""
    named = dict(zip(("z", "lengths"), call.args)) | call.kwargs
    z, lengths = named["z"], named["lengths"]
    if not isinstance(z, TensorPair) or not isinstance(lengths, PlainValue):
        raise call.refuse("whose sequence does not depend on the input, or whose lengths do")
    lengths = PlainValue(lengths.part.clamp(min=1), lengths.whole.clamp(min=1))
    out, _ = _layers(z, call.module_as(nn.RNNBase), lengths)

    def real(value: Tensor, length: Tensor) -> Tensor:
        padding = torch.arange(value.shape[1], device=value.device) >= length[:, None]
        return value.masked_fill(padding[:, :, None], 0.0)

    return _by_length(out, lengths, real)
