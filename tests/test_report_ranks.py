"""Critical difference diagrams: who is under one bar, what is drawn and what is not."""

import base64

import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

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
    for text in ("best", "1.00", "&lt;b&gt;", "2.00", "3.00", "worst"):
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


LABELS = {
    "short": lambda i: f"m{i}",
    "fields": lambda i: f"integrated_gradients (steps=50, baseline=mean, reduce=abs_max, layer=features.{i:02d}.conv)"[
        :80
    ],
    "no place to break": lambda i: f"{i:02d}" + "W" * 78,
    "spaces": lambda i: f"method number {i} with a rather long label that says all of its fields in words"[:80],
    "mixed": lambda i: ("a" * (i % 3 * 38 + 1)) + f" {i}",
}


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("k", [2, 3, 9, 40])
def test_every_word_can_be_read(kind, k):
    """Nothing is cut off, no two texts are in one place, and the axis keeps its width."""
    names = [LABELS[kind](i) for i in range(k)]
    values = {name: [float(i % 7 + i / 50), float(-i), float(i * i % 11)] * 4 for i, name in enumerate(names)}
    rows = tables.ranks(_frame(values))
    figure = ranks.figure(rows[rows["rank"].notna()], _styles(names))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    (axes,) = figure.axes
    boxes = [text.get_window_extent(canvas.get_renderer()) for text in axes.texts]
    whole = figure.bbox
    for box in boxes:
        assert box.x0 >= whole.x0
        assert box.x1 <= whole.x1
        assert box.y0 >= whole.y0
        assert box.y1 <= whole.y1
    for i, box in enumerate(boxes):
        assert not any(box.x0 < b.x1 and b.x0 < box.x1 and box.y0 < b.y1 and b.y0 < box.y1 for b in boxes[:i])
    line = axes.lines[0].get_xdata()
    assert line[1] - line[0] == pytest.approx(ranks.AXIS)
    said = "".join(text.get_text() for text in axes.texts).replace(" ", "")
    for name in names:
        assert name.replace(" ", "") in said


@pytest.mark.parametrize("name", ["", "a", "x" * 80, "a, b", "field=value, " * 6, "a" * 41 + "=b", "-" * 50])
def test_a_wrapped_name_is_all_there(name):
    lines = ranks._wrapped(name)
    assert "".join(lines).replace(" ", "") == name.replace(" ", "")
    assert all(len(line) <= ranks.LONGEST for line in lines)
    assert len(lines) <= 3
