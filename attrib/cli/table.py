"""``attrib table``: the scores of a work directory, or of a paper's table, as text."""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from attrib.cli import common
from attrib.cli.parsers import PARSERS, work_directory
from attrib.config.places import checked_folder
from attrib.errors import UserError
from attrib.process import exit_status
from attrib.results import agreement, formats, power, tables
from attrib.running.options import Options

SUFFIXES = {".csv": "csv", ".md": "md", ".markdown": "md", ".tex": "tex", ".txt": "terminal"}
SHORT = 30  # lines of paired tests that a terminal shows unless they were asked for


def main(argv: Sequence[str]) -> int:
    args = PARSERS["table"]().parse(argv)
    return common.guarded(lambda: _table(args))


def _table(args: argparse.Namespace) -> int:
    broken: list[str] = []
    text = draw(args, broken)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text, encoding="utf-8")
        print(f"wrote {args.out}")
    else:
        print(text, end="")
    return exit_status.report_broken(broken)


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


def draw(args: argparse.Namespace, broken: list[str]) -> str:
    """The text of the table; "" if it went straight to the terminal. ``broken`` gets what could not be read."""
    kind = args.format or SUFFIXES.get(args.out.suffix.lower() if args.out else "", None if args.out else "terminal")
    if kind is None:
        raise UserError(f"--out {args.out}: no format has this suffix; use {', '.join(SUFFIXES)} or --format")
    if args.wide and kind == "csv":
        raise UserError("--wide is for md, tex and terminal; a csv has one line per cell and column")
    if args.rows and kind != "csv":
        raise UserError("--rows is for csv only; add --format csv or --out FILE.csv")
    common.check_confidence(args.confidence)

    views = {name: getattr(args, name) for name in ("rows", "ranks", "power", "agreement", "wide")}
    chosen = [f"--{name}" for name, given in views.items() if given]
    if len(chosen) > 1 or (args.pairs is not None and (args.power or args.agreement or args.ranks)):
        raise UserError(f"give one of {', '.join([*chosen, *(['--pairs'] if args.pairs is not None else [])])}")
    if any(word.startswith("paper=") for word in args.root):
        return draw_paper(args, kind)
    if len(args.root) > 1 or args.commands:
        raise UserError("expected one work directory; overrides and --commands go with paper=NAME")
    root = work_directory(args.root[0]) if args.root else Path(Options.root)
    frame = tables.rows(root, broken)
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
        if kind == "csv":
            return formats.to_csv(ranked)
        return write(formats.rank_tables(ranked, args.confidence), kind, apart=args.out is not None)
    if args.power or args.agreement:
        return _of_a_study(args, frame, kind)
    table = tables.summary(frame, args.confidence)
    if kind == "csv":
        return formats.to_csv(table)

    if args.wide:
        drawn = [formats.wide_table(block) for block in formats.wide(table)]
    else:
        drawn = [formats.long_table(table, args.confidence)]
    if refused := _refused(frame, root):
        drawn[0] = dataclasses.replace(drawn[0], notes=(*drawn[0].notes, *refused))
    if args.pairs is not None or kind == "terminal":
        tests = tables.all_paired(frame, args.pairs or (), args.confidence)
        if len(tests) or args.pairs is not None:
            drawn.append(formats.paired_table(tests, args.confidence, most=None if args.pairs is not None else SHORT))
    return write(drawn, kind, apart=args.out is not None)


def _refused(frame: pd.DataFrame, root: Path) -> list[str]:
    """A line for each cell with pending samples whose last run was refused: why."""
    found = tables.refused(frame, root)
    return [f"{name}: pending because its run was refused: {why.splitlines()[0]}" for name, why in found.items()]


def _of_a_study(args: argparse.Namespace, frame: pd.DataFrame, kind: str) -> str:
    """How many samples tell methods apart, or whether metrics agree."""
    apart = args.out is not None
    if args.power:
        tests = tables.all_paired(frame, confidence=args.confidence)
        found = power.sizes(tests, confidence=args.confidence)
        if not len(found):
            raise UserError("--power: no column has scores of two methods on two common samples")
        return (
            formats.to_csv(found)
            if kind == "csv"
            else write([power.table(tests, confidence=args.confidence)], kind, apart=apart)
        )
    found = agreement.agreement(frame, args.confidence)
    if not len(found):
        raise UserError("--agreement: no two columns with a direction have scores of three methods in common")
    return (
        formats.to_csv(found) if kind == "csv" else write(agreement.tables(found, args.confidence), kind, apart=apart)
    )


def draw_paper(args: argparse.Namespace, kind: str) -> str:
    views = (args.wide, args.ranks, args.rows, args.where, args.pairs is not None, args.power, args.agreement)
    if any(views):
        raise UserError("paper=NAME has one layout: no --wide, --ranks, --rows, --where, --pairs, --power, --agreement")
    from attrib.papers import comparison, presets, study  # compose configurations, which takes seconds to import

    [name] = [word.removeprefix("paper=") for word in args.root if word.startswith("paper=")]
    overrides = [word for word in args.root if not word.startswith("paper=")]
    folder = checked_folder(args.config_dir)
    if study.is_study(name, folder):
        raise UserError(
            f"{name} is a study; attrib paper {name} computes it, and writes what it found to studies/{name}.md"
        )
    preset = presets.load(name, overrides, folder)
    found = comparison.table(preset, preset.root, args.confidence)
    if args.commands:
        missing = found.loc[found["verdict"] == comparison.MISSING, "command"]
        return "".join(f"{line}\n" for line in dict.fromkeys(missing))
    if kind == "csv":
        return formats.to_csv(found)
    return write([comparison.drawn(preset, found, args.confidence)], kind, apart=args.out is not None)


def write(drawn: Sequence[formats.TextTable], kind: str, *, apart: bool = False) -> str:
    """The tables as one text; "" if they went straight to the terminal, which those for a file (``apart``) never do."""
    if kind != "terminal":
        return "\n".join(map(formats.to_markdown if kind == "md" else formats.to_latex, drawn))
    console = common.console(apart=apart)
    for item in drawn:
        console.print(formats.to_terminal(item))
        for line in item.code:
            console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)
    return common.printed(console)
