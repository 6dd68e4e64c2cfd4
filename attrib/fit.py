"""Fits: what some methods must learn from data before they can explain anything, such as a layer's statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar, Protocol

from torch import Tensor

from attrib.models import Classifier
from attrib.types import Batch

State = dict[str, Tensor]


class Progress(str):
    """A line of progress that also says how far its work is: ``done`` of ``total`` steps that take equally long.

    >>> Progress("covariance", 12, 300, "samples")
    'covariance: 12 / 300 samples'
    """

    what: str
    done: int
    total: int
    unit: str

    def __new__(cls, what: str, done: int, total: int, unit: str, more: str = "") -> Progress:
        self = super().__new__(cls, f"{what}: {done} / {total} {unit}{more}")
        self.what, self.done, self.total, self.unit = what, done, total, unit
        return self


class FitData(Protocol):
    """The samples that a state is fitted on (the estimation set).

    asked   the classes that will be explained, for a fit that goes by classes; None: any
    """

    uids: tuple[str, ...]
    asked: frozenset[int] | None

    def batch(self, uids: Sequence[str]) -> Batch:
        """These samples, in this order. Raises SampleError if one of them cannot be read."""
        ...

    def __iter__(self) -> Iterator[Batch]:
        """All samples that can be read, in batches; the state must not depend on their size."""
        ...


class Partial(Protocol):
    """Where a fit keeps its intermediate state, so that a job that was killed continues where it stopped."""

    def load(self) -> State | None:
        """What was saved last; None if nothing was."""
        ...

    def save(self, state: State) -> None: ...

    def wanted(self) -> bool:
        """Whether the job was told to stop. A fit with long steps asks after each, saves if so, and then reports."""
        ...


class Fit(Protocol):
    """How a method's state is made from data.

    A frozen dataclass like the method itself, with a key of its own: methods whose fits are equal share one state.
    A fit derives from this class and gets the defaults below.
    """

    VERSION: ClassVar[int]  # raised whenever the numbers of the state change
    TEXT_ROLES: ClassVar[tuple[str, ...]] = ()  # layers that it reads of text nets only, beside ``roles``
    BY_CLASS: ClassVar[bool] = False  # whether its state has parts for classes, of which those explained suffice

    @property
    def TARGETS(self) -> bool:  # noqa: N802  like the constants of ``Method``
        """Whether the state depends on the samples' targets, which otherwise need not be known."""
        return True

    @property
    def roles(self) -> tuple[str, ...]:
        """The layers that it reads; their paths enter the state's key."""
        ...

    def run(self, model: Classifier, data: FitData, partial: Partial, report: Callable[[str], None]) -> State:
        """The fitted state. ``report`` takes a line for people, best a ``Progress``, after every batch or step.

        Where a job is told to stop, ``report`` is also where it ends.
        """
        ...

    def covers(self, state: State, asked: frozenset[int] | None) -> bool:
        """Whether a state has all that was looked for for these classes; None: for any."""
        return True

    def united(self, stored: State, new: State) -> State:
        """What is kept of a state that was stored and one that was fitted meanwhile. The first decides."""
        return stored
