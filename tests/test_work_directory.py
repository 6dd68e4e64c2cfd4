"""``attrib.results``: the same rows as the tools show, arrays that are read when they are taken out."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from synthetic import cell, metric_folder
from tiny import command

import attrib
from attrib.api.stored import Place
from attrib.results import labels, tables
from attrib.types import UserError


def test_scores_and_tables_are_the_rows_that_the_tools_show(root, capfd, tmp_path):
    results = attrib.results(root)
    pd.testing.assert_frame_equal(results.scores(), tables.rows(root))
    assert command(capfd, "table")(str(root), "--rows", "--out", str(tmp_path / "rows.csv")).status == 0
    written = pd.read_csv(tmp_path / "rows.csv", keep_default_na=False)
    assert len(written) == len(results.scores())
    assert list(written["uid"]) == list(results.scores()["uid"])
    pd.testing.assert_frame_equal(results.table(), tables.summary(tables.rows(root)))
    pd.testing.assert_frame_equal(results.compare(), tables.all_paired(tables.rows(root)))


def test_conditions_are_labels_or_the_names_they_begin_with(root):
    results = attrib.results(str(root))
    some = results.scores(method="iba", metric="ehr", uid=["val/001", "val/002"])
    assert set(some["method"]) == {"iba"}
    assert set(some["metric"]) == {"ehr"}
    assert set(some["uid"]) == {"val/001", "val/002"}
    assert set(results.table(method=["iba", "grad_cam"])["method"]) == {"iba", "grad_cam"}
    with pytest.raises(UserError, match="method=ibb; there are: grad_cam, iba"):
        results.scores(method="ibb")
    with pytest.raises(UserError, match="no results have the sample 'cat'; there are: val/000"):
        results.scores(uid="cat")
    with pytest.raises(UserError, match="no results have method=ibb; there are"):
        results.maps(method="ibb")


def test_a_pair_is_the_same_test_from_either_side(root):
    results = attrib.results(root)
    one, other = results.compare("iba", "grad_cam", metric="ehr"), results.compare("grad_cam", "iba", metric="ehr")
    assert set(one["a"]) == {"iba"}
    assert set(one["b"]) == {"grad_cam"}
    np.testing.assert_allclose(one["difference"], -other["difference"])
    np.testing.assert_allclose(one["lo"], -other["hi"])
    np.testing.assert_allclose(one["p"], other["p"])
    with pytest.raises(UserError, match="compare takes two methods"):
        results.compare("iba")
    with pytest.raises(UserError, match="method=nobody; there are"):
        results.compare("iba", "nobody")


def test_maps_are_those_of_the_cells_one_at_a_time(root):
    results = attrib.results(root)
    maps = results.maps(method="iba")
    (item,) = (item for item in labels.labelled(root) if item.method == "iba")
    stored = item.maps()
    assert len(maps) == len({uid for uid, _ in stored})
    for place, map in maps.items():
        key = next(key for key in stored if key[0] == place.uid)
        np.testing.assert_array_equal(map, item.cell.maps.read(key, ["map"])["map"])
    uid = next(iter(maps)).uid
    single = results.maps(method="iba", uid=uid)
    np.testing.assert_array_equal(single.array, maps[next(iter(single))])
    assert list(single.index["uid"]) == [uid]
    with pytest.raises(UserError, match="arrays, not one"):
        _ = maps.array
    with pytest.raises(UserError, match="no map is called other; there are: map"):
        results.maps(map="other")


def test_a_damaged_map_is_named_when_it_is_taken_out(root):
    maps = attrib.results(root).maps(method="iba")
    (item,) = (item for item in labels.labelled(root) if item.method == "iba")
    for chunk in item.cell.maps.folder.glob("*.safetensors"):
        data = bytearray(chunk.read_bytes())
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])
        data[start + header["0/map"]["data_offsets"][0]] ^= 255
        chunk.write_bytes(data)
    damaged = 0
    for place in maps:
        with contextlib.suppress(UserError):
            maps[place]
            continue
        damaged += 1
        with pytest.raises(UserError, match="attrib cache verify"):
            maps[place]
    assert 0 < damaged < len(maps)


def test_failures_cells_and_the_report(root, tmp_path):
    results = attrib.results(root)
    failed = results.failures()
    assert list(failed.columns) == ["dataset", "model", "method", "stage", "reason", "uid"]
    rows = tables.rows(root)
    assert set(failed["uid"]) == set(rows.loc[rows["state"] == "failed", "uid"])
    assert set(results.cells["method"]) == {item.method for item in labels.labelled(root)}
    page = results.report(tmp_path / "page.html")
    assert "attrib.results(" in page.read_text()
    assert "Results of" in repr(results)


def test_what_is_no_work_directory_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no results"):
        attrib.results(tmp_path)
    with pytest.raises(UserError, match="confidence=2"):
        attrib.results(tmp_path, confidence=2)


def test_results_need_no_torch(root):
    code = "import sys, attrib; attrib.results(sys.argv[1]).table(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, str(root)], check=True, timeout=120)


def test_curves_under_the_names_of_metric_json(tmp_path):
    made = cell(tmp_path, "photos.net.iba.iba0000")
    made.maps.add("a", "f", {"map": np.zeros((2, 2), np.float32)})
    made.maps.flush()
    metric_folder(made, "road.33333333", {"road": "higher"}, {"road_curve": "x: share; y: accuracy"})
    scores, curves = made.scores("road.33333333"), made.curves("road.33333333")
    for uid in ("a", "b"):
        scores.add(uid, "f", {("map", "road"): 0.5})
    curves.add("a", "f", {"map/road_curve": np.arange(4.0)})
    scores.flush()
    curves.flush()
    found = attrib.results(tmp_path).curves(curve="road_curve")
    assert list(found) == [Place("photos", "net", "iba", "map", "road", "road_curve", "a")]  # b has none
    assert found.array.tolist() == [0, 1, 2, 3]
