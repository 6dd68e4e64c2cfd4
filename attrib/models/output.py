"""How the scores of the classes come out of what a net returns, and the probabilities out of the scores."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from attrib.types import UserError, did_you_mean

Take = str | int | Callable[[Any], Tensor]


def probabilities(logits: Tensor, several: bool = False) -> Tensor:
    """(N, K) -> (N, K). Classes that exclude each other: softmax; ``several`` labels at once: sigmoids."""
    return logits.sigmoid() if several else logits.softmax(dim=1)


@dataclass(frozen=True)
class Output:
    """``model.output``: how the logits (N, K) come out of what the net returns.

    take   a field of it ("logits"), an index (0), or a function of it; None: it is the tensor
    read   "classes": a logit per class. "sigmoid": one logit s, whose sigmoid is the probability of class 1;
           the logits are then (-s/2, s/2), whose softmax is that sigmoid, so that both classes can be explained
    """

    take: Take | None = None
    read: Literal["classes", "sigmoid"] = "classes"

    def __post_init__(self) -> None:
        if self.read not in ("classes", "sigmoid"):
            raise UserError(f"model.output: read must be classes or sigmoid, not {self.read!r}")
        if self.take is not None and (isinstance(self.take, bool) or not (_is_key(self.take) or callable(self.take))):
            raise UserError(f"model.output: take must be a field, an index or a function, not {self.take!r}")

    @classmethod
    def of(cls, given: Output | Mapping[str, Any] | Take | None) -> Output:
        """From ``{take: ..., read: ...}``, or from what to take alone. Raises UserError."""
        if isinstance(given, Output):
            return given
        if not isinstance(given, Mapping):
            return cls(given)
        unknown = [name for name in given if name not in ("take", "read")]
        if unknown:
            raise UserError(f"model.output has no field {unknown[0]!r} (fields: take, read)")
        return cls(**given)

    @property
    def spec(self) -> dict[str, Any] | None:
        """What enters the model's key; None if the net returns its logits as they are."""
        if self == Output():
            return None
        return {"take": self.take if self.take is None or _is_key(self.take) else _name(self.take), "read": self.read}

    def __call__(self, raw: Any) -> Any:
        """The logits in what the net returned. ``check`` says whether they are some."""
        if isinstance(self.take, str):
            raw = _field(raw, self.take)
        elif isinstance(self.take, int):
            raw = _item(raw, self.take)
        elif self.take is not None:
            raw = self.take(raw)
        if self.read == "sigmoid":
            if not isinstance(raw, Tensor | fx.Proxy):
                raise UserError(f"model.output: a single logit is a tensor (N, 1) or (N,), not {_described(raw)}")
            logit: Any = raw.reshape(-1, 1)
            return torch.cat((-logit / 2, logit / 2), 1)
        return raw

    def attach(self, net: nn.Module) -> None:
        """Let ``net`` return logits from now on. Its modules keep their paths."""
        if self == Output():
            return
        if isinstance(net, fx.GraphModule):
            raise UserError(
                "model.output: the output of a torch.fx graph cannot be read differently; give the net that the graph "
                "was made from, or return the logits in the graph"
            )
        replace_forward(net, lambda forward, x: self(forward(x)))

    def check(self, net: str, logits: Any, rows: int) -> None:
        """Raises UserError unless they are one logit for each of ``rows`` rows and two classes or more."""
        taken = "" if self.take is None else ", of which model.output takes that"
        if not isinstance(logits, Tensor):
            raise UserError(
                f"{net} returns {_described(logits)}{taken}; a classifier returns a tensor (N, K) of logits. Set "
                f"model.output to {_advice(logits)}"
            )
        shape = tuple(logits.shape)
        if shape in ((rows,), (rows, 1)):
            raise UserError(
                f"{net} returns one number a row, {shape}{taken}; a classifier returns a tensor (N, K) of logits. If "
                "it is the logit of two classes, set model.output to {read: sigmoid}; a value has no classes to explain"
            )
        if logits.ndim != 2 or shape[0] != rows or shape[1] < 2 or not logits.is_floating_point():
            kind = "" if logits.is_floating_point() else f" of {logits.dtype}"
            raise UserError(
                f"{net} returns {shape}{kind} for {rows} rows{taken}; a classifier returns a tensor (N, K) of logits. "
                "Set model.output to a function that makes one of it"
            )


