"""Tables of texts, and how they are written: CSV, Markdown, LaTeX, or for a terminal."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import rich.box
import rich.table
import rich.text

from attrib.errors import printable


@dataclass(frozen=True)
class TextTable:
    """A table of texts, to be written in any format. ``bold``: (row, column) positions; ``code``: lines to copy."""

    title: str
    header: Sequence[str]
    body: Sequence[Sequence[str]]
    bold: frozenset[tuple[int, int]] = frozenset()
    left: int = 1  # how many columns are aligned left: the names
    notes: Sequence[str] = field(default_factory=tuple)
    code: Sequence[str] = ()


FORMULA = "=+-@"  # what a cell begins with that a spreadsheet would compute


def to_csv(frame: pd.DataFrame) -> str:
    """Full precision, one header line.

    A text that a spreadsheet would take for a formula gets a ' in front; control characters go.
    """
    shown = frame.copy()
    for name in shown.columns:
        if not pd.api.types.is_numeric_dtype(shown[name]):
            values = shown[name].astype(object)
            shown[name] = values.map({value: _csv(value) for value in values.unique()})
    return shown.to_csv(index=False)


def _csv(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    text = printable(value)
    return f"'{text}" if text.lstrip()[:1] in FORMULA and text.strip() else text


def one_line(text: Any) -> str:
    """A text from a file or a name, fit for any line: no control characters, and nothing that ends the line."""
    return printable(" ".join(str(text).split()))


def to_markdown(table: TextTable) -> str:
    def line(texts: Iterable[str]) -> str:
        return "| " + " | ".join(texts) + " |"

    lines = [f"**{markdown(table.title)}**", ""] if table.title else []
    lines.append(line(map(markdown, table.header)))
    lines.append(line(":--" if j < table.left else "--:" for j in range(len(table.header))))
    for i, row in enumerate(table.body):
        lines.append(line(f"**{markdown(t)}**" if (i, j) in table.bold else markdown(t) for j, t in enumerate(row)))
    lines += [f"\n{markdown(note)}" for note in table.notes]
    lines += ["\n```bash", *table.code, "```"] if table.code else []
    return "\n".join(lines) + "\n"


def markdown(text: str) -> str:
    """A text as one line of Markdown that shows it as it is."""
    return re.sub(r"([\\`*_|<>\[\]~#$])", r"\\\1", one_line(text))


_TEX = {
    **{c: "\\" + c for c in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "±": r"$\pm$",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
    "–": "--",
    "·": r"$\cdot$",
    "×": r"$\times$",
}


def to_latex(table: TextTable) -> str:
    r"""A tabular for booktabs; ``\usepackage{booktabs}`` is all it needs."""

    def line(texts: Iterable[str]) -> str:
        return "  " + " & ".join(texts) + r" \\"

    lines = [f"% {one_line(table.title)}; needs \\usepackage{{booktabs}}"]
    lines.append(rf"\begin{{tabular}}{{{'l' * table.left}{'r' * (len(table.header) - table.left)}}}")
    lines += [r"  \toprule", line(map(_tex, table.header)), r"  \midrule"]
    for i, row in enumerate(table.body):
        lines.append(line(rf"\textbf{{{_tex(t)}}}" if (i, j) in table.bold else _tex(t) for j, t in enumerate(row)))
    lines += [r"  \bottomrule", r"\end{tabular}"]
    lines += [f"% {one_line(note)}" for note in (*table.notes, *table.code)]
    return "\n".join(lines) + "\n"


def _tex(text: str) -> str:
    return "".join(_TEX.get(c, c) for c in one_line(text))


def to_terminal(table: TextTable) -> rich.table.Table:
    """For rich.console.Console.print. Texts are never read as markup, and steer no terminal."""
    drawn = rich.table.Table(
        title=rich.text.Text(one_line(table.title), style="bold") if table.title else None,
        caption=rich.text.Text("\n".join(map(one_line, table.notes))) if table.notes else None,
        title_justify="left",
        caption_justify="left",
        box=rich.box.SIMPLE_HEAD,
    )
    for j, name in enumerate(table.header):
        drawn.add_column(rich.text.Text(one_line(name)), justify="left" if j < table.left else "right", overflow="fold")
    for i, row in enumerate(table.body):
        drawn.add_row(
            *(
                rich.text.Text(one_line(t), style="bold green" if (i, j) in table.bold else "")
                for j, t in enumerate(row)
            )
        )
    return drawn
