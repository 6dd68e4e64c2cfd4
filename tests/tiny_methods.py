"""Methods that fail, as a user's own might, and a metric that tells what it was given."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from attrib.fit import State
from attrib.methods import Method
from attrib.metrics import Direction, Explain, Metric
from attrib.models import Classifier
from attrib.noise import Noise
from attrib.types import Batch


@dataclass(frozen=True)
class Flaky(Method):
    """Raises for p001, returns NaN for p004."""

    VERSION: ClassVar[int] = 1
    MAPS: ClassVar[Mapping[str, str]] = {"map": "noise"}

    def attribute(self, model: Classifier, batch: Batch, state: State, noise: Noise) -> Mapping[str, Tensor]:
        if "p001" in batch.uids:
            raise RuntimeError("no luck")
        maps = noise.uniform(*batch.x.shape[-2:])
        for i, uid in enumerate(batch.uids):
            if uid == "p004":
                maps[i, 0, 0] = float("nan")
        return {"map": maps}


@dataclass(frozen=True)
class Broken(Method):
    """Returns something other than it declares."""

    VERSION: ClassVar[int] = 1
    MAPS: ClassVar[Mapping[str, str]] = {"map": "noise"}

    def attribute(self, model: Classifier, batch: Batch, state: State, noise: Noise) -> Mapping[str, Tensor]:
        return {"mapp": noise.uniform(*batch.x.shape[-2:])}


during: Callable[[Batch], object] = len  # what happens within a batch of ``Eventful``, for a test to set


@dataclass(frozen=True)
class Eventful(Method):
    """Noise and input, while something else happens."""

    VERSION: ClassVar[int] = 1
    MAPS: ClassVar[Mapping[str, str]] = {"map": "noise and input"}

    def attribute(self, model: Classifier, batch: Batch, state: State, noise: Noise) -> Mapping[str, Tensor]:
        during(batch)
        return {"map": noise.uniform(*batch.x.shape[-2:]) + batch.x.mean(1)}


@dataclass(frozen=True)
class Sized(Eventful):
    """With a score of its own."""

    EXTRAS: ClassVar[Mapping[str, str]] = {"size": "sum of the map"}
    COLUMNS: ClassVar[Mapping[str, str]] = {"size": "none"}

    def attribute(self, model: Classifier, batch: Batch, state: State, noise: Noise) -> Mapping[str, Tensor]:
        found = super().attribute(model, batch, state, noise)
        return {**found, "size": found["map"].flatten(1).sum(1)}


@dataclass(frozen=True)
class TargetOf(Metric):
    """The class that a score is about."""

    VERSION: ClassVar[int] = 1
    MODALITIES: ClassVar[tuple[str, ...]] = ("image", "text")
    COLUMNS: ClassVar[Mapping[str, Direction]] = {"target": "none"}

    def score(self, model: Classifier, batch: Batch, map: Tensor, noise: Noise) -> Mapping[str, Tensor]:
        return {"target": batch.target}


@dataclass(frozen=True)
class MapAgain(Metric):
    """How far the map of the unchanged input is from the one that is stored."""

    VERSION: ClassVar[int] = 1
    NEEDS_EXPLAIN: ClassVar[bool] = True
    MODALITIES: ClassVar[tuple[str, ...]] = ("image",)
    COLUMNS: ClassVar[Mapping[str, Direction]] = {"same": "lower", "other": "none"}

    def score(
        self, model: Classifier, batch: Batch, map: Tensor, noise: Noise, explain: Explain
    ) -> Mapping[str, Tensor]:
        size = map.abs().flatten(1).amax(1)
        again, other = explain(batch), explain(replace(batch, x=batch.x.flip(-1)))
        return {name: (m - map).abs().flatten(1).amax(1) / size for name, m in (("same", again), ("other", other))}


@dataclass(frozen=True)
class TwoMaps(Method):
    """Two different maps, of the input and of noise."""

    VERSION: ClassVar[int] = 1
    MAPS: ClassVar[Mapping[str, str]] = {"input": "input", "noisy": "input and noise"}

    def attribute(self, model: Classifier, batch: Batch, state: State, noise: Noise) -> Mapping[str, Tensor]:
        value = batch.x.sum(1)
        return {"input": value, "noisy": 3 * value + noise.normal(*value.shape[1:])}
