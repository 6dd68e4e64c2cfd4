"""Mean, standard deviation and activity of a layer's units over a data set: what IBA's noise is made from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attrib.fit import Fit, FitData, Partial, Progress, State
from attrib.methods.parts.layout import TextLayout
from attrib.models import Classifier
from attrib.types import UserError


class Moments:
    """Streaming mean, standard deviation (ddof 1) and share of non-zero values, per unit.

    Batches are merged with the update of Chan, Golub & LeVeque (1979), the batched form of
    Welford's, in float64: the result does not depend on how the data is divided into batches.
    """

    def __init__(self) -> None:
        self.n = 0
        self._mean = self._m2 = self._nonzero = torch.zeros(())

    def add(self, z: Tensor) -> None:
        """z (B, *units), one observation per row."""
        z = z.to(torch.float64)
        n, mean = len(z), z.mean(0)
        m2 = ((z - mean) ** 2).sum(0)
        if self.n == 0:
            self._mean, self._m2, self._nonzero = mean, m2, (z != 0).sum(0)
        else:
            delta, total = mean - self._mean, self.n + n
            self._mean = self._mean + delta * (n / total)
            self._m2 = self._m2 + m2 + delta**2 * (self.n * n / total)
            self._nonzero = self._nonzero + (z != 0).sum(0)
        self.n += n

    def state(self) -> State:
        """mean, std and active (share of rows where the unit is not zero), each (*units), and n, the number of rows.

        The std of a unit that varies by no more than its mean is rounded by, where that is kept as float32, is zero:
        a distance from the mean, divided by so small a number, would be rounding alone.
        Raises UserError for fewer than two rows.
        """
        if self.n < 2:
            raise UserError(f"feature statistics need at least 2 samples, the estimation set has {self.n}")
        std = (self._m2 / (self.n - 1)).sqrt()
        std = std.masked_fill(std <= torch.finfo(torch.float32).eps * self._mean.abs(), 0)
        return {
            "mean": self._mean.float(),
            "std": std.float(),
            "active": (self._nonzero / self.n).float(),
            "n": torch.tensor(self.n),
        }


@dataclass(frozen=True)
class FeatureStatistics(Fit):
    """The moments of the layer with role ``layer`` (IBA, section 3.1: mu_R and sigma_R).

    In a layer of texts, (B, T, C), every real token is one observation of C units, so the moments are (C,),
    padding counts for nothing and a long text for more than a short one. (InputIBA's code takes a text for
    one observation, and averages over padding too.)
    """

    NAME: ClassVar[str] = "attrib.methods.statistics.FeatureStatistics"
    VERSION: ClassVar[int] = 1
    TARGETS: ClassVar[bool] = False
    layer: str = "bottleneck"

    @property
    def roles(self) -> tuple[str, ...]:
        return (self.layer,)

    def run(self, model: Classifier, data: FitData, partial: Partial, report: Callable[[str], None]) -> State:
        moments, seen = Moments(), 0
        for batch in data:
            z = model.until(self.layer, batch.x).z
            per_token = batch.mask is not None and TextLayout.found(model, self.layer, batch, z).real is not None
            moments.add(z[batch.mask] if per_token else z)
            seen += len(batch)
            report(Progress(f"feature statistics of {model.roles.path(self.layer)}", seen, len(data.uids), "samples"))
        return moments.state()
