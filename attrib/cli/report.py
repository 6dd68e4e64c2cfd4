"""``attrib report``: one self-contained HTML page about a work directory."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence

from attrib import report
from attrib.cli import common
from attrib.cli.parsers import PARSERS
from attrib.process import exit_status
from attrib.types import UserError


def main(argv: Sequence[str]) -> int:
    args = PARSERS["report"]().parse(argv)
    return common.guarded(lambda: _report(args, shlex.join(["attrib", "report", *argv])))


def _report(args: argparse.Namespace, command: str) -> int:
    out = args.out or args.root / ("report.html" if args.sample is None else "sample.html")
    if not 0 < args.confidence < 1:
        raise UserError(f"--confidence {args.confidence}: expected a number between 0 and 1, such as 0.95")
    broken: list[str] = []
    with common.writing(out):
        report.write(
            args.root,
            out,
            samples=args.samples,
            confidence=args.confidence,
            command=command,
            broken=broken,
            sample=args.sample,
        )
    print(f"wrote {out} ({out.stat().st_size / 1e6:.1f} MB)")
    return exit_status.report_broken(broken)
