"""``attrib list``: what can be chosen on a command line."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from attrib.cli import common
from attrib.cli.parsers import PARSERS
from attrib.config.compose import preset
from attrib.config.objects import target
from attrib.config.places import checked_folder, presets
from attrib.types import UserError

GROUP = {
    "methods": "method",
    "models": "model",
    "datasets": "dataset",
    "metrics": "metric",
    "papers": "paper",
    "recipes": "train",
}


def main(argv: Sequence[str]) -> int:
    args = PARSERS["list"]().parse(argv)
    return common.guarded(lambda: _list(args))


def _list(args: argparse.Namespace) -> int:
    group, folder = GROUP[args.what], checked_folder(args.config_dir)
    drawn = Table(box=None, pad_edge=False, header_style="bold")
    kinds = group in ("method", "model", "dataset", "metric")
    if group == "paper":
        return _papers(folder)
    for name in (f"{group}=", *(("data",) if kinds else ()), "what it is"):
        drawn.add_column(name, no_wrap=name != "what it is")
    for name, path in presets(group, folder).items():
        about = described(group, name, path, folder)
        drawn.add_row(name, *((Text(about[0]),) if kinds else ()), Text(about[1]))
    console = common.console()
    console.print(drawn)
    print(common.printed(console), end="")
    return 0


def _papers(folder: Path | None) -> int:
    """Each table with what it needs, how much of it is published, and how long it takes."""
    from attrib.papers import study
    from attrib.papers.presets import load  # composes configurations

    drawn = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("paper=", "what it is", "needs", "published", "takes"):
        drawn.add_column(name, no_wrap=name in ("paper=", "published"))
    for name in presets("paper", folder):
        try:
            preset = load(name, folder=folder)
        except UserError as error:
            drawn.add_row(name, Text(f"cannot be read: {error}"))
            continue
        known = sum(entry.published is not None for entry in preset.entries)
        published = f"{known} of {len(preset.entries)}" if known else "none read yet"
        drawn.add_row(name, Text(preset.title), Text(preset.needs or "?"), published, Text(preset.duration or "?"))
    for name in study.names(folder):
        try:
            made = study.load(name, folder=folder)
        except UserError as error:
            drawn.add_row(name, Text(f"cannot be read: {error}"))
            continue
        drawn.add_row(
            name,
            Text(f"{made.title} (a study of {len(made.parts)} parts)"),
            Text(made.needs or "?"),
            "–",
            Text(made.duration or "?"),
        )
    console = common.console()
    console.print(drawn)
    print(common.printed(console), end="")
    return 0


def described(group: str, name: str, path: Path, folder: Path | None) -> tuple[str, str]:
    """(the data that a preset is for, one line about it).

    The line is the comment at the head of its file, or the first line of its class's docstring.
    """
    head = re.match(r"(?:# @package.*\n)?# *(.+)", path.read_text(encoding="utf-8"))
    line = head[1] if head else ""
    if group == "train":
        return "", line
    try:
        node = preset(group, name, folder)
        kind = target(node, f"{group} {name}")
    except UserError as error:
        return "?", line or f"cannot be read: {error}"
    return ", ".join(_modalities(group, node, kind)), line or (kind.__doc__ or "").strip().split("\n")[0]


def _modalities(group: str, node: Mapping[str, Any], kind: Any) -> Sequence[str]:
    """What data a preset is for: image, text, audio."""
    if group in ("method", "metric"):
        return tuple(node.get("modalities", getattr(kind, "MODALITIES", ("image",))))
    if group == "dataset":
        return [getattr(kind, "modality", "image")]
    reads = str((node.get("input") or {}).get("_target_", ""))
    return ["text" if reads.endswith("Encoder") else "audio" if reads.endswith("WaveTransform") else "image"]
