"""A method that takes its time, so that there is some left in which to kill it; found in the working directory."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from attrib.fit import State
from attrib.methods import Method
from attrib.models import Classifier
from attrib.noise import Noise
from attrib.types import Batch


@dataclass(frozen=True)
class Slow(Method):
    """The input's channels added up, and noise; takes as many seconds for a batch as the file ``pace`` says now."""

    VERSION: ClassVar[int] = 1
    MAPS: ClassVar[Mapping[str, str]] = {"map": "input and noise"}

    def attribute(self, model: Classifier, batch: Batch, state: State, noise: Noise) -> Mapping[str, Tensor]:
        time.sleep(float(Path("pace").read_text()))
        value = batch.x.sum(1)
        return {"map": value + noise.normal(*value.shape[1:])}
