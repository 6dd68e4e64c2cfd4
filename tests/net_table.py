"""Every net of ``net_zoo`` against every preset of a method: ``make nets`` writes docs/nets.md.

python tests/net_table.py --out docs/nets.md        all of them; what a run that was stopped has found is kept
python tests/net_table.py --net resnet18 --method iba    one cell, with the traceback of what is wrong

*Works* means that a batch of two equals its samples one by one, that maps have the shape of the input and are finite,
and that what a method says of its own completeness is small. *Zero* is the same, but there is nothing in the map.
*Refused* is a sentence of attrib's own. Anything else is *wrong*. Methods are tried with few steps, in float64.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import logging
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from contracts import FitSamples, PartialInMemory, untouched
from fuzz_checks import pattern
from net_zoo import PAD, ZOO, Entry
from text_nets import texts
from torch import Tensor

from attrib.config.objects import build
from attrib.models import Classifier
from attrib.noise import Noise
from attrib.types import Batch, SampleError, UserError

ROOT = Path(__file__).parent.parent
METHODS = {path.stem: path for path in sorted((ROOT / "configs" / "method").glob("*.yaml"))}
CACHE = ROOT / "workdirs" / "nets"

# What makes a method cheap, wherever it has such a field; all else is as in its preset.
CHEAP: dict[str, Any] = {
    "steps": 2, "samples": 3, "batch": 2, "draws": 2, "epochs": 1, "train_batch": 4, "window": 32, "stride": 32,
    "side": 3, "segments": 4, "tiles": 3, "dataset_size": 4, "sub_dataset_size": 2, "correct": False, "rank": 2,
    "passes": 1, "relu": False, "readouts": ["bottleneck", "cam"], "critic_iter": 1, "search": {"layers": 12, "candidates": 1},
}  # fmt: skip
FITTED_ON = 6
TOLERANCE = 1e-6  # of a batch against its samples, relative to the largest number
COMPLETE = {"delta": 1e-3, "completeness_error": 1e-3}  # columns of completeness, and how large they may be
NEGLIGIBLE = 1e-14  # a largest number below this is rounding

Outcome = Literal["works", "zero", "refused", "wrong", "other"]  # other: a method of other data
SYMBOLS: dict[Outcome, str] = {"works": "✓", "zero": "0", "refused": "–", "wrong": "**wrong**", "other": ""}
Cell = dict[str, str]  # outcome, text

LIBRARIES = {"torchvision": "torchvision", "timm": "timm", "transformers": "transformers", "own": "own nets"}


def cheap(node: Any) -> Any:
    """The preset of a method with what makes it cheap."""
    if not isinstance(node, Mapping):
        return node
    found = {}
    for name, value in node.items():
        small = CHEAP.get(name)
        if isinstance(value, Mapping):
            value = cheap(value) | (small if isinstance(small, Mapping) else {})
        elif small is not None and value is not None:
            value = min(value, small) if isinstance(value, float | int) and not isinstance(value, bool) else small
        found[name] = value
    return found


class Case:
    """A net with its samples."""

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.batch, self.estimation = self._samples(2, 0), self._samples(FITTED_ON, 1)

    @cached_property
    def classifiers(self) -> tuple[Classifier, Classifier]:
        """One that takes all rows at once, one that takes two at a time."""
        net, entry = self.entry.net(), self.entry
        layers = entry.layers or getattr(net, "default_layers", {})
        shape = None if entry.modality == "text" else entry.shape
        large, small = (
            Classifier(net, layers, rows=rows, dtype=torch.float64, input_shape=shape, output=entry.output)
            for rows in (32, 2)
        )
        if not large.examine(self.estimation.x, self.estimation.lengths):  # as a run does: texts of equal length
            self.batch, self.estimation = equal(self.batch), equal(self.estimation)
        return large, small

    def _samples(self, n: int, seed: int) -> Batch:
        target = torch.ones(n, dtype=torch.long)
        if self.entry.modality == "text":
            return dataclasses.replace(texts(n, seed), target=target)
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(n, *self.entry.shape, generator=generator, dtype=torch.float64)
        return Batch(tuple(f"{seed}/{i}" for i in range(n)), x, target)

    def judge(self, preset: str) -> Cell:
        """Raises whatever is wrong; a refusal is an outcome."""
        node = yaml.safe_load(METHODS[preset].read_text())
        meant = node.pop("modalities", None)
        node.pop("name")
        method = build(cheap(node), preset)
        if self.entry.modality not in (meant or method.MODALITIES):
            return {"outcome": "other", "text": ""}
        try:
            return {"outcome": self._check(method), "text": ""}
        except (UserError, SampleError) as refusal:
            return {"outcome": "refused", "text": str(refusal)}

    def _check(self, method: Any) -> Outcome:
        large, small = self.classifiers
        state: dict[str, Tensor] = {}
        if method.fit is not None:
            data = FitSamples(self.estimation, 4)
            state = dict(method.fit.run(large, data, PartialInMemory(), lambda line: None))
        batch = self.batch
        random = torch.get_rng_state(), np.random.get_state()[1].copy()
        with untouched(large, batch, state):
            found = dict(method.attribute(large, batch, state, _noise(batch)))
        assert torch.equal(random[0], torch.get_rng_state()), "torch's global random numbers were drawn"
        assert (random[1] == np.random.get_state()[1]).all(), "numpy's global random numbers were drawn"
        singles = []
        for i in range(len(batch)):
            one = batch[[i]]
            one = one if one.lengths is None else one.cut(int(one.lengths.max()))
            singles.append(dict(method.attribute(small, one, state, _noise(one))))
        largest = max(float(found[name].abs().max()) for name in method.MAPS)
        for name in (*method.MAPS, *method.EXTRAS):
            value = found[name]
            assert value.isfinite().all(), f"{name} is not finite"
            scale = max(largest, float(value.abs().max()), NEGLIGIBLE) if value.numel() else 1.0
            assert value.shape[0] == len(batch), f"{name} is {tuple(value.shape)} for {len(batch)} samples"
            for i, single in enumerate(singles):
                part = single[name][0]
                whole = value[i][: len(part)] if batch.lengths is not None and part.ndim else value[i]
                worst = float((whole - part).abs().max()) / scale if part.numel() else 0.0
                assert worst <= TOLERANCE or largest < NEGLIGIBLE, (
                    f"{name} of sample {i} alone differs from that in a batch by {worst:.2g}"
                )
        for name in method.MAPS:
            expected = batch.x.shape if batch.lengths is not None else (len(batch), *batch.x.shape[2:])
            assert found[name].shape == expected, f"{name} is {tuple(found[name].shape)}, not {tuple(expected)}"
        for name in set(method.COLUMNS) & set(COMPLETE):
            size = max(1.0, float(found["map"].abs().flatten(1).sum(1).max()))
            assert float(found[name].abs().max()) <= COMPLETE[name] * size, f"{name} is {found[name].tolist()}"
        return "works" if largest > NEGLIGIBLE else "zero"


def _noise(batch: Batch) -> Noise:
    return Noise(batch.uids, 3, dtype=torch.float64)


def equal(batch: Batch) -> Batch:
    """Texts cut to the length of the shortest."""
    length = int(batch.lengths.min()) if batch.lengths is not None else 0
    ids = batch.x[:, :length].clone()
    assert not (ids == PAD).any()
    return dataclasses.replace(batch, lengths=torch.full_like(batch.target, length)).cut(length)


def verdict(case: Case, preset: str, show: bool = False) -> Cell:
    try:
        return case.judge(preset)
    except Exception as error:  # whatever else a method may raise is wrong
        if show:
            traceback.print_exc()
        return {"outcome": "wrong", "text": f"{type(error).__name__}: {error}"}


# ---- all of them ------------------------------------------------------------------------------------------


@cache
def version() -> str:
    """Of the code that the results depend on."""
    files = sorted([*(ROOT / "attrib").rglob("*.py"), *Path(__file__).parent.glob("*net*.py"), *METHODS.values()])
    return hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest()[:16]


def row(entry: Entry, methods: Sequence[str]) -> dict[str, Cell]:
    """What became of each method, from the cache as far as the code is the same."""
    name = "".join(c if c.isalnum() else "-" for c in f"{entry.library}-{entry.name}")
    path = CACHE / version() / f"{name}.json"
    known: dict[str, Cell] = json.loads(path.read_text()) if path.exists() else {}
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


def footnotes(rows: Mapping[Entry, Mapping[str, Cell]]) -> dict[str, str]:
    """The shortened reason of each refusal -> its number."""
    numbers: dict[str, str] = {}
    for cells in rows.values():
        for cell in cells.values():
            if cell["outcome"] in ("refused", "wrong"):
                numbers.setdefault(pattern(cell["text"]), str(len(numbers) + 1))
    return numbers


def symbol(cell: Cell, notes: Mapping[str, str]) -> str:
    outcome: Any = cell["outcome"]
    return SYMBOLS[outcome] + (f" {notes[pattern(cell['text'])]}" if outcome in ("refused", "wrong") else "")


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
    head = f"""# Which nets work with which methods

