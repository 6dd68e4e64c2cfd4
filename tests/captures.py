"""Captures without the detours of torch.export, which cost each .3 s; the tests make some thousand captures.

Before torch takes composite operations apart it lists them all, and tells each of 500 to be what it is anyway.
test_graph.py compares the graphs with those of torch as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.export import exported_program as PLACE

NAMES = ("_collect_all_valid_cia_ops", "_override_composite_implicit_decomp")  # not public: perhaps they are not there
TORCHS = {name: getattr(PLACE, name) for name in NAMES if hasattr(PLACE, name)}


@functools.cache
def _listed(libraries: tuple[str, ...]) -> frozenset[Any]:
    return frozenset(TORCHS[NAMES[0]]())


def _is_itself(op: Any, parts: Any) -> bool:
    return isinstance(parts, functools.partial) and parts.keywords.get("kernel") is op


def _overridden(parts_of: dict[Any, Callable[..., Any]]) -> Any:
    return TORCHS[NAMES[1]]({op: parts for op, parts in parts_of.items() if not _is_itself(op, parts)})


DIRECT = dict(zip(NAMES, (lambda: set(_listed(tuple(torch.ops))), _overridden))) if len(TORCHS) == len(NAMES) else {}
