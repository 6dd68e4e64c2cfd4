"""What attrib graph wrote is on the page: pictures within the budget, tables, damaged files by name."""

import json

import pandas as pd
import pytest
from PIL import Image

from attrib import report
from attrib.report.graphs import graphs


@pytest.fixture
def folder(root):
    folder = root / "graphs" / "digits.lenet.0123abcd"
    folder.mkdir(parents=True)
    for target in (2, 10):
        layers = [
            {"path": "fc2", "how": "z test", "causes": 3, "candidates": 9},
            {"path": "fc1", "how": "fallback", "causes": 1, "candidates": 5},
        ]
        about = {"class": target, "name": "<b>two</b>" if target == 2 else "", "samples": 7, "layers": layers}
        (folder / f"class_{target}.json").write_text(json.dumps({"graph": about, "nodes": [], "edges": []}))
        Image.new("RGB", (1300, 600), "white").save(folder / f"class_{target}.png")
    Image.new("RGB", (90, 40), "white").save(folder / "stability.png")
    rows = [
        (2, "keep nodes", "causal", 0, 0.9),
        (2, "keep nodes", "random", 0, 0.1),
        (2, "keep nodes", "random", 1, 0.3),
    ]
    rows += [("union", "keep nodes", "causal", 0, 0.8)]
    frame = pd.DataFrame(rows, columns=["class", "change", "network", "draw", "accuracy"])
    frame.assign(samples=4, logit=1.5, others=0.25).to_csv(folder / "effect.csv", index=False)
    columns = ["nodes", "edges", "nodes_reference", "edges_reference"]
    drawn = pd.DataFrame([(1.0, 0.5, 0.25, 0.0), (0.0, 0.5, 0.75, None)], columns=columns)
    drawn.assign(**{"class": [2, 10], "layer": "fc2"}).to_csv(folder / "bootstrap.csv", index=False)
    return folder


def test_everything_that_was_written(root, folder):
    (one,) = graphs(root, 10**6)
    assert (one.title, one.left, one.problems) == ("digits.lenet.0123abcd", 0, [])
    assert [caption for caption, _ in one.images] == ["2 <b>two</b>", "10"]  # by number, not by letters
    assert all(image.startswith("data:image/png;base64,") for _, image in one.images)
    assert one.stability
    sizes, effect, bootstrap = one.tables
    assert sizes.header == ["class", "samples", "fc2", "fc1"]
    assert sizes.body[1] == ["10", "7", "3/9", "1/5*"]
    assert ["mean", "keep nodes", "random", "1.500", "0.200", "0.250"] in [list(row) for row in effect.body]
    assert ["union", "keep nodes", "causal", "1.500", "0.800", "0.250"] in [list(row) for row in effect.body]
    assert bootstrap.body == [["fc2", "0.500", "0.500", "0.500", "0.000"]]

    page = report.page(root)
    assert "Causal graphs<small>digits.lenet.0123abcd</small>" in page
    assert "Stability under soft interventions" in page
    assert "<b>two</b>" not in page
    assert "&lt;b&gt;two&lt;/b&gt;" in page


def test_pictures_beyond_the_budget_are_counted(root, folder):
    (one,) = graphs(root, 1)
    assert (len(one.images), one.left) == (1, 1)


def test_damaged_files_are_named(root, folder):
    (folder / "class_2.png").write_bytes(b"no picture")
    (folder / "class_10.json").write_text("{")
    (folder / "effect.csv").write_text("")
    (one,) = graphs(root, 10**6)
    assert [problem.split(":")[0] for problem in one.problems] == ["class_2.png", "class_10.json", "effect.csv"]
    assert "cannot be read: class_10.json" in report.page(root)


def test_without_graphs_there_is_no_section(root):
    assert graphs(root, 10**6) == []
    assert "Causal graphs" not in report.page(root)
