"""What the command-line tools have in common: how they start, what they say of errors, the status they end with."""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path

from attrib.process.memory import keep_freed_memory
from attrib.process.signals import LEFT
from attrib.types import UserError

UNEXPECTED, USER, FAILED = 1, 2, 3  # beside 0 and LEFT; docs/how-to/cluster.md says what each means
WORST = (USER, UNEXPECTED, FAILED, LEFT, 0)  # what a person should hear of first


def ready() -> None:
    """For a process that computes: log lines, memory, and ``_target_: my_module.MyMethod`` from a file beside you."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    logging.getLogger("attrib").setLevel(logging.INFO)
    keep_freed_memory()
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)


def told(error: Exception) -> int:
    """Say what went wrong at once, because Hydra says it at the end of a grid, or never; the status it ends with."""
    if isinstance(error, UserError):
        print(f"error: {error}", file=sys.stderr, flush=True)
        return USER
    traceback.print_exception(error)
    return UNEXPECTED


def worst(statuses: Iterable[int]) -> int:
    """Of many: a grid goes on after a failure, but does not hide it. A status that is not ours is unexpected."""
    return min((s if s in WORST else UNEXPECTED for s in statuses), key=WORST.index, default=0)
