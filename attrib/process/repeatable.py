"""The same bits in every run on the same machine, where torch can."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def repeatable(wanted: bool) -> Iterator[None]:
    """If wanted, torch takes algorithms whose sums have a fixed order, and warns of operations that have none.

    On a GPU other algorithms let the order depend on which thread is first. ``CUBLAS_WORKSPACE_CONFIG`` is set unless
    it was, and stays: cuBLAS reads it once, when it starts.
    """
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    more: Any = torch.utils.deterministic
    fill = more.fill_uninitialized_memory
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    more.fill_uninitialized_memory = False  # it costs time, and is for finding mistakes
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        more.fill_uninitialized_memory = fill
