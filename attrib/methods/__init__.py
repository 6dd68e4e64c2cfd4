"""Attribution methods.

A method is a frozen dataclass. Its fields are its hyper-parameters: they are what its YAML may
set and what enters the key of its results. Methods know models, batches and noise; they know
nothing of datasets, metrics, the store or each other, except that those built on IBA import it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Protocol

from torch import Tensor

from attrib.fit import Fit, State
from attrib.models import Classifier
from attrib.noise import Noise
from attrib.types import Batch


class Method(Protocol):
    """Explains the target's score of every sample of a batch."""

    VERSION: ClassVar[int]  # raised whenever numbers change
    MAPS: ClassVar[Mapping[str, str]]  # name -> one line: unit, sign, resolution
    EXTRAS: ClassVar[Mapping[str, str]] = {}  # other arrays kept per sample, such as losses
    COLUMNS: ClassVar[Mapping[str, str]] = {}  # EXTRAS of one number that tables show -> "higher", "lower" or "none"
    DOCUMENTS: ClassVar[Mapping[str, str]] = {}  # name -> one line; JSON per sample: ``<cell>/<name>/<uid>.json``
    TOKENS: ClassVar[tuple[str, ...]] = ()  # the EXTRAS that have a place per token of a text, (B, T, ...)
    MODALITIES: ClassVar[tuple[str, ...]] = ("image",)  # what it explains: "image", "text", "audio"
    TEXT_ROLES: ClassVar[tuple[str, ...]] = ()  # layers that it reads of a text's net only, beside ``roles``

    @property
    def roles(self) -> tuple[str, ...]:
        """The layers it reads; their paths enter the key of its maps."""
        return ()

    @property
    def fit(self) -> Fit | None:
        """What must be fitted first, or None."""
        return None

    def bytes_per_sample(self, model: Classifier, batch: Batch) -> int | None:
        """What each sample of such a batch will take of the device's memory, or None if that is not known.

        Beside what goes through the net, which ``run.rows`` bounds. For a method with much to keep per
        sample: so many samples as do not fit are never tried (``attrib.running.batch_size``). A hint: it changes
        no number.
        """
        return None

    def attribute(self, model: Classifier, batch: Batch, state: State, noise: Noise) -> Mapping[str, Tensor]:
        """Every name in MAPS -> (B, H, W), of sounds (B, L), finite, signed; every EXTRA -> (B, ...).
        Every DOCUMENT -> a list of B values that JSON can hold.

        Of a text a map is (B, T), zero on padding, and does not depend on how much of that there is.

        Equal, within floating-point noise, for any batch size and order; leaves the model and
        the batch as they were, also after an error.
        """
        ...
