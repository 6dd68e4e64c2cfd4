"""What a method needs to know of the data before it can explain anything, and how it gets to know it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar, Protocol

from torch import Tensor

from attrib.models import Classifier
from attrib.types import Batch

State = dict[str, Tensor]


class FitData(Protocol):
    """The samples that a state is fitted on."""

    uids: tuple[str, ...]

    def batch(self, uids: Sequence[str]) -> Batch: ...

    def __iter__(self) -> Iterator[Batch]:
        """All samples, in batches of a size that must not matter."""
        ...


class Partial(Protocol):
    """Where a fit keeps its intermediate state, so that a killed job goes on where it was."""

    def load(self) -> State | None: ...

    def save(self, state: State) -> None: ...

    def wanted(self) -> bool:
        """Whether the job was told to stop: a fit whose steps are long saves now, and then reports."""
        ...


class Fit(Protocol):
    """What a method needs to know of the data before it can explain anything.

    A frozen dataclass with a key of its own: methods with an equal fit share its state.
    """

    VERSION: ClassVar[int]
    TARGETS: ClassVar[bool] = True  # whether it looks at the samples' targets
    TEXT_ROLES: ClassVar[tuple[str, ...]] = ()  # layers that it reads of a text's net only; may be left out

    @property
    def roles(self) -> tuple[str, ...]: ...

    def run(self, model: Classifier, data: FitData, partial: Partial, report: Callable[[str], None]) -> State:
        """The fitted state; ``report`` takes a line of progress for people."""
        ...
