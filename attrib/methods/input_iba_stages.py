"""InputIBA across two nets: the sanity check of its authors, which randomises the net for some stages only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

from attrib.checks import require
from attrib.fit import FitData, Partial, State
from attrib.methods.input_iba import InputIBA
from attrib.methods.parts.statistics import FeatureStatistics
from attrib.models import Classifier


@dataclass(frozen=True)
class OriginalStatistics(FeatureStatistics):
    """The statistics of the original net, also when the net is a copy with randomised layers."""

    NAME: ClassVar[str] = "attrib.methods.input_iba_stages.OriginalStatistics"
    VERSION: ClassVar[int] = 1

    def run(self, model: Classifier, data: FitData, partial: Partial, report: Callable[[str], None]) -> State:
        return super().run(model.original, data, partial, report)


@dataclass(frozen=True)
class InputIBAStages(InputIBA):
    """InputIBA whose first stages use the original net, and the later ones its copy with randomised layers.

    For a net that is no such copy (``attrib.models.randomise``) it is the same as InputIBA. As in the authors'
    code (evaluation/sanity_check.py), the feature bottleneck is always that of the original net.

    randomised_from   the first stage that uses the randomised net: "gan", or "input", which is the last one

    >>> InputIBAStages(randomised_from="input").feature.beta
    20.0
    """

    NAME: ClassVar[str] = "attrib.methods.input_iba_stages.InputIBAStages"
    VERSION: ClassVar[int] = 1

    randomised_from: Literal["gan", "input"] = "gan"

    def __post_init__(self) -> None:
        require(self, "randomised_from", one_of=("gan", "input"))

    @property
    def fit(self) -> OriginalStatistics:
        return OriginalStatistics(self.feature.layer)

    def nets(self, model: Classifier) -> tuple[Classifier, Classifier, Classifier]:
        return model.original, model if self.randomised_from == "gan" else model.original, model
