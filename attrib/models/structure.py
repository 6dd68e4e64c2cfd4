"""What a net computes beside its weights, as far as it can be told from outside.

It is part of the key of a net that was handed over in Python, and by it a run sees that one's own code has changed.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import sysconfig
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType
from typing import Any

from torch import fx, nn

from attrib import keys

_HOW = ("training", "name_or_path")  # of a module: how it is used, and where its weights lay
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def structure(net: nn.Module) -> dict[str, Any]:
    """A description that differs between nets that have the same weights and compute something else from them.

    What every module says of itself (``extra_repr``), plain values and functions that are its attributes, and the code
    of what is no part of torch: forwards, of classes or of one object, and hooks. Functions that these call are not
    looked into.

    >>> one, other = (nn.Sequential(nn.Linear(2, 2), last) for last in (nn.ReLU(), nn.Softplus()))
    >>> structure(one) == structure(other)
    False
    """
    code: dict[str, str] = {}
    modules: dict[str, Any] = {}
    for path, module in net.named_modules():
        traced = isinstance(module, fx.GraphModule)  # each has a class of its own
        name = keys.stable_name(fx.GraphModule if traced else type(module))
        if traced:
            code[f"{path}: {name}"] = str(module.code)
        else:
            code |= {keys.stable_name(kind): _code(kind) for kind in _written(type(module))}
        hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
        for function in ([] if traced else [vars(module).get("forward")]) + hooks:
            if function is not None:
                code[f"{path}: {_name(function)}"] = _code(function)
        own = {key: value for key, value in vars(module).items() if not key.startswith("_") and key not in _HOW}
        known = {key: said for key, value in own.items() if (said := _said(value)) is not None}
        modules[path] = [name, _ADDRESS.sub("", module.extra_repr()), known]
    return {"modules": modules, "code": code}


def own_code(*classes: type) -> str | None:
    """A digest of the code of those classes that are part of no installed package, nor of Python; None if all are."""
    own = {keys.stable_name(kind): _code(kind) for one in classes for kind in _written(one) if not _installed(kind)}
    return keys.digest(own) if own else None


def _written(kind: type) -> list[type]:
    """A class and those that it is made of, down to torch's."""
    return [one for one in kind.__mro__ if one.__module__.partition(".")[0] not in ("torch", "builtins")]


def _installed(kind: type) -> bool:
    if kind.__module__.partition(".")[0] in ("attrib", "torch"):
        return True
    try:
        parts = Path(inspect.getfile(kind)).resolve().parts
    except (OSError, TypeError):  # typed into a shell, or made by a program
        return False
    python = Path(sysconfig.get_path("stdlib")).resolve().parts
    return parts[: len(python)] == python or not {"site-packages", "dist-packages"}.isdisjoint(parts)


def _said(value: Any, depth: int = 3) -> Any:
    """A plain value, or the name of a function; None for anything else."""
    if isinstance(value, tuple | list):
        return [_said(one, depth - 1) for one in value] if depth else None  # a list may hold itself
    if isinstance(value, bool | int | float | str):
        return value
    return _name(value) if isinstance(value, FunctionType | BuiltinFunctionType) else None


def _name(function: Any) -> str:
    return str(getattr(function, "__qualname__", type(function).__qualname__))


def _code(thing: Any) -> str:
    """The source of a class or function, without comments; where there is none, as in a shell, its instructions."""
    if isinstance(thing, FunctionType) and thing.__closure__:
        return json.dumps([_said(one) for one in inspect.getclosurevars(thing).nonlocals.values()]) + _source(thing)
    return _source(thing)


def _source(thing: Any) -> str:
    try:
        return ast.unparse(ast.parse(textwrap.dedent(inspect.getsource(thing))))
    except (OSError, TypeError, SyntaxError):  # the source of a lambda is the line that it stands in
        return _instructions(vars(thing).get("forward") if isinstance(thing, type) else thing)


def _instructions(function: Callable[..., Any] | None) -> str:
    code = getattr(inspect.unwrap(function) if callable(function) else None, "__code__", None)
    return "" if code is None else repr(_parts(code))


def _parts(code: CodeType) -> tuple[Any, ...]:
    constants = [_parts(one) if isinstance(one, CodeType) else _constant(one) for one in code.co_consts]
    return code.co_code, constants, code.co_names


def _constant(value: Any) -> str:
    """The same in every process, which ``repr`` of a set of texts is not."""
    return repr(sorted(map(repr, value))) if isinstance(value, frozenset) else repr(value)
