"""The protocol that all metrics derive from."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, Protocol

from torch import Tensor

from attrib.models import Classifier
from attrib.noise import Noise
from attrib.types import Batch

Direction = Literal["higher", "lower", "none"]
Explain = Callable[[Batch], Tensor]  # (B, *input) -> maps (B, H, W), of sounds (B, L); see ``Metric.score``


class Metric(Protocol):
    """Numbers for the map of every sample of a batch."""

    NEEDS_INPUT: ClassVar[bool] = True  # whether it looks at ``Batch.x``; else the images may not be read at all
    NEEDS_EXPLAIN: ClassVar[bool] = False  # whether it asks for maps of other inputs; its score then takes explain

    # The others may depend on the fields. Where they do not, a metric has a class variable in the property's place.

    @property
    @abstractmethod
    def VERSION(self) -> int:  # noqa: N802
        """Raised whenever numbers change; it may depend on the fields, so that other cases keep their scores."""

    @property
    @abstractmethod
    def COLUMNS(self) -> Mapping[str, Direction]:  # noqa: N802
        """The name of every number, and which direction is better."""

    @property
    def CURVES(self) -> Mapping[str, str]:  # noqa: N802
        """The name of every curve, and one line that says what its axes are."""
        return {}

    @property
    def ABOUT(self) -> Mapping[str, str]:  # noqa: N802
        """For every column a line that says to the reader of a report what the number is, without a full stop."""
        return {}

    @property
    def BOUNDS(self) -> Mapping[str, tuple[float, float]]:  # noqa: N802
        """For every curve whose points cannot be smaller or larger: the least and the greatest value."""
        return {}

    @property
    @abstractmethod
    def MODALITIES(self) -> tuple[str, ...]:  # noqa: N802
        """The data whose maps it scores: "image", "text", "audio"."""

    @property
    def NEEDS_ROI(self) -> bool:  # noqa: N802
        """Whether it is defined only with a region of interest."""
        return False

    @property
    def NEEDS_PROBABILITIES(self) -> bool:  # noqa: N802
        """Whether it asks for probabilities (``model.link``) or which class the net decides for.

        Without probabilities, as in a regression, such a metric is refused.
        """
        return False

    @property
    def NEEDS_LOGITS(self) -> tuple[str, ...]:  # noqa: N802
        """For which data it asks what the net says of the input (``perturb.whole``): metrics of a cell share that."""
        return ()

    @property
    def CONTRASTS(self) -> bool:  # noqa: N802
        """Whether the target may be a difference of the scores of two classes: in ``Batch.target`` (B, K) one is -1.

        Never where it asks for probabilities.
        """
        return False

    @property
    def roles(self) -> tuple[str, ...]:
        """The layers that it may read; of those that the model has, the paths enter the key of its scores."""
        return ()

    @abstractmethod
    def score(
        self, model: Classifier, batch: Batch, map: Tensor, noise: Noise, *args: Any, **kwargs: Any
    ) -> Mapping[str, Tensor]:
        """``map`` (B, H, W), of sounds (B, L), of texts (B, T), not changed -> every column (B,), every curve (B, S).

        With NEEDS_INPUT false, ``batch.x`` may have no channels: (B, 0, H, W).

        For a sample that the metric is not defined on (no region of interest, NaN in its map) every
        column is NaN; the runner records it in the failure ledger.

        With NEEDS_EXPLAIN there is one more argument, ``explain``; without, none. (``*args, **kwargs`` tell a type
        checker that both may be.) ``explain(batch)`` takes the same samples (``uids``), with other inputs or targets,
        and returns their maps, of the shape of ``map``: made by the same method with the same state and seed, and from
        the same random numbers, so that an unchanged input gives ``map`` again, and every difference comes from
        the input. They may hold NaN. One call costs as much as the maps of a batch; never ask for more samples at
        once than ``batch`` has.
        """


def reads_inputs(metric: Metric) -> bool:
    """Whether its samples must be read whole, and not just their regions."""
    return getattr(metric, "NEEDS_INPUT", True) or metric.NEEDS_EXPLAIN  # a user's may be older