def replace_forward(net: nn.Module, forward: Callable[[Callable[[Any], Any], Any], Any]) -> None:
    """From now on ``net(x)`` is ``forward(own, x)``, where ``own`` is its forward as it was.

    Its class becomes a subclass of it, as in ``torch.nn.utils.parametrize``: unlike a net around the net this
    keeps the paths of the modules, unlike a hook it can be traced.
    """
    base = type(net)

    def replaced(self: nn.Module, x: Any) -> Any:
        return forward(partial(base.forward, self), x)

    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    net.__class__ = type(base.__name__, (base,), {**names, "forward": replaced})


def _is_key(take: Any) -> bool:
    return isinstance(take, str | int)


def _name(function: Any) -> Any:
    """A function by its path; one without a path that leads to it, such as a lambda, also by its code."""
    if isinstance(function, partial):
        return [_name(function.func), *map(repr, function.args), repr(sorted(function.keywords.items()))]
    kind = function if hasattr(function, "__qualname__") else type(function)
    name = f"{kind.__module__}.{kind.__qualname__}"
    code = getattr(function, "__code__", None)
    if code is None or "<" not in name:
        return name
    cells = [repr(cell.cell_contents) for cell in function.__closure__ or ()]
    text = repr((code.co_code, code.co_consts, code.co_names, cells, function.__defaults__))
    return [name, hashlib.sha256(text.encode()).hexdigest()]


def _field(raw: Any, name: str) -> Any:
    if isinstance(raw, fx.Proxy):  # caught where the net is traced, which is then cut by hooks instead
        raise TypeError(f"a traced net does not tell whether {name!r} is a key or an attribute")
    found = raw.get(name) if isinstance(raw, Mapping) else getattr(raw, name, None)
    if found is None or isinstance(raw, Tensor):
        names = list(_fields(raw))
        hint = f"{did_you_mean(name, names)} (fields: {', '.join(names) or 'none'})"
        raise UserError(f"model.output: the net returns {_described(raw)}, which has no field {name!r}{hint}")
    return found


def _item(raw: Any, index: int) -> Any:
    if isinstance(raw, fx.Proxy):
        return operator.getitem(raw, index)
    if not isinstance(raw, tuple | list) or not -len(raw) <= index < len(raw):
        raise UserError(f"model.output: the net returns {_described(raw)}, which has no item {index}")
    return raw[index]


def _fields(raw: Any) -> dict[str, Any]:
    """The fields of an output that hold something."""
    if isinstance(raw, Tensor):
        return {}
    found = raw if isinstance(raw, Mapping) else getattr(raw, "__dict__", {})
    return {str(name): value for name, value in found.items() if value is not None}


def _described(raw: Any) -> str:
    """What a net returned, in a few words."""
    kind = type(raw).__name__
    if isinstance(raw, Tensor):
        return f"a tensor {tuple(raw.shape)}"
    if isinstance(raw, tuple | list):
        return f"a {kind} of {len(raw)} ({', '.join(map(_short, raw[:4]))}{', ...' if len(raw) > 4 else ''})"
    fields = [f"{name} {_short(value)}" for name, value in list(_fields(raw).items())[:6]]
    return f"a {kind}{' with ' + ', '.join(fields) if fields else ''}"


def _short(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def _advice(raw: Any) -> str:
    if isinstance(raw, tuple | list) and raw:
        return f"the index of the logits, 0 to {len(raw) - 1}"
    names = list(_fields(raw))
    return f"the field of the logits: {', '.join(names[:6])}" if names else "a function that makes them of it"
