"""What is imported, and what is not: a process that starts in a grid of jobs shall start quickly."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def without(name: str) -> Iterator[None]:
    """Meanwhile a package that is not loaded yet counts as not installed.

    >>> with without("turtledemo"):
    ...     import turtledemo
    Traceback (most recent call last):
    ModuleNotFoundError: import of turtledemo halted; None in sys.modules
    """
    modules: dict[str, Any] = sys.modules
    if name in modules:
        yield
        return
    modules[name] = None
    try:
        yield
    finally:
        modules.pop(name, None)
