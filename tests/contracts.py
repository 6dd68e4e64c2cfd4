"""What every metric (and method) promises, as functions that a test calls."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from attrib.models import Classifier
from attrib.noise import Noise
from attrib.types import Batch

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

    with pytest.MonkeyPatch.context() as patch:
        for owner, names in ((torch, _TORCH), (torch.Tensor, _TENSOR), (np.random, _NUMPY), (random, _PYTHON)):
            for name in (*names, "seed" if owner in (np.random, random) else "manual_seed"):
                patch.setattr(owner, name, refuse, raising=False)
        yield


@contextmanager
def unchanged(*things: Any) -> Iterator[None]:
    """Checks that the tensors, batches and classifiers given are the same after as before, bit by bit."""

    def tensors(thing: Any) -> list[Tensor]:
        if isinstance(thing, Tensor):
            return [thing]
        if isinstance(thing, Batch):
            return [value for _, value in thing._tensors()]
        return list(thing.module.state_dict().values())

    live = [tensor for thing in things for tensor in tensors(thing)]
    before = [tensor.clone() for tensor in live]
    yield
    for now, then in zip(live, before, strict=True):
        assert torch.equal(now.nan_to_num(12345.0), then.nan_to_num(12345.0)), "an input was changed"


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

    ``classifier(rows)`` builds the model with that row limit, in float64.
    """

    def score(batch: Batch, map: Tensor, rows: int = 64) -> dict[str, Tensor]:
        return metric.score(classifier(rows), batch, map, Noise(batch.uids, seed=3))

    model, everything = classifier(64), range(len(batch))
    with forbid_global_rng(), unchanged(batch, map, model):
        scores = metric.score(model, batch, map, Noise(batch.uids, seed=3))
    assert scores.keys() == metric.COLUMNS.keys() | metric.CURVES.keys()
    assert set(metric.COLUMNS.values()) <= {"higher", "lower", "none"}
    assert all(scores[name].shape == (len(batch),) for name in metric.COLUMNS)
    assert all(scores[name].ndim == 2 and len(scores[name]) == len(batch) for name in metric.CURVES)

    singles = [score(batch[[i]], map[i : i + 1]) for i in everything]
    close({name: torch.cat([s[name] for s in singles]) for name in scores}, scores, atol)
    order = list(reversed(everything))
    close(score(batch[order], map[order]), {name: value[order] for name, value in scores.items()}, atol)
    for rows in (1, 3, 7, 1000):
        close(score(batch, map, rows), scores, atol)
    return scores
