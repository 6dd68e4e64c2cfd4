"""``attrib show``: explained texts on the terminal, their words coloured by the maps."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from attrib.cli import common
from attrib.cli.parsers import PARSERS
from attrib.report import terminal


def main(argv: Sequence[str]) -> int:
    args = PARSERS["show"]().parse(argv)
    return common.guarded(lambda: _show(args))


def _show(args: argparse.Namespace) -> int:
    console = Console()
    for title, table in terminal.sentences(args.root, args.samples):
        console.rule(Text(title))
        console.print(table)
    console.print("\nred: for the class, blue: against it; each text and method has its own scale")
    return 0
