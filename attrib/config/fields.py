"""Values of YAML in the one form that an annotation has for them."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from attrib.types import UserError


def is_node(value: Any) -> bool:
    return isinstance(value, Mapping) and "_target_" in value


def _as(hint: Any, value: Any) -> Any:
    """``value`` in the one form that its annotation has for it, so that 10 and 10.0 have the same key.

    An annotation that is not understood accepts anything. Raises TypeError.
    """
    origin, arms = get_origin(hint), get_args(hint)
    if is_node(value):  # an object to come
        return value
    if origin in (Union, types.UnionType):
        for arm in sorted(arms, key=lambda arm: type(value) is not arm):  # 1 stays 1 in float | int
            try:
                return _as(arm, value)
            except TypeError:
                continue
        raise TypeError
    if origin is Literal:
        good = any(type(value) is type(arm) and value == arm for arm in arms)
    elif hint is float:
        good = isinstance(value, (int, float)) and not isinstance(value, bool)
        value = float(value) if good else value
    elif hint is int:
        good = isinstance(value, int) and not isinstance(value, bool)
    elif hint in (bool, str, type(None)) or (isinstance(hint, type) and dataclasses.is_dataclass(hint)):
        good = isinstance(value, hint)
    elif origin in (tuple, list, Sequence):
        good = isinstance(value, (tuple, list))
        if good and origin is tuple:
            each = arms[:1] * len(value) if arms[-1:] == (...,) else arms
            good = len(each) == len(value)
            value = tuple(map(_as, each, value))
        elif good:
            value = [_as(arms[0], v) for v in value]
    else:
        good = True
    if not good:
        raise TypeError
    return value


def _spelled(hint: Any) -> str:
    """An annotation in words for people who write YAML."""
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_spelled(arm) for arm in get_args(hint))
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    if hint is type(None):
        return "null"
    return str(hint) if get_args(hint) else getattr(hint, "__name__", str(hint))


def checked_value(name: str, hint: Any, value: Any) -> Any:
    try:
        return _as(hint, value)
    except (TypeError, OverflowError) as error:
        raise UserError(f"{name} must be {_spelled(hint)}, not {value!r}") from error


def hints_of(what: Callable[..., Any]) -> Mapping[str, Any]:
    """The annotations of what a call of ``what`` takes; none where they cannot be read."""
    plain_class = isinstance(what, type) and not dataclasses.is_dataclass(what)
    try:
        return get_type_hints(what.__init__ if plain_class else what)
    except Exception:  # a name that is imported for type checkers only, a builtin without annotations
        return {}
