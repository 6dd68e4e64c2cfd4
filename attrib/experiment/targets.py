"""Which class is explained, and which class of the net a class of the data is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from attrib.classes import ClassNames, Numbering, listed
from attrib.datasets import Dataset
from attrib.types import UserError


def labels_of(dataset: Dataset, uids: Sequence[str]) -> set[int] | None:
    """The classes of some samples; None if the dataset does not say without reading them."""
    label = getattr(dataset, "label", None)
    if label is None:
        return None
    found: set[int] = set()
    for uid in uids:
        value = label(uid)
        if not isinstance(value, int):
            return None
        found.add(value)
    return found


def matched(
    dataset: Dataset, classes: ClassNames | None, uids: Sequence[str], where: str = "dataset"
) -> Mapping[int, int] | None:
    """Class of the dataset -> class of the net, by their names; None: the numbers are the same.

    They are taken to be the same if net or data give their classes no names.
    Raises UserError, with both lists, if a class of ``uids`` is none of the net's.
    """
    names: Mapping[int, str] = dataset.names
    numbering: Numbering = getattr(dataset, "numbering", "given")
    if not names:
        return None
    if classes is None:
        if numbering == "labels":
            raise UserError(
                f"{where}: its labels are names ({listed(names.values())}), and nothing says which classes of the net "
                "they are; give the names of the net's classes as model.classes, or the numbers of the data's as "
                "dataset.classes"
            )
        return None
    found, problems = classes.match(names, numbering, getattr(dataset, "wnids", None))
    there = labels_of(dataset, uids)
    wrong = {i: why for i, why in problems.items() if there is None or i in there}
    if wrong:
        some = len(names if there is None else there & set(names))
        raise UserError(
            f"{where}: {next(iter(wrong.values()))}. {len(wrong)} of {some} classes of the data are not the net's:\n"
            f"  data: {listed(names[i] for i in wrong)}\n"
            f"  net ({classes.source}): {listed(classes.shown(i) for i in range(len(classes)))}\n"
            "Call them what the net does (WordNet id, name or number), give their numbers as dataset.classes, explain "
            "dataset.target=predicted, leave their samples out (dataset.select.list), or set model.classes: to the "
            "net's own names, or to none if both number their classes alike"
        )
    return None if all(i == j for i, j in found.items()) else found
