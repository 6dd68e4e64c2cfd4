"""How the subcommands report an error, and the exit status they end with."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterable

from attrib.errors import GoneError, UserError, printable
from attrib.process.signals import LEFT

SHOWN = 10  # files named of those that cannot be read

UNEXPECTED, USER, FAILED, DAMAGED, GONE = (
    1,
    2,
    3,
    4,
    5,
)  # beside 0 and LEFT; docs/how-to/cluster.md says what each means
WORST = (USER, UNEXPECTED, GONE, FAILED, LEFT, 0)  # what a person should hear of first comes first


def report_error(error: Exception) -> int:
    """Print what went wrong at once, not at the end of a grid. Returns the exit status that it stands for."""
    if isinstance(error, UserError):
        print(f"error: {lines(str(error))}", file=sys.stderr, flush=True)
        return GONE if isinstance(error, GoneError) else USER
    print(lines("".join(traceback.format_exception(error))), file=sys.stderr, flush=True)
    return UNEXPECTED


def lines(text: str) -> str:
    """A message of several lines, without control characters."""
    return "\n".join(map(printable, text.split("\n")))


def report_broken(broken: Iterable[str]) -> int:
    """Name the files that could not be read; returns DAMAGED if there are any, else 0."""
    named = list(dict.fromkeys(broken))
    if not named:
        return 0
    count = "1 file" if len(named) == 1 else f"{len(named)} files"
    more = [f"and {len(named) - SHOWN} more"] if len(named) > SHOWN else []
    print(
        f"left out: {count} of which not everything can be read; see `attrib cache verify`",
        *(f"  {printable(line)[:500]}" for line in (*named[:SHOWN], *more)),
        sep="\n",
        file=sys.stderr,
        flush=True,
    )
    return DAMAGED


def worst(statuses: Iterable[int]) -> int:
    """The exit status of a grid, which goes on after a failure but does not hide it; unknown ones are UNEXPECTED."""
    return min((s if s in WORST else UNEXPECTED for s in statuses), key=WORST.index, default=0)
