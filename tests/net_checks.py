"""Whether a method is right for a net of ``net_zoo``: what the cells of docs/nets.md say.

*Works* means that a batch of two equals its samples one by one, that maps have the shape of the input and are finite,
and that what a method says of its own completeness is small. *Zero* is the same, but there is nothing in the map.
*Refused* is a sentence of attrib's own. Anything else is *wrong*. Methods are tried with few steps, in float64.
"""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch
import yaml
from contracts import FitSamples, PartialInMemory, untouched
from net_zoo import PAD, Entry
from test_pieces import pieces
from text_nets import texts
from torch import Tensor, nn

from attrib.config.objects import build
from attrib.datasets import HuggingFaceEncoder
from attrib.methods.captum import Captum
from attrib.methods.lrp import LRP
from attrib.models import Classifier
from attrib.noise import Noise
from attrib.types import Batch, SampleError, UserError

ROOT = Path(__file__).parent.parent
# The oracle asks no net anything, and wants regions.
METHODS = {p.stem: p for p in sorted((ROOT / "configs" / "method").glob("*.yaml")) if p.stem != "oracle"}

# What makes a method cheap, wherever it has such a field; all else is as in its preset.
CHEAP: dict[str, Any] = {
    "steps": 2, "samples": 3, "batch": 2, "draws": 2, "epochs": 1, "train_batch": 4, "window": 32, "stride": 32,
    "side": 3, "segments": 4, "tiles": 3, "dataset_size": 2, "sub_dataset_size": 1, "correct": False, "rank": 2,
    "passes": 1, "relu": False, "readouts": ["bottleneck", "cam"], "critic_iter": 1,
    "search": {"layers": 12, "candidates": 1},
    "sigma": 1.0,  # the masks of extremal perturbation are made for larger images than these
}  # fmt: skip
FITTED_ON = 6
TOLERANCE = 1e-6  # of a batch against its samples, relative to the largest number
INCOMPLETE = 1e-3  # how much of the score may be missing of a method that says that it is complete
NEGLIGIBLE = 1e-14  # a largest number below this is rounding

Outcome = Literal["works", "zero", "refused", "wrong", "other"]  # other: a method of other data
Cell = dict[str, str]  # outcome, text


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
        self._judged: list[tuple[Any, Cell]] = []  # presets that differ in their steps only are the same when cheap
        self.batch, self.estimation = self._samples(2, 0), self._samples(FITTED_ON, 1)

    @cached_property
    def net(self) -> nn.Module:
        return self.entry.net()

    @cached_property
    def classifiers(self) -> tuple[Classifier, Classifier]:
        """One that takes all rows at once, one that takes two at a time."""
        net, entry = self.net, self.entry
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
        if self.entry.sentences:
            return dataclasses.replace(sentences(n, seed), target=target)
        if self.entry.modality == "text":
            return dataclasses.replace(texts(n, seed), target=target)
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(n, *self.entry.shape, generator=generator, dtype=torch.float64)
        x = x.clamp(-1.8, 2.2)  # as pixels of ImageNet are
        return Batch(tuple(f"{seed}/{i}" for i in range(n)), x, target)

    def judge(self, preset: str) -> Cell:
        """Raises whatever is wrong; a refusal is an outcome."""
        node = yaml.safe_load(METHODS[preset].read_text())
        meant = node.pop("modalities", None)
        node.pop("name")
        method = build(cheap(node), preset)
        if self.entry.modality not in (meant or method.MODALITIES):
            return {"outcome": "other", "text": ""}
        if found := next((cell for known, cell in self._judged if known == method), None):
            return dict(found)
        try:
            cell: Cell = {"outcome": self._check(method), "text": ""}
        except (UserError, SampleError) as refusal:
            if isinstance(method, LRP) and isinstance(refusal, SampleError):
                raise AssertionError(f"relevance is lost: {refusal}") from refusal
            cell = {"outcome": "refused", "text": self._without_its_name(str(refusal))}
        self._judged.append((method, cell))
        return dict(cell)

    def _without_its_name(self, text: str) -> str:
        """A message in which the classes of the net and of what it is wrapped in are called the net."""
        for net in (self.net, getattr(self.net, "net", None)):
            text = text if net is None else text.replace(type(net).__name__, "the net")
        return text

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
            of = next((map_ for map_ in method.MAPS if name.endswith(f"_{map_}")), None)
            if of and float(found[of].abs().max()) < NEGLIGIBLE:
                continue  # the relative error of nothing, say
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
        for name, missing in self._missing(method, found).items():
            assert float(missing.abs().max()) <= INCOMPLETE, f"{name} is {found[name].tolist()}"
        return "works" if largest > NEGLIGIBLE else "zero"

    def _missing(self, method: Any, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """By column (B,) what is missing of the score, as a share, of a method that says that nothing is."""
        columns = set(method.COLUMNS)
        if isinstance(method, Captum):
            columns -= {"delta"}  # of a sum over a few steps: its size says how few, and is no fault
        missing = {name: found[name] for name in columns & {"completeness_error"}}
        size = found[next(iter(method.MAPS))].abs().flatten(1).sum(1).max().clamp(min=1.0)
        missing |= {name: found[name] / size for name in columns & {"delta"}}
        if "bias_relevance" in columns:
            x, target = self.batch.x, self.batch.target
            score = self.classifiers[0].logits(x).gather(1, target[:, None])[:, 0]
            missing["bias_relevance"] = (found["map"].flatten(1).sum(1) + found["bias_relevance"] - score) / size
        return missing


def _noise(batch: Batch) -> Noise:
    return Noise(batch.uids, 3, dtype=torch.float64)


def sentences(n: int, seed: int) -> Batch:
    """Texts as a tokenizer without a pre-tokenizer makes them, as SentencePiece models such as Llama's do."""
    with TemporaryDirectory() as folder:
        encoder = HuggingFaceEncoder(pieces(Path(folder)))
    words = ["a", "bad", "slow", "film", "is", "so", "bad", "low", "as", "a", "dim", "fad"]
    rows = [encoder.encode(" ".join(words[(seed + i) % 5 :][: 4 + i % 3])) for i in range(n)]
    lengths = torch.tensor([len(row.ids) for row in rows])
    x, of = torch.full((n, int(lengths.max())), PAD), torch.full((n, int(lengths.max())), -1)
    for i, row in enumerate(rows):
        x[i, : len(row.ids)], of[i, : len(row.ids)] = torch.tensor(row.ids), torch.tensor(row.words)
    uids = tuple(f"{seed}/{i}" for i in range(n))
    return Batch(uids, x, torch.ones(n, dtype=torch.long), lengths=lengths, words=of)


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
