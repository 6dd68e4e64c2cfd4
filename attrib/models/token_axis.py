"""Whether the second axis of a text net's layer is that of the tokens.

Sizes prove nothing: what 100 filters give for texts of 100 tokens, (B, 100, 100), looks like a vector for each token.
So a text of another length is asked: the axis of the tokens changes with it, that of channels does not. Of a net that
takes one length only, or makes all texts equally long, the places that answer to the first and to the last token are
compared. Where tokens are mixed, as by a Fourier transform, all places answer to both, and a net of one length has as
many places as tokens: then sizes that differ do tell.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attrib.models.device_memory import of_the_device
from attrib.models.split import HookSplit

CLEAR = 1.5  # of 2, which is where no place answers to both ends of a text


def tokens_are_second(net: nn.Module, path: str, x: Tensor) -> bool:
    """For a layer that gives (1, T, C) for a text x (1, T): whether axis 1 is that of the tokens."""
    if type(net.get_submodule(path)) is nn.Embedding:
        return True
    cut = HookSplit(net, path)
    plain, other = _given(cut, x), _given(cut, x[:, :-1] if x.shape[1] > 1 else torch.cat((x, x), 1))
    if plain is None or plain.ndim != 3:
        return True  # nothing speaks against it
    if other is not None and other.ndim == 3 and other.shape != plain.shape:
        return other.shape[1] != x.shape[1]
    return _answers(cut, x, plain, in_doubt=other is None and plain.shape[2] != x.shape[1])


@torch.no_grad()
def _given(cut: HookSplit, x: Tensor) -> Tensor | None:
    """What the layer gives, None for a text that the net does not take."""
    try:
        return cut.front(x).z
    except Exception as error:  # a user's net may raise anything
        if of_the_device(error):
            raise
        return None


def _answers(cut: HookSplit, x: Tensor, plain: Tensor, in_doubt: bool) -> bool:
    """Whether other tokens at both ends of the text change other places along axis 1 rather than along axis 2.

    ``in_doubt``: what is said where it is clear of neither.
    """
    apart = []
    for at in (0, x.shape[1] - 1):
        others = x[0][x[0] != x[0, at]]
        changed = x.clone()
        changed[0, at] = others[0] if len(others) else x[0, at]
        answer = _given(cut, changed)
        if answer is None or answer.shape != plain.shape or answer.equal(plain):
            return True
        apart.append((answer - plain).square()[0].double())
    far = [(_share(apart[0], axis) - _share(apart[1], axis)).abs().sum() for axis in (0, 1)]
    return bool(far[0] >= far[1]) or (in_doubt and bool(far[1] < CLEAR))


def _share(answer: Tensor, axis: int) -> Tensor:
    """Of an answer (T, C), the share of each place along one axis."""
    return answer.sum(1 - axis) / answer.sum()


def not_per_token(role: str, path: str, z: Tensor, x: Tensor) -> str:
    """Why a layer is refused that gives z for texts x (B, T) where vectors (B, T, E) are wanted."""
    shape = tuple(z.shape)
    if z.ndim == 3 and shape[:2] == (x.shape[1], x.shape[0]):
        advice = "the tokens come first there: let the net embed texts (B, T), and transpose their vectors"
    else:
        advice = "it must be the layer that gives one vector per token, (B, T, E)"
    return f"model.layers.{role}: {path} gives {shape} for tokens {tuple(x.shape)}; {advice}"
