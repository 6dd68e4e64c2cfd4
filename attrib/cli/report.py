"""Write one self-contained HTML page about a work directory: python tools/report.py workdirs [--out report.html]"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from attrib import report
from attrib.types import UserError


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("root", type=Path, help="work directory that tools/run.py wrote")
    p.add_argument("--out", type=Path, metavar="FILE", help="default: ROOT/report.html")
    p.add_argument("--samples", type=int, default=12, help="at most so many rows in each gallery (12)")
    p.add_argument("--confidence", type=float, default=0.95, help="of the intervals and verdicts (0.95)")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    command = shlex.join(["tools/report.py", *(sys.argv[1:] if argv is None else argv)])
    out = args.out or args.root / "report.html"
    try:
        if not 0 < args.confidence < 1:
            raise UserError(f"--confidence {args.confidence}: expected a number between 0 and 1, such as 0.95")
        report.write(args.root, out, samples=args.samples, confidence=args.confidence, command=command)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {out} ({out.stat().st_size / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
