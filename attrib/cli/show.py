"""Show texts with coloured words on the terminal: python tools/show.py workdirs [--samples 8]"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from attrib.report import terminal
from attrib.types import UserError


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("root", type=Path, help="work directory that tools/run.py wrote")
    p.add_argument("--samples", type=int, default=8, help="texts of each dataset and model (8)")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    console = Console()
    try:
        for title, table in terminal.sentences(args.root, args.samples):
            console.rule(Text(title))
            console.print(table)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    console.print("\nred: for the class, blue: against it; each text and method has its own scale")
    return 0


if __name__ == "__main__":
    sys.exit(main())
