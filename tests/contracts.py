"""What every metric (and method) promises, as functions that a test calls."""

from __future__ import annotations

import dataclasses
import importlib
import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from attrib.models import Classifier
from attrib.noise import Noise
from attrib.types import Batch, SampleError, UserError

_TORCH = ("rand", "rand_like", "randn", "randn_like", "randint", "randint_like", "randperm", "normal", "bernoulli")
_TENSOR = ("normal_", "uniform_", "random_", "bernoulli_", "exponential_", "multinomial")
_NUMPY = (
    "rand",
    "randn",
    "random",
    "random_sample",
    "randint",
    "normal",
    "uniform",
    "choice",
    "permutation",
    "shuffle",
)
_PYTHON = ("random", "randint", "gauss", "uniform", "choice", "sample", "shuffle")


@contextmanager
def forbid_global_rng() -> Iterator[None]:
    """Inside, every draw from a process-wide random state raises, and so does seeding one."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a global random state was used; draw from the sample's Noise")

    # torch.fx asks for this list once, and torch.export loads that module; neither must see the patches.
    torch.overrides.get_overridable_functions()
    importlib.import_module("torch._dynamo")
    with pytest.MonkeyPatch.context() as patch:
        for owner, names in ((torch, _TORCH), (torch.Tensor, _TENSOR), (np.random, _NUMPY), (random, _PYTHON)):
            for name in (*names, "seed" if owner in (np.random, random) else "manual_seed"):
                patch.setattr(owner, name, refuse, raising=False)
        yield


def _tensors(thing: Tensor | Batch | Classifier | Mapping[str, Tensor]) -> list[Tensor]:
    if isinstance(thing, Tensor):
        return [thing]
    if isinstance(thing, Batch):
        return [value for _, value in thing._tensors()]
    return list((thing.module.state_dict() if isinstance(thing, Classifier) else thing).values())


@contextmanager
def unchanged(*things: Any) -> Iterator[None]:
    """Checks that the tensors, batches, states and classifiers are bit by bit what they were, also after an error."""
    live = [tensor for thing in things for tensor in _tensors(thing)]
    before = [(tensor.clone(), tensor.requires_grad) for tensor in live]
    try:
        yield
    finally:
        for now, (then, flag) in zip(live, before, strict=True):
            assert torch.equal(now.nan_to_num(12345.0), then.nan_to_num(12345.0)), "an input was changed"
            assert now.requires_grad == flag, "requires_grad of an input was changed"


def close(a: Mapping[str, Tensor], b: Mapping[str, Tensor], atol: float = 1e-12) -> None:
    """The same names and numbers; NaN equals NaN."""
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(
            a[name], b[name], rtol=0, atol=atol, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )


def metric_contract(
    metric: Any,
    classifier: Callable[[int], Classifier],
    batch: Batch,
    map: Tensor,
    atol: float = 1e-12,
) -> dict[str, Tensor]:
    """The promises of ``attrib.metrics.Metric``; returns the scores of the whole batch.

    ``classifier(rows)`` builds the model with that row limit, in float64. Texts are also scored alone
    without padding, and with more of it.
    """

    def score(batch: Batch, map: Tensor, rows: int = 64) -> dict[str, Tensor]:
        return metric.score(classifier(rows), batch, map, Noise(batch.uids, seed=3))

    model, everything = classifier(64), range(len(batch))
    with forbid_global_rng(), unchanged(batch, map, model):
        scores = metric.score(model, batch, map, Noise(batch.uids, seed=3))
    assert scores.keys() == metric.COLUMNS.keys() | metric.CURVES.keys()
    assert set(metric.COLUMNS.values()) <= {"higher", "lower", "none"}
    assert {2: "text", 3: "audio", 4: "image"}[batch.x.ndim] in metric.MODALITIES
    assert all(isinstance(role, str) for role in metric.roles)
    assert metric.COLUMNS.keys() <= metric.ABOUT.keys()
    assert all(text and not text.endswith(".") and "\n" not in text for text in metric.ABOUT.values())
    assert metric.BOUNDS.keys() <= metric.CURVES.keys()
    for name, (least, greatest) in metric.BOUNDS.items():
        inside = scores[name][~scores[name].isnan()]
        assert ((inside >= least - 1e-9) & (inside <= greatest + 1e-9)).all()
    assert all(scores[name].shape == (len(batch),) for name in metric.COLUMNS)
    assert all(scores[name].ndim == 2 and len(scores[name]) == len(batch) for name in metric.CURVES)

    singles = [score(*unpadded(batch[[i]], map[i : i + 1])) for i in everything]
    close({name: torch.cat([s[name] for s in singles]) for name in scores}, scores, atol)
    order = list(reversed(everything))
    close(score(batch[order], map[order]), {name: value[order] for name, value in scores.items()}, atol)
    for rows in (1, 3, 7, 1000):
        close(score(batch, map, rows), scores, atol)
    if batch.lengths is not None:
        close(score(*padded(batch, map, model.module.pad_id)), scores, atol)
    return scores


def unpadded(batch: Batch, map: Tensor) -> tuple[Batch, Tensor]:
    """The texts without the padding that all of them have; images as they are."""
    if batch.lengths is None:
        return batch, map
    longest = int(batch.lengths.max())
    return dataclasses.replace(batch, x=batch.x[:, :longest], words=batch.words[:, :longest]), map[:, :longest]


def padded(batch: Batch, map: Tensor, pad: int, more: int = 5) -> tuple[Batch, Tensor]:
    """The texts with ``more`` tokens of padding."""

    def longer(t: Tensor, value: float) -> Tensor:
        return nn.functional.pad(t, (0, more), value=value)

    return dataclasses.replace(batch, x=longer(batch.x, pad), words=longer(batch.words, -1)), longer(map, 0.0)


# ---- methods -------------------------------------------------------------------------------------


def seeded(net: nn.Module, scale: float = 0.5) -> nn.Module:
    """The net with weights that need no random generator, frozen, in float64."""
    for i, p in enumerate(net.parameters()):
        p.data = torch.arange(p.numel()).add(7.0 * i).mul(1.7).sin().mul(scale).view_as(p)
    return net.double().eval().requires_grad_(False)


class FitSamples:
    """A batch as the data of a fit, handed out ``size`` samples at a time; texts with the padding that these need."""

    asked: frozenset[int] | None = None

    def __init__(self, samples: Batch, size: int) -> None:
        self.samples, self.size, self.uids = samples, size, samples.uids

    def batch(self, uids: Sequence[str]) -> Batch:
        return _alone(self.samples[[self.uids.index(uid) for uid in uids]])

    def __iter__(self) -> Iterator[Batch]:
        return (_alone(self.samples[i : i + self.size]) for i in range(0, len(self.samples), self.size))


class PartialInMemory:
    """Keeps what a fit saves; raises ``KilledError`` right after save number ``killed_after``."""

    def __init__(self, killed_after: int | None = None) -> None:
        self.state: dict[str, Tensor] | None = None
        self.left = killed_after

    def load(self) -> dict[str, Tensor] | None:
        return self.state

    def save(self, state: Mapping[str, Tensor]) -> None:
        self.state = {name: value.clone() for name, value in state.items()}
        if self.left is not None:
            self.left -= 1
            if self.left == 0:
                self.left = None
                raise KilledError

    def wanted(self) -> bool:
        return False


class KilledError(Exception):
    """A net or a job that dies where a test wants it to."""


@contextmanager
def net_dies(call: int | None) -> Iterator[list[int]]:
    """The ``call``-th convolution, linear layer, embedding or LSTM that runs raises; None only counts.

    Yields a list with the number of calls so far. Patched by class, so that copies and traced
    nets die too.
    """
    calls = [0]

    def dying(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*args: Any, **kwargs: Any) -> Tensor:
            calls[0] += 1
            if calls[0] == call:
                raise KilledError
            return forward(*args, **kwargs)

        return run

    with pytest.MonkeyPatch.context() as patch:
        for kind in (nn.Conv1d, nn.Conv2d, nn.Linear, nn.Embedding, nn.LSTM):
            patch.setattr(kind, "forward", dying(kind.forward))
        yield calls


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _marks(model: Classifier) -> list[Any]:
    """What a method must leave as it was, beside the weights."""
    modules = [
        (path, id(m), m.training, vars(m).get("forward"), [len(getattr(m, hooks)) for hooks in _HOOKS])
        for path, m in model.module.named_modules()
    ]
    parameters = [(name, id(p), p.requires_grad, p.grad) for name, p in model.module.named_parameters()]
    return [modules, parameters, model.rows, dict(model.roles.named), torch.is_grad_enabled()]


@contextmanager
def untouched(model: Classifier, *inputs: Any) -> Iterator[None]:
    """Checks that model and inputs are what they were: weights, hooks, modes, gradients. Also after an error."""
    before = _marks(model)
    try:
        with unchanged(model, *inputs):
            yield
    finally:
        assert _marks(model) == before, "the model was changed"


def _alone(batch: Batch) -> Batch:
    """As these samples would be without those that they shared a batch with."""
    return unpadded(batch, batch.x)[0]


def _among_others(batch: Batch, pad: int) -> Batch:
    """The first sample among others than before; texts that are longer than all before."""
    if batch.lengths is None:
        return dataclasses.replace(batch, x=torch.cat((batch.x[:1], batch.x[1:].flip(-1) * 100)))
    longer = padded(batch, batch.x, pad)[0]
    x, lengths, words = longer.x.clone(), longer.lengths.clone(), longer.words.clone()
    places = torch.arange(x.shape[1])
    x[1:], words[1:], lengths[1:] = x[0, 0] + places % 3, places, x.shape[1]
    return dataclasses.replace(longer, x=x, lengths=lengths, words=words)


def method_contract(
    method: Any,
    classifier: Callable[[int, torch.dtype], Classifier],
    batch: Batch,
    state: Mapping[str, Tensor],
    atol: float = 1e-9,
) -> dict[str, Tensor]:
    """The promises of ``attrib.methods.Method``; returns the maps and extras of the whole batch.

    ``classifier(rows, dtype)`` builds the model with that row limit; ``batch`` is in float64 and has
    at least three samples; texts are of different lengths, two tokens or more. ``atol`` is relative to
    the largest value.

    What is promised of texts: maps (B, T), zero on padding; how much padding there is does not matter.
    """
    everything, state, text = list(range(len(batch))), dict(state), batch.lengths is not None
    per_token = (*method.MAPS, *method.TOKENS) if text else ()

    others: dict[int, Classifier] = {}  # by their row limit: to read a net anew is what takes the time

    def explain(batch: Batch, model: Classifier | None = None, rows: int = 64) -> dict[str, Tensor]:
        if model is None:
            model = others[rows] if rows in others else others.setdefault(rows, classifier(rows, torch.float64))
        return dict(method.attribute(model, batch, state, Noise(batch.uids, 3, dtype=model.dtype)))

    def same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], atol: float = atol) -> None:
        """Up to ``atol`` of the largest value: of the array, or of the maps, whose remainders extras may be."""
        for name in method.DOCUMENTS:
            same_json(found[name], expected[name], max(atol, 1e-6))
        found, expected = ({n: v for n, v in m.items() if n not in method.DOCUMENTS} for m in (found, expected))
        largest = max(expected[name].abs().max().item() for name in method.MAPS)
        scales = {name: max(largest, value.abs().max().item()) for name, value in expected.items()}
        close(*({name: value.double() / scales[name] for name, value in m.items()} for m in (found, expected)), atol)

    def picked(maps: Mapping[str, Tensor], rows: list[int]) -> dict[str, Tensor]:
        return {n: v[rows] if isinstance(v, Tensor) else [v[i] for i in rows] for n, v in maps.items()}

    def long(maps: Mapping[str, Tensor], length: int = batch.x.shape[1]) -> dict[str, Tensor]:
        """Maps of texts with zeros up to ``length``, or cut to it."""

        def one(value: Tensor) -> Tensor:
            more = value.new_zeros(len(value), max(0, length - value.shape[1]), *value.shape[2:])
            return torch.cat((value, more), 1)[:, :length]

        return {name: one(value) if name in per_token else value for name, value in maps.items()}

    # What it returns, and what it leaves behind.
    model = classifier(64, torch.float64)
    with forbid_global_rng(), untouched(model, batch, state), net_dies(None) as calls:
        maps = explain(batch, model)
    assert maps.keys() == method.MAPS.keys() | method.EXTRAS.keys() | method.DOCUMENTS.keys()
    assert method.COLUMNS.keys() <= method.EXTRAS.keys()
    for name in method.DOCUMENTS:
        assert len(maps[name]) == len(batch), name
        json.dumps(maps[name], allow_nan=False)
    for name, value in maps.items():
        if name in method.DOCUMENTS:
            continue
        assert value.shape[:1] == (len(batch),), f"{name}: {tuple(value.shape)}"
        assert value.is_floating_point(), f"{name}: {value.dtype}"
        assert value.isfinite().all(), name
        assert not value.requires_grad, name
    for name in method.MAPS:
        assert maps[name].shape == (batch.x.shape if text else (len(batch), *batch.x.shape[2:])), name
        for i, one in enumerate(maps[name]):
            assert (one[: batch.lengths[i]] if text else one).std() > 0, f"{name} is constant"
    for name in per_token:
        assert maps[name].shape[:2] == batch.x.shape, name
        assert (maps[name][~batch.mask] == 0).all(), f"{name} is not zero on padding"

    # The same again; another seed is another draw of the same thing; no sample sees the others.
    same(explain(batch, model), maps)
    singles = (long(explain(_alone(batch[[i]]))) for i in everything)
    same({name: _joined(parts) for name, parts in _listed(singles)}, maps)
    order = everything[::-1]
    same(explain(batch[order]), picked(maps, order))
    for rows in (1, 2):
        same(explain(batch, rows=rows), maps)
    pad = model.module.pad_id if text else 0
    same(long(picked(explain(_among_others(batch, pad)), [0])), picked(maps, [0]))
    if text:
        same(long(explain(padded(batch, batch.x, pad)[0])), maps)

    # Precision is chosen for speed alone.
    single = explain(batch.to("cpu", torch.float32), classifier(64, torch.float32))
    same(single, maps, atol=1e-3)

    # Errors: the net dies at its first, a middle and its last layer; the target does not exist.
    with net_dies(None) as calls:  # less than before, when the model had not been cut yet
        explain(batch, model)
    for call in sorted({1, (calls[0] + 1) // 2, calls[0]}) if calls[0] else []:
        with pytest.raises(KilledError), untouched(model, batch, state), net_dies(call):
            explain(batch, model)
        same(explain(batch, model), maps)
    wrong = dataclasses.replace(batch, target=torch.full_like(batch.target, 10_000))
    try:
        with untouched(model, wrong, state):
            found = explain(wrong, model)
    except (IndexError, RuntimeError, SampleError, UserError):
        same(explain(batch, model), maps)
    else:
        same(found, maps)  # only a method that never looks at the target may go on
    return maps


def _joined(parts: list[Any]) -> Any:
    return torch.cat(parts) if isinstance(parts[0], Tensor) else [document for part in parts for document in part]


def same_json(found: Any, expected: Any, atol: float) -> None:
    """The same structure and texts; numbers up to ``atol``, relative to those beyond 1."""
    if isinstance(expected, Mapping):
        assert found.keys() == expected.keys()
        pairs = [(found[key], value) for key, value in expected.items()]
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        pairs = list(zip(found, expected, strict=True))
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=atol, abs=atol)
        pairs = []
    else:
        assert found == expected
        pairs = []
    for one, other in pairs:
        same_json(one, other, atol)


def _listed(parts: Iterable[Mapping[str, Tensor]]) -> list[tuple[str, list[Tensor]]]:
    all_parts = list(parts)
    return [(name, [part[name] for part in all_parts]) for name in all_parts[0]]


def fit_contract(
    fit: Any, classifier: Callable[[int, torch.dtype], Classifier], samples: Batch, atol: float = 1e-9
) -> dict[str, Tensor]:
    """The promises of ``attrib.methods.Fit``; returns the state."""
    lines: list[str] = []
    model, partial = classifier(64, torch.float64), PartialInMemory()
    with forbid_global_rng(), untouched(model, samples):
        state = dict(fit.run(model, FitSamples(samples, 4), partial, lines.append))
    assert all(isinstance(value, Tensor) and not value.requires_grad for value in state.values())
    assert all(isinstance(line, str) for line in lines)
    for size, rows in ((1, 3), (len(samples), 64)):
        other = fit.run(classifier(rows, torch.float64), FitSamples(samples, size), PartialInMemory(), lines.append)
        scales = {name: max(1.0, value.abs().max().item()) for name, value in state.items()}
        close(*({name: value / scales[name] for name, value in one.items()} for one in (other, state)), atol)
    with net_dies(None) as calls:
        fit.run(model, FitSamples(samples, 4), PartialInMemory(), lines.append)
    if calls[0] > 1:  # what is fitted on images themselves needs no net
        with pytest.raises(KilledError), untouched(model, samples), net_dies(2):
            fit.run(model, FitSamples(samples, 4), PartialInMemory(), lines.append)
    if partial.state is not None:  # it saves: killed right after its first save, it goes on to the same state
        partial = PartialInMemory(killed_after=1)
        with pytest.raises(KilledError):
            fit.run(classifier(64, torch.float64), FitSamples(samples, 4), partial, lines.append)
        close(fit.run(classifier(64, torch.float64), FitSamples(samples, 4), partial, lines.append), state, atol)
    return state
