"""What several subcommands share: how errors end, how a grid is gone through, how tables are printed."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import io
import logging
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from attrib.errors import UserError
from attrib.process import exit_status
from attrib.process.memory import keep_freed_memory
from attrib.process.signals import LEFT, Interrupted, Stop, watching

if TYPE_CHECKING:
    from attrib.config.compose import CommandLine, Composition
    from attrib.results.written import TextTable

# Cells of a grid that the line at their end tells apart.
NAMED = re.compile(r"((dataset|model|method)=[\w.-]+ ?)+")


class _Printable(logging.Formatter):
    """For a terminal, which what a file name or a class says must not steer."""

    def format(self, record: logging.LogRecord) -> str:
        return exit_status.lines(super().format(record))


def prepare() -> None:
    """For a process that computes: log lines on the terminal, and memory that is kept once it was got."""
    logging.basicConfig(level=logging.WARNING)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(_Printable("%(levelname)s %(message)s"))
    logging.getLogger("attrib").setLevel(logging.INFO)
    logging.getLogger("huggingface_hub").propagate = False  # it has a handler of its own: each line came twice
    keep_freed_memory()


def check_confidence(value: float) -> None:
    """Raises UserError."""
    if not 0 < value < 1:
        raise UserError(f"--confidence {value}: expected a number between 0 and 1, such as 0.95")


def guarded(work: Callable[[], int]) -> int:
    """The exit status of a subcommand that reads or writes files: 2 with one line for what a person can put right."""
    try:
        return work()
    except (UserError, OSError) as error:
        if isinstance(error, BrokenPipeError):
            raise
        return exit_status.report_error(error if isinstance(error, UserError) else UserError(str(error)))
    except KeyboardInterrupt:
        return 130


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Around what writes the page ``out``: that it cannot be written becomes a UserError, which says what to do.

    An error of a file that is only read stays as it is.
    """
    try:
        yield
    except OSError as error:
        named = Path(error.filename) if isinstance(error.filename, str) else None
        ours = named is not None and (named == out or named.name.startswith(f".{out.name}.") or named in out.parents)
        if not ours and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        raise UserError(
            f"{out} cannot be written: {error.strerror or error}; --out FILE writes it elsewhere"
        ) from error


def grid(name: str, args: argparse.Namespace, compute: Callable[[Composition], int]) -> int:
    """``compute`` for every cell of a command line; the worst exit status.

    A cell that fails, or cannot even be composed, does not stop the others; being told to stop does.
    name   the primary configuration: run, sanity, graph, train
    """

    from attrib.config.compose import CommandLine

    def work(stop: Stop) -> int:
        line = CommandLine.of(args.overrides, args.config_dir, getattr(args, "multirun", False))
        return each(name, line, line.cells(), compute, show=bool(args.cfg))

    return watched(work)


def watched(work: Callable[[Stop], int]) -> int:
    """The exit status of ``work``, or of its mistake, or of being told to stop between two cells."""
    with watching() as stop:
        try:
            with stop.immediately():
                return work(stop)
        except UserError as error:
            return exit_status.report_error(error)
        except Interrupted as stopped:
            print(f"{stopped}; the same command goes on", flush=True)
            return LEFT


def each(
    name: str,
    line: CommandLine,
    cells: Sequence[Sequence[str]],
    compute: Callable[[Composition], int],
    *,
    show: bool = False,
) -> int:
    """As ``grid``, of these cells; what tells a cell from the others is printed where its names will not say it.

    Raises Interrupted.
    """
    from omegaconf import OmegaConf  # not for tools that only look

    from attrib.config.compose import compose

    statuses: list[int] = []
    refused: list[tuple[str, str]] = []
    try:
        for overrides, cell in zip(cells, told_apart(cells), strict=True):
            composition = None
            try:
                composition = compose(name, overrides, line.folder)
                if show:
                    print(OmegaConf.to_yaml(OmegaConf.create(composition.values)), end="")
                    continue
                if cell and not NAMED.fullmatch(cell):
                    print(exit_status.lines(cell), flush=True)
                statuses.append(compute(composition))
                if statuses[-1] == exit_status.FAILED:
                    refused.append((cell, "samples failed, see above"))
            except Exception as error:
                said = composition.blamed(error) if composition and isinstance(error, UserError) else error
                statuses.append(exit_status.report_error(said, cell))
                why = str(said) if isinstance(said, UserError) else f"{type(said).__name__}: {said}"
                refused.append((cell, why))
            if statuses[-1] == LEFT:
                return LEFT
    finally:
        if len(cells) > 1:
            exit_status.report_refused(refused, len(cells))
    return exit_status.worst(statuses)


def told_apart(cells: Sequence[Sequence[str]]) -> list[str]:
    """What each cell of a grid is called: the overrides that not all of them have; "" for one alone.

    >>> told_apart([("seed=1", "method=iba"), ("seed=1", "method=lime")])
    ['method=iba', 'method=lime']
    """
    if len(cells) < 2:
        return [""] * len(cells)
    common = set.intersection(*map(set, cells))
    return [" ".join(o for o in cell if o not in common) or " ".join(cell) for cell in cells]


def console(*, apart: bool = False) -> Console:
    """The terminal, or a stand-in for a file or a pipe (``apart``): a table must never be folded for one."""
    return Console(file=io.StringIO(), width=400) if apart or not sys.stdout.isatty() else Console()


def show(tables: Iterable[TextTable]) -> None:
    """Tables on the terminal, whose titles and notes are as wide as it is, however narrow they are."""
    from rich.text import Text

    from attrib.results.written import to_terminal  # brings pandas, which not every tool needs

    on = console()
    for table in tables:
        on.print(Text(table.title, style="bold"))
        on.print(to_terminal(dataclasses.replace(table, title="", notes=())))
        for note in table.notes:
            on.print(Text(note))
    print(printed(on), end="")


def printed(console: Console) -> str:
    """What was written to a stand-in; "" of a terminal, where it stands already."""
    if not isinstance(console.file, io.StringIO):
        return ""
    return "".join(f"{line.rstrip()}\n" for line in console.file.getvalue().splitlines())
