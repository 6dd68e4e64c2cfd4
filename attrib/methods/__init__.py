"""Attribution methods: what in its input made a net say what it says.

A method is a frozen dataclass that derives from ``Method``::

    @dataclass(frozen=True)
    class InputNorm(Method):
        VERSION: ClassVar[int] = 1
        MAPS: ClassVar[Mapping[str, str]] = {"map": "norm over the channels, >= 0"}
        power: float = 2.0

        def __post_init__(self) -> None:
            require(self, "power", at_least=1)  # attrib.checks

        def attribute(self, model, batch, state, noise):
            return {"map": batch.x.norm(self.power, dim=1)}

*Dataclass*: every annotated line in the class is a field (``power``), and Python writes ``__init__`` from them. The
fields are the hyper-parameters: they are what the method's YAML may set (another name is an error), and with the
class's name and ``VERSION`` they are the method's part of the key under which results are stored. What must not be
a field is a ``ClassVar``. *Frozen*: no field can change after the object has been built, so the key stays true, and
``__post_init__`` is the one place where values are checked.

Because two methods with equal fields must give equal maps, a method keeps nothing from one call to the next. It gets
all that it needs: the net (``Classifier``, which says how many rows fit at once), the samples (``Batch``), what was
fitted for it (``State``) and random numbers (``Noise``, a stream per sample). Methods know nothing of data sets,
metrics or the store, nor of each other, except that some are built on another (IBA, Grad-CAM). What several share is in
``parts``; docs/how-to/add-a-method.md goes through all steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

from torch import Tensor

from attrib.fit import Fit, State
from attrib.models import Classifier
from attrib.noise import Noise
from attrib.types import Batch

Explanation = Mapping[str, Tensor | list[Any]]  # a tensor (B, ...) for each map and extra, a list of B for a document


class Method(Protocol):
    """Explains the target's score of every sample of a batch.

    What the class says of itself is constant for most methods, a ``ClassVar``; where it depends on the fields it is
    a property of the same name.
    """

    MODALITIES: ClassVar[tuple[str, ...]] = ("image",)  # what it explains: "image", "text", "audio"
    TEXT_ROLES: ClassVar[tuple[str, ...]] = ()  # layers that it reads of text nets only, beside ``roles``
    DOCUMENTS: ClassVar[Mapping[str, str]] = {}  # name -> one line; JSON per sample, in ``<cell>/<name>/<uid>.json``

    @property
    def VERSION(self) -> int:  # noqa: N802
        """Raised whenever the method's numbers change; where it depends on the fields, other cases keep their maps."""
        ...

    @property
    def MAPS(self) -> Mapping[str, str]:  # noqa: N802
        """Name of each map -> one line with its unit, its sign and, if it is not the input's, its resolution."""
        ...

    @property
    def EXTRAS(self) -> Mapping[str, str]:  # noqa: N802
        """Name -> one line, of other arrays that are kept for each sample, such as losses."""
        return {}

    @property
    def COLUMNS(self) -> Mapping[str, str]:  # noqa: N802
        """Those EXTRAS that are a single number and that tables show -> which is better: "higher", "lower", "none"."""
        return {}

    @property
    def TOKENS(self) -> tuple[str, ...]:  # noqa: N802
        """Those EXTRAS that have a place for each token of a text, (B, T, ...)."""
        return ()

    @property
    def roles(self) -> tuple[str, ...]:
        """The layers that it reads; their paths enter the key of its maps."""
        return ()

    @property
    def laid(self) -> Mapping[str, str]:
        """Those of its roles whose layers it lays on the image or sound -> the ``layout`` that is given for them."""
        return {}

    @property
    def NEEDS_PROBABILITIES(self) -> bool:  # noqa: N802
        """Whether it asks for probabilities (``model.link``), a loss made of them, or which class the net decides for.

        Without probabilities, as in a regression, such a method is refused.
        """
        return False

    @property
    def CONTRASTS(self) -> bool:  # noqa: N802
        """Whether the target may be a difference of the scores of two classes: in ``Batch.target`` (B, K) one is -1.

        Never where it asks for probabilities.
        """
        return False

    @property
    def fit(self) -> Fit | None:
        """How its state is made from an estimation set; None if it needs no state."""
        return None

    def bytes_per_sample(self, model: Classifier, batch: Batch) -> int | None:
        """How much of the device's memory the method keeps for each sample of such a batch; None if not known.

        This is beside what goes through the net, which ``run.rows`` bounds. It is for methods that keep much: batches
        that cannot fit are then never tried (``attrib.running.batch_size``). It changes no number.
        """
        return None

    def attribute(self, model: Classifier, batch: Batch, state: State, noise: Noise) -> Explanation:
        """Explain ``batch.target``.

        Returns all that the class declares: each of MAPS as (B, H, W), of sounds (B, L), of texts (B, T) with zeros
        on padding, finite, and negative where something speaks against the target, if the method can tell; each of
        EXTRAS as (B, ...); each of DOCUMENTS as a list of B values that JSON can hold.

        A sample's result is the same, within floating-point noise, whatever else is in the batch, in any order, and
        however much padding there is. The model and the batch are left as they were, also after an error.

        Raises SampleError for a sample that cannot be explained, UserError for what only the user can put right.
        """
        ...
