"""Metrics: numbers for each sample and map; each metric declares which direction is better.

A metric is a frozen dataclass; its fields are its parameters and enter the key of its scores.
"""

from __future__ import annotations

from attrib.metrics.adversarial import AdversarialAgreement
from attrib.metrics.degradation import Degradation
from attrib.metrics.ehr import EHR
from attrib.metrics.eraser import Eraser
from attrib.metrics.infidelity import Infidelity
from attrib.metrics.insertion_deletion import InsertionDeletion
from attrib.metrics.irof import IROF
from attrib.metrics.lipschitz import Lipschitz
from attrib.metrics.localisation import Localisation
from attrib.metrics.metric import Direction, Explain, Metric
from attrib.metrics.quantus import ExplainingQuantus, Quantus, quantus_metric
from attrib.metrics.road import ROAD
from attrib.metrics.sensitivity_n import SensitivityN

__all__ = [
    "EHR",
    "IROF",
    "ROAD",
    "AdversarialAgreement",
    "Degradation",
    "Direction",
    "Eraser",
    "Explain",
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
