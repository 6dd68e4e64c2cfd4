"""How much a map changes with its input: local Lipschitz estimate and max-sensitivity."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from attrib.checks import require
from attrib.metrics.metric import Direction, Explain, Metric
from attrib.models import Classifier
from attrib.noise import Noise
from attrib.types import Batch

Normalize = Literal["norm", "max", "none"]


@dataclass(frozen=True)
class Lipschitz(Metric):
    """Local Lipschitz estimate and max-sensitivity, from the maps F(y) of ``samples`` points y around the input x:

        lipschitz        max over y of  |F(y) - F(x)| / |y - x|    (Alvarez-Melis & Jaakkola, *On the
                         Robustness of Interpretability Methods*, 2018, eq. 2)
        max_sensitivity  max over y of  |F(y) - F(x)|              (Yeh et al., *On the (In)fidelity and
                         Sensitivity of Explanations*, NeurIPS 2019, definition 3)

    with L2 norms. The points are drawn uniformly from a box around x (the ball of Yeh et al.), so the true maximum
    is at least what is found. A method that draws random numbers gets the same ones at every point, so that only the
    input differs.

    A low value alone is no merit: a map that never changes scores 0.

    samples     points per input; each costs as much as a map
    radius      of the box, as a share of the input's range (largest minus smallest number)
    normalize   maps of different methods have different units. "norm": of both maps the share of |F(x)|, as
                in the program of Yeh et al.; "max": each map divided by its own largest absolute value, the
                default of quantus; "none": the formulas as they stand

    |y - x| is in units of the normalised input. NaN for a map that is not finite, at x or y; for one that is zero
    everywhere, where maps are divided by its norm or maximum; and for an input whose numbers are all equal.

    >>> import attrib, torch
    >>> net, x = attrib.models.LeNet(), torch.rand(1, 1, 32, 32)
    >>> explanation = attrib.explain(net, x, method="gradient")
    >>> list(explanation.evaluate(Lipschitz(samples=2))["column"])
    ['lipschitz', 'max_sensitivity']
    """

    NAME: ClassVar[str] = "attrib.metrics.lipschitz.Lipschitz"
    VERSION: ClassVar[int] = 1
    CONTRASTS: ClassVar[bool] = True
    NEEDS_EXPLAIN: ClassVar[bool] = True
    MODALITIES: ClassVar[tuple[str, ...]] = ("image", "audio")
    COLUMNS: ClassVar[Mapping[str, Direction]] = {"lipschitz": "lower", "max_sensitivity": "lower"}
    ABOUT: ClassVar[Mapping[str, str]] = {
        "lipschitz": "largest change of the map per change of the input, among inputs that differ a little",
        "max_sensitivity": "largest change of the map among inputs that differ a little",
    }

    samples: int = 10
    radius: float = 0.05
    normalize: Normalize = "norm"

    def __post_init__(self) -> None:
        require(self, "samples", at_least=1)
        require(self, "radius", above=0)
        require(self, "normalize", one_of=get_args(Normalize))

    def score(self, model: Classifier, batch: Batch, map: Tensor, noise: Noise, explain: Explain) -> dict[str, Tensor]:
        """``map`` (B, H, W), sound (B, L) -> two columns (B,), float64 on the model's device."""
        x = batch.x.to(model.device, model.dtype)
        here = map.detach().to(model.device, torch.float64).flatten(1)
        scale = self._scale(here)
        span = (x.flatten(1).amax(1) - x.flatten(1).amin(1)).view(-1, *[1] * (x.ndim - 1))
        change = x.new_zeros(len(x), dtype=torch.float64)
        ratio = change.clone()
        for _ in range(self.samples):  # every sample at one point: no more samples at once than were explained at once
            step = self.radius * span * (2 * noise.uniform(*x.shape[1:]).to(x) - 1)
            there = explain(replace(batch, x=x + step)).detach().to(model.device, torch.float64).flatten(1)
            other = scale if self.normalize == "norm" else self._scale(there)
            moved = (there / other - here / scale).norm(dim=1)
            # torch.maximum keeps NaN, as it should.
            change = torch.maximum(change, moved)
            ratio = torch.maximum(ratio, moved / step.double().flatten(1).norm(dim=1))
        defined = ratio.isfinite() & change.isfinite()
        return {
            "lipschitz": ratio.masked_fill(~defined, torch.nan),
            "max_sensitivity": change.masked_fill(~defined, torch.nan),
        }

    def _scale(self, map: Tensor) -> Tensor:
        """(B, N) -> (B, 1) what a map is divided by."""
        if self.normalize == "none":
            return torch.ones_like(map[:, :1])
        return map.norm(dim=1, keepdim=True) if self.normalize == "norm" else map.abs().amax(1, keepdim=True)
