"""Draw the tables of a work directory, or a paper's table beside ours.

python tools/table.py workdirs [--wide] [--ranks] [--out table.md] ...
python tools/table.py paper=NAME [run.root=workdirs] [what tools/run.py was given besides] ...
"""

from __future__ import annotations

import argparse
import io
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from attrib.results import formats, tables
from attrib.types import UserError

FORMATS = ("csv", "md", "tex", "terminal")
SUFFIXES = {".csv": "csv", ".md": "md", ".markdown": "md", ".tex": "tex", ".txt": "terminal"}
SHORT = 30  # lines of paired tests that a terminal shows unless they were asked for


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "root",
        nargs="+",
        help="work directory that tools/run.py wrote; or paper=NAME (configs/paper) and overrides as for tools/run.py",
    )
    p.add_argument("--format", choices=FORMATS, help="default: by the suffix of --out, else terminal")
    p.add_argument("--out", type=Path, metavar="FILE", help="write there instead of to the terminal")
    p.add_argument("--wide", action="store_true", help="methods × columns, one table per dataset and model (not csv)")
    p.add_argument(
        "--pairs",
        nargs="*",
        metavar="COLUMN",
        help="paired tests of these columns, without a name of all; in a terminal they are shown anyway. "
        "A csv then holds the tests instead of the means",
    )
    p.add_argument("--ranks", action="store_true", help="mean ranks of the methods with Friedman's test and Nemenyi's")
    p.add_argument("--rows", action="store_true", help="csv of every sample's scores instead of means")
    p.add_argument(
        "--where",
        nargs="+",
        default=[],
        metavar="FIELD=VALUE[,VALUE]",
        help=f"only these; fields: {', '.join(tables.WHERE)}. Example: dataset=photos method=iba,grad_cam",
    )
    p.add_argument("--commands", action="store_true", help="paper=NAME: only the commands that compute what is missing")
    p.add_argument(
        "--config-dir", type=Path, metavar="DIR", help="paper=NAME: more configurations, as for tools/run.py"
    )
    p.add_argument("--confidence", type=float, default=0.95, help="of the intervals and verdicts (0.95)")
    return p


def conditions(texts: Sequence[str]) -> dict[str, list[str]]:
    """``["method=iba,grad_cam"]`` -> ``{"method": ["iba", "grad_cam"]}``."""
    found: dict[str, list[str]] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        if not equals or not values:
            raise UserError(f"--where {text}: expected FIELD=VALUE, such as method=iba,grad_cam")
        # A comma with a blank belongs to a label: iba (beta=1, steps=5).
        found.setdefault(name, []).extend(re.split(r",(?! )", values))
    return found


def draw(args: argparse.Namespace) -> str | None:
    """The text of the table; None if it went straight to the terminal."""
    kind = args.format or SUFFIXES.get(args.out.suffix.lower() if args.out else "", None if args.out else "terminal")
    if kind is None:
        raise UserError(f"--out {args.out}: no format has this suffix; use {', '.join(SUFFIXES)} or --format")
    if args.wide and kind == "csv":
        raise UserError("--wide is for md, tex and terminal; a csv has one line per cell and column")
    if args.rows and kind != "csv":
        raise UserError("--rows is for csv only; add --format csv or --out FILE.csv")
    if not 0 < args.confidence < 1:
        raise UserError(f"--confidence {args.confidence}: expected a number between 0 and 1, such as 0.95")

    if args.root[0].startswith("paper="):
        return draw_paper(args, kind)
    if len(args.root) > 1 or args.commands or args.config_dir:
        raise UserError("one work directory, please; overrides, --commands and --config-dir go with paper=NAME")
    frame = tables.rows(args.root[0])
    if args.where:
        frame = tables.where(frame, conditions(args.where))
    if args.rows:
        return formats.to_csv(frame)
    if kind == "csv" and args.pairs is not None:
        return formats.to_csv(tables.all_paired(frame, args.pairs, args.confidence))
    if args.ranks:
        ranked = tables.ranks(frame, args.confidence)
        if not len(ranked):
            raise UserError("--ranks: no column has a direction and scores of two methods on one dataset and model")
        return (
            formats.to_csv(ranked) if kind == "csv" else write(formats.rank_tables(ranked, args.confidence), kind, args)
        )
    table = tables.summary(frame, args.confidence)
    if kind == "csv":
        return formats.to_csv(table)

    if args.wide:
        drawn = [formats.wide_table(block) for block in formats.wide(table)]
    else:
        drawn = [formats.long_table(table, args.confidence)]
    if args.pairs is not None or kind == "terminal":
        tests = tables.all_paired(frame, args.pairs or (), args.confidence)
        if len(tests) or args.pairs is not None:
            drawn.append(formats.paired_table(tests, args.confidence, most=None if args.pairs is not None else SHORT))
    return write(drawn, kind, args)


def draw_paper(args: argparse.Namespace, kind: str) -> str | None:
    if args.wide or args.ranks or args.rows or args.where or args.pairs is not None:
        raise UserError("paper=NAME has one layout: no --wide, --ranks, --rows, --where, --pairs")
    from attrib.papers import comparison, presets  # compose configurations, which takes seconds to import
    from attrib.running.options import Options

    name, *overrides = args.root
    preset = presets.load(name.removeprefix("paper="), overrides, args.config_dir)
    roots = [o.removeprefix("run.root=") for o in preset.how if o.startswith("run.root=")]
    found = comparison.table(preset, roots[-1] if roots else Options.root, args.confidence)
    if args.commands:
        missing = found.loc[found["verdict"] == comparison.MISSING, "command"]
        return "".join(f"{line}\n" for line in dict.fromkeys(missing))
    if kind == "csv":
        return formats.to_csv(found)
    return write([comparison.drawn(preset, found, args.confidence)], kind, args)


def write(drawn: Sequence[formats.Table], kind: str, args: argparse.Namespace) -> str | None:
    """The tables as one text; None if they went straight to the terminal."""
    if kind != "terminal":
        return "\n".join(map(formats.to_markdown if kind == "md" else formats.to_latex, drawn))
    # A file or a pipe has no width: never fold a table for it.
    apart = args.out is not None or not sys.stdout.isatty()
    console = Console(file=io.StringIO() if apart else sys.stdout, width=400 if apart else None)
    for item in drawn:
        console.print(formats.to_terminal(item))
        for line in item.code:
            console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)
    return "\n".join(s.rstrip() for s in console.file.getvalue().splitlines()) + "\n" if apart else None


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        text = draw(args)
        if args.out and text is not None:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(text, encoding="utf-8")
            print(f"wrote {args.out}")
        elif text is not None:
            print(text, end="")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
