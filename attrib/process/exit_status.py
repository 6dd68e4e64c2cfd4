"""How the subcommands report an error, and the exit status they end with."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterable, Sequence

from attrib.errors import GoneError, UserError, printable
from attrib.process.signals import LEFT

SHOWN = 10  # files named of those that cannot be read
WIDE = 200  # characters of a line of a summary

UNEXPECTED, USER, FAILED, DAMAGED, GONE = (
    1,
    2,
    3,
    4,
    5,
)  # beside 0 and LEFT; docs/how-to/cluster.md says what each means
WORST = (USER, UNEXPECTED, GONE, FAILED, LEFT, 0)  # what a person should hear of first comes first


def report_error(error: Exception, cell: str = "") -> int:
    """Print what went wrong at once, not at the end of a grid. Returns the exit status that it stands for.

    cell   which one of a grid it was
    """
    of = f"{lines(cell)}: " if cell else ""
    if isinstance(error, UserError):
        print(f"error: {of}{lines(str(error))}", file=sys.stderr, flush=True)
        return GONE if isinstance(error, GoneError) else USER
    if of:
        print(f"error: {of}{type(error).__name__}", file=sys.stderr, flush=True)
    print(lines("".join(traceback.format_exception(error))), file=sys.stderr, flush=True)
    return UNEXPECTED


def report_refused(refused: Sequence[tuple[str, str]], cells: int) -> None:
    """At the end of a grid of so many cells, whose errors may be far above: which did not end well, a line each."""
    if not refused:
        return
    print(f"{len(refused)} of {cells} cells did not end well:", file=sys.stderr)
    for cell, why in refused:
        first = next(iter(why.splitlines()), "")
        print(f"  {printable(cell)}: {printable(first)}"[:WIDE], file=sys.stderr)
    sys.stderr.flush()


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
