"""Whether a text net sees what texts share a batch: their padding, and how long they are."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from attrib.models.device_memory import of_the_device
from attrib.models.output import replace_forward
from attrib.models.text import real_tokens

SHORT = 8  # texts of one token that are tried
TOGETHER = 32  # and of a net that takes many at once


class Seen(NamedTuple):
    """What a net makes of padding and of longer texts beside a text.

    share   how far logits of texts alone are apart from what they are with padding, or beside a longer text. Infinite
            if the net takes a text in one of both ways only, or sorts them
    sorted  a layer has the texts of a batch in an order of its own: what a method puts there would be another text's
    """

    share: float
    sorted: bool


def seen(net: nn.Module, x: Tensor, pad: int, pairs: bool, tokens: Sequence[int] = ()) -> Seen:
    """What the net makes of padding, by two texts x (2, T) of equal length.

    A text may already be as long as the net takes, so its end makes room for the padding where it can. A padding that
    is hidden by larger numbers, as before a maximum over all places, most likely is not in the shortest texts. Even of
    these most may hide it, so there are many of one token each: of ``tokens``, of x, and of ids that lie between them.
    With ``pairs`` a text is also tried beside a longer one: some nets look for the longest of a batch, or sort it.
    """
    length = x.shape[1]
    half = _taken(net, x[:1], length - length // 2 if length > 3 else length)
    worst = _padded(net, half, pad, {1, max(3, length - half.shape[1])})
    few = {tuple(x[0, :n].tolist()) for n in (2, 3)} | {
        (token,) for token in _single([*tokens, *x.flip(1).flatten().tolist()], TOGETHER if pairs else SHORT)
    }
    few -= {tuple(half[0].tolist()), (pad,)}
    for n in sorted({len(text) for text in few}):
        worst = max(worst, _padded_each(net, x.new_tensor(sorted(text for text in few if len(text) == n)), pad, pairs))
    if not pairs:
        return Seen(max(worst, _trimmed(net, half, pad)), False)
    beside = _beside(net, x, pad)
    return Seen(max(worst, beside.share), beside.sorted)


def _single(tokens: Sequence[int], count: int) -> list[int]:
    """The first ``count`` different tokens and, if these are fewer, of the ids up to their largest."""
    between = torch.linspace(0, max(tokens), count).long().tolist()
    return list(dict.fromkeys([*tokens, *between]))[:count]


def _taken(net: nn.Module, text: Tensor, length: int) -> Tensor:
    """A part of a text (1, T): its begin or, of a net that wants the token that ends it, its end; else all of it."""
    parts = (text[:, :length], text[:, text.shape[1] - length :])
    return next((part for part in parts if tried(net, part) is not None), text)


def _padded(net: nn.Module, text: Tensor, pad: int, more: set[int]) -> float:
    """With each of these numbers of places more; 0 for a text that the net takes in neither way."""
    alone, worst = tried(net, text), 0.0
    for count in more:
        padded = tried(net, torch.cat((text, text.new_full((1, count), pad)), 1))
        if alone is None or padded is None:
            worst = worst if alone is padded else math.inf
        else:
            worst = max(worst, apart(alone, padded))
    return worst


def _padded_each(net: nn.Module, texts: Tensor, pad: int, pairs: bool) -> float:
    """The same of several texts (N, T), with three places more; by two passes where the net takes them together.

    Where it takes them one by one only, of as many as ``SHORT``.
    """
    if pairs and len(texts) > 1:
        longer = torch.cat((texts, texts.new_full((len(texts), 3), pad)), 1)
        alone, padded = tried(net, texts), tried(net, longer)
        if alone is not None and padded is not None and len(alone) == len(padded) == len(texts):
            return max(map(apart, alone.split(1), padded.split(1)))
    return max(_padded(net, text, pad, {3}) for text in texts[:SHORT].split(1))


def _beside(net: nn.Module, x: Tensor, pad: int) -> Seen:
    """Of a long and a short text together, in either order."""
    long = x[:1].repeat(1, 3)[:, : max(3, x.shape[1])]
    short = _taken(net, x[1:], (x.shape[1] + 1) // 2)
    both = torch.cat((long, torch.cat((short, short.new_full((1, long.shape[1] - short.shape[1]), pad)), 1)))
    alone = [logits for text in (long, short) if (logits := tried(net, text)) is not None]
    if len(alone) < 2:
        return Seen(0.0, False)
    (one, layers), (other, turned) = (_with_layers(net, rows) for rows in (both, both.flip(0)))
    expected = torch.cat(alone)
    if one is None or other is None or one.shape != expected.shape:
        return Seen(math.inf, False)
    moved = any(a.shape == b.shape and apart(a, b.flip(0)) > 1e-3 for a, b in zip(layers, turned))
    return Seen(math.inf if moved else max(apart(one, expected), apart(other.flip(0), expected)), moved)


def _trimmed(net: nn.Module, text: Tensor, pad: int) -> float:
    """Infinite if layers have no places for the padding of a text (1, T): then those of several texts do not fit."""
    layers, padded = (_with_layers(net, x)[1] for x in (text, torch.cat((text, text.new_full((1, 3), pad)), 1)))
    return 0.0 if len(layers) == len(padded) else math.inf


def _with_layers(net: nn.Module, x: Tensor) -> tuple[Tensor | None, list[Tensor]]:
    """What the net gives, and in the order of their ends what modules in it do that give a vector for each token."""
    found: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        first = next((t for t in tree_leaves(output) if isinstance(t, Tensor)), None)
        if first is not None and not first.is_nested and first.ndim > 2 and first.shape[:2] == x.shape:
            found.append(first.detach().clone())

    with ExitStack() as stack:
        for module in net.modules():
            if not isinstance(module, torch.jit.ScriptModule):
                stack.callback(module.register_forward_hook(keep).remove)
        return tried(net, x), found


def tried(net: nn.Module, x: Tensor) -> Tensor | None:
    """None for what the net does not take."""
    try:
        logits: Tensor = net(x.clone())
    except Exception as error:  # a user's net may raise anything
        if of_the_device(error):
            raise
        return None
    return logits


def apart(one: Tensor, other: Tensor) -> float:
    """The largest difference of equal shapes, relative to the largest number; NaN is equal to NaN."""
    one, other = one.double(), other.double()
    same = (one == other) | (one.isnan() & other.isnan())
    difference = (one - other).abs().masked_fill(same, 0)
    if not difference.isfinite().all():
        return math.inf
    scale = one.abs().nan_to_num(0, 0, 0)
    return float(difference.max() / scale.max().clamp(min=torch.finfo(torch.float32).tiny)) if len(one) else 0.0


def keep_lengths_apart(net: nn.Module, pad: int) -> None:
    """From now on ``net`` gets only texts of equal length together, and none with padding."""

    def grouped(_net: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # its graph is asked for texts of one length only (``check_padding``)
            return forward(x)
        lengths = real_tokens(x, pad).sum(1)
        each = lengths.unique().tolist()
        if len(each) == 1:
            return forward(x[:, : each[0]])
        rows = [(lengths == length).nonzero().squeeze(1) for length in each]
        parts = [forward(x[some, :length]) for some, length in zip(rows, each, strict=True)]
        return torch.cat(parts)[torch.cat(rows).argsort()]

    replace_forward(net, grouped)
