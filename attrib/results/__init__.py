"""Stored scores as labelled rows, tables, intervals and tests.

The package itself can be called: ``attrib.results("workdirs/demo")`` opens a work directory
(:class:`attrib.api.work_directory.Results`).

>>> attrib.results("workdirs/demo").compare("iba", "grad_cam")  # doctest: +SKIP
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any


class _Results(types.ModuleType):
    # A function of this name could not stand in the package `attrib`: importing this package would replace it.
    def __call__(self, folder: str | Path, *, confidence: float = 0.95) -> Any:
        return importlib.import_module("attrib.api.work_directory").Results(folder, confidence=confidence)


sys.modules[__name__].__class__ = _Results
