"""What to take where a net is not for a method that works on its graph."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from attrib.models.padding import tried

GRADIENT = "Take a method that needs the gradient alone, such as integrated_gradients"


@torch.no_grad()
def gradient_alone(net: nn.Module, x: Tensor) -> str:
    """A sentence: which method works on the net alone, for inputs like x (N, *input); of some text nets none does.

    A method that needs the gradient alone explains a text at the one layer that embeds its words (``every_word``).
    """
    if x.is_floating_point() or x.ndim != 2:
        return GRADIENT
    one = x[:1]
    # Its ends may be what the net looks for.
    other = torch.cat((one[:, :1], one[:, 1:-1].flip(1), one[:, 1:][:, -1:]), 1)
    tables = told_apart(net, one, other)
    if len(tables) < 2:
        return GRADIENT
    return (
        f"Methods that need the gradient alone do not take its place, as {type(net).__name__} reads its words by "
        f"{' and '.join(tables)}: give a net in which one module embeds them for all that read them"
    )


def told_apart(net: nn.Module, x: Tensor, other: Tensor) -> list[str]:
    """The embeddings that give other vectors for the one text (1, T) than for the other; none if it takes not both."""

    def seen(text: Tensor) -> dict[str, list[Tensor]]:
        found: dict[str, list[Tensor]] = {}

        def keep(path: str) -> Callable[[nn.Module, Any, Any], None]:
            return lambda _module, _inputs, output: found.setdefault(path, []).append(output.clone())

        with ExitStack() as stack:
            for path, module in net.named_modules():
                if isinstance(module, nn.Embedding | nn.EmbeddingBag):
                    stack.callback(module.register_forward_hook(keep(path)).remove)
            return {} if tried(net, text) is None else found

    one, two = seen(x), seen(other)
    both = [path for path in one if path in two]
    return [path for path in both if any(a.shape != b.shape or not a.equal(b) for a, b in zip(one[path], two[path]))]
