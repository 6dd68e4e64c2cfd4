"""How the scores of the classes come out of what a net returns, and the probabilities out of the scores."""

from __future__ import annotations

import dataclasses
import hashlib
import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from attrib.models.output_kind import Link, OutputKind
from attrib.models.output_kinds import KINDS, Classes
from attrib.types import UserError, did_you_mean

Take = str | int | Callable[[Any], Tensor]
ScoreScale = Literal["probability", "logit"]  # in what a method or metric measures the target's score

WITHOUT = "the output of the net is read in a way that has no probabilities (model.output.read)"


def probabilities(logits: Tensor, several: bool = False, link: Link | None = "softmax") -> Tensor:
    """(N, K) -> (N, K), by the link of the model (``Classifier.link``); ``several`` labels at once: sigmoids.

    Raises UserError for scores that have none.
    """
    return logits.sigmoid() if _apart(several, link) else logits.softmax(dim=1)


def log_probabilities(logits: Tensor, several: bool = False, link: Link | None = "softmax") -> Tensor:
    """The logarithms of ``probabilities``, which do not underflow."""
    if _apart(several, link):
        return torch.nn.functional.logsigmoid(logits)
    return logits.log_softmax(dim=1)


def _apart(several: bool, link: Link | None) -> bool:
    """Whether each class is true or not by itself."""
    if link is None:
        raise UserError(f"probabilities are asked for, but {WITHOUT}")
    return several or link == "sigmoid"


@dataclass(frozen=True)
class Output:
    """``model.output``: how the scores (N, K) come out of what the net returns.

    take   a field of it ("logits"), an index (0), or a function of it; None: it is what ``read`` wants
    read   an ``OutputKind``, or the name of one: "classes", "probabilities", "sigmoid", "value", "region",
           "similarity", "next_token"

    >>> Output.of({"take": "logits", "read": "sigmoid"}).spec
    {'take': 'logits', 'read': 'sigmoid'}
    """

    take: Take | None = None
    read: OutputKind = dataclasses.field(default_factory=Classes)

    def __post_init__(self) -> None:
        if not isinstance(self.read, OutputKind):
            object.__setattr__(self, "read", _kind(self.read, {}))
        if self.take is not None and (isinstance(self.take, bool) or not (_is_key(self.take) or callable(self.take))):
            raise UserError(f"model.output: take must be a field, an index or a function, not {self.take!r}")

    @classmethod
    def of(cls, given: Output | Mapping[str, Any] | Take | None) -> Output:
        """From ``{take: ..., read: ..., ...}``, with the fields of the kind, or from what to take alone.

        Raises UserError.
        """
        if isinstance(given, Output):
            return given
        if not isinstance(given, Mapping):
            return cls(given)
        fields = {str(name): value for name, value in given.items()}
        take, read = fields.pop("take", None), fields.pop("read", "classes")
        if isinstance(read, OutputKind):
            if fields:
                raise UserError(f"model.output has no field {next(iter(fields))!r} (fields: take, read)")
            return cls(take, read)
        return cls(take, _kind(read, fields))

    @property
    def spec(self) -> dict[str, Any] | None:
        """What enters the model's key; None if the net returns its logits as they are."""
        if self._as_it_is:
            return None
        take = self.take if self.take is None or _is_key(self.take) else _name(self.take)
        return {"take": take, "read": self.read.READ, **self.read.spec}

    @property
    def _as_it_is(self) -> bool:
        return self.take is None and type(self.read) is Classes

    def attach(self, net: nn.Module) -> None:
        """Let ``net`` return scores from now on. Its modules keep their paths."""
        if self._as_it_is:
            return
        if isinstance(net, fx.GraphModule):
            raise UserError(
                "model.output: the output of a torch.fx graph cannot be read differently; give the net that the graph "
                "was made from, or return the logits in the graph"
            )
        self.read.prepare(net)
        replace_forward(net, lambda net, own, x: self.read.scores(net, self._taken(own(x)), x))

    def _taken(self, raw: Any) -> Any:
        if isinstance(self.take, str):
            return _field(raw, self.take)
        if isinstance(self.take, int):
            return _item(raw, self.take)
        return raw if self.take is None else self.take(raw)

    @contextmanager
    def alone(self, net: nn.Module) -> Iterator[list[Tensor]]:
        """Meanwhile every row that goes through ``net`` is a sample of its own, none a perturbed copy of another.

        Gives a list, to which every pass adds (N, H, W), the class of each pixel.
        """
        seen: list[Tensor] = []
        with self.explaining(net, seen):
            yield seen

    @contextmanager
    def explaining(self, net: nn.Module, first: Tensor | list[Tensor]) -> Iterator[None]:
        """Meanwhile every row is a perturbed copy of the one sample whose pixels have the classes ``first``, (1, H, W).

        It makes a difference to kinds that are ``per_sample`` only.
        """
        if not self.read.per_sample:
            yield
            return
        before, net.output_first = net.output_first, first  # type: ignore[assignment]
        try:
            yield
        finally:
            net.output_first = before

    def check(self, net: str, logits: Any, rows: int) -> None:
        """Raises UserError unless they are scores of each of ``rows`` rows for as many classes as there must be."""
        taken = "" if self.take is None else ", of which model.output takes that"
        wanted = "a classifier returns a tensor (N, K) of logits"
        if not isinstance(logits, Tensor):
            raise UserError(
                f"{net} returns {_described(logits)}{taken}; {wanted}. Set model.output to {_advice(logits)} "
                "(in Python: Classifier(net, output=...))"
            )
        shape = tuple(logits.shape)
        if logits.ndim == 2 and shape[0] == rows and shape[1] >= self.read.LEAST and logits.is_floating_point():
            return
        if shape in ((rows,), (rows, 1)):
            raise UserError(
                f"{net} returns one number a row, {shape}{taken}; {wanted}. If it is the logit of two classes, set "
                "model.output to {read: sigmoid}; if its probability, to {read: sigmoid, of: probability}; if it "
                "is a value, to {read: value}"
            )
        kind = "" if logits.is_floating_point() else f" of {logits.dtype}"
        others = {
            3: ". If these are logits of next tokens, set model.output to {read: next_token}; else to",
            4: ". If this is a map of logits, set model.output to {read: region, region: ...}; else to",
        }
        raise UserError(
            f"{net} returns {shape}{kind} for {rows} rows{taken}; {wanted}"
            f"{others.get(logits.ndim, '. Set model.output to')} a function that makes one of it"
        )


