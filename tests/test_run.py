"""The main job end to end, on small pictures and a small net, through the command line's own doors."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.hooks import Hook
from mmengine.visualization import BaseVisBackend
from tiny import command, only_cell, pictures, write_image

from attrib import report
from attrib.cli.main import dispatch
from attrib.errors import UserError
from attrib.methods.baselines import Random
from attrib.methods.iba import IBA
from attrib.results import tables
from attrib.running.hooks import Heartbeat
from attrib.store import files
from attrib.store.cell import UNASKED, Arrays, cells
from attrib.store.files import picture_path
from attrib.upkeep.status import Observer

COMMON = ("dataset=tiny", "model=small_cnn", "run.progress=false", "run.batch=4")


@pytest.fixture
def run(monkeypatch, capfd, tmp_path):
    call = command(capfd)
    images = pictures(tmp_path)

    def run_here(*arguments: str, root: str = "work"):
        if not any(a.startswith("metric=") for a in arguments):
            arguments = (*arguments, "metric.insertion_deletion.steps=4")
        arguments = sorted(arguments, key=lambda a: a != "-m")  # the flag must stand first
        return call(
            *arguments[: "-m" in arguments],
            *COMMON,
            f"dataset.root={images}",
            f"run.root={tmp_path / root}",
            *arguments["-m" in arguments :],
        )

    run_here.images, run_here.root = images, tmp_path / "work"
    return run_here


def summary(result) -> dict[str, int]:
    words = result.out.strip().splitlines()[-1].split(": ")[1].split()
    return {k: int(v) for k, v in (w.split("=") for w in words)}


def scores(root: Path) -> dict:
    frame = tables.rows(root)
    return {(r.method, r.metric, r.map, r.uid, r.column): r.value for r in frame.itertuples()}


def maps(root: Path) -> dict[str, np.ndarray]:
    cell = only_cell(root)
    return {uid: cell.maps.read((uid, f))["map"] for uid, f in cell.maps.index()}


def test_a_second_run_computes_nothing(run):
    first = run("method=iba", "method.steps=2")
    assert first.status == 0, first.err
    assert summary(first) == dict(maps_computed=6, maps_present=0, scores_computed=12, scores_present=0, failed=0)
    second = run("method=iba", "method.steps=2", "run.batch=1", "run.rows=3", "run.flush=0")
    assert summary(second) == dict(maps_computed=0, maps_present=6, scores_computed=0, scores_present=12, failed=0)
    records = [json.loads(p.read_text()) for p in sorted(run.root.glob("*/runs/*/summary.json"))]
    assert sorted(r["maps_computed"] for r in records) == [0, 6]
    assert all(r["finished"] for r in records)
    folder = next(run.root.glob("*/runs/*/"))
    assert {"config.json", "environment.json", "summary.json"} <= {p.name for p in folder.iterdir()}


def test_deterministic_algorithms_are_on_for_the_run_alone(run, monkeypatch):
    seen, explain = [], IBA.attribute

    def looking(self, *arguments):
        seen.append(torch.are_deterministic_algorithms_enabled())
        return explain(self, *arguments)

    monkeypatch.setattr(IBA, "attribute", looking)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    for root, wanted in (("as_usual", "false"), ("repeatable", "true")):
        how = ("method=iba", "method.steps=2", "metric=[]", "run.limit=2", f"run.deterministic={wanted}")
        assert run(*how, root=root).status == 0
    assert seen == [False, True]
    assert not torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    one, other = (maps(run.root.parent / root) for root in ("as_usual", "repeatable"))
    assert all(np.array_equal(one[uid], other[uid]) for uid in one)


def test_how_does_not_change_what(run):
    """Batch size, rows, flushing and shards: the same cell, the same numbers."""
    run("method=iba", "method.steps=2", "run.dtype=float64", root="whole")
    for shard in range(3):
        run("method=iba", "method.steps=2", "run.dtype=float64", "run.batch=1", "run.rows=2", "run.flush=0",
            f"run.shard={shard}", "run.shards=3", root="parts")  # fmt: skip
    parent = run.root.parent
    whole, parts = maps(parent / "whole"), maps(parent / "parts")
    assert only_cell(parent / "whole").folder.name == only_cell(parent / "parts").folder.name
    assert whole.keys() == parts.keys()
    for uid in whole:
        np.testing.assert_allclose(whole[uid], parts[uid], rtol=1e-6, atol=1e-9)
    expected, got = scores(parent / "whole"), scores(parent / "parts")
    assert expected.keys() == got.keys()
    np.testing.assert_allclose([got[k] for k in expected], list(expected.values()), atol=1e-6)


def test_limit_grows_the_same_cell(run):
    assert summary(run("method=random", "run.limit=2"))["maps_computed"] == 2
    cell = only_cell(run.root)
    assert [value == UNASKED for value in cell.samples().values()].count(True) == 4
    (rows,) = [group for name, group in tables.rows(run.root).groupby("column") if name == "insertion"]
    assert rows["state"].value_counts().to_dict() == {"ok": 2, "unasked": 4}
    (kept,) = (run.root / "state").glob("pictures.*")
    for record in Arrays(kept).index().values():  # what the net says of them, for the report
        said = record.info
        assert said["right"] == (said["predicted"] == said["target"])
        assert 0 < said["probability"] <= 1
    again = summary(run("method=random"))
    assert (again["maps_computed"], again["maps_present"]) == (4, 2)


def test_what_changes_the_key(run):
    run("method=grad_cam", "metric=[]")
    run("method=grad_cam", "metric=[]", "method.relu=false")
    run("method=grad_cam", "metric=[]", "seed=1")
    run("method=grad_cam", "metric=[]", "model.layers.cam=features.5")
    run("method=grad_cam", "metric=[]", "dataset.target=predicted")
    run("method=grad_cam", "metric=[]", "model.layers.bottleneck=features.8")  # Grad-CAM does not read it
    run("method=grad_cam", "metric=[]", "dataset.name=another", "method.name=cam")  # names are labels: same key
    assert len({c.folder.name.rsplit(".", 1)[1] for c in cells(run.root)}) == 5


def test_a_changed_metric_reuses_the_maps(run):
    run("method=grad_cam", "metric=[ehr]")
    after = summary(run("method=grad_cam", "metric=[ehr]", "metric.ehr.steps=5"))
    assert after == dict(maps_computed=0, maps_present=6, scores_computed=6, scores_present=0, failed=0)
    assert len(only_cell(run.root).metrics()) == 2


def test_data_that_changes_is_computed_anew(run):
    run("method=gradient", "metric=[ehr]")
    before = scores(run.root)
    write_image(run.images / "p001.png", 99)
    assert summary(run("method=gradient", "metric=[ehr]"))["maps_computed"] == 1
    after = scores(run.root)
    assert before.keys() == after.keys()
    assert {k[3] for k in before if before[k] != after[k]} == {"p001"}


def test_data_that_goes_leaves_the_table(run):
    run("method=random", "metric=[ehr]")
    (run.images / "p002.png").unlink()
    labels = run.images.parent / "labels.csv"
    for table in (labels, run.images.parent / "boxes.csv"):
        table.write_text("\n".join(line for line in table.read_text().splitlines() if "p002" not in line))
    assert summary(run("method=random", "metric=[ehr]"))["maps_computed"] == 0
    assert len(scores(run.root)) == 5


def test_a_corrupt_image_costs_only_itself(run):
    (run.images / "p003.png").write_bytes(b"not a picture")
    result = run("method=grad_cam", "run.strict=true")
    assert result.status == 3
    assert summary(result) == dict(maps_computed=5, maps_present=0, scores_computed=10, scores_present=0, failed=1)
    (entry,) = only_cell(run.root).ledger.entries()
    assert entry["uid"] == "p003"
    assert entry["stage"] == "load"
    assert "p003.png" in entry["reason"]
    table = tables.summary(tables.rows(run.root))
    assert set(table["n"]) == {5}
    assert set(table["failed"]) == {1}


def test_a_sample_that_a_method_cannot_explain(run):
    result = run("method=flaky", "metric=[ehr]")
    assert result.status == 0
    counts = summary(result)
    assert (counts["maps_computed"], counts["scores_computed"], counts["failed"]) == (4, 4, 2)
    reasons = {e["uid"]: e["reason"] for e in only_cell(run.root).ledger.entries()}
    assert "no luck" in reasons["p001"]
    assert "NaN" in reasons["p004"]


def test_a_sample_without_a_box_has_no_ehr(run):
    boxes = run.images.parent / "boxes.csv"
    boxes.write_text("\n".join(line for line in boxes.read_text().splitlines() if "p005" not in line))
    counts = summary(run("method=random"))
    assert (counts["maps_computed"], counts["scores_computed"], counts["failed"]) == (6, 11, 1)
    (entry,) = only_cell(run.root).ledger.entries()
    assert (entry["uid"], entry["stage"].rpartition(".")[0]) == ("p005", "ehr")
    assert "region of interest" in entry["reason"]


class Listener(Hook):
    heard: list = []

    def before_run(self, runner) -> None:
        self.heard.append("before_run")

    def after_test_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        self.heard.append((outputs.stage, outputs.uids))

    def after_run(self, runner) -> None:
        self.heard.append("after_run")


class Memory(BaseVisBackend):
    scalars: list = []
    images: list = []

    def _init_env(self) -> None:
        pass

    @property
    def experiment(self):
        return self

    def add_scalars(self, scalar_dict, step=0, file_path=None, **_) -> None:
        self.scalars.append(scalar_dict)

    def add_image(self, name, image, step=0, **_) -> None:
        self.images.append((name, image.shape))


def test_a_metric_of_boxes_on_data_without_is_refused_at_once(run):
    result = run("method=random", "~dataset.boxes", "metric=[ehr,insertion_deletion]")
    assert result.status == 2
    assert "ehr needs regions of interest" in result.err
    assert "metric=[insertion_deletion]" in result.err
    assert not cells(run.root)


def test_a_full_disk_ends_the_run_and_keeps_what_is_there(run, monkeypatch):
    def full(self) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Arrays, "flush", full)
        result = run("method=random", "metric=[]", "run.flush=0")
    assert result.status == 2
    assert "No space left on device" in result.err
    assert "Traceback" not in result.err
    after = summary(run("method=random", "metric=[]"))
    assert (after["maps_present"] + after["maps_computed"], after["failed"]) == (6, 0)


def test_a_work_directory_that_may_only_be_read_says_what_still_works(run, monkeypatch):
    def refused(path, data):
        raise PermissionError(13, "Permission denied", str(path))

    assert run("method=random", "metric=[ehr]").status == 0
    monkeypatch.setattr(files, "write_synced", refused)
    finished = run("method=random", "metric=[ehr]")
    assert finished.status == 2
    assert "All that this run would compute is stored there; `attrib table` and `attrib report --out" in finished.err
    for more in (["metric=[ehr,localisation]"], ["metric=[lipschitz]"]):
        result = run("method=random", *more)
        assert result.status == 2
        assert "What was stored is safe; `attrib table`" in result.err
        assert "another run.root, or the right to write there, computes the rest" in result.err
        assert "run the same command again" not in result.err


def test_why_a_cell_was_refused_is_kept_and_shown(run, monkeypatch, capfd):
    def refuses(self, model, batch, *rest):
        raise UserError(f"this net has no place for {batch.uids[0]}\nand a second line")

    with monkeypatch.context() as patch:
        patch.setattr(Random, "attribute", refuses)
        result = run("method=random", "metric=[ehr]", "run.progress=true")
    assert result.status == 2
    assert "\nerror: this net has no place for p000\n" in result.err  # not behind the bar
    (record,) = [json.loads(path.read_text()) for path in run.root.glob("*/runs/*/summary.json")]
    assert (record["refused"], record["finished"]) == ("this net has no place for p000\nand a second line", False)

    def shown(name: str, prefix: str = "") -> str:
        capfd.readouterr()
        dispatch([name, f"{prefix}{run.root}"])
        return " ".join(capfd.readouterr().out.split())

    cell = only_cell(run.root).folder.name
    assert f"{cell} was refused: this net has no place for p000 and a second line" in shown("status")
    assert "failed: refused" in shown("status")
    assert f"{cell}: pending because its run was refused: this net has no place for p000" in shown("table")
    assert shown("table", "run.root=") == shown("table")
    assert Observer(run.root).look().record()["cells"][0]["refused"].startswith("this net")
    page = report.page(run.root)
    assert 'random was <a href="#failures">refused</a>: this net has no place for p000</p>' in page
    assert "this net has no place for p000<br>and a second line</td>" in page
    (path,) = run.root.glob("*/runs/*/summary.json")
    before = path.read_text()
    path.write_text(json.dumps({**json.loads(before), "refused": "<b>&amp;"}))
    assert "refused</a>: &lt;b&gt;&amp;amp;</p>" in report.page(run.root), "what a file says is text"
    path.write_text(before)
    assert run("method=random", "metric=[ehr]").status == 0
    assert "was refused" not in shown("status") + shown("table")
    assert "refused</a>" not in report.page(run.root)


def test_scores_judge_the_class_that_the_map_explains(run):
    """Not the dataset's label, and not what the model would predict now, on another device or in another batch."""
    run("method=random", "metric=[ehr]", "+metric.t._target_=tiny_methods.TargetOf", "dataset.target=predicted")
    explained = {uid: record.info["target"] for (uid, _), record in only_cell(run.root).maps.index().items()}
    judged = {uid: value for (_, _, _, uid, column), value in scores(run.root).items() if column == "target"}
    assert judged == explained
    assert judged != {uid: int(uid[1:]) % 10 for uid in judged}  # the labels


