"""attrib: attribution experiments whose numbers can be trusted, resumed and compared."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attrib.api import Comparison, Explanation, compare, dataset, evaluate, explain

__version__ = "0.1.0"

__all__ = ["Comparison", "Explanation", "compare", "dataset", "evaluate", "explain"]


def __getattr__(name: str) -> Any:
    """What ``attrib.api`` offers, imported when it is asked for: torch takes seconds."""
    if name not in __all__:
        raise AttributeError(f"module 'attrib' has no attribute {name!r}")
    return getattr(importlib.import_module("attrib.api"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