def _kind(read: Any, fields: Mapping[str, Any]) -> OutputKind:
    """Raises UserError for a kind or a field that does not exist."""
    kind = KINDS.get(read) if isinstance(read, str) else None
    if kind is None:
        *names, last = KINDS
        raise UserError(f"model.output: read must be {', '.join(names)} or {last}, not {read!r}")
    known = [field.name for field in dataclasses.fields(kind) if field.init]
    for name in fields:
        if name not in known:
            every = ["take", "read", *known]
            raise UserError(
                f"model.output has no field {name!r}{did_you_mean(name, every)} (fields with read={read}: "
                f"{', '.join(every)})"
            )
    return kind(**fields)


def replace_forward(net: nn.Module, forward: Callable[[nn.Module, Callable[[Any], Any], Any], Any]) -> None:
    """From now on ``net(x)`` is ``forward(net, own, x)``, where ``own`` is its forward as it was.

    Its class becomes a subclass of it, as in ``torch.nn.utils.parametrize``: unlike a net around the net this
    keeps the paths of the modules, unlike a hook it can be traced.
    """
    base = type(net)

    def replaced(self: nn.Module, x: Any) -> Any:
        return forward(self, partial(base.forward, self), x)

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
    article = "an" if kind[0] in "AEIOU" else "a"
    return f"{article} {kind}{' with ' + ', '.join(fields) if fields else ''}"


def _short(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def _advice(raw: Any) -> str:
    if isinstance(raw, tuple | list) and raw:
        return f"the index of the logits, 0 to {len(raw) - 1}"
    names = list(_fields(raw))
    return f"the field of the logits: {', '.join(names[:6])}" if names else "a function that makes them of it"
