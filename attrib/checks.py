"""Checks of a dataclass's fields when it is built, so that a value without sense is refused before anything runs."""

from __future__ import annotations

import math
from collections.abc import Sequence

from attrib.errors import UserError


def require(
    owner: object,
    *fields: str,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    one_of: Sequence[str] | None = None,
    or_none: bool = False,
) -> None:
    """Check the values of these fields of ``owner``; made to be called from its ``__post_init__``.

    A number must be finite and within the given bounds, of which there may be none; a word must be one of
    ``one_of``. None is allowed with ``or_none`` only.

    Raises UserError that names the class, the field, its value and what is allowed.

    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True)
    ... class Blur:
    ...     sigma: float
    ...     def __post_init__(self):
    ...         require(self, "sigma", at_least=0)
    >>> Blur(sigma=-1.0)
    Traceback (most recent call last):
        ...
    attrib.errors.UserError: Blur.sigma is -1.0, must be at least 0
    """
    bounds = {"above": above, "at least": at_least, "below": below, "at most": at_most}
    if one_of is not None:
        allowed = f"one of {', '.join(one_of)}"
    else:
        allowed = " and ".join(f"{name} {bound}" for name, bound in bounds.items() if bound is not None)
        allowed = allowed or "a finite number"
    for field in fields:
        value = getattr(owner, field)
        if value is None and or_none:
            continue
        if one_of is not None:
            good = value in one_of
        else:
            good = (
                value is not None
                and math.isfinite(value)
                and (above is None or value > above)
                and (at_least is None or value >= at_least)
                and (below is None or value < below)
                and (at_most is None or value <= at_most)
            )
        if not good:
            null = ", or null" if or_none else ""
            raise UserError(
                f"{type(owner).__name__}.{field} is {value!r}, must be {allowed or 'a finite number'}{null}"
            )
