"""Metrics: numbers per sample and map, with a direction that is declared once.

A metric is a frozen dataclass; its fields are its parameters and enter the key of its scores.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, Protocol

from torch import Tensor

from attrib.metrics.degradation import Degradation
from attrib.metrics.ehr import EHR
from attrib.metrics.eraser import Eraser
from attrib.metrics.explaining import Explain, Explaining
from attrib.metrics.infidelity import Infidelity
from attrib.metrics.insertion_deletion import InsertionDeletion
from attrib.metrics.irof import IROF
from attrib.metrics.lipschitz import Lipschitz
from attrib.metrics.localisation import Localisation
from attrib.metrics.quantus import ExplainingQuantus, Quantus, quantus_metric
from attrib.metrics.road import ROAD
from attrib.metrics.sensitivity_n import SensitivityN
from attrib.models import Classifier
from attrib.noise import Noise
from attrib.types import Batch

__all__ = [
    "EHR",
    "IROF",
    "ROAD",
    "Degradation",
    "Direction",
    "Eraser",
    "Explain",
    "Explaining",
    "ExplainingQuantus",
    "Infidelity",
    "InsertionDeletion",
    "Lipschitz",
    "Localisation",
    "Metric",
    "Quantus",
    "SensitivityN",
    "quantus_metric",
]

Direction = Literal["higher", "lower", "none"]


class Metric(Protocol):
    VERSION: ClassVar[int]  # raised whenever numbers change
    COLUMNS: ClassVar[Mapping[str, Direction]]  # which direction is better
    CURVES: ClassVar[Mapping[str, str]]  # name -> one line: what lies on x and y
    NEEDS_ROI: ClassVar[bool]  # whether it is defined only with a region of interest
    MODALITIES: ClassVar[tuple[str, ...]]  # whose maps it judges: "image", "text", "audio"

    roles: tuple[str, ...]  # the layers that it may read; of those that the model has, the paths enter the key

    def score(self, model: Classifier, batch: Batch, map: Tensor, noise: Noise) -> Mapping[str, Tensor]:
        """``map`` (B, H, W), sound (B, L), text (B, T), not changed -> every column (B,), every curve (B, S).

        A sample that the metric is not defined on (no region of interest, NaN in its map) gets
        NaN in every column; the runner puts it into the failure ledger.

        A metric that needs maps of other inputs as well derives from ``Explaining``.
        """
        ...
