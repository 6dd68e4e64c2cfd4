"""Whether a net reads numbers of its samples into Python, where it may decide by them for the whole batch."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdRef

from attrib.models.calls import OF_SHAPE, EachCall

_READS = frozenset(
    {"item", "tolist", "numpy", "equal", "allclose", "is_nonzero", "__array__"}
    | {f"__{name}__" for name in ("bool", "float", "int", "index", "complex")}
)
# Functions of torch within which a number may be read for the net; others, as one_hot, read some to check them.
_READS_WITHIN = _READS | {"__getitem__", "__setitem__", "__contains__"}
aten = torch.ops.aten
Memory = StorageWeakRef | WeakIdRef


class Decisions(EachCall):
    """``found``: the net read a number that it had computed of x, such as ``if x.max() > 1``, ``float(z.norm())``.

    What is read of ids alone, as the lengths of texts and the places of padding, is no such number, nor is a weight.

    Tensors go by their memory, which views share: what is written into a part of a tensor is then read of the whole.
    """

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.found = False
        self._ids: set[Memory] = set()
        self._weights: set[Memory] = set()
        self._numbers: set[Memory] = set()
        (self._numbers if x.is_floating_point() else self._ids).add(_memory(x))
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
        if func.overloadpacket.__name__ in OF_SHAPE:
            return out
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        memories = {_memory(one) for one in given}
        of_numbers, of_ids, of_weights = (
            not known.isdisjoint(memories) for known in (self._numbers, self._ids, self._weights)
        )
        of_weights = of_weights or any(isinstance(one, nn.Parameter) for one in given)
        if func.overloadpacket is aten._local_scalar_dense and of_numbers and self._reads.for_the_net:
            self.found = True
        if of_numbers or (of_ids and (of_weights or func.overloadpacket is aten.embedding)):
            known = self._numbers
        elif of_ids:
            known = self._ids
        elif of_weights:
            known = self._weights
        else:
            return out
        known.update(_memory(one) for one in tree_leaves(out) if isinstance(one, Tensor))
        return out

    def read(self, tensor: Any) -> None:
        self.found = self.found or (isinstance(tensor, Tensor) and _memory(tensor) in self._numbers)


def _memory(tensor: Tensor) -> Memory:
    """Of a tensor without memory of that kind, as sparse ones, the tensor itself."""
    try:
        return StorageWeakRef(tensor.untyped_storage())
    except (NotImplementedError, RuntimeError):
        return WeakIdRef(tensor)


class _Reads(TorchFunctionMode):
    """Tells of the tensors that Python reads.

    for_the_net   whether a number that is read now is read for the net: by Python, or by TorchScript, whose calls do
                  not come here
    """

    def __init__(self, decisions: Decisions) -> None:
        super().__init__()
        self._decisions, self.for_the_net = decisions, True

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, before = getattr(func, "__name__", ""), self.for_the_net
        if name in _READS:
            for one in args:
                self._decisions.read(one)
        self.for_the_net = name in _READS_WITHIN
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.for_the_net = before
