"""Presets of papers: what they say, what they run, what of it is found in a work directory, and every one of them."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import re
import shlex
import tarfile
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from tiny import ROOT, Result, called, pictures, tool

from attrib.config.objects import experiment, options_of
from attrib.datasets import snippets
from attrib.models import DeepLSTM, LeNet
from attrib.models.checkpoint import save_checkpoint
from attrib.papers import comparison, presets
from attrib.running.run import run as run_cell
from attrib.store.cell import cells
from attrib.types import UserError

PRESETS = sorted(p.stem for p in (ROOT / "configs" / "paper").glob("*.yaml"))
MINE = """\
# @package _global_
defaults:
  - override /dataset: tiny
  - override /model: small_cnn
  - override /metric: [ehr]
paper:
  title: A table
  source: Someone 2020
  place: table 3, page 5
  tolerance: 0.5
  size: full
  columns:
    EHR: ehr.ehr
    of steps: {score: ehr.ehr, with: metric.ehr.steps=3}
  rows:
    random: {with: method=random, published: {EHR: 0.2, of steps: {value: 9.5, tolerance: 0.1, source: "table 4"}}}
    Grad-CAM: {with: method=grad_cam, published: {EHR: null}}
    IBA {}: "method=iba method.steps=2 method.beta=1,10"
  tiny: dataset.select={count:2}
