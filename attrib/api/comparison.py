"""Several methods on the same samples: the rows, and what the tables make of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from attrib.api import pictures
from attrib.api.explanation import Explanation, together
from attrib.api.names import numbered
from attrib.results import formats, tables
from attrib.store.files import write_atomic
from attrib.types import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = 10  # lines of what failed, in ``repr``
_CATEGORIES = (
    "cell",
    "dataset",
    "model",
    "method",
    "map",
    "contender",
    "metric",
    "column",
    "direction",
    "state",
    "stage",
)


@dataclass(frozen=True, eq=False)
class Comparison:
    """What :func:`attrib.compare` gives back; in a notebook it shows its table and its maps.

    explanations   method -> its maps
    scored         method -> a row for each sample, map and column
    refused        method -> why it has no maps, or no scores

    >>> import attrib, torch
    >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(256, 2))
    >>> found = attrib.compare(net, torch.rand(3, 1, 16, 16), ["gradient", "random"], "insertion_deletion")
    >>> len(found.rows), sorted(found.explanations)
    (18, ['gradient', 'random'])
    """

    explanations: Mapping[str, Explanation]
    scored: Mapping[str, pd.DataFrame] = field(repr=False)
    refused: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def rows(self) -> pd.DataFrame:
        """All scores with the columns that :func:`attrib.results.tables.rows` gives of a work directory."""
        return pd.concat(
            [_rows(name, self.explanations[name], scored) for name, scored in self.scored.items()], ignore_index=True
        ).pipe(_categorical)

    @cached_property
    def table(self) -> pd.DataFrame:
        """One row for each method, map and column: n, mean with its 95 % interval, whether it is best, costs."""
        return tables.summary(self.rows).drop(columns=["cell", "dataset", "pending"])

    @cached_property
    def tests(self) -> pd.DataFrame:
        """Paired tests between all methods, per column, corrected by Holm."""
        return tables.all_paired(self.rows).drop(columns=["dataset"], errors="ignore")

    @cached_property
    def ranks(self) -> pd.DataFrame:
        """Mean ranks of the methods, per column."""
        return tables.ranks(self.rows).drop(columns=["dataset"])

    def __repr__(self) -> str:
        problems = self.problems
        more = [f"and {len(problems) - SHOWN} more: see problems"] if len(problems) > SHOWN else []
        lines = "".join(f"\n{line}" for line in [*problems[:SHOWN], *more])
        return f"Comparison of {', '.join(self.explanations)}:\n{self._short().to_string(index=False)}{lines}"

    @property
    def problems(self) -> list[str]:
        """A line for each method that is missing, and for each sample that a method could not explain."""
        refused = [f"{name} was left out: {reason}" for name, reason in self.refused.items()]
        return refused + [f"{name}: {line}" for name, e in self.explanations.items() for line in e.problems]

    def _short(self) -> pd.DataFrame:
        shown = self.table
        value = [
            f"{m:.3g}" if math.isnan(lo) else f"{m:.3g} [{lo:.3g}, {hi:.3g}]"  # of one sample there is no interval
            for m, lo, hi in zip(shown["mean"], shown["lo"], shown["hi"])
        ]
        arrows = shown["column"] + " " + shown["direction"]
        found = pd.DataFrame(
            {"method": shown["contender"], "metric": shown["metric"], "column": arrows, "n": shown["n"]}
        )
        return found.assign(**{"mean [95 %]": value, "best": shown["best"].map({True: "best", False: ""})})

    def plot(self) -> Figure:
        """The maps side by side as a figure of matplotlib."""
        return pictures.figure(together(list(self.explanations.values())))

    def _repr_html_(self) -> str:
        drawn = together(list(self.explanations.values()))
        return pictures.html(drawn, _html(self._short()), self._samples, self.problems)

    @property
    def _samples(self) -> int:
        """How many have a map."""
        return len({uid for e in self.explanations.values() for uid in e.uids})

    def save(self, folder: str | Path) -> Path:
        """Writes ``comparison.html``, ``scores.csv``, ``table.csv``, ``tests.csv``, and each method's maps.

        The maps are in a folder called like the method; of names that differ only in what a folder's cannot have, the
        second gets ``-2``.

        See :meth:`Explanation.save`. Returns the folder. Raises UserError if it cannot be written.
        """
        folder = Path(folder).expanduser()
        try:
            for name, frame in (("scores", self.rows), ("table", self.table), ("tests", self.tests)):
                write_atomic(folder / f"{name}.csv", frame.to_csv(index=False).encode())
            title, table = f"Comparison of {', '.join(self.explanations)}", _html(self._short())
            drawn = together(list(self.explanations.values()))
            text = pictures.page(drawn, title, table, self._samples, self.problems)
            write_atomic(folder / "comparison.html", text.encode())
        except OSError as error:
            raise UserError(f"{folder} cannot be written: {error.strerror or error}") from error
        for name, place in zip(self.explanations, _folders(list(self.explanations))):
            self.explanations[name].save(folder / place)
        return folder


def _folders(names: Sequence[str]) -> list[str]:
    """A folder for each method, called as it is called; a sign that no path has is "-", and of equal ones the second
    in a row is ``NAME-2``. Case does not tell folders apart everywhere.

    >>> _folders(["a/b", "a-b", "a b", "A-B-2", "iba"])
    ['a-b', 'a-b-2', 'a-b-3', 'A-B-2-2', 'iba']
    """
    places = ("".join(c if c.isalnum() or c in "-_" else "-" for c in name) for name in names)
    return list(numbered(places, str.lower))


def _rows(name: str, explanation: Explanation, scored: pd.DataFrame) -> pd.DataFrame:
    """With the columns that tables expect."""
    cell = explanation.cell
    costs = pd.DataFrame([{"uid": uid, **explanation.known[uid].cost} for uid in explanation.uids])
    frame = scored.merge(costs, on="uid", how="left").reindex(columns=[*scored.columns, *tables.COSTS])
    several = len(cell.method.MAPS) > 1
    stage = frame["metric"].where(frame["state"] == "failed", "")
    return frame.assign(
        cell=name,
        dataset="given",
        model=cell.names["model"],
        method=name,
        contender=name + formats.BETWEEN + frame["map"] if several else name,
        fingerprint="",
        stage=stage.mask(frame["uid"].isin(list(explanation.failures)), "maps"),
        time=math.nan,
        value=frame["value"].where(frame["state"] == "ok"),
        device=frame["device"].fillna(""),
    )[tables.ROWS]


def _categorical(frame: pd.DataFrame) -> pd.DataFrame:
    for column in (*_CATEGORIES, "device"):
        values = frame[column].astype(str)
        frame[column] = pd.Categorical(values, categories=values.unique().tolist())
    return frame


def _html(frame: pd.DataFrame) -> str:
    head = "".join(f"<th>{escape(str(c))}</th>" for c in frame.columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(str(v))}</td>" for v in row) + "</tr>" for row in frame.itertuples(index=False)
    )
    return f'<table class="scores"><tr>{head}</tr>{body}</table>'
