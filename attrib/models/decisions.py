"""Whether a net reads numbers of its samples into Python, where it may decide by them for the whole batch."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from attrib.models.calls import EachCall

_READS = frozenset(
    {"item", "tolist", "numpy", "equal", "allclose", "is_nonzero", "__array__"}
    | {f"__{name}__" for name in ("bool", "float", "int", "index", "complex")}
)
_EMBEDDING = torch.ops.aten.embedding


class Decisions(EachCall):
    """``found``: the net read a number that it had computed of x, such as ``if x.max() > 1``, ``float(z.norm())``.

    What is read of ids alone, as the lengths of texts and the places of padding, is no such number, nor is a weight.
    """

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.found = False
        self._ids, self._numbers = WeakTensorKeyDictionary(), WeakTensorKeyDictionary()
        (self._numbers if x.is_floating_point() else self._ids)[x] = True
        self._reads = _Reads(self)

    def __enter__(self) -> Decisions:
        super().__enter__()
        self._reads.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._reads.__exit__(kind, error, trace)
        super().__exit__(kind, error, trace)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        of_numbers, of_ids = (any(one in known for one in given) for known in (self._numbers, self._ids))
        if of_ids and (func.overloadpacket is _EMBEDDING or any(isinstance(one, nn.Parameter) for one in given)):
            of_numbers = True
        for one in tree_leaves(out):
            if isinstance(one, Tensor) and (of_numbers or of_ids):
                (self._numbers if of_numbers else self._ids)[one] = True
        return out

    def read(self, tensor: Any) -> None:
        self.found = self.found or (isinstance(tensor, Tensor) and tensor in self._numbers)


class _Reads(TorchFunctionMode):
    """Tells of the tensors that Python reads."""

    def __init__(self, decisions: Decisions) -> None:
        super().__init__()
        self._decisions = decisions

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in _READS:
            for one in args:
                self._decisions.read(one)
        return func(*args, **(kwargs or {}))