"""


@pytest.fixture
def configs(tmp_path):
    """A folder for --config-dir with the presets of the tests and one of its own, ``mine``."""
    folder = tmp_path / "configs"
    for kind in ("dataset", "model", "method"):
        (folder / kind).mkdir(parents=True)
        for path in (ROOT / "tests" / "configs" / kind).glob("*.yaml"):
            (folder / kind / path.name).write_text(path.read_text())
    (folder / "paper").mkdir()
    (folder / "paper" / "mine.yaml").write_text(MINE)
    return folder


@pytest.fixture
def images(tmp_path):
    return pictures(tmp_path, 4)


def entries(preset):
    return [(e.row, e.column, *e.overrides) for e in preset.entries]


# What a preset says -------------------------------------------------------------------------------------


def test_a_preset_is_rows_times_columns(configs):
    preset = presets.load("mine", folder=configs)
    assert entries(preset) == [
        ("random", "EHR", "method=random"),
        ("random", "of steps", "method=random", "metric.ehr.steps=3"),
        ("Grad-CAM", "EHR", "method=grad_cam"),
        ("Grad-CAM", "of steps", "method=grad_cam", "metric.ehr.steps=3"),
        ("IBA 1", "EHR", "method=iba", "method.steps=2", "method.beta=1"),
        ("IBA 1", "of steps", "method=iba", "method.steps=2", "method.beta=1", "metric.ehr.steps=3"),
        ("IBA 10", "EHR", "method=iba", "method.steps=2", "method.beta=10"),
        ("IBA 10", "of steps", "method=iba", "method.steps=2", "method.beta=10", "metric.ehr.steps=3"),
    ]
    assert len(preset.jobs) == 8
    first, second, third, *_ = (e.published for e in preset.entries)
    assert first == presets.Published(0.2, 0.5, "Someone 2020, table 3, page 5")
    assert second == presets.Published(9.5, 0.1, "table 4")
    assert third is None


def test_the_command_line_chooses_adds_and_replaces(configs):
    def rows(*overrides):
        return list(dict.fromkeys(e.row for e in presets.load("mine", overrides, configs).entries))

    assert rows("method=grad_cam") == ["Grad-CAM"]
    assert rows("method=random,grad_cam") == ["random", "Grad-CAM"]
    assert rows("method=iba", "method.beta=5") == ["IBA 5"]
    assert rows("method=iba", "method.beta=5,7") == ["IBA 5", "IBA 7"]
    assert rows("seed=1,2")[:2] == ["random (seed=1)", "random (seed=2)"]
    preset = presets.load("mine", ["seed=3", "run.root=w", "metric.ehr.steps=3", "method=random"], configs)
    assert preset.jobs == [("method=random", "seed=3", "metric.ehr.steps=3")]
    assert preset.changed == ("seed=3", "metric.ehr.steps=3", "method=random")
    assert preset.arguments(preset.jobs[0])[-1] == "run.root=w"
    tiny = presets.load("mine", ["paper.size=tiny", "method=random"], configs)
    assert all("dataset.select={count:2}" in e.overrides for e in tiny.entries)
    assert not any(e.published for e in tiny.entries)
    assert "paper.size=tiny" in tiny.all_arguments


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("  title: A table\n", "", ("mine.yaml", "paper.title")),
        ("  size: full", "  size: huge", ("paper.size=huge", "tiny")),
        ("EHR: ehr.ehr", "EHR: ehr", ("columns: EHR", "METRIC.COLUMN", "'ehr'")),
        ("with: metric.ehr.steps=3", "with: 'metric.ehr.steps=3,4'", ("of steps", "write a column for each")),
        ("{EHR: 0.2, ", "{EHR: zero, ", ("random: EHR", "a number")),
        ("{EHR: null}", "{IOU: null}", ("Grad-CAM", "IOU", "EHR, of steps")),
        ("  tolerance: 0.5\n", "", ("random: EHR", "tolerance")),
        ("  place: table 3, page 5\n", "", ("random: EHR", "source")),
        ("method=random, pub", "method=random, colour: red, pub", ("rows: random", "colour")),
        ("  source: Someone", "  colour: red\n  source: Someone", ("no field 'colour'",)),
        ('"method=iba method.steps=2 method.beta=1,10"',
         '{with: "method=iba method.beta=1,10", published: {EHR: 1}}', ("IBA {}", "a row for each")),
    ],
)  # fmt: skip
def test_mistakes_in_a_preset_are_named(configs, old, new, words):
    assert old in MINE
    (configs / "paper" / "mine.yaml").write_text(MINE.replace(old, new))
    with pytest.raises(UserError) as error:
        presets.load("mine", folder=configs)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("EHR: ehr.ehr", "EHR: ehr.iou", ("random, EHR", "ehr.iou is not computed", "ehr.ehr")),
        ("EHR: ehr.ehr", "EHR: irof.irof", ("irof.irof is not computed",)),
        ("{with: method=random,", "{with: method=random, map: blue,", ("map must be one of map", "blue")),
        ("with: method=grad_cam,", "with: method=input_iba,", ("map must be one of input, gan, feature", "left out")),
    ],
)
@pytest.mark.quick(every=2)
def test_a_preset_that_reads_what_is_not_computed(configs, tmp_path, images, old, new, words):
    assert old in MINE
    (configs / "paper" / "mine.yaml").write_text(MINE.replace(old, new))
    preset = presets.load("mine", [f"dataset.root={images}"], configs)
    with pytest.raises(UserError) as error:
        comparison.table(preset, tmp_path / "none")
    for word in words:
        assert word in str(error.value)


def test_mistakes_on_the_command_line_are_named(configs):
    with pytest.raises(
        UserError, match=r"nothing has method=nope; there is method=random, method=grad_cam|method=nope"
    ):
        presets.load("mine", ["method=nope"], configs)
    with pytest.raises(UserError, match="there is no paper 'nope'"):
        presets.load("nope", folder=configs)
    with pytest.raises(UserError, match="command line"):
        presets.load("mine", ["a=[1"], configs)


# Running and finding ------------------------------------------------------------------------------------


@pytest.fixture
def run(monkeypatch, capfd, configs, images, tmp_path):
    common = (f"dataset.root={images}", f"run.root={tmp_path / 'work'}", "run.progress=false")

    def run_here(*arguments: str) -> Result:
        return called(capfd, lambda: tool("run").main(["--config-dir", str(configs), *arguments, *common]))

    run_here.common, run_here.root = common, tmp_path / "work"
    return run_here


@pytest.mark.slow  # test_paper_command does the same in one command
def test_a_multirun_computes_what_is_missing_and_the_table_says_what_is_left(run, configs, tmp_path):
    def table(*more):
        preset = presets.load("mine", [*run.common, *more], configs)
        return preset, comparison.table(preset, run.root)

    _, before = table()
    assert set(before["verdict"]) == {"MISSING"}
    assert before["mean"].isna().all()

    # The command of one entry computes that entry, and its like, alone.
    line = shlex.split(before["command"][0])
    assert line[:2] == ["attrib", "run"]
    result = run(*(a for a in line[4:] if a not in run.common))
    assert result.status == 0, result.err
    preset, some = table()
    assert some["verdict"].tolist() == ["PASS", *["MISSING"] * 7]

    result = run("-m", "paper=mine")
    assert result.status == 0, result.err
    assert len(re.findall("maps_computed=4", result.out)) == 3  # random was there
    preset, found = table()
    assert found["verdict"].tolist() == ["PASS", "FAIL", *["UNREAD"] * 6]
    assert found["n"].tolist() == [4] * 8
    assert found["difference"][0] == pytest.approx(found["mean"][0] - 0.2)
    assert found["source"][:2].tolist() == ["Someone 2020, table 3, page 5", "table 4"]
    assert found["mean"][0] != found["mean"][1]  # two metrics of one cell
    assert found["mean"][4] != found["mean"][6]  # two strengths of one method
    assert (found["memory"] > 2**20).all()
    assert found["device"].str.startswith("CPU").all()
    assert len(cells(run.root)) == 4

    again = run("-m", "paper=mine", "method=iba", "method.beta=10")
    assert "maps_computed=4" not in again.out
    assert len(re.findall("scores_computed=0", again.out)) == 2

    drawn = comparison.drawn(preset, found)
    assert drawn.body[0][:3] == ["random", "EHR", "4"]
    assert "1 PASS, 1 FAIL, 6 UNREAD" in drawn.notes[0]
    assert not drawn.code
    # Another seed is another table, and says so.
    preset, other = table("seed=1")
    assert set(other["verdict"]) == {"MISSING"}
    assert "seed=1" in " ".join(comparison.drawn(preset, other).notes)

    for suffix in ("md", "tex", "csv", "txt"):
        out = tmp_path / f"table.{suffix}"
        arguments = ["paper=mine", "method=random", *run.common, "--config-dir", str(configs), "--out", str(out)]
        assert tool("table").main(arguments) == 0
        assert "PASS" in out.read_text()


def test_a_run_that_is_not_complete_is_missing(run, configs):
    assert run("paper=mine", "method=random", "run.limit=3").status == 0
    found = comparison.table(presets.load("mine", [*run.common, "method=random"], configs), run.root)
    assert found[["verdict", "n", "pending", "why"]].iloc[0].tolist() == ["MISSING", 3, 1, "3 of 4 samples"]
    assert not pd.isna(found["mean"][0])


def test_failed_samples_are_counted(run, configs, images):
    (images / "p001.png").write_bytes(b"not a picture")
    assert run("paper=mine", "method=random").status == 0
    preset = presets.load("mine", [*run.common, "method=random"], configs)
    found = comparison.table(preset, run.root)
    assert found[["verdict", "n", "failed"]].iloc[0].tolist() == ["PASS", 3, 1]
    assert comparison.drawn(preset, found).body[0][2] == "3, 1 failed"


def test_what_cannot_be_run_so_is_said(run):
    assert "add -m" in run("paper=mine", "paper.size=tiny").err
    result = run("-m", "paper=mine", "hydra/launcher=joblib")
    assert result.status == 2
    assert "--commands" in result.err
    assert run("-m", "paper=mine", "method=nope").status == 2


def test_commands(configs, images, tmp_path, capsys):
    arguments = ["paper=mine", f"dataset.root={images}", f"run.root={tmp_path / 'w'}", "--config-dir", str(configs)]
    module = tool("table")
    assert module.main([*arguments, "--commands"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8
    assert all(line.startswith("attrib run --config-dir ") for line in lines)
    assert module.main([*arguments, "--format", "md"]) == 0
    text = capsys.readouterr().out
    assert "```bash\nattrib run -m --config-dir" in text
    assert module.main([*arguments, "--format", "tex"]) == 0
    assert "% attrib run" in capsys.readouterr().out
    assert module.main([*arguments, "--wide"]) == 2
    assert "one layout" in capsys.readouterr().err
    assert module.main([str(tmp_path), "seed=1"]) == 2
    assert "paper=NAME" in capsys.readouterr().err


# Every preset -------------------------------------------------------------------------------------------


def test_the_presets_of_all_five_papers_are_there():
    assert {name.split("_")[0] for name in PRESETS} >= {"iba", "input", "fisher", "cd", "causal"}


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.quick("acd_table2", "causal_paths", "fisher_image")
def test_preset_composes_and_reads_what_it_computes(name, tmp_path):
    """And no value is there without a source; every row and column reads a map and a score that exist."""
    preset = presets.load(name)
    assert preset.source
    assert preset.title
    table = comparison.table(preset, tmp_path / "none")
    assert len(table) == len(preset.entries) > 1
    assert not table.duplicated(["row", "column"]).any()
    assert set(table["verdict"]) == {"MISSING"}
    drawn = comparison.drawn(preset, table)
    assert drawn.code[0].startswith(f"attrib run -m paper={name}")
    node = yaml.safe_load((ROOT / "configs" / "paper" / f"{name}.yaml").read_text())["paper"]
    assert node["tiny"]


CHEAP = {
    "steps": 2, "samples": 2, "epochs": 1, "batch": 2, "window": 16, "stride": 4, "dataset_size": 4,
    "sub_dataset_size": 2, "segments": 4, "draws": 2, "correct": "false", "candidates": 2,
    "z": -99.0, "points": 2,
}  # fmt: skip


def cheap(node, at):
    """Overrides that make a method or metric quick."""
    less = [k for k, v in node.items() if k in CHEAP and isinstance(v, int | float | None)]
    if node.get("step") is not None:  # a metric has the one or the other
        less = [k for k in less if k != "steps"]
    found = [f"{at}.{k}={CHEAP[k]}" for k in less]
    parts = {k: v for k, v in node.items() if isinstance(v, dict)}
    return [*found, *(o for k, v in parts.items() for o in cheap(v, f"{at}.{k}"))]


def nets(folder: Path) -> dict[str, Path]:
    """Seeded nets where trained ones would be, as attrib train writes them."""
    words = ["<unk>", "<pad>", *"abcdefgh"]
    made = {}
    for name, kind, arguments in (
        ("lenet_digits", LeNet, {"num_classes": 10, "channels": 1, "padding": 0}),
        ("lstm_snippets", DeepLSTM, {"vocab_size": 10, "embedding_dim": 50, "hidden_dim": 8}),
    ):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            net = kind(**arguments)
        made[name] = folder / f"{name}.safetensors"
        about = {"target": f"attrib.models.{kind.__name__}", "arguments": arguments}
        save_checkpoint(made[name], net, about | ({} if kind is LeNet else {"vocabulary": words}))
    return made


def packed(name: str, content: bytes) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
    return stream.getvalue()


@pytest.fixture
def embedded(tmp_path, monkeypatch):
    """Overrides that put nets with seeded weights, and a few texts, where trained nets and the archive would be."""
    content = "".join(f"{i}\t{(-1) ** i * 2.0}\ta b {'cdef'[i % 4]} {i}\r\n" for i in range(80)).encode()
    monkeypatch.setattr(snippets, "SHA256", hashlib.sha256(content).hexdigest())
    (tmp_path / "texts.tar.gz").write_bytes(packed(snippets.INNER, packed(snippets.FILE, content)))
    made = nets(tmp_path)
    return {
        net: [f"model.checkpoint={path}", *([] if "lenet" in net else [f"dataset.archive={tmp_path}/texts.tar.gz"])]
        for net, path in made.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("rows", ["the first row", "all rows"])
def test_every_preset_runs_in_its_tiny_size(name, rows, embedded, tmp_path):
    """On data that comes with the project; then nothing of what was run is missing."""
    tiny = yaml.safe_load((ROOT / "configs" / "paper" / f"{name}.yaml").read_text())["paper"]["tiny"]
    (net,) = (o.removeprefix("model=") for o in tiny.split() if o.startswith("model="))
    preset = presets.load(name, ["paper.size=tiny", *embedded[net], f"run.root={tmp_path}/work", "run.progress=false"])
    done = {}
    for job in preset.jobs if rows == "all rows" else preset.jobs[:1]:
        config = presets.configuration(preset, job).values
        more = ["dataset.estimation.select.count=40", *cheap(config["method"], "method")]
        more += [o for metric, node in config["metric"].items() for o in cheap(node, f"metric.{metric}")]
        quick = presets.configuration(preset, [*job, *more]).values
        summary = run_cell(
            experiment(quick), options_of(quick["run"] | {"root": f"{tmp_path}/work", "progress": False})
        )
        assert summary.maps_present + summary.maps_computed == 3
        done[job] = (*job, *more)
    entries = [dataclasses.replace(e, overrides=done[e.overrides]) for e in preset.entries if e.overrides in done]
    table = comparison.table(dataclasses.replace(preset, entries=tuple(entries)), f"{tmp_path}/work")
    assert set(table["verdict"]) == {"UNREAD"}
    # Nets with random weights: a map that is zero has no Lipschitz constant.
    assert (table["n"] + table["failed"] == 3).all()
    assert (table["n"] > 0).all()
    assert (table["rows"] >= 0).all()


def test_another_net_for_the_layers():
    """What was a plain multirun of Hydra: the values of a row's sweep are the command line's."""
    preset = presets.load("input_iba_layers", ["model=resnet50", "model.layers.bottleneck=layer1,layer3"])
    assert [job[-1] for job in preset.jobs] == ["model.layers.bottleneck=layer1", "model.layers.bottleneck=layer3"]
    assert list(dict.fromkeys(e.row for e in preset.entries))[1] == "InputIBA at layer3"
    assert presets.configuration(preset, preset.jobs[0]).values["model"]["name"] == "resnet50"
    assert [e.map for e in preset.entries[::6]] == ["input", "feature"]


def test_a_row_of_its_own_in_the_tiny_size():
    """What an image of 224 pixels wants, one of 28 does not."""
    for size, there in (("tiny", True), ("full", False)):
        preset = presets.load("input_iba_table1", [f"paper.size={size}"])
        for entry in preset.entries:
            its = entry.row == "Extremal Perturbation"
            assert ("method.sigma=1" in entry.overrides) == (there and its)
