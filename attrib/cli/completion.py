"""``attrib completion``: shell completion by argcomplete, of subcommands, options and ``KEY=VALUE``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import argcomplete

from attrib.cli import parsers
from attrib.cli.parsers import PARSERS
from attrib.config.places import configs, presets


def main(argv: Sequence[str]) -> int:
    args = PARSERS["completion"]().parse(argv)
    print(argcomplete.shellcode(["attrib"], shell=args.shell))
    return 0


def complete() -> None:
    """Answers the shell's question and ends the process."""
    whole = argparse.ArgumentParser(prog="attrib")
    subcommands = whole.add_subparsers()
    for name, made in PARSERS.items():
        parser = made()
        known = subcommands.add_parser(name, parents=[parser], add_help=False)
        for action in known._actions:
            if action.dest == "overrides" or (name, action.dest) == ("table", "root"):
                action.completer = overrides  # type: ignore[attr-defined]  # argcomplete's way to say so
            elif action.dest == "command":
                action.choices = tuple(parsers.CACHE_COMMANDS)
    argcomplete.autocomplete(whole)


def overrides(prefix: str, parsed_args: argparse.Namespace, **_: Any) -> list[str]:
    """``KEY=VALUE`` that can follow: groups first, then what a group can be."""
    folder: Path | None = getattr(parsed_args, "config_dir", None)
    key, equals, value = prefix.partition("=")
    if not equals:
        return [f"{group}=" for group in sorted(p.name for p in configs().iterdir() if p.is_dir())]
    before = value[: value.rfind(",") + 1]  # method=random,gr
    return [f"{key}={before}{name}" for name in presets(key, folder)]
