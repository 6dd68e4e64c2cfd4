"""Training: order, state, resume to the bit, early stopping, refusals; and, slowly, the real recipes."""

from __future__ import annotations

import copy
import functools
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from mmengine.hooks import Hook
from omegaconf import OmegaConf
from safetensors.torch import load_file
from tiny import ROOT, Result, called, tool
from torch import nn

from attrib.datasets import TextTable, WordEncoder
from attrib.metadata import read_metadata
from attrib.models import DeepLSTM, load_weights
from attrib.models.zoo import seeded
from attrib.noise import Noise
from attrib.store.files import write_atomic
from attrib.training import batches, recipe, state
from attrib.training.batches import EpochBatches, LoadedSamples, crop_flip, learning_rate_factor, uid_fraction
from attrib.training.loop import Hyperparameters, evaluate
from attrib.training.record import Trained, TrainingResult, read
from attrib.training.state import Progress, load_state, save_state
from attrib.types import Batch, SampleError, UserError

GOOD, BAD = ("great", "moving", "funny", "fine"), ("dull", "awful", "boring", "poor")
TINY = ("train=acd_cnn_digits", "train.limit=60", "train.epochs=4", "train.batch=16")


class StopAt(Hook):
    """Ctrl-C in the middle of an epoch."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.epoch == self.epoch and batch_idx == 1:
            raise KeyboardInterrupt


@functools.cache
def composed(recipe: str) -> dict:
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = compose("train", [f"train={recipe}"])
    if OmegaConf.is_missing(config.dataset, "root"):
        config.dataset.root = "a folder to be given"
    return OmegaConf.to_container(config, resolve=True)


def configured(*arguments: str) -> dict:
    """What Hydra makes of ``train=RECIPE a.b=value ...``, without its half second."""
    (recipe,) = (a.removeprefix("train=") for a in arguments if a.startswith("train="))
    config = copy.deepcopy(composed(recipe))
    for path, value in (a.lstrip("+").split("=", 1) for a in arguments if not a.startswith("train=")):
        *parts, last = path.split(".")
        functools.reduce(dict.__getitem__, parts, config)[last] = OmegaConf.to_object(
            OmegaConf.create(f"value: {value}")
        )["value"]
    return config


@pytest.fixture
def train(capfd, tmp_path):
    """What ``attrib train ARGS`` does, in this process; everything below tmp_path/work."""

    def run(*arguments: str, root: str = "work") -> Result:
        capfd.readouterr()
        try:
            print(recipe.train(configured(*arguments, f"train.root={tmp_path / root}")))
            status = 0
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            status = 2
        except KeyboardInterrupt:
            status = 130
        return Result(status, *capfd.readouterr())

    run.root = tmp_path / "work" / "train"
    return run


@pytest.fixture
def command(monkeypatch, capfd, tmp_path):
    """``attrib train ARGS`` itself."""
    return lambda *arguments: called(capfd, lambda: tool("train").main([*arguments, f"train.root={tmp_path / 'work'}"]))


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_weights(one: Path, other: Path) -> None:
    """To the bit. (The files also note the git commit, which may move under a test.)"""
    a, b = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


class Words:
    """A dataset of texts of given lengths, or of images if ``lengths`` is None."""

    names = {0: "a", 1: "b"}
    modality = "text"

    def __init__(self, lengths: list[int] | None, targets: list[int], broken: str | None = None) -> None:
        self.uids = tuple(f"s{i:03d}" for i in range(len(targets)))
        self._lengths, self._targets, self._broken = lengths, targets, broken

    def batch(self, uids):
        if self._broken in uids:
            raise SampleError(f"{self._broken}.txt is damaged")
        index = [self.uids.index(u) for u in uids]
        target = torch.tensor([self._targets[i] for i in index])
        if self._lengths is None:
            return Batch(tuple(uids), torch.stack([torch.full((1, 4, 4), float(i)) for i in index]), target)
        lengths = torch.tensor([self._lengths[i] for i in index])
        x = torch.ones(len(index), int(lengths.max()), dtype=torch.long)
        for row, i in zip(x, index):
            row[: self._lengths[i]] = 100 + i
        return Batch(tuple(uids), x, target, lengths=lengths)


# ---- batches ------------------------------------------------------------------------------------


def test_every_sample_once_and_another_order_each_epoch():
    loader = EpochBatches(LoadedSamples(Words(None, [0] * 50), [f"s{i:03d}" for i in range(50)]), size=8, seed=3)
    first, second = loader.order(0), loader.order(1)
    for order in (first, second):
        assert sorted(i for batch in order for i in batch) == list(range(50))
        assert [len(batch) for batch in order] == [8] * 6 + [2]
    assert first != second
    assert first == loader.order(0)
    assert first != EpochBatches(loader.samples, size=8, seed=4).order(0)
    pixels = [x[:, 0, 0, 0].tolist() for x, _ in loader]
    assert pixels == first


def test_the_order_belongs_to_the_uids_and_not_to_their_positions():
    data = Words(None, [0] * 20)
    forwards, backwards = LoadedSamples(data, data.uids), LoadedSamples(data, data.uids[::-1])
    orders = [
        [[samples.uids[i] for i in b] for b in EpochBatches(samples, size=6, seed=0).order(2)]
        for samples in (forwards, backwards)
    ]
    assert orders[0] == orders[1]


@pytest.mark.parametrize(("n", "size", "sizes"), [(9, 4, [4, 5]), (8, 4, [4, 4]), (1, 4, [1]), (3, 1, [1, 1, 1])])
def test_a_last_sample_is_not_alone(n, size, sizes):
    data = Words(None, [0] * n)
    loader = EpochBatches(LoadedSamples(data, data.uids), size=size, seed=0)
    assert [len(b) for b in loader.order(0)] == sizes
    assert len(loader) == len(sizes)


def test_texts_of_similar_length_are_together(monkeypatch):
    monkeypatch.setattr(batches, "BUCKET", 5)
    lengths = [1 + (7 * i) % 23 for i in range(100)]
    data = Words(lengths, [i % 2 for i in range(100)])
    samples = LoadedSamples(data, data.uids, pad=1)
    loader = EpochBatches(samples, size=10, seed=0)
    padded = sum(x.numel() for x, _ in loader)
    unsorted = sum(10 * max(lengths[i] for i in range(k, k + 10)) for k in range(0, 100, 10))
    assert sum(lengths) <= padded < 0.8 * unsorted
    assert sorted(i for b in loader.order(0) for i in b) == list(range(100))
    longest = [max(lengths[i] for i in b) for b in loader.order(0)]
    assert longest != sorted(longest)


def test_rows_are_padded_like_the_datasets_own_batch():
    lengths = [3, 1, 6, 2]
    data = Words(lengths, [0, 1, 1, 0])
    samples = LoadedSamples(data, data.uids, pad=1)
    for positions in ([0], [2, 1], [3, 0, 1]):
        expected = data.batch([data.uids[i] for i in positions])
        x, target = samples.pick(positions)
        assert torch.equal(x, expected.x)
        assert torch.equal(target, expected.target)
    assert [i for b in samples.portions(3) for i in b] == [1, 3, 0, 2]


def test_samples_that_cannot_train():
    with pytest.raises(UserError, match="s001 has no label"):
        LoadedSamples(Words([2, 2], [0, -1]), ["s000", "s001"])
    with pytest.raises(UserError, match=r"s001\.txt is damaged"):
        LoadedSamples(Words([2, 2], [0, 1], broken="s001"), ["s000", "s001"])
    with pytest.raises(UserError, match="no samples"):
        LoadedSamples(Words([2], [0]), [])


def test_crop_flip_against_a_loop():
    x = torch.arange(5 * 2 * 9 * 7.0).reshape(5, 2, 9, 7)
    uids = list("abcde")
    got = crop_flip(x, Noise(uids, 1), margin=3)
    for i, uid in enumerate(uids):
        noise = Noise([uid], 1)
        down, right = noise.integers(7, 2)[0].tolist()
        flip = bool(noise.integers(2, 1)[0, 0])
        padded = np.pad(x[i].numpy(), ((0, 0), (3, 3), (3, 3)), mode="reflect")
        expected = padded[:, down : down + 9, right : right + 7]
        np.testing.assert_array_equal(got[i].numpy(), expected[:, :, ::-1] if flip else expected)
    assert not torch.equal(got, x)


def test_augmentation_changes_with_the_epoch_and_is_for_images():
    data = Words(None, [0] * 8)
    samples = LoadedSamples(data, data.uids)
    samples._arrays = torch.rand(8, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    loader = EpochBatches(samples, size=8, seed=0, augment="crop_flip")
    (first, _), (again, _) = next(iter(loader)), next(iter(loader))
    assert torch.equal(first, again)
    order = loader.order(0)[0]
    loader.epoch = 1
    second = next(iter(loader))[0]
    assert not torch.equal(first[order.index(0)], second[loader.order(1)[0].index(0)])
    with pytest.raises(UserError, match="images"):
        EpochBatches(LoadedSamples(Words([1], [0]), ["s000"]), size=1, seed=0, augment="crop_flip")


def test_learning_rate():
    constant = [learning_rate_factor(i, 10, warmup=4, schedule="constant") for i in range(10)]
    assert constant == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1]
    cosine = [learning_rate_factor(i, 10, warmup=0, schedule="cosine") for i in range(10)]
    np.testing.assert_allclose(cosine, [(1 + math.cos(math.pi * i / 10)) / 2 for i in range(10)])
    assert learning_rate_factor(5, 5, warmup=9, schedule="cosine") == pytest.approx(6 / 9)


def test_shares_are_stable_and_even():
    uids = [f"train/{i}" for i in range(4000)]
    assert abs(np.mean([uid_fraction(u, "test") < 0.2 for u in uids]) - 0.2) < 0.03
    both = np.mean([uid_fraction(u, "test") < 0.2 and uid_fraction(u, "validation") < 0.2 for u in uids])
    assert abs(both - 0.04) < 0.02  # independent of each other
    assert uid_fraction("train/0", "test") == uid_fraction("train/0", "test")


# ---- state --------------------------------------------------------------------------------------


def _net(seed: int = 0) -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)), seed)


def _steps(net: nn.Module, optimizer: torch.optim.Optimizer, numbers: range) -> None:
    for i in numbers:
        x = Noise([f"{i}/{k}" for k in range(6)]).normal(3)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), torch.tensor([0, 1] * 3)).backward()
        optimizer.step()


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.Adam(p, lr=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.SGD(p, lr=0.1),
    ],
)
def test_a_state_that_was_stored_goes_on_to_the_bit(make, tmp_path):
    whole = _net()
    optimizer = make(whole.parameters())
    _steps(whole, optimizer, range(3))
    progress = Progress(epoch=3, iteration=9, best=0.5, best_epoch=2, waited=1, history=[{"epoch": 1, "loss": 0.1}])
    save_state(tmp_path / "state.safetensors", whole, optimizer, progress)
    _steps(whole, optimizer, range(3, 6))
    resumed = _net(seed=9)
    again = make(resumed.parameters())
    assert load_state(tmp_path / "state.safetensors", resumed, again) == progress
    _steps(resumed, again, range(3, 6))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_a_damaged_state(tmp_path):
    path = tmp_path / "state.safetensors"
    net = _net()
    optimizer = torch.optim.Adam(net.parameters())
    save_state(path, net, optimizer, Progress())
    assert load_state(path, net, optimizer).best == -math.inf
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=r"state\.safetensors.*restart"):
        load_state(path, net, optimizer)
    other = nn.Linear(2, 2)
    save_state(path, other, torch.optim.Adam(other.parameters()), Progress())
    with pytest.raises(UserError, match="restart"):
        load_state(path, net, optimizer)


@pytest.mark.parametrize(
    ("name", "kind", "text"),
    [
        ("result.json", TrainingResult, '{"name": "n", "folder": "f"}'),
        ("result.json", TrainingResult, '{"name": "n", "folder": "f", "accuracy": {}, "samples": {}, "epochs": 1, '
         '"best_epoch": 1, "seconds": 1}'),
        ("config.json", Trained, '{"dataset": 3}'),
        ("config.json", Trained, "[" * 100_000),
        ("config.json", Trained, None),
    ],
)  # fmt: skip
def test_a_record_that_is_something_else(name, kind, text, tmp_path):
    path = tmp_path / name
    os.mkfifo(path) if text is None else path.write_text(text)
    with pytest.raises(UserError, match=rf"{name}: .*restart"):
        read(path, kind)


# ---- whole trainings ----------------------------------------------------------------------------


def test_the_command(command):
    """Ctrl-C, going on, a field that does not exist, and no recipe at all."""
    how = ("train=acd_cnn_digits", "train.limit=30", "train.epochs=2", "train.batch=10")
    stopped = command(*how, "train.hooks=[{_target_: test_training.StopAt, epoch: 1}]")
    assert stopped.status == 75
    assert "goes on" in stopped.err
    done = command(*how)
    assert done.status == 0, done.err
    assert done.out.startswith("acd_cnn_digits: accuracy train ")
    wrong = command(*how, "+train.epoch=3")
    assert wrong.status == 2
    assert wrong.err.startswith("error: configs/train: train has no field 'epoch'; did you mean 'epochs'?")
    assert "Traceback" not in wrong.err


def test_what_a_training_leaves(train):
    result = train(*TINY)
    assert result.status == 0, result.err
    folder = train.root / "acd_cnn_digits"
    assert {p.name for p in folder.iterdir()} == {
        "config.json", "curve.png", "metrics.jsonl", "model.safetensors", "result.json", "runs",
    }  # fmt: skip
    (run,) = (folder / "runs").iterdir()
    assert (run / "environment.json").exists()
    assert "Epoch(val) [4]" in next(run.glob("*.log")).read_text()
    rows, found = rows_of(folder), json.loads((folder / "result.json").read_text())
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    assert rows[0].keys() >= {"loss", "train_accuracy", "validation_accuracy", "lr", "seconds"}
    best = max(rows, key=lambda row: row["validation_accuracy"])  # the first of the best
    assert found["best_epoch"] == best["epoch"]
    assert found["accuracy"]["validation"] == best["validation_accuracy"]
    assert found["samples"] == {"train": 60, "validation": 60, "test": 60}
    assert f"test {100 * found['accuracy']['test']:.2f} %" in result.out
    about = read_metadata(str(folder / "model.safetensors"))
    assert about["target"] == "attrib.models.AcdCNN"
    assert about["arguments"] == {"num_classes": 10, "channels": 1}
    assert about["classes"] == [str(i) for i in range(10)]
    assert about["training"]["accuracy"] == found["accuracy"]
    assert about["training"]["epoch"] == found["best_epoch"]


def test_a_finished_training_is_not_repeated(train):
    first = train(*TINY)
    stamp = (train.root / "acd_cnn_digits" / "model.safetensors").stat().st_mtime_ns
    again = train(*TINY, "train.progress=false", "train.device=cpu", "model.layers.cam=conv1", "dataset.select.count=3")
    assert again.status == 0, again.err
    assert again.out == first.out
    assert (train.root / "acd_cnn_digits" / "model.safetensors").stat().st_mtime_ns == stamp
    assert len(list((train.root / "acd_cnn_digits" / "runs").iterdir())) == 1
    assert train(*TINY, "train.restart=true").status == 0
    assert len(list((train.root / "acd_cnn_digits" / "runs").iterdir())) == 2


def test_a_finished_training_whose_weights_are_gone_is_done_again(train):
    first, path = train(*TINY), train.root / "acd_cnn_digits" / "model.safetensors"
    weights = load_file(path)
    path.unlink()
    again = train(*TINY)
    assert again.status == 0, again.err
    assert again.out.partition(";")[0] == first.out.partition(";")[0]
    assert all(torch.equal(value, weights[name]) for name, value in load_file(path).items())


def test_what_is_said_when_stopped(command, monkeypatch):
    monkeypatch.setattr(recipe, "fit", _stop)
    assert "stopped; the same command goes on" in command(*TINY).err
    assert "stopped; without train.restart the same command goes on" in command(*TINY, "train.restart=true").err


def _stop(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_told_to_stop(command, monkeypatch, number):
    """By Slurm, say: the state of the last whole epoch is there, so there is nothing to wait for."""
    monkeypatch.setattr(recipe, "fit", lambda *_, **__: [os.kill(os.getpid(), number), time.sleep(30)])
    start = time.monotonic()
    result = command(*TINY)
    assert (result.status, time.monotonic() - start < 20) == (75, True)
    assert "the same command goes on after the last whole epoch" in result.err


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_stopped_and_resumed_is_as_if_never_stopped(train, optimizer):
    """With dropout, a schedule, augmentation and clipping; the weights are the same to the bit."""
    how = (*TINY, f"train.optimizer={optimizer}", "train.augment=crop_flip", "train.clip=1", "train.warmup=1")
    assert train(*how, root="whole").status == 0
    stopped = train(*how, "train.hooks=[{_target_: test_training.StopAt, epoch: 2}]")
    assert stopped.status == 130
    folder = train.root / "acd_cnn_digits"
    assert [row["epoch"] for row in rows_of(folder)] == [1, 2]
    assert not (folder / "result.json").exists()
    stopped = train(*how, "train.hooks=[{_target_: test_training.StopAt, epoch: 3}]")
    assert stopped.status == 130
    assert train(*how).status == 0
    whole = train.root.parent.parent / "whole" / "train" / "acd_cnn_digits"
    assert_same_weights(folder, whole)
    timeless = [[{k: v for k, v in row.items() if k != "seconds"} for row in rows_of(f)] for f in (folder, whole)]
    assert timeless[0] == timeless[1]
    assert not (folder / "state.safetensors").exists()


def test_random_numbers_are_its_own(train):
    """What the process drew before changes nothing, and nothing is drawn from or seeded."""
    train(*TINY, root="one")
    torch.manual_seed(7)
    random.seed(7)
    np.random.seed(7)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()
    train(*TINY, root="two")
    assert torch.equal(before[0], torch.get_rng_state())
    assert random.getstate() == before[1]
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), before[2]))
    train(*TINY, "seed=1", root="three")
    weights = [
        load_file(train.root.parent.parent / r / "train" / "acd_cnn_digits" / "model.safetensors")["fc2.weight"]
        for r in ("one", "two", "three")
    ]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_another_recipe_in_the_same_folder(train):
    assert train(*TINY).status == 0
    result = train(*TINY, "train.lr=0.5", "seed=3")
    assert result.status == 2
    for part in ("train.lr was 0.002, now 0.5", "seed was 0, now 3", "train.name=", "train.restart=true"):
        assert part in result.err
    assert "Traceback" not in result.err
    assert train(*TINY, "train.lr=0.5", "seed=3", "train.name=other").status == 0
    assert train(*TINY, "train.limit=61", "train.restart=true").status == 0


def test_early_stopping_also_after_a_resume(train):
    how = (*TINY, "train.lr=1e-12", "train.patience=3", "train.epochs=9")
    assert train(*how, "train.hooks=[{_target_: test_training.StopAt, epoch: 3}]").status == 130
    assert train(*how).status == 0
    assert len(rows_of(train.root / "acd_cnn_digits")) == 4  # the first was the best, then three of patience


def test_a_loss_that_is_not_finite(train):
    result = train(*TINY, "train.optimizer=sgd", "train.schedule=constant", "train.lr=1e25")
    assert result.status == 2
    assert "epoch 1, batch " in result.err
    assert "the loss is nan" in result.err or "the loss is inf" in result.err
    assert "train.lr" in result.err


def test_a_loss_that_is_not_finite_after_good_epochs(train):
    """Steps that grow by a linear start of the learning rate: what was best before is still there."""
    how = ("train.optimizer=sgd", "train.lr=1e12", "train.momentum=0", "train.warmup=1e9", "train.epochs=9")
    assert train(*TINY, "train.name=x", "train.epochs=1").status == 0
    result = train(*TINY, *how, "train.batch=60", "train.warmup=1e6")
    folder = train.root / "acd_cnn_digits"
    assert result.status == 2
    best = max(rows_of(folder), key=lambda row: row["validation_accuracy"])["epoch"]
    assert f"(epoch {best}) are kept" in result.err
    kept = read_metadata(str(folder / "model.safetensors"))["training"]
    assert kept["epoch"] == best
    assert all(bool(v.isfinite().all()) for v in load_file(folder / "model.safetensors").values())


def test_a_full_disk_costs_one_epoch(train, monkeypatch):
    whole = train(*TINY, "train.name=whole")
    assert whole.status == 0
    written = []

    def write(path, data):
        written.append(path)
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        write_atomic(path, data)

    monkeypatch.setattr(state, "write_atomic", write)
    full = train(*TINY)
    assert full.status == 2
    assert "No space left on device" in full.err
    assert train(*TINY).status == 0
    assert_same_weights(train.root / "whole", train.root / "acd_cnn_digits")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("+train.epoch=3", "did you mean 'epochs'"),
        ("train.epochs=many", "epochs must be int, not 'many'"),
        ("train.epochs=0", "train.epochs must be positive"),
        ("train.optimizer=adagrad", "'adam' or 'adamw' or 'sgd'"),
        ("train.freeze=[conv9]", "train.freeze: AcdCNN has no parameters at 'conv9'"),
        ("train.validation=train", "samples are in train and validation"),
        ("train.validation=1.5", "a share between 0 and 1"),
        ("train.validation=dev", "split must be 'train' or 'val' or 'test', not 'dev'"),
        ("train.baseline=true", "train.baseline is for texts"),
        ("train.vectors=some.txt", "train.vectors is for nets that read words"),
        ("train.device=cuda:77", "train.device=cuda:77"),
        ("model.num_classes=7", "the net has 7 outputs, the data have 10 classes"),
        ("train.weights=missing.safetensors", "missing.safetensors"),
        ("train.hooks=[{type: NoSuchHook}]", "train.hooks or train.vis_backends cannot be built"),
    ],
)
def test_refusals(train, argument, message):
    result = train(*TINY, argument)
    assert result.status == 2
    assert message in result.err
    assert "Traceback" not in result.err


def test_frozen_parts_keep_their_values_and_weights_to_start_from(train):
    assert train(*TINY).status == 0
    first = train.root / "acd_cnn_digits" / "model.safetensors"
    more = (f"train.weights={first}", "train.freeze=[conv1,conv2.bias]", "train.name=more", "seed=1")
    assert train(*TINY, *more).status == 0
    before, after = load_file(first), load_file(train.root / "more" / "model.safetensors")
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {"conv1.weight", "conv1.bias", "conv2.bias"}


# ---- texts --------------------------------------------------------------------------------------


@pytest.fixture
def table(tmp_path):
    """train.tsv, dev.tsv and test.tsv whose sentiment one word decides."""
    for split, n in (("train", 60), ("dev", 20), ("test", 20)):
        lines = ["text\tlabel"]
        for i in range(n):
            word = (GOOD if i % 2 else BAD)[i // 2 % 4]
            lines.append(f"{'the ' * (i % 5)}film {split}word is {word} .\t{i % 2}")
        (tmp_path / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    return tmp_path


TEXT = ("train=acd_lstm_sst2", "train.vectors=null", "model.embedding_dim=8", "model.hidden_dim=8", "train.batch=10",
        "train.lr=0.02")  # fmt: skip


def test_texts_learn_and_the_checkpoint_says_how_to_read_them(train, table):
    result = train(*TEXT, f"dataset.root={table}", "train.epochs=6")
    assert result.status == 0, result.err
    folder = train.root / "acd_lstm_sst2"
    found = json.loads((folder / "result.json").read_text())
    assert found["accuracy"] == {"train": 1.0, "validation": 1.0, "test": 1.0}
    assert found["baseline"]["test"] == 1.0
    assert "TF-IDF" in result.out
    path = str(folder / "model.safetensors")
    about = read_metadata(path)
    assert about["vocabulary"][:2] == ["<unk>", "<pad>"]
    assert "trainword" in about["vocabulary"]
    assert not {"devword", "testword"} & set(about["vocabulary"])
    assert about["classes"] == ["negative", "positive"]
    assert about["arguments"]["vocab_size"] == len(about["vocabulary"])
    # What a run will do with the file alone:
    from attrib.models import AcdLSTM

    net = AcdLSTM(**about["arguments"])
    load_weights(net, path)
    data = TextTable(str(table / "test.tsv"), WordEncoder(path))
    assert evaluate(net, LoadedSamples(data, data.uids, pad=1), torch.device("cpu"))["accuracy"] == 1.0


def test_word_vectors_start_the_embedding(train, table):
    file = table / "vectors.txt"
    file.write_text("".join(f"{w} {i} 1 2 3 4 5 6 7\n" for i, w in enumerate((*GOOD, *BAD))))
    result = train(*TEXT, f"dataset.root={table}", "train.epochs=1", f"train.vectors={file}", "train.freeze=[embed]")
    assert result.status == 0, result.err
    path = train.root / "acd_lstm_sst2" / "model.safetensors"
    vocabulary, embedding = read_metadata(str(path))["vocabulary"], load_file(path)["embed.weight"]
    for i, word in enumerate((*GOOD, *BAD)):
        assert embedding[vocabulary.index(word)].tolist() == [i, 1, 2, 3, 4, 5, 6, 7]
    assert embedding[1].abs().max() == 0
    wrong = train(*TEXT, f"dataset.root={table}", f"train.vectors={file}", "model.embedding_dim=5", "train.name=wrong")
    assert wrong.status == 2
    assert "this one has" in wrong.err


def test_words_of_four_layers_and_a_vocabulary_that_is_cut(train, table):
    how = ("train=lstm_sst2", "train.vectors=null", "model.embedding_dim=8", "model.hidden_dim=8", "train.epochs=1")
    result = train(*how, f"dataset.root={table}", "train.vocabulary_size=4", "train.baseline=false")
    assert result.status == 0, result.err
    about = read_metadata(str(train.root / "lstm_sst2" / "model.safetensors"))
    assert about["target"] == "attrib.models.DeepLSTM"
    assert len(about["vocabulary"]) == 6
    assert DeepLSTM(**about["arguments"]).embedding.num_embeddings == 6
    assert json.loads((train.root / "lstm_sst2" / "result.json").read_text())["baseline"] is None


def test_texts_that_changed(train, table):
    how = (*TEXT, f"dataset.root={table}", "train.epochs=1", "train.baseline=false")
    assert train(*how).status == 0
    with open(table / "train.tsv", "a") as file:
        file.write("one more\t1\n")
    result = train(*how)
    assert result.status == 2
    assert "samples have changed" in result.err


def test_a_share_of_one_split(train, table):
    how = (
        *TEXT,
        f"dataset.root={table}",
        "dataset.path=train.tsv",
        "dataset.split=null",
        "train.split=null",
        "train.epochs=1",
    )
    result = train(*how, "train.validation=0.2", "train.test=0.3")
    assert result.status == 0, result.err
    samples = json.loads((train.root / "acd_lstm_sst2" / "result.json").read_text())["samples"]
    assert sum(samples.values()) == 60
    assert all(n >= 5 for n in samples.values())
    assert "train.split is null" in train(*how, "train.validation=dev", "train.name=b").err


def test_samples_without_a_label(train, table):
    with open(table / "train.tsv", "a") as file:
        file.write("who knows\t-1\n")
    result = train(*TEXT, f"dataset.root={table}")
    assert result.status == 2
    assert "train/000062 has no label" in result.err


def test_samples_that_cannot_be_read(train, table):
    with open(table / "train.tsv", "a") as file:
        file.write("half a record\n")
    how = (*TEXT, f"dataset.root={table}", "train.epochs=1")
    result = train(*how)
    assert result.status == 2
    assert "1 samples cannot be read, the first is train/000062" in result.err
    assert train(*how, "train.skip_unreadable=true").status == 0
    assert json.loads((train.root / "acd_lstm_sst2" / "result.json").read_text())["samples"]["train"] == 60


# ---- recipes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(p.stem for p in (ROOT / "configs" / "train").glob("*.yaml")))
def test_recipes_compose(name):
    config = configured(f"train={name}")
    options, data, hyperparameters = recipe.parts(config["train"])
    assert options.name == name
    assert isinstance(hyperparameters, Hyperparameters)
    if config["model"]["checkpoint"] is not None:
        assert config["model"]["checkpoint"] == f"workdirs/train/{name}/model.safetensors"
    assert not data.baseline or "encoder" in config["dataset"]


def _command(*arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "tools" / "train.py"), *arguments]


def _run(*arguments: str) -> str:
    done = subprocess.run(_command(*arguments), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
def test_killed_and_resumed(tmp_path):
    """SIGKILL at any moment after the first epoch; the same command ends with the same bits."""
    how = ("train=acd_cnn_digits", "train.epochs=8", "train.patience=null")
    _run(*how, f"train.root={tmp_path / 'whole'}")
    folder, here = tmp_path / "killed" / "train" / "acd_cnn_digits", f"train.root={tmp_path / 'killed'}"
    with subprocess.Popen(_command(*how, here), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as killed:
        while not (folder / "metrics.jsonl").exists() and killed.poll() is None:
            time.sleep(0.01)
        killed.kill()
    assert killed.returncode == -signal.SIGKILL
    assert 1 <= len(rows_of(folder)) < 8
    assert "going on after epoch" in _run(*how, here)
    assert_same_weights(folder, tmp_path / "whole" / "train" / "acd_cnn_digits")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "least"), [("lenet_digits", 0.97), ("lstm_snippets", 0.79), ("bilstm_snippets", 0.79)]
)
def test_accuracy(name, least, tmp_path):
    out = _run(f"train={name}", f"train.root={tmp_path}")
    found = json.loads((tmp_path / "train" / name / "result.json").read_text())
    assert found["accuracy"]["test"] >= least, out
