"""Equal things have one name in all cells; different things that share a name show what differs."""

import numpy as np
import pytest
from synthetic import UIDS, add_rows, cell, iba, metric_folder, only, spec

from attrib import keys
from attrib.results import formats, labels, tables
from attrib.store import cell as store
from attrib.types import UserError


def shown(root, axis="method"):
    return [getattr(item, axis) for item in labels.labelled(root)]


def test_labels_of_variants_name_the_fields_that_differ(tmp_path):
    cell(tmp_path, "photos.net.iba.1", method="iba", beta=1, steps=10, fit={"n": 5})
    cell(tmp_path, "photos.net.iba.2", method="iba", beta=10, steps=10, fit={"n": 5})
    cell(tmp_path, "photos.net.iba.3", method="iba", beta=10, steps=10, fit={"n": 9})
    cell(tmp_path, "photos.net.ig.1", method="ig", steps=3)
    assert shown(tmp_path) == ["iba (beta=1, fit.n=5)", "iba (beta=10, fit.n=5)", "iba (beta=10, fit.n=9)", "ig"]


def test_the_same_method_keeps_its_label_in_all_datasets_and_models(tmp_path):
    cell(tmp_path, "cats.net.iba.1", dataset="cats", method="iba", beta=1)
    cell(tmp_path, "photos.net.iba.2", method="iba", beta=1)
    cell(tmp_path, "photos.other.iba.3", model="other", method="iba", beta=2)
    assert shown(tmp_path) == ["iba (beta=1)", "iba (beta=1)", "iba (beta=2)"]


def test_labels_of_seeds_versions_weights_and_datasets(tmp_path):
    cell(tmp_path, "photos.net.iba.1", seed=0)
    cell(tmp_path, "photos.net.iba.2", seed=1)
    assert shown(tmp_path) == ["iba (seed=0)", "iba (seed=1)"]
    for i, change in enumerate(({"weights": "cd" * 32, "model_key": "dd" * 32}, {"dataset_key": "beefbeef"})):
        made = store.Cell(tmp_path / f"photos.net.iba.x{i}")
        made.write_spec(spec() | change)
    assert set(shown(tmp_path, "model")) == {"net (weights=abababab)", "net (weights=cdcdcdcd)"}
    # Equal configurations, other keys: the key itself tells them apart.
    assert set(shown(tmp_path, "dataset")) == {"photos (key=cafecafe)", "photos (key=beefbeef)"}


def test_labels_of_what_else_makes_a_cell(tmp_path):
    for key, layer, state in (
        ("1", "features.3", "aa" * 32),
        ("2", "features.9", "bb" * 32),
        ("3", "features.9", None),
    ):
        made = store.Cell(tmp_path / f"photos.net.iba.{key}")
        made.write_spec(spec(beta=1) | {"layers": {"bottleneck": layer}, "state_key": state})
    cell(tmp_path, "photos.net.iba.4", beta=2)
    assert shown(tmp_path) == [
        "iba (beta=1, bottleneck=features.3, state=aaaaaaaa)",
        "iba (beta=1, bottleneck=features.9, state=bbbbbbbb)",
        "iba (beta=1, bottleneck=features.9, state=None)",
        "iba (beta=2)",
    ]


def test_cells_that_nothing_tells_apart_show_their_keys(tmp_path):
    cell(tmp_path, "photos.net.iba.0a")
    cell(tmp_path, "photos.net.iba.0b")
    assert shown(tmp_path) == ["iba (key=0a)", "iba (key=0b)"]


def test_another_path_to_the_same_data_is_the_same_dataset(tmp_path):
    for i, path in enumerate(("/scratch", "/home")):
        made = store.Cell(tmp_path / f"photos.net.iba.{i}")
        described = spec()
        described["config"]["dataset"]["root"] = path
        made.write_spec(described)
    assert shown(tmp_path, "dataset") == ["photos", "photos"]


def test_labels_of_metric_parameters(root):
    made = iba(root)
    metric_folder(made, "ehr.33333333", {"ehr": "higher"}, parameters={"class": "ehr", "steps": 5})
    add_rows(made, "ehr.33333333", [(u, "f", "map", "ehr", 0.5, 1.0) for u in UIDS])
    table = tables.summary(tables.rows(root))
    assert set(only(table, column="ehr")["metric"]) == {
        "ehr (key=" + keys.digest({"class": "ehr"})[:8] + ")",
        "ehr (steps=5)",
    }
    titles = formats.wide(table)[0].columns
    assert "ehr · ehr (steps=5) ↑" in titles
    assert "deletion ↓" in titles


def test_a_model_is_known_by_its_key(tmp_path):
    for i, (key, path, layer) in enumerate((("aa", "/a", "x"), ("aa", "/b", "y"), ("bb", "/a", "x"))):
        described = spec(method=f"m{i}") | {"model_key": key * 32}
        described["config"]["model"] |= {"checkpoint": path, "layers": {"cam": layer}}
        store.Cell(tmp_path / f"photos.net.m{i}.{i}").write_spec(described)
    # Neither a path nor the layers of a method make another model; of equal fields the key is shown.
    assert shown(tmp_path, "model") == ["net (key=aaaaaaaa)"] * 2 + ["net (key=bbbbbbbb)"]


def test_metrics_that_only_the_ledger_knows(root):
    known = labels.metrics(store.cells(root))
    found = labels.lost(
        ["load", "ehr.11111111", "maps", "insertion_deletion.22222222"], "photos.net.iba.iba0000", known
    )
    assert found == []
    found = labels.lost(["lpips.0123abcd", "ehr.0123abcd", "lpips.4567abcd", "odd"], "photos.net.iba.iba0000", known)
    assert [(s.folder, s.label) for s in found] == [
        ("ehr.0123abcd", "ehr [0123abcd]"),  # another ehr than the one with a folder
        ("lpips.0123abcd", "lpips"),
        ("lpips.4567abcd", "lpips [4567abcd]"),
        ("odd", "odd"),
    ]
    assert all(s.lost for s in found)
    # A folder that another cell has gives its label.
    metric_folder(iba(root), "ehr.33333333", {"ehr": "higher"}, parameters={"class": "ehr", "steps": 5})
    known = labels.metrics(store.cells(root))
    assert [s.label for s in labels.lost(["ehr.33333333"], "photos.net.ig.ig0000", known)] == ["ehr (steps=5)"]


def test_results_count_under_the_recorded_fingerprint(root):
    made = iba(root)
    arrays = {"map": np.zeros((8, 8), np.float32)}
    late = store.Arrays(made.folder / "maps", "w1")
    late.add(UIDS[0], "other", arrays)
    late.add(UIDS[1], "other", arrays)
    late.flush()
    made.write_samples([*UIDS[:3], "new"], {UIDS[0]: "other", UIDS[2]: "third"})
    (item,) = [item for item in labels.labelled(root) if item.method == "iba"]
    assert set(item.maps()) == {(UIDS[0], "other"), (UIDS[1], "f"), (UIDS[1], "other")}
    assert item.about("new")
    assert not item.about(UIDS[3])
    (free,) = [item for item in labels.labelled(root) if item.method == "ig"]
    assert free.samples is None
    assert len(free.maps()) == 20


def test_a_spec_that_is_not_a_runs_is_named(tmp_path):
    made = cell(tmp_path, "photos.net.iba.1")
    described = made.spec
    del described["model_key"], described["seed"]
    store.write_json(made.folder / "spec.json", described)
    with pytest.raises(UserError, match=r"iba\.1/spec\.json does not say its model_key, seed"):
        labels.labelled(tmp_path)