def test_a_users_hook_and_backend(run, tmp_path):
    Listener.heard, Memory.scalars, Memory.images = [], [], []
    result = run("method=grad_cam", "run.png=true", "run.hooks=[{_target_: test_run.Listener}]",
                 f"run.vis_backends=[{{_target_: test_run.Memory, save_dir: {tmp_path}}}]")  # fmt: skip
    assert result.status == 0, result.err
    assert Listener.heard[0] == "before_run"
    assert Listener.heard[-1] == "after_run"
    stages = [h[0] for h in Listener.heard[1:-1]]
    assert stages == ["maps"] * 2 + ["ehr"] * 2 + ["insertion_deletion"] * 2
    assert len(Memory.images) == 6
    assert any("ehr/ehr" in s for s in Memory.scalars)
    pngs = sorted(p.name for p in only_cell(run.root).folder.glob("masks/map/*.png"))
    assert pngs == [f"p{i:03d}.png" for i in range(6)]


@pytest.mark.parametrize(
    "uid", ["../../etc/passwd", "/etc/passwd", "a/../../b", "..", "a\x00b", "C:\\x", "ü/é", "a//b"]
)
def test_a_pictures_path_stays_in_its_folder(tmp_path, uid):
    path = picture_path(tmp_path / "masks", uid)
    assert path.resolve().is_relative_to((tmp_path / "masks").resolve())
    assert "\x00" not in str(path)


