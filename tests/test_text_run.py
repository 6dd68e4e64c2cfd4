"""Sentences through the command line's own doors: run, resume, table, report, coloured words."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tiny import command, only_cell, stored, tool

from attrib import report
from attrib.config.trained import with_checkpoint
from attrib.models import DeepLSTM, save_checkpoint

TEXTS = [
    "A good film , good and short !",
    "bad",
    "the plot is bad but the music is good and the end is a <b>surprise</b>",
    "not good",
    "I slept .",
    "",
]
VOCABULARY = ["<unk>", "<pad>", "good", "bad", "the", "a", "film", "not", "is", ",", ".", "!", "and", "plot"]


@pytest.fixture
def folder(tmp_path):
    lines = ["text\tlabel", *(f"{text}\t{i % 2}" for i, text in enumerate(TEXTS))]
    (tmp_path / "films.tsv").write_text("\n".join(lines) + "\n")
    torch.manual_seed(0)
    arguments = {"vocab_size": len(VOCABULARY), "embedding_dim": 6, "hidden_dim": 5, "num_classes": 2}
    net = DeepLSTM(**arguments)
    for parameter in net.parameters():
        parameter.data *= 3
    about = {"target": "attrib.models.DeepLSTM", "arguments": arguments, "vocabulary": VOCABULARY}
    save_checkpoint(tmp_path / "net.safetensors", net, about)
    return tmp_path


@pytest.fixture
def run(monkeypatch, capfd, folder):
    call = command(capfd)

    def run_here(*arguments: str, root: str = "work"):
        return call(
            "dataset=text_csv", "model=deep_lstm", f"dataset.path={folder / 'films.tsv'}",
            f"model.checkpoint={folder / 'net.safetensors'}", f"run.root={folder / root}", "run.progress=false",
            *arguments,
        )  # fmt: skip

    return run_here


def test_iba_on_sentences_end_to_end(run, folder):
    method = ("method=iba", "method.steps=3", "method.batch=2", "metric=[insertion_deletion,eraser]", "run.png=true")
    result = run(*method, "run.batch=6")
    assert result.status == 0, result.err
    assert "maps_computed=6 maps_present=0 scores_computed=12 scores_present=0 failed=0" in result.out
    maps = stored(folder / "work")
    lengths = [8, 1, 15, 2, 3, 1]
    assert [maps[uid]["map"].shape for uid in sorted(maps)] == [(n,) for n in lengths]  # cut to their own lengths
    assert [maps[uid]["capacity"].shape for uid in sorted(maps)] == [(n,) for n in lengths]

    # Again: nothing to do. In single samples and one row at a time: the same numbers.
    assert "maps_computed=0 maps_present=6 scores_computed=0 scores_present=12" in run(*method).out
    assert run(*method, "run.batch=1", "run.rows=1", root="single").status == 0
    for uid, arrays in stored(folder / "single").items():
        for name, value in arrays.items():
            np.testing.assert_allclose(value, maps[uid][name], rtol=1e-3, atol=1e-5, err_msg=f"{uid} {name}")

    # What people look at.
    pages = sorted((only_cell(folder / "work").folder / "masks" / "map").rglob("*.html"))
    assert len(pages) == 6
    assert "&lt;b&gt;surprise&lt;/b&gt;" in pages[2].read_text()
    page = report.page(folder / "work")
    assert page.count('<div class="words">') == 6
    assert "&lt;b&gt;surprise" in page
    assert "<b>surprise" not in page
    assert tool("show").main([str(folder / "work")]) == 0
    assert tool("table").main([str(folder / "work"), "--wide"]) == 0


def test_every_text_method_runs(run, folder):
    for method in ("random", "gradient", "input_x_gradient", "integrated_gradients", "smooth_grad", "occlusion"):
        result = run(f"method={method}", "metric=[eraser]", root=method)
        assert result.status == 0, result.err
        assert "scores_computed=6" in result.out
    for method in ("lime", "kernel_shap"):
        result = run(f"method={method}", "method.samples=20", "metric=[eraser]", root=method)
        assert result.status == 0, result.err
        assert "scores_computed=6" in result.out


def test_what_is_for_images_is_refused(run):
    result = run("method=grad_cam", "metric=[]")
    assert result.status == 2
    assert "grad_cam is for image data, but dataset text_csv holds text" in result.err
    result = run("method=random", "metric=[ehr]")
    assert result.status == 2
    assert "ehr is for image and audio data" in result.err
    result = run("method=random", "metric=[ehr,insertion_deletion]")
    assert "take metric=[insertion_deletion]" in result.err
    assert run("method=random").status == 0  # nobody named ehr


def test_mistakes_with_models_and_data(run, folder):
    result = run("method=random", "model.checkpoint=workdirs/train/lstm_none/model.safetensors")
    assert result.status == 2
    assert "no such file" in result.err
    assert "attrib train train=lstm_none" in result.err
    result = run("method=random", "model=bilstm", f"model.checkpoint={folder / 'net.safetensors'}")
    assert result.status == 2
    assert "holds a DeepLSTM, not a BiLSTM" in result.err
    (folder / "short.txt").write_text("\n".join(VOCABULARY[::-1]) + "\n")
    result = run("method=random", "metric=[]", f"model.input.vocabulary={folder / 'short.txt'}")
    assert result.status == 2
    assert "is not the one that the net was trained with" in result.err
    (folder / "other.txt").write_text("\n".join([*VOCABULARY[:2], *VOCABULARY[:1:-1]]) + "\n")
    result = run("method=random", "metric=[]", f"model.input.vocabulary={folder / 'other.txt'}")
    assert result.status == 2
    assert "with which the net was trained" in result.err


def test_images_and_texts_are_not_mixed_up(monkeypatch, capfd, folder):
    call = command(capfd)
    result = call("dataset=movie_snippets", "model=efficientnet_lite0", "method=random", f"run.root={folder / 'work'}")
    assert result.status == 2
    assert "this dataset needs a text model" in result.err
    result = call("dataset=photos", "model=deep_lstm", "method=random", f"run.root={folder / 'work'}")
    assert result.status == 2
    assert "dataset photos holds images, and model deep_lstm does not say how it wants them" in result.err


def test_a_checkpoint_cannot_name_what_is_built(run, folder):
    """Its metadata are data: nothing in them is imported or called."""
    net = DeepLSTM(len(VOCABULARY), 6, 5)
    evil = {"_target_": "os.mkdir", "path": str(folder / "made")}
    arguments = {"vocab_size": len(VOCABULARY), "embedding_dim": 6, "hidden_dim": 5, "dropout": evil, "_target_": "x.Y"}
    about = {"target": "attrib.models.DeepLSTM", "arguments": arguments, "vocabulary": VOCABULARY}
    save_checkpoint(folder / "net.safetensors", net, about)
    assert run("method=random", "metric=[]").status == 0
    assert not (folder / "made").exists()
    spec = json.loads((only_cell(folder / "work").folder / "spec.json").read_text())
    assert spec["config"]["model"]["_target_"] == "attrib.models.DeepLSTM"


def test_what_a_checkpoint_says_must_be_arguments(run, folder):
    save_checkpoint(folder / "net.safetensors", DeepLSTM(len(VOCABULARY), 6, 5), {"arguments": ["vocab_size"]})
    result = run("method=random", "metric=[]")
    assert result.status == 2
    assert "its arguments are list, not an object" in result.err


def test_a_checkpoint_does_not_say_where_to_read_from(tmp_path):
    """The tokenizer comes from model.path; a net from elsewhere would take other ids."""
    save_checkpoint(tmp_path / "n.safetensors", torch.nn.Linear(1, 1), {"arguments": {"path": "x/y", "num_labels": 3}})
    model = {"_target_": "attrib.models.hf_classifier", "path": "mine", "num_labels": None}
    found = with_checkpoint({"model": {**model, "checkpoint": str(tmp_path / "n.safetensors")}}, "x.yaml")["model"]
    assert (found["path"], found["num_labels"]) == ("mine", 3)


def test_the_embedding_may_be_more_than_a_table(run, folder):
    result = run("method=gradient", "metric=[eraser]", "model.layers.embedding=rnn_1")
    assert result.status == 0, result.err
    assert "scores_computed=6" in result.out
