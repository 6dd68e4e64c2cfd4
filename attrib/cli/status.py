"""``attrib status``: how far a work directory is, and which processes work on it."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence

from attrib.cli import common
from attrib.cli.parsers import PARSERS
from attrib.errors import UserError
from attrib.process.signals import LEFT
from attrib.upkeep.status import WORKED_ON, Observer, Status
from attrib.upkeep.status_table import show


def main(argv: Sequence[str]) -> int:
    args = PARSERS["status"]().parse(argv)
    return common.guarded(lambda: _status(args))


def _status(args: argparse.Namespace) -> int:
    if args.watch is not None and not args.watch > 0:
        raise UserError(f"--watch {args.watch:g}: expected seconds, such as 10")
    observer = Observer(args.root, args.filter, args.silent)
    while True:
        status = observer.look()
        print(text(status, args), end="", flush=True)
        if not args.watch or status.exit not in (WORKED_ON, LEFT):
            return status.exit
        time.sleep(args.watch)


def text(status: Status, args: argparse.Namespace) -> str:
    """What to print; "" if it went straight to the terminal."""
    if args.json:
        return json.dumps(status.record(args.lines), indent=None if args.watch else 2) + "\n"
    console = common.console()
    if args.watch and sys.stdout.isatty():
        console.clear()
    show(console, status, args.lines)
    return common.printed(console)
