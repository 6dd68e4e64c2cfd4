"""Critical difference diagrams: who is under one bar, what is drawn and what is not."""

import base64

import pandas as pd
import pytest

from attrib.report import curves, ranks
from attrib.results import stats, tables


@pytest.mark.parametrize(
    ("letters", "bars"),
    [
        (["a", "a", "b"], [[0, 1]]),
        (["a", "ab", "b", "c"], [[0, 1], [1, 2]]),
        (["a", "b", "c"], []),
        (["a", "a", ""], [[0, 1]]),
        (["(52)", "(52)(53)", "(53)"], [[0, 1], [1, 2]]),  # past the alphabet
    ],
)
def test_a_bar_for_each_letter_that_is_shared(letters, bars):
    assert ranks.groups(letters) == bars


def _frame(values, column="score", direction="higher"):
    """Scores as ``tables.rows`` gives them, of methods over samples."""
    rows = [
        {
            "dataset": "d",
            "model": "m",
            "metric": "score",
            "column": column,
            "direction": direction,
            "contender": name,
            "uid": str(i),
            "fingerprint": "f",
            "state": "ok",
            "value": value,
        }
        for name, own in values.items()
        for i, value in enumerate(own)
    ]
    return pd.DataFrame(rows)


def _styles(names):
    return {name: curves.style(i) for i, name in enumerate(names)}


def test_the_picture_names_every_method_with_its_rank():
    values = {"best": [3.0] * 20, "<b>": [2.0] * 20, "worst": [1.0] * 20}
    (one,) = ranks.diagrams(tables.ranks(_frame(values)), _styles(values))
    assert one.title == "score"
    assert one.about.startswith("n = 20, Friedman's p < .001, critical difference 0.74")
    head, _, body = one.image.partition(",")
    assert head == "data:image/svg+xml;base64"
    svg = base64.b64decode(body).decode()
    for text in ("best  1.00", "&lt;b&gt;  2.00", "3.00  worst"):
        assert text in svg  # matplotlib keeps the words in a comment beside their outlines


def test_two_methods_and_methods_without_scores_are_not_drawn():
    two = {"a": [1.0, 2.0, 3.0], "b": [2.0, 3.0, 4.0]}
    assert ranks.diagrams(tables.ranks(_frame(two)), _styles(two)) == []
    frame = _frame({**two, "c": [0.0, 1.0, 2.0], "gone": [1.0] * 3})
    frame.loc[frame["contender"] == "gone", "state"] = "failed"
    (one,) = ranks.diagrams(tables.ranks(frame), _styles(["a", "b", "c", "gone"]))
    assert b"gone" not in base64.b64decode(one.image.partition(",")[2])


def test_all_alike_is_one_bar_over_all():
    values = [[1.0, 2.0, 3.0], [2.0, 3.0, 1.0], [3.0, 1.0, 2.0]]  # (samples, methods)
    assert ranks.groups(stats.ranks(values).groups) == [[0, 1, 2]]
