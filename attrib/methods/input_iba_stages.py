"""InputIBA across two nets: the sanity check that its authors made, of one stage at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

from attrib.fit import FitData, Partial, State
from attrib.methods.input_iba import InputIBA
from attrib.methods.parts.statistics import FeatureStatistics
from attrib.models import Classifier
from attrib.types import UserError


@dataclass(frozen=True)
class OriginalStatistics(FeatureStatistics):
    """The same of the net that a randomised one is a copy of."""

    NAME: ClassVar[str] = "attrib.methods.input_iba_stages.OriginalStatistics"
    VERSION: ClassVar[int] = 1

    def run(self, model: Classifier, data: FitData, partial: Partial, report: Callable[[str], None]) -> State:
        return super().run(model.original, data, partial, report)


@dataclass(frozen=True)
class InputIBAStages(InputIBA):
    """InputIBA whose first stages explain the original net, and the others its copy with randomised layers.

    Of a net that is no such copy (``attrib.models.randomise``) it is InputIBA. As in the authors' code
    (evaluation/sanity_check.py), the feature bottleneck is always that of the original net.

    randomised_from   "gan": the generator and the bottleneck at the input see the randomised net; "input": the
                      bottleneck at the input alone
    """

    NAME: ClassVar[str] = "attrib.methods.input_iba_stages.InputIBAStages"
    VERSION: ClassVar[int] = 1

    randomised_from: Literal["gan", "input"] = "gan"

    def __post_init__(self) -> None:
        if self.randomised_from not in ("gan", "input"):
            raise UserError(f"InputIBAStages.randomised_from must be gan or input, not {self.randomised_from!r}")

    @property
    def fit(self) -> OriginalStatistics:
        return OriginalStatistics(self.feature.layer)

    def nets(self, model: Classifier) -> tuple[Classifier, Classifier, Classifier]:
        return model.original, model if self.randomised_from == "gan" else model.original, model