def test_long_names_that_begin_alike_do_not_share_a_picture(tmp_path):
    long = "写真" * 40  # 720 characters when quoted
    paths = [picture_path(tmp_path, uid) for uid in (f"{long}一", f"{long}二", f"{long}一/a", f"{long}二/a")]
    assert len(set(paths)) == 4
    for path in paths:
        assert max(len(part.encode()) for part in path.relative_to(tmp_path).parts) <= 204
    assert picture_path(tmp_path, "a" * 200).name == "a" * 200 + ".png", "as it always was"
    assert picture_path(tmp_path, "caf\udce9").name == "caf%E9.png"


def test_multirun_goes_on_after_a_failure(run):
    result = run("-m", "method=random,grad_cam,iba", "metric=[ehr]", "model.layers.cam=features.55")
    assert result.status == 2
    assert "features.55" in result.err
    assert len(cells(run.root)) == 0  # all three share the wrong layer name
    result = run("-m", "method=random,broken,grad_cam", "metric=[ehr]")
    assert result.status == 2
    computed = {c.folder.name.split(".")[2]: len(c.maps.index()) for c in cells(run.root)}
    assert computed == {"random": 6, "broken": 0, "grad_cam": 6}


def test_dry(run):
    result = run("method=grad_cam", "run.dry=true")
    assert result.status == 0
    assert "6 samples, 0 maps present, 6 to compute" in result.out
    assert not run.root.exists() or not cells(run.root)
    run("method=grad_cam", "metric=[ehr]", "run.limit=2")
    result = run("method=grad_cam", "run.dry=true")
    assert "2 maps present, 4 to compute" in result.out
    assert "ehr: 2 present, 4 to compute" in result.out
    assert "insertion_deletion: 0 present, 6 to compute" in result.out
    assert "s per sample recorded" in result.out


