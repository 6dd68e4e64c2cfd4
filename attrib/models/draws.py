"""What a net draws at random: from which generators, and what it does with extreme numbers."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from attrib.models.calls import EachCall

_WORDS = 624  # of the state of a Mersenne Twister, with which Python and numpy draw
_ONES = 0x12DD9BB3  # the word that is given out as 32 ones


def generators(device: torch.device) -> list[Tensor]:
    """The states of the global generators: of torch, Python and numpy."""
    _, words, place, *_ = np.random.get_state()
    others = [torch.tensor(random.getstate()[1]), torch.tensor([*map(int, words), int(place)])]
    return [*_of_torch(device), *others]


def _of_torch(device: torch.device) -> list[Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


class _Drawing(EachCall):
    """What torch draws at random is ``value`` instead."""

    def __init__(self, value: int) -> None:
        super().__init__()
        self.value = value

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        device = torch.device(kwargs.get("device") or (tensors[0].device if tensors else "cpu"))
        before = _of_torch(device)
        out = func(*args, **kwargs)
        if not all(map(torch.equal, before, _of_torch(device))):  # it may also draw none, as attention may
            for tensor in tree_leaves(out):
                tensor.fill_(self.value)
        return out


@contextmanager
def drawing(value: int) -> Iterator[None]:
    """What torch, Python and numpy draw next is 0 or (nearly) 1.

    Python's and numpy's generators, Mersenne Twisters, give their state word by word. Only half of one is such that
    they give nothing but zeros or ones: loops that draw until a number fits must come to an end.
    """
    half = _WORDS // 2
    words = [(i * 2654435761 + 1) % 2**32 for i in range(half)] + half * [_ONES if value else 0]
    random.setstate((3, (*words, half), None))
    np.random.set_state(("MT19937", np.array(words, dtype=np.uint32), half, 0, 0.0))
    with _Drawing(value):
        yield
