"""Rules for recurrent layers. Papers: see ``rules_linear``.

The steps of a sentence follow each other in a Python loop, as each needs the one before; spans, samples and
hidden units do not: all rows take a step together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attrib.decomposition.call import Call
from attrib.decomposition.values import Pair, Plain, proportion


class _Three(NamedTuple):
    """f(relevant + irrelevant + bias) as three contributions; the irrelevant one is what is missing from whole."""

    relevant: Tensor  # (R, H)
    bias: Tensor  # (H,)
    whole: Tensor  # (S, H)


def _three(pair: Pair, bias: Tensor, f: Callable[[Tensor], Tensor]) -> _Three:
    """Murdoch 2018, section 3.2.2, as its code does it: the bias comes first, the two others are averaged."""
    at_bias, whole = f(bias), f(pair.whole + bias)
    relevant = (f(pair.relevant + bias) - at_bias + pair.spread(whole) - f(pair.irrelevant + bias)) / 2
    return _Three(relevant, at_bias, whole)


def _two(pair: Pair) -> Pair:
    """tanh(relevant + irrelevant) as two contributions, averaged over both orders (Murdoch 2018)."""
    whole = pair.whole.tanh()
    return pair.rows.pair((pair.relevant.tanh() + pair.spread(whole) - pair.irrelevant.tanh()) / 2, whole)


class _State(NamedTuple):
    h: Pair
    c: Pair


class _Step(NamedTuple):
    """What all kinds of cell need in one step."""

    x: Pair  # the input's contribution to the gates, without biases (rows, gates * H)
    inside: Tensor  # (R, 1), how much of the step's input is relevant: 1 inside of a span, 0 outside
    x_bias: Tensor
    h_weight: Tensor
    h_bias: Tensor

    def gates(self, h: Pair, part: slice) -> Pair:
        weight = self.h_weight[part]
        back = h.linear(lambda value, _: F.linear(value, weight))
        return _plus(self.x.linear(lambda value, _: value[:, part]), back)


def _lstm_step(step: _Step, state: _State) -> _State:
    """Murdoch 2018, section 3.2.2, with the output gate as of the whole, as the authors' code does it.

    Relevant are products of relevant with relevant or bias; bias with bias counts as the word does
    that is read (the code that was released leaves out a span's last word; the paper does not).
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
    """No paper defines it: gates and products as for the LSTM."""
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
    """No paper defines it: three contributions, f(bias) counting as the word that is read."""

    def run(step: _Step, state: _State) -> _State:
        three = _three(step.gates(state.h, slice(None)), step.x_bias + step.h_bias, f)
        h = state.h.rows.pair(three.relevant + step.inside * three.bias, three.whole)
        return _State(h, h)

    return run


_STEPS: dict[str, Callable[[_Step, _State], _State]] = {
    "LSTM": _lstm_step, "GRU": _gru_step, "RNN_TANH": _rnn_step(torch.tanh), "RNN_RELU": _rnn_step(torch.relu),
}  # fmt: skip


def _inside(z: Pair, first: bool) -> Tensor:
    """(R, T, 1) how much of each step is relevant; of a word whose vector is zero the mask alone can say it."""
    relevant, rest = (part.abs().sum(-1, keepdim=True) for part in (z.relevant, z.irrelevant))
    share, mask = proportion(relevant, rest), z.rows.mask
    if not first or mask is None or mask.shape != share.shape[:2]:
        return share
    return torch.where(relevant + rest == 0, mask[..., None].to(share.dtype), share)


def _direction(z: Pair, inside: Tensor, module: nn.RNNBase, suffix: str) -> tuple[Pair, _State]:
    """One direction of one layer: (rows, T, E) -> (rows, T, H), and the state after the last step."""
    names = (f"{name}_{suffix}" for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    x_weight, h_weight, x_bias, h_bias = (getattr(module, name, None) for name in names)
    if x_bias is None:
        x_bias = h_bias = x_weight.new_zeros(len(x_weight))
    x = z.linear(lambda part, _: F.linear(part, x_weight))
    start = x.linear(lambda part, _: part.new_zeros(len(part), module.hidden_size))
    state, outputs = _State(start, start), []
    for t in range(z.whole.shape[1]):
        now = x.linear(lambda part, _, t=t: part[:, t])
        state = _STEPS[module.mode](_Step(now, inside[:, t], x_bias, h_weight, h_bias), state)
        outputs.append(state.h)
    return _joined(outputs, lambda values: torch.stack(values, 1)), state


def _turned(z: Pair, lengths: Plain | None) -> Pair:
    """The steps from the last to the first; of padded rows the real ones."""
    if lengths is None:
        return z.linear(lambda part, _: _turn(part))
    return _by_length(z, lengths, _turn)


def _turn(value: Tensor, length: Tensor | None = None) -> Tensor:
    if length is None:
        return value.flip(1)
    t = torch.arange(value.shape[1], device=value.device)[None]
    order = torch.where(t < length[:, None], length[:, None] - 1 - t, t)
    return value.gather(1, order[:, :, None].expand_as(value))


def _by_length(z: Pair, lengths: Plain, function: Callable[[Tensor, Tensor], Tensor]) -> Pair:
    """Both parts through ``function(part, lengths)``, linear in the part."""
    relevant = function(z.relevant, lengths.part)
    if z.other is not None:
        return z.rows.sum(relevant, function(z.other, lengths.part))
    return z.rows.pair(relevant, function(z.whole, lengths.whole))


def _layers(z: Pair, module: nn.RNNBase, lengths: Plain | None) -> tuple[Pair, list[_State]]:
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


def _joined(pairs: list[Pair], function: Callable[[list[Tensor]], Tensor]) -> Pair:
    rows, relevant = pairs[0].rows, function([p.relevant for p in pairs])
    if rows.both:
        return rows.sum(relevant, function([p.irrelevant for p in pairs]))
    return rows.pair(relevant, function([p.whole for p in pairs]))


def _plus(a: Pair, b: Pair) -> Pair:
    return _joined([a, b], lambda values: values[0] + values[1])


def recurrent(call: Call) -> Any:
    """``nn.LSTM``, ``nn.GRU``, ``nn.RNN``: sequences (rows, T, E) or (T, rows, E), from a state of zeros.

    Several layers and both directions. In deeper layers a step's input is relevant in part; the
    share of "bias with bias" is then that of its parts' sizes (no paper defines it).
    """
    module, (z, *others) = call.module, call.args
    if not isinstance(z, Pair) or any(o is not None for o in (*others, *call.kwargs.values())):
        raise call.refuse("with an initial state, or packed by hand; use attrib.models.Recurrent for padded texts")
    if getattr(module, "proj_size", 0) or z.whole.ndim != 3:
        raise call.refuse("with projections, or without a batch")
    z = z if module.batch_first else z.linear(lambda part, _: part.transpose(0, 1))
    out, states = _layers(z, module, None)
    out = out if module.batch_first else out.linear(lambda part, _: part.transpose(0, 1))
    h = _joined([state.h for state in states], torch.stack)
    if module.mode != "LSTM":
        return out, h
    return out, (h, _joined([state.c for state in states], torch.stack))


def padded_recurrent(call: Call) -> Pair:
    """``attrib.models.Recurrent``: padded sequences (rows, T, E) and their lengths; zero on padding."""
    named = dict(zip(("z", "lengths"), call.args)) | call.kwargs
    z, lengths = named["z"], named["lengths"]
    if not isinstance(z, Pair) or not isinstance(lengths, Plain):
        raise call.refuse("whose sequence does not depend on the input, or whose lengths do")
    lengths = Plain(lengths.part.clamp(min=1), lengths.whole.clamp(min=1))
    out, _ = _layers(z, call.module, lengths)

    def real(value: Tensor, length: Tensor) -> Tensor:
        padding = torch.arange(value.shape[1], device=value.device) >= length[:, None]
        return value.masked_fill(padding[:, :, None], 0.0)

    return _by_length(out, lengths, real)