def test_a_fit_is_planned_and_shows_how_far_it_is(run, monkeypatch):
    beats, mark = [], Heartbeat._mark
    monkeypatch.setattr(Heartbeat, "_mark", lambda self, *n: beats.append((self._stage, *n)) or mark(self, *n))
    how = ("method=iba", "method.steps=2", "metric=[]", "run.limit=2")
    assert "FeatureStatistics: to be fitted first, on 6 samples" in run(*how, "run.dry=true").out
    result = run(*how, "run.progress=true")
    assert "feature statistics of" in result.err
    assert "6/6" in result.err
    assert beats == [("fit", 4, 6), ("fit", 6, 6), ("maps", 2, 2)]
    assert "FeatureStatistics: fitted on 6 samples" in run("method=iba", "method.steps=2", "run.dry=true").out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("method=iba", "model.layers.bottleneck=feature.5"), ("bottleneck", "feature.5", "features.5")),
        (("method=grad_cam", "+method.betta=1"), ("error: +method.betta=1: ", "no field 'betta'")),
        (("method=iba", "+method.betta=1"), ("betta", "did you mean 'beta'")),
        (("method=grad_cam", "run.device=cuda:7"), ("cuda:7", "run.device=cpu")),
        (("method=grad_cam", "run.device=tpu9"), ("tpu9",)),
        (("method=grad_cam", "model.checkpoint=/no/such.pth"), ("/no/such.pth",)),
        (("method=grad_cam", "run.shard=3", "run.shards=2"), ("run.shard",)),
        (("method=grad_cam", "dataset.root=/no/such/folder"), ("/no/such/folder",)),
        (("method=grad_cam", "dataset.target=lable"), ("must be label, predicted or second",)),
        (("method=grad_cam", "run.dtype=float8"), ("float8",)),
        (("method=grad_cam", "method._target_=no.such.Thing"), ("no.such.Thing",)),
        (("method=grad_cam", "dataset.select.min_confidence=1.0"), ("min_confidence",)),
    ],
)
def test_mistakes_are_named(run, arguments, words):
    if "model.checkpoint=/no/such.pth" in arguments:
        arguments = ("method=grad_cam", "+model.checkpoint=/no/such.pth")
    result = run(*arguments)
    assert result.status == 2
    assert "Traceback" not in result.err
    for word in words:
        assert word in result.err, result.err


def test_selection_by_confidence_is_remembered(run):
    arguments = ("method=random", "metric=[]", "dataset.target=predicted", "dataset.select.min_confidence=0.15")
    first = summary(run(*arguments))
    assert 0 < first["maps_computed"] <= 6
    assert summary(run(*arguments))["maps_present"] == first["maps_computed"]
    assert len(list((run.root / "state").glob("confidence.*.json"))) == 1


def test_any_seed_that_an_experiment_takes(run):
    """numpy, which mmengine seeds, takes 32 bits: a larger one was refused, in the name of run.hooks."""
    assert summary(run("method=random", "metric=[]", f"seed={2**62}", "run.limit=2"))["maps_computed"] == 2
