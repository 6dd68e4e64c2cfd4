"""Every net of ``net_zoo`` against every preset of a method: ``make nets`` writes docs/nets.md.

python tests/net_table.py --out docs/nets.md        all of them; what a run that was stopped has found is kept
python tests/net_table.py --net resnet18 --method iba    one cell, with the traceback of what is wrong
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import net_checks
import net_zoo
import torch
from fuzz_checks import pattern
from net_checks import METHODS, ROOT, Case, Cell, Outcome, verdict
from net_zoo import ZOO, Entry

CACHE = ROOT / "workdirs" / "nets"
SHORT = 120  # characters of a reason
SYMBOLS: dict[Outcome, str] = {"works": "✓", "zero": "0", "refused": "–", "wrong": "**wrong**", "other": ""}
LIBRARIES = {"torchvision": "torchvision", "timm": "timm", "transformers": "transformers", "own": "own nets"}


@cache
def version() -> str:
    """Of the code that the results depend on."""
    own = (Path(module.__file__) for module in (net_checks, net_zoo))
    files = [*sorted((ROOT / "attrib").rglob("*.py")), *own, *METHODS.values()]
    return hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest()[:16]


def kept(entry: Entry) -> tuple[Path, dict[str, Cell]]:
    """Where a net's results are, and those that are there."""
    name = "".join(c if c.isalnum() else "-" for c in f"{entry.library}-{entry.name}")
    path = CACHE / version() / f"{name}.json"
    return path, json.loads(path.read_text()) if path.exists() else {}


def row(entry: Entry, methods: Sequence[str]) -> dict[str, Cell]:
    """What became of each method, from the cache as far as the code is the same."""
    path, known = kept(entry)
    missing = [method for method in methods if method not in known]
    case = Case(entry) if missing else None
    for method in missing:
        start = time.monotonic()
        known[method] = verdict(case, method)  # type: ignore[arg-type]
        known[method]["seconds"] = f"{time.monotonic() - start:.1f}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(known, indent=1))
    return {method: known[method] for method in methods}


# ---- the table --------------------------------------------------------------------------------------------


def reason(cell: Cell) -> str:
    """Shortened, and without what is the net's own."""
    found = pattern(cell["text"])
    return found if len(found) < SHORT else found[:SHORT].rpartition(" ")[0] + " ..."


def footnotes(rows: Mapping[Entry, Mapping[str, Cell]]) -> dict[str, str]:
    """The shortened reason of each refusal -> its number."""
    numbers: dict[str, str] = {}
    for cells in rows.values():
        for cell in cells.values():
            if cell["outcome"] in ("refused", "wrong"):
                numbers.setdefault(reason(cell), str(len(numbers) + 1))
    return numbers


def symbol(cell: Cell, notes: Mapping[str, str]) -> str:
    outcome: Any = cell["outcome"]
    return SYMBOLS[outcome] + (f" {notes[reason(cell)]}" if outcome in ("refused", "wrong") else "")


def groups(rows: Mapping[Entry, Mapping[str, str]], methods: Sequence[str]) -> list[list[str]]:
    """Methods whose columns are the same stand in one."""
    by_column: dict[tuple[str, ...], list[str]] = {}
    for method in methods:
        by_column.setdefault(tuple(cells[method] for cells in rows.values()), []).append(method)
    return [*by_column.values()]


def tables(rows: Mapping[Entry, Mapping[str, Cell]], methods: Sequence[str]) -> Iterator[str]:
    notes = footnotes(rows)
    for title, modalities in (("Images and sounds", ("image", "audio")), ("Texts", ("text",))):
        part = {
            e: {m: symbol(cell, notes) for m, cell in c.items()} for e, c in rows.items() if e.modality in modalities
        }
        used = [method for method in methods if any(cells[method] for cells in part.values())]
        if not used:
            continue
        together = groups(part, used)
        yield from ("", f"## {title}", "", "| column | methods |", "|---|---|")
        yield from (f"| {chr(65 + i)} | {', '.join(names)} |" for i, names in enumerate(together))
        yield from ("", f"| net | {' | '.join(chr(65 + i) for i in range(len(together)))} |")
        yield "|---|" + "---|" * len(together)
        library = ""
        for entry, cells in part.items():
            if entry.library != library:
                library = entry.library
                yield f"| **{LIBRARIES[library]}** |" + " |" * len(together)
            about = f" ({entry.about})" if entry.about else ""
            yield f"| {entry.name}{about} | {' | '.join(cells[names[0]] for names in together)} |"
    if notes:
        yield from ("", "## Why", "")
        yield from (f"{number}. {_plain(reason)}" for reason, number in notes.items())


