"""The answer as a map: of data whose regions are known to be right, it tells what a metric can see."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from attrib.checks import require
from attrib.fit import State
from attrib.methods import Method
from attrib.models import Classifier
from attrib.noise import Noise
from attrib.types import Batch, UserError


@dataclass(frozen=True)
class Oracle(Method):
    """The sample's region of interest as its map, or the opposite, with noise in some of its places.

    It asks the net nothing, so it is no explanation. It serves to test metrics: where the region is all that the net
    can have seen, such as the ink of the only digit (``dataset=digits_canvas dataset.regions=masks``), a metric that
    does not prefer the oracle to its opposite measures something else.

    noise     share of the places, drawn at random, whose value is uniform noise on [0, 1): with more of it the order of
              the places is a worse one, by construction
    opposite  high outside the region, low inside

    Raises UserError for data without regions.

    >>> import torch
    >>> from attrib.models import Classifier, LeNet
    >>> from attrib.types import Batch
    >>> inside = torch.zeros(1, 32, 32, dtype=torch.bool)
    >>> inside[:, 8:16] = True
    >>> batch = Batch(("a",), torch.rand(1, 1, 32, 32), torch.tensor([3]), inside)
    >>> map = Oracle().attribute(Classifier(LeNet()), batch, {}, Noise(("a",), 0))["map"]
    >>> torch.equal(map.bool(), inside)
    True
    """

    NAME: ClassVar[str] = "attrib.methods.oracle.Oracle"
    VERSION: ClassVar[int] = 1
    CONTRASTS: ClassVar[bool] = True
    MODALITIES: ClassVar[tuple[str, ...]] = ("image", "audio")
    MAPS: ClassVar[Mapping[str, str]] = {"map": "1 inside the region of interest, 0 outside, or noise; >= 0, no unit"}

    noise: float = 0.0
    opposite: bool = False

    def __post_init__(self) -> None:
        require(self, "noise", at_least=0, at_most=1)

    def attribute(self, model: Classifier, batch: Batch, state: State, noise: Noise) -> Mapping[str, Tensor]:
        if batch.roi is None:
            raise UserError("the oracle is the region of interest, and these data have none: take another method")
        places = batch.roi.shape[1:]
        drawn, lost = noise.uniform(*places), noise.uniform(*places) < self.noise
        return {"map": drawn.where(lost, (batch.roi != self.opposite).to(drawn))}
