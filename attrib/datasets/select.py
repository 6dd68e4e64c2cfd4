"""Which samples of a dataset an experiment is about."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import ClassVar

import numpy as np

from attrib.datasets.files import shown
from attrib.datasets.protocols import Dataset
from attrib.keys import ADDED, stable_hash
from attrib.types import SampleError, UserError, did_you_mean

Confidence = Callable[[Sequence[str]], Mapping[str, float]]


@dataclass(frozen=True)
class Selection:
    """Rules, applied in the order list, max_box_area, min_confidence, count or permutation; None leaves a rule out.

    list            text file: a uid or relative file name per line; blank lines are skipped
    max_box_area    boxes cover less than this fraction of the image (the papers: 0.33); samples without a box are
                    left out
    min_confidence  the network's softmax probability of the target is at least this (the papers: 0.6); of several
                    labels, the sigmoid of each
    count           the ``count`` samples with the smallest hash of (seed, uid), which mixes the classes
    permutation     a seed: of the data set's uids in their order, ``count`` are those at the first places that
                    ``numpy.random.RandomState(seed).permutation`` gives, as papers often choose theirs; not together
                    with another rule

    A sample that a rule cannot judge because it cannot be read stays, so that the run reports it.
    """

    NAME: ClassVar[str] = "attrib.datasets.select.Selection"
    count: int | None = None
    seed: int = 0
    list: str | None = None
    min_confidence: float | None = None
    max_box_area: float | None = None
    permutation: int | None = field(default=None, metadata=ADDED)

    def __post_init__(self) -> None:
        others = (self.list, self.min_confidence, self.max_box_area)
        if self.permutation is not None and (self.count is None or any(rule is not None for rule in others)):
            raise UserError("select.permutation needs select.count, and no other rule beside it")
        if self.count is not None and self.count < 1:
            raise UserError(f"select.count must be at least 1, not {self.count}")
        for name in ("min_confidence", "max_box_area"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise UserError(f"select.{name} must be between 0 and 1, not {value}")

    def listed(self, dataset: Dataset) -> tuple[str, ...]:
        """What ``list`` leaves, sorted. Raises UserError like ``apply``."""
        return dataset.uids if self.list is None else tuple(sorted(_listed(self.list, dataset)))

    def apply(self, dataset: Dataset, confidence: Confidence) -> tuple[str, ...]:
        """The selected uids, sorted.

        ``confidence`` maps uids to the probability of their target and may leave out those that
        cannot be read. It is called at most once, for the samples that the cheaper rules left.

        Raises UserError if the list names an unknown sample, or if nothing is left, saying which rule removed what.
        """
        if self.permutation is not None:
            places = np.random.RandomState(self.permutation).permutation(len(dataset.uids))[: self.count]
            return tuple(sorted(dataset.uids[i] for i in places))
        left: Sequence[str] = dataset.uids
        removed: list[str] = []

        def keep(rule: str, uids: Collection[str]) -> tuple[str, ...]:
            removed.append(f"{rule} removed {len(left) - len(uids)}")
            return tuple(sorted(uids))

        if self.list is not None:
            left = keep(f"select.list={self.list}", _listed(self.list, dataset))
        if self.max_box_area is not None:
            left = keep(
                f"select.max_box_area={self.max_box_area}", [u for u in left if _small(dataset, u, self.max_box_area)]
            )
        if self.min_confidence is not None and left:
            known = confidence(left)
            sure = [u for u in left if u not in known or known[u] >= self.min_confidence]
            left = keep(f"select.min_confidence={self.min_confidence}", sure)
        if not left:
            raise UserError(f"no sample is left of {len(dataset.uids)}: {', '.join(removed)}")
        if self.count is None:
            return tuple(sorted(left))
        ranked = sorted(left, key=lambda uid: (stable_hash(f"{self.seed}/{uid}"), uid))
        return tuple(sorted(ranked[: self.count]))


def _small(dataset: Dataset, uid: str, limit: float) -> bool:
    """Whether the sample's boxes cover less than the fraction ``limit`` of it, or cannot be read."""
    try:
        area = dataset.box_area(uid)
    except SampleError:
        return True
    return area is not None and area < limit


def _listed(file: str, dataset: Dataset) -> set[str]:
    """The uids that a list file names. Raises UserError naming the line of an unknown sample."""
    uids: Sequence[str] = dataset.uids
    left_out: Mapping[str, str] = getattr(dataset, "left_out", {})  # uid -> why the dataset goes without it here
    path, known = Path(file).expanduser(), set(uids)
    try:
        # A name of a file may be in any encoding.
        lines = path.read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines()
    except OSError as error:
        raise UserError(f"select.list: {path} cannot be read: {error}") from error
    found = set()
    for number, line in enumerate(lines, 1):
        entry = shown(line.strip())
        if not entry:
            continue
        uid = entry if entry in known else str(PurePosixPath(entry).with_suffix(""))
        if why := left_out.get(entry) or left_out.get(uid):
            raise UserError(f"select.list: {path}, line {number}: sample {entry!r} is not here: {why}")
        if uid not in known:
            hint = did_you_mean(uid, uids) or "".join(f"; a uid looks like {uid!r}" for uid in uids[:1])
            raise UserError(f"select.list: {path}, line {number}: no sample {entry!r} in the dataset{hint}")
        found.add(uid)
    return found
