"""A status for people: tables on a terminal, plain lines in a pipe."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from attrib.errors import printable
from attrib.store.workers import DEAD, FAILED, FINISHED, RUNNING, STOPPED, Worker, counted
from attrib.upkeep.status import CellStatus, StageStatus, Status

STYLES = {RUNNING: "green", FINISHED: "dim", STOPPED: "yellow", FAILED: "red", DEAD: "red"}
BROKEN = 5  # files that cannot be read, named of each cell
MOST = 40  # workers listed; the others are counted


def duration(seconds: float) -> str:
    """``45 s``, ``12 min``, ``3.5 h``, ``2.1 d``."""
    for size, unit, below in ((1, "s", 99.5), (60, "min", 99.5), (3600, "h", 99.5)):
        if seconds / size < below:
            value = seconds / size
            return f"{value:.0f} {unit}" if unit != "h" or value >= 10 else f"{value:.1f} {unit}"
    return f"{seconds / 86400:.1f} d"


def speed(rate: float | None) -> str:
    """Samples per second, minute or hour, whichever is at least one."""
    if not rate:
        return ""
    for factor, unit in ((1, "s"), (60, "min"), (3600, "h")):
        if rate * factor >= 1:
            return f"{rate * factor:.3g}/{unit}"
    return f"{rate * 86400:.3g}/d"


def drawn(status: Status, lines: int = 5) -> RenderableType:
    """Cells with their stages; workers; the newest ``lines`` of the logs of running, dead and failed ones; failures."""
    parts: list[RenderableType] = [_head(status), _cells(status)]
    workers = [worker for cell in status.cells if cell.left or cell.running for worker in cell.workers]
    if workers:
        parts += [Text(), _workers(workers)]
    for fit in status.fits:
        needing = ", ".join(fit.cells) or "no cell here"
        parts.append(
            Text(f"\nstate {fit.name} is being fitted (for {needing}); last saved {duration(fit.age)} ago", "cyan")
        )
    for moved in status.moved:
        head, *rest = moved.advice
        parts.append(Text(f"\n{printable(head)}", style="yellow"))
        parts += [Padding(Text(printable(line)), (0, 0, 0, 2)) for line in rest]
    for worker in workers:
        if lines and worker.state in (RUNNING, DEAD, FAILED):
            parts += _log(worker, lines)
    for cell in status.cells:
        parts += _problems(cell, lines)
    return Group(*parts)


def _head(status: Status) -> Text:
    """The totals, in one line."""
    maps = [cell.stages[0] for cell in status.cells]
    running = sum(len(cell.running) for cell in status.cells)
    words = [
        f"{status.root}: {counted(len(status.cells), 'cell')}",
        f"{sum(m.done for m in maps)} maps done",
        f"{sum(m.todo for m in maps)} to do",
        f"{sum(m.failed for m in maps)} failed",
        f"{counted(running, 'worker')} running",
    ]
    return Text(", ".join(words), style="bold")


def _cells(status: Status) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("cell", no_wrap=True)
    for name in ("done", "to do", "failed", "rate", "left"):
        table.add_column(name, justify="right", no_wrap=True)
    for cell in status.cells:
        about = "" if cell.samples is not None else "  (no samples.json)"
        table.add_row(Text(printable(cell.name) + about, style="bold"), "", "", "", "", Text(_time_left(cell)))
        for stage in cell.stages:
            table.add_row(*_stage(stage))
    return table


def _time_left(cell: CellStatus) -> str:
    if not cell.left:
        return "" if cell.running else "done"
    if cell.refused:
        return "refused"
    workers = len(cell.running)
    if not workers:
        return f"{duration(cell.seconds)} of work" if cell.seconds is not None else "no worker"
    if cell.eta is not None:
        return duration(cell.eta)
    known = sum(stage.todo * stage.seconds for stage in cell.stages if stage.asked and stage.seconds is not None)
    return f"over {duration(known / workers)}" if known else "not known yet"


def _stage(stage: StageStatus) -> list[Text]:
    dim = "" if stage.asked else "dim"
    todo = str(stage.todo) if stage.asked else f"({stage.todo})"
    todo += f" ({stage.unseen} unseen)" if stage.unseen else ""
    return [
        Text(f"  {printable(stage.name)}", style=dim),
        Text(str(stage.done), style=dim),
        Text(todo, style=dim),
        Text(str(stage.failed), style="red" if stage.failed else dim),
        Text(speed(stage.rate), style=dim),
    ]


def _workers(workers: Sequence[Worker]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("worker", "state", "stage", "done", "rate", "left", "last sign", "where", "cell"):
        table.add_column(name, no_wrap=name != "cell", justify="right" if name in ("done", "rate", "left") else "left")
    urgent = sorted(workers, key=lambda worker: worker.state in (FINISHED, STOPPED))
    for worker in urgent[:MOST]:
        part = f"shard {worker.shard}/{worker.shards}" if worker.shards > 1 else "all"
        where = " ".join(filter(None, (worker.host, f"pid {worker.pid}", f"job {worker.job}" if worker.job else "")))
        left = f"{worker.left} left" if worker.left else "" if worker.eta is None else duration(worker.eta)
        done = f"{worker.done}/{worker.total}" if worker.total else ""
        state = worker.state + (f": {worker.why}" if worker.why else "")
        rate = speed(worker.rate) if worker.state == RUNNING else ""
        cells = (part, state, worker.stage, done, rate, left, f"{duration(worker.age)} ago", where)
        texts = [Text(printable(cell)) for cell in (*cells, worker.cell)]
        texts[1].stylize(STYLES[worker.state])
        table.add_row(*texts)
    if len(urgent) > MOST:
        table.add_row(Text(f"and {len(urgent) - MOST} more"))
    return table


def _log(worker: Worker, lines: int) -> list[RenderableType]:
    found = worker.log_lines(lines)
    if not found:
        return []
    part = f"shard {worker.shard}/{worker.shards} of " if worker.shards > 1 else ""
    head = Text(f"\nlog of {part}{printable(worker.cell)} ({worker.state}): {printable(str(worker.folder))}", "bold")
    return [head, *(Padding(Text(line), (0, 0, 0, 2)) for line in found)]


def _problems(cell: CellStatus, lines: int) -> list[RenderableType]:
    parts: list[RenderableType] = []
    if cell.refused and cell.left:
        parts.append(Text(f"\n{printable(cell.name)} was refused:", style="red"))
        parts += [Padding(Text(line), (0, 0, 0, 2)) for line in cell.refused.splitlines()]
    if cell.broken:
        word = f"\n{counted(len(cell.broken), 'damaged file')} in {printable(cell.name)}: run `attrib cache repair`"
        parts.append(Text(word, style="red"))
        parts += [Padding(Text(line), (0, 0, 0, 2)) for line in cell.broken[:BROKEN]]
        if len(cell.broken) > BROKEN:
            parts.append(Padding(Text(f"and {len(cell.broken) - BROKEN} more"), (0, 0, 0, 2)))
    if cell.failures and lines:
        parts.append(Text(f"\n{len(cell.failures)} failed in {printable(cell.name)}", style="red"))
        for failure in cell.failures[:lines]:
            reason = next(iter(failure.reason.strip().splitlines()), "")
            line = printable(f"{failure.uid}: {failure.stage}: {reason}")
            parts.append(Padding(Text(line), (0, 0, 0, 2)))
        if len(cell.failures) > lines:
            parts.append(Padding(Text(f"and {len(cell.failures) - lines} more"), (0, 0, 0, 2)))
    return parts


def show(console: Console, status: Status, lines: int = 5) -> None:
    console.print(drawn(status, lines), soft_wrap=not console.is_terminal)
