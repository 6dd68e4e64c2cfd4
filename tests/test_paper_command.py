"""``attrib paper``: a table in one command, a study as a preset; what a preset says beside rows and columns."""

from __future__ import annotations

import pytest
import yaml
from test_paper import MINE, configs, images  # noqa: F401 (fixtures)
from tiny import called, tool

from attrib.papers import comparison, presets
from attrib.types import UserError


@pytest.fixture
def attrib(capfd, configs, images, tmp_path):  # noqa: F811
    def call(name: str, *arguments: str, data: bool = True):
        own = (f"dataset.root={images}", "run.progress=false") if data else ()
        return called(capfd, lambda: tool(name).main([*arguments, *own, "--config-dir", str(configs)]))

    return call


def test_a_table_in_one_command_which_goes_on(attrib, tmp_path):
    root = tmp_path / "work"
    result = attrib("paper", "mine", "method=random", f"run.root={root}")
    assert result.status == 0, result.err
    assert "maps_computed=4" in result.out
    assert "1 PASS, 1 FAIL" in result.out
    assert (root / "papers" / "mine.png").read_bytes().startswith(b"\x89PNG")
    assert "| random | EHR |" in (root / "papers" / "mine.md").read_text()
    again = attrib("paper", "mine", "method=random", f"run.root={root}")
    assert again.status == 0
    assert "maps_computed=0" in again.out
    assert not list(root.glob("papers.*"))


@pytest.mark.slow
def test_a_study_as_a_preset_that_others_run_again(attrib, configs, tmp_path):  # noqa: F811
    root, again = tmp_path / "work", tmp_path / "again"
    study = ("-m", "dataset=tiny", "model=small_cnn", "method=random,iba", "method.steps=2", "metric=[ehr]")
    assert attrib("run", *study[:3], "method=random", study[5], "metric.ehr.steps=5", f"run.root={root}").status == 0
    more = ("method=iba", "method.steps=2", "metric.ehr.steps=5", f"run.root={root}")
    assert attrib("run", *study[:3], study[5], *more, "run.limit=2").status == 0
    unfinished = attrib("paper", "--export", "my_study", str(root), data=False)
    assert unfinished.status == 2
    assert "is not finished" in unfinished.err
    assert attrib("run", *study[:3], study[5], *more).status == 0

    result = attrib("paper", "--export", "my_study", str(root), data=False)
    assert result.status == 0, result.err
    path = configs / "paper" / "my_study.yaml"
    node = yaml.safe_load(path.read_text())
    assert node["metric"]["ehr"]["steps"] == 5
    assert set(node["paper"]["digests"]) == set(node["paper"]["rows"])
    assert "is there already" in attrib("paper", "--export", "my_study", str(root), data=False).err

    table = comparison.table(presets.load("my_study", folder=configs), root)
    assert len(table) == 2
    assert set(table["verdict"]) == {"PASS"}  # found as it lies there
    assert set(table["other"]) == {""}
    assert (table["difference"].abs() < 1e-5).all()
    assert (table["tolerance"] > 0).all()

    result = attrib("paper", "my_study", f"run.root={again}")
    assert result.status == 0, result.err
    assert "2 PASS" in result.out
    row = next(iter(node["paper"]["digests"]))
    node["paper"]["digests"][row]["weights"] = "0" * 16
    path.write_text("# @package _global_\n" + yaml.safe_dump(node, sort_keys=False))
    changed = comparison.table(presets.load("my_study", [f"run.root={again}"], configs), root)
    assert changed.set_index("row").loc[row, "other"] == "weights"
    assert "other weights than the study" in " ".join(
        comparison.drawn(presets.load("my_study", folder=configs), changed).notes
    )


def test_what_cannot_be_exported(attrib, configs, tmp_path):  # noqa: F811
    assert "holds no results" in attrib("paper", "--export", "x", str(tmp_path / "none"), data=False).err
    assert "letters, digits" in attrib("paper", "--export", "../x", str(tmp_path), data=False).err
    assert "takes one work directory" in attrib("paper", "--export", "x", data=False).err


def test_the_list_says_what_a_table_needs(attrib):
    result = attrib("list", "papers", data=False)
    assert result.status == 0, result.err
    line = next(line for line in result.out.splitlines() if line.startswith("acd_table2"))
    assert "attrib[attacks]" in line
    assert "20 of 20" in line
    assert "none read yet" in next(line for line in result.out.splitlines() if line.startswith("iba_table1"))


def test_some_columns_of_a_row_have_more_overrides(configs):  # noqa: F811
    text = MINE.replace('"method=iba method.steps=2 method.beta=1,10"', """
      with: method=iba method.steps=2 method.beta=1,10
      also: {of steps: method.relu=true}
      comparison: {EHR: {value: 0.5, spread: 0.1, source: a notebook}}""")  # fmt: skip
    (configs / "paper" / "mine.yaml").write_text(text)
    found = [e for e in presets.load("mine", folder=configs).entries if e.row.startswith("IBA")]
    assert ["method.relu=true" in e.overrides for e in found] == [False, True, False, True]
    assert [e.comparison for e in found] == [presets.Comparison(0.5, 0.1, "a notebook"), None] * 2
    assert all(e.published is None for e in found)
    for old, new, words in (
        ("value: 0.5", "value: high", "needs a number"),
        (", source: a notebook", "", "needs a source"),
        ("{of steps: method", "{no column: method", "no 'no column'"),
    ):
        (configs / "paper" / "mine.yaml").write_text(text.replace(old, new))
        with pytest.raises(UserError, match=words):
            presets.load("mine", folder=configs)
