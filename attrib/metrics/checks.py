"""Refusing fields that make no sense, when a metric is built and not when the first map is scored."""

from __future__ import annotations

import math
from collections.abc import Sequence

from attrib.types import UserError


def refusal(metric: object, field: str, wanted: str) -> UserError:
    """The error that names class, field and value, and says what the value must be."""
    return UserError(f"{type(metric).__name__}.{field} is {getattr(metric, field)!r}, must be {wanted}")


def one_of(metric: object, **choices: Sequence[str]) -> None:
    """Every field named must have one of these values; else UserError."""
    for field, allowed in choices.items():
        if getattr(metric, field) not in allowed:
            raise refusal(metric, field, f"one of {', '.join(allowed)}")


def at_least(metric: object, **bounds: float) -> None:
    """Every field named must be a finite number from its bound on, or None where that is a default; else UserError."""
    for field, least in bounds.items():
        value = getattr(metric, field)
        if value is not None and not least <= value < math.inf:
            raise refusal(metric, field, f"at least {least}" if least else "0 or a positive number")


def positive(metric: object, *fields: str) -> None:
    """Every field named must be a finite number above 0; else UserError."""
    for field in fields:
        if not 0 < getattr(metric, field) < math.inf:
            raise refusal(metric, field, "a positive number")
