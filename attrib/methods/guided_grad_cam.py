"""Guided backpropagation within the places of Grad-CAM."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, get_args

from torch import Tensor

from attrib.checks import require
from attrib.fit import State
from attrib.methods import Method
from attrib.methods.baselines import GuidedBackprop
from attrib.methods.cam import GradCAM
from attrib.methods.parts.inputs import Reduce
from attrib.models import Classifier
from attrib.models.reading import check_layout
from attrib.noise import Noise
from attrib.types import Batch


@dataclass(frozen=True)
class GuidedGradCAM(Method):
    """Guided backpropagation times the enlarged Grad-CAM, which is >= 0 (Selvaraju et al., 2017, section 3.2).

    layer, layout   see ``GradCAM``
    reduce          how channels become one value, see ``baselines``

    Raises UserError on a net without ReLUs, see ``baselines.GuidedBackprop``.

    >>> import attrib, torch
    >>> net, x = attrib.models.LeNet(), torch.rand(1, 1, 32, 32)
    >>> attrib.explain(net, x, method=GuidedGradCAM(), layers={"cam": "relu2"}).map.shape
    torch.Size([1, 32, 32])
    """

    NAME: ClassVar[str] = "attrib.methods.guided_grad_cam.GuidedGradCAM"
    VERSION: ClassVar[int] = 2
    CONTRASTS: ClassVar[bool] = True
    MAPS: ClassVar[Mapping[str, str]] = {"map": "guided gradient times Grad-CAM, signed"}
    layer: str = "cam"
    layout: str = "auto"
    reduce: Reduce = "sum"

    def __post_init__(self) -> None:
        check_layout(type(self).__name__, self.layout)
        require(self, "reduce", one_of=get_args(Reduce))

    @property
    def roles(self) -> tuple[str, ...]:
        return (self.layer,)

    @property
    def laid(self) -> Mapping[str, str]:
        return {self.layer: self.layout}

    def attribute(self, model: Classifier, batch: Batch, state: State, noise: Noise) -> Mapping[str, Tensor]:
        cam = GradCAM(self.layer, layout=self.layout).attribute(model, batch, state, noise)["map"]
        return {"map": cam * GuidedBackprop(self.reduce).attribute(model, batch, state, noise)["map"]}
