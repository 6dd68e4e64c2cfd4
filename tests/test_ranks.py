"""Processes of torchrun: each has a part of the shard, and a GPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from tiny import ROOT, only_cell, pictures

from attrib import keys
from attrib.cluster.ranks import of_rank
from attrib.running.options import Options
from attrib.types import UserError


def ranked(rank: int, world: int, local: int | None = None, **options) -> Options:
    local = rank if local is None else local
    return of_rank(Options(**options), {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(local)})


def test_one_process_is_as_before():
    options = Options(shard=3, shards=8)
    assert of_rank(options, {}) is options
    assert of_rank(options, {"RANK": "2"}) is options
    assert ranked(0, 1, shard=3, shards=8) == options


@pytest.mark.parametrize("shards", [1, 3])
def test_processes_cut_a_shard_without_overlap(shards):
    uids = [f"val/{i}" for i in range(500)]
    for shard in range(shards):
        mine = [u for u in uids if keys.shard_of(u, shards) == shard]
        parts = [ranked(rank, 4, shard=shard, shards=shards) for rank in range(4)]
        assert {(p.shard, p.shards) for p in parts} == {(4 * shard + rank, 4 * shards) for rank in range(4)}
    every = [ranked(rank, 4, shard=shard, shards=shards) for rank in range(4) for shard in range(shards)]
    counts = [sum(keys.shard_of(u, p.shards) == p.shard for p in every) for u in uids]
    assert counts == [1] * len(uids)
    assert mine


def test_a_process_takes_its_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert ranked(6, 8, local=2).device == "cuda:2"
    assert ranked(6, 8, local=2, device="cuda").device == "cuda:2"  # not the first GPU for all of them
    assert ranked(6, 8, local=2, device="cuda:1").device == "cuda:1"
    assert ranked(6, 8, local=2, device="cpu").device == "cpu"
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)  # each process sees its own only
    assert ranked(6, 8, local=2).device == "cuda:0"
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert ranked(6, 8, local=2).device == "auto"


def test_one_bar_on_a_terminal():
    assert [ranked(rank, 2).progress for rank in range(2)] == [True, False]
    assert not ranked(0, 2, progress=False).progress


@pytest.mark.parametrize(
    "environment",
    [
        {"WORLD_SIZE": "2"},
        {"WORLD_SIZE": "2", "RANK": "2", "LOCAL_RANK": "0"},
        {"WORLD_SIZE": "0", "RANK": "0", "LOCAL_RANK": "0"},
        {"WORLD_SIZE": "two", "RANK": "0", "LOCAL_RANK": "0"},
        {"WORLD_SIZE": "2", "RANK": "-1", "LOCAL_RANK": "0"},
    ],
)
def test_nonsense_is_refused(environment):
    with pytest.raises(UserError, match="torchrun sets them"):
        of_rank(Options(), environment)


@pytest.mark.slow
def test_torchrun_starts_two_processes(tmp_path):
    images = pictures(tmp_path, 12)
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
        *(str(ROOT / "tools" / "run.py"), "--config-dir", str(ROOT / "tests" / "configs"), "dataset=tiny"),
        *("model=small_cnn", "method=random", "metric=[]", f"dataset.root={images}", f"run.root={tmp_path / 'work'}"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    cell = only_cell(tmp_path / "work")
    assert len(cell.maps.index()) == 12
    assert sorted(p.name.split("-")[3] for p in cell.folder.glob("runs/*")) == ["0", "1"]
