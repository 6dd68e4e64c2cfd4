"""Which class is explained, and which class of the net a class of the data is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from attrib.classes import ClassNames, Numbering, listed
from attrib.datasets import Dataset
from attrib.types import UserError

Named = Literal["label", "predicted", "second"]
Rule = Named | int
_SPLITS = frozenset({"train", "training", "val", "valid", "validation", "dev", "test", "testing"})
RULES: tuple[Named, ...] = ("label", "predicted", "second")


@dataclass(frozen=True)
class Contrast:
    """Why this class and not that one: the score of ``of`` minus that of ``against``."""

    NAME: ClassVar[str] = "attrib.experiment.targets.Contrast"
    of: Rule
    against: Rule

    def __str__(self) -> str:
        return f"{{of: {self.of}, against: {self.against}}}"


Target = Rule | Contrast


def rules_of(target: Target | None) -> tuple[Rule, ...]:
    if isinstance(target, Contrast):
        return target.of, target.against
    return () if target is None else (target,)


def parsed(given: Any, classes: ClassNames | None = None) -> Target:
    """``dataset.target``: ``label``, ``predicted``, ``second``, the number or name of a class, or a contrast of two.

    classes   among which a name is found

    Raises UserError.
    """
    if isinstance(given, Contrast):
        given = {"of": given.of, "against": given.against}
    if not isinstance(given, Mapping):
        return _rule(given, classes)
    if set(given) != {"of", "against"}:
        raise UserError(
            f"dataset.target: a contrast has the fields of and against, such as {{of: predicted, against: second}}, "
            f"not {', '.join(map(str, given)) or 'none'}"
        )
    of, against = (_rule(given[name], classes) for name in ("of", "against"))
    if of == against:
        raise UserError(f"dataset.target: of and against are both {of}, so their difference is 0")
    return Contrast(of, against)


def _rule(given: Any, classes: ClassNames | None) -> Rule:
    for name in RULES:
        if given == name:
            return name
    if isinstance(given, int) and not isinstance(given, bool) and given >= 0:
        return given
    what = "label, predicted or second, or the number or name of a class"
    if not isinstance(given, str):
        last = f"{len(classes) - 1}" if classes is not None and len(classes) else "the net's last class"
        raise UserError(f"dataset.target must be {what}, not {given!r}; classes are numbered from 0 to {last}")
    if classes is None:
        if given.isdecimal():
            return int(given)
        raise UserError(
            f"dataset.target must be {what}, not {given!r}; the net's classes have no names (model.classes gives them)"
        )
    found = classes.find(given)
    if isinstance(found, str):
        raise UserError(f"dataset.target: {found} ({classes.source}: {classes})")
    return found


def labels_of(dataset: Dataset, uids: Sequence[str]) -> Counter[int] | None:
    """How many of some samples have each class; None if the dataset does not say without reading them.

    Of several labels a sample counts for each. -1: no label.
    """
    label = getattr(dataset, "label", None)
    if label is None:
        return None
    found: Counter[int] = Counter()
    for uid in uids:
        value = label(uid)
        if isinstance(value, int):
            found[value] += 1
        elif isinstance(value, tuple) and all(one in (0, 1) for one in value):
            found.update(i for i, one in enumerate(value) if one)
        else:
            return None
    return found


def check_labels(dataset: Dataset, uids: Sequence[str], target: Target) -> None:
    """Raises UserError if labels are to be explained and no sample has one, as far as can be said without reading."""
    if "label" not in rules_of(target) or not uids:
        return
    known = labels_of(dataset, uids)
    if known is None or known.keys() - {-1}:
        return
    why = next((w for w in (getattr(dataset, "label_problems", {}).get(uid) for uid in uids) if w), "")
    raise UserError(
        f"none of the {len(uids)} samples has a label{f' ({why})' if why else ''}, and dataset.target=label explains "
        "them; take dataset.target=predicted to explain the class that the network predicts, or the number of one "
        "class, dataset.target=NUMBER"
    )


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
    if numbering == "folders" and _SPLITS.issuperset(name.casefold() for name in names.values()):
        raise UserError(
            f"{where}: its folders are splits ({listed(names.values())}), not classes; name one of them as "
            f"{where}.root, or explain dataset.target=predicted"
        )
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
        some = len(names if there is None else there.keys() & names.keys())
        raise UserError(
            f"{where}: {len(wrong)} of {some} classes of the data are not the net's: {next(iter(wrong.values()))}\n"
            f"  data: {listed(names[i] for i in wrong)}\n"
            f"  net ({classes.source}): {classes}\n"
            "Call them what the net does (WordNet id, name or number), give their numbers as dataset.classes, explain "
            "dataset.target=predicted, leave their samples out (dataset.select.list), or set model.classes: to the "
            "net's own names, or to none if both number their classes alike"
        )
    return None if all(i == j for i, j in found.items()) else found
