"""How the subcommands report an error, and the exit status they end with."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterable

from attrib.process.signals import LEFT
from attrib.types import UserError

UNEXPECTED, USER, FAILED = 1, 2, 3  # beside 0 and LEFT; docs/how-to/cluster.md says what each means
WORST = (USER, UNEXPECTED, FAILED, LEFT, 0)  # what a person should hear of first comes first


def report_error(error: Exception) -> int:
    """Print what went wrong at once, not at the end of a grid. Returns the exit status that it stands for."""
    if isinstance(error, UserError):
        print(f"error: {error}", file=sys.stderr, flush=True)
        return USER
    traceback.print_exception(error)
    return UNEXPECTED


def worst(statuses: Iterable[int]) -> int:
    """The exit status of a grid, which goes on after a failure but does not hide it; unknown ones are UNEXPECTED."""
    return min((s if s in WORST else UNEXPECTED for s in statuses), key=WORST.index, default=0)