Made by `make nets`: {tried}.
{counts["works"]} pairs work, {counts["zero"]} give nothing, {counts["refused"]} are refused, {counts["wrong"]} are wrong.

- ✓ **works**: the method ran on two samples, and a batch of two equals its samples one by one (to 10⁻⁶ of the largest
  number, in float64), maps have the shape of the input and are finite, model, inputs and global random numbers are
  unchanged, and the error of completeness is below 10⁻³ where the method reports one.
- 0: all that is right, but the map is zero. Behind a LayerNorm, for example, the gradients of a token's channels always
  add up to zero, so that `reduce: sum` leaves nothing; take `abs_sum`.
- – **refused**: attrib says why, shortened below (# stands for names and numbers of the net).
- empty: the method is for other data.

Weights are random, inputs are noise of 64 x 64 where nothing else is said, and methods run with few steps and small
sets, so the table says whether a net's operations are understood, not how good a map is. "n blocks", "narrow" and
the like mean that a net is of the library's own kind with fewer or narrower layers. No layer is named for images and sounds: `cam` and
`bottleneck` are found out ([add-a-model](how-to/add-a-model.md)), and Readout IBA reads these two. Nets that see
padding get texts of equal length, as in a run."""
    return "\n".join([head, *tables(rows, methods), ""])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the table there instead of printing it")
    parser.add_argument("--net", action="append", help="only nets whose name contains this; may be repeated")
    parser.add_argument("--method", action="append", choices=tuple(METHODS), help="only this preset; may be repeated")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    methods = given.method or list(METHODS)
    entries = [e for e in ZOO if not given.net or any(part in f"{e.library} {e.name}" for part in given.net)]
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
