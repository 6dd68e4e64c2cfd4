"""attrib: attribution experiments whose numbers can be trusted, resumed and compared."""

from __future__ import annotations

import importlib
import random
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attrib.api.comparison import Comparison
    from attrib.api.explanation import Explanation
    from attrib.api.front import compare, evaluate, explain
    from attrib.api.parts import dataset
    from attrib.errors import SampleError, UserError

__version__ = "0.1.0"

__all__ = [
    "Comparison", "Explanation", "SampleError", "UserError", "compare", "dataset", "evaluate", "explain", "results",
]  # fmt: skip

_HOMES = {
    "Comparison": "attrib.api.comparison",
    "Explanation": "attrib.api.explanation",
    "SampleError": "attrib.errors",
    "UserError": "attrib.errors",
    "compare": "attrib.api.front",
    "dataset": "attrib.api.parts",
    "evaluate": "attrib.api.front",
    "explain": "attrib.api.front",
}


def __getattr__(name: str) -> Any:
    """What ``attrib.api`` offers, imported when it is asked for: torch takes seconds."""
    if name != "results" and name not in _HOMES:
        raise AttributeError(f"module 'attrib' has no attribute {name!r}")
    state = random.getstate()
    try:
        if name == "results":  # a package that can be called
            return importlib.import_module("attrib.results")
        return getattr(importlib.import_module(_HOMES[name]), name)
    finally:
        random.setstate(state)  # rich draws a number when it is imported


def __dir__() -> list[str]:
    return [*globals(), *__all__]