def _plain(reason: str) -> str:
    return reason.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_")


def document(rows: Mapping[Entry, Mapping[str, Cell]], methods: Sequence[str]) -> str:
    outcomes = [cell["outcome"] for cells in rows.values() for cell in cells.values()]
    counts = {outcome: outcomes.count(outcome) for outcome in SYMBOLS}
    tried = f"{len(rows)} nets against {len(methods)} presets of methods"
    told = (
        f"{counts['works']} pairs work, {counts['zero']} give nothing, {counts['refused']} are refused, "
        f"{counts['wrong']} are wrong"
    )
    head = f"""# Which nets work with which methods

Made by `make nets`: {tried}.
{told}.

- ✓ **works**: the method ran on two samples, and a batch of two equals its samples one by one (to 10⁻⁶ of the largest
  number, in float64), maps have the shape of the input and are finite, model, inputs and global random numbers are
  unchanged, and the error of completeness is below 10⁻³ where the method reports one.
- 0: all that is right, but the map is zero. Behind a LayerNorm, for example, the gradients of a token's channels always
  add up to zero, so that `reduce: sum` leaves nothing; take `abs_sum`.
- – **refused**: attrib says why, shortened below (# stands for names and numbers of the net).
- empty: the method is for other data.

Weights are random, inputs are noise of 64 x 64 where nothing else is said, and methods run with few steps and small
sets, so the table says whether a net's operations are understood, not how good a map is. "n blocks", "narrow" and the
like mean that a net is of the library's own kind with fewer or narrower layers. No layer is named for images and
sounds: `cam` and `bottleneck` are found out ([add-a-model](how-to/add-a-model.md)), and Readout IBA reads these two.
Nets that see padding get texts of equal length, as in a run. Causal graphs are searched in the last
12 layers with one candidate each, so that "no paths" says nothing of a real search.

**Random nets as well**: `make fuzz N=1000` makes nets of some 40 operations and habits, and judges 30 methods on each
by a check of their own (finite differences, slow references, completeness). On 2026-11-30 25,721 of 30,000 pairs were
right, none was wrong, and 309 (1.0 %) were refused for what a net does, most of them because nothing tells which axes
of a layer are space (178), or which channels of a recurrent layer make which (75). 3,970 (13 %) were refused as they
must be: nets whose rows interact or that draw at random, attention methods without self-attention, guided rules
without a ReLU, and captum's own DeepLift and GuidedBackprop where they are not right."""
    return "\n".join([head, *tables(rows, methods), ""])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the table there instead of printing it")
    parser.add_argument("--net", action="append", help="only nets whose name contains this; may be repeated")
    parser.add_argument("--method", action="append", choices=tuple(METHODS), help="only this preset; may be repeated")
    parser.add_argument("--known", action="store_true", help="only nets whose results are all there, from earlier runs")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    methods = given.method or list(METHODS)
    entries = [e for e in ZOO if not given.net or any(part in f"{e.library} {e.name}" for part in given.net)]
    if given.known:
        entries = [entry for entry in entries if set(methods) <= kept(entry)[1].keys()]
    rows: dict[Entry, dict[str, Cell]] = {}
    for entry in entries:
        start = time.monotonic()
        if given.net and given.method:
            case = Case(entry)
            rows[entry] = {method: verdict(case, method, show=True) for method in methods}
        else:
            rows[entry] = row(entry, methods)
        outcomes = [cell["outcome"] for cell in rows[entry].values()]
        counts = ", ".join(
            f"{outcomes.count(o)} {o}" for o in ("works", "zero", "refused", "wrong") if outcomes.count(o)
        )
        print(f"{entry.library} {entry.name}: {counts} ({time.monotonic() - start:.0f} s)", file=sys.stderr, flush=True)
        for method, cell in rows[entry].items():
            if cell["outcome"] == "wrong" or (given.net and given.method):
                print(f"  {method}: {cell['outcome']} {cell['text']}", file=sys.stderr, flush=True)
    text = document(rows, methods)
    if given.out:
        given.out.write_text(text)
    else:
        print(text)
    return int(any(cell["outcome"] == "wrong" for cells in rows.values() for cell in cells.values()))


if __name__ == "__main__":
    sys.exit(main())
