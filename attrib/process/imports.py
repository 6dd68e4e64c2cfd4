"""What is imported, and what is not: a process that starts in a grid of jobs shall start quickly."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def without(*names: str) -> Iterator[None]:
    """Meanwhile packages and modules that are not loaded yet count as not installed.

    >>> with without("turtledemo"):
    ...     import turtledemo
    Traceback (most recent call last):
    ModuleNotFoundError: import of turtledemo halted; None in sys.modules
    """
    modules: dict[str, Any] = sys.modules
    left_out = [name for name in names if name not in modules]
    modules.update(dict.fromkeys(left_out))
    try:
        yield
    finally:
        for name in left_out:
            modules.pop(name, None)
