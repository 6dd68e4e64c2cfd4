"""Metrics that ask for the maps of other inputs than those whose maps are stored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

from torch import Tensor

from attrib.models import Classifier
from attrib.noise import Noise
from attrib.types import Batch

Explain = Callable[[Batch], Tensor]


class Explaining(ABC):
    """A base class that marks such a metric: its ``score`` gets one argument more than that of ``Metric``.

    ``explain(batch)`` gives the map that is scored, (B, H, W) or (B, L), of a batch of the same samples
    (``uids``) with other inputs, by the method, state and seed of the stored map. The method's own random
    numbers are the samples' again, so that an unchanged input gives the stored map, and what
    differs is due to the input. It may not be finite.

    Each call costs as much as a map: ask for no more samples at a time than ``batch`` has.
    """

    @abstractmethod
    def score(
        self, model: Classifier, batch: Batch, map: Tensor, noise: Noise, explain: Explain
    ) -> Mapping[str, Tensor]: ...
