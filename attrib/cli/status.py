"""Where a work directory stands: python tools/status.py workdirs [FILTER ...] [--watch SECONDS] [--json]

Exit status: 0 all is done (samples that failed are named, and do not count as work), 10 work is left and every cell
that misses something has a running worker, 75 work is left that nobody does (give the same command again), 2 there is
nothing to look at.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from attrib.store.workers import SILENT
from attrib.types import UserError
from attrib.upkeep.status import WORKED_ON, Observer
from attrib.upkeep.status_table import show


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("root", type=Path, help="work directory that tools/run.py writes to")
    p.add_argument("filter", nargs="*", help="only cells with all of these in their name; iba.* matches between dots")
    p.add_argument("--watch", type=float, metavar="SECONDS", help="look again and again, until all is done")
    p.add_argument("--json", action="store_true", help="for scripts; with --watch a line each time")
    p.add_argument("--lines", type=int, default=5, metavar="N", help="of each log, and of what failed; 0: none (5)")
    p.add_argument(
        "--silent",
        type=float,
        default=SILENT,
        metavar="SECONDS",
        help=f"without a sign of life, after which a worker on another machine counts as dead ({SILENT:.0f})",
    )
    return p


def text(status, args: argparse.Namespace) -> str | None:
    """What to print; None if it went straight to the terminal."""
    if args.json:
        return json.dumps(status.record(args.lines), indent=None if args.watch else 2)
    if sys.stdout.isatty():
        console = Console()
        if args.watch:
            console.clear()
        show(console, status, args.lines)
        return None
    console = Console(file=io.StringIO(), width=400)  # a pipe has no width: never fold a table for it
    show(console, status, args.lines)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        if args.watch is not None and not args.watch > 0:
            raise UserError(f"--watch {args.watch:g}: expected seconds, such as 10")
        observer = Observer(args.root, args.filter, args.silent)
        while True:
            status = observer.look()
            found = text(status, args)
            if found is not None:
                print(found, flush=True)
            if not args.watch or status.exit not in (WORKED_ON, 75):
                return status.exit
            time.sleep(args.watch)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # such as | head
        sys.stderr.close()
        return 0


if __name__ == "__main__":
    sys.exit(main())
