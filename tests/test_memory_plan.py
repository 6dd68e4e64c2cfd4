"""Memory is planned: ``run.batch=auto``, what is free, and a run that goes on when memory runs out."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from test_run import maps, only_cell, scores
from tiny import ROOT, command, pictures
from torch import nn

from attrib.config.compose import resolved
from attrib.config.objects import experiment, options_of
from attrib.experiment.cell import Experiment
from attrib.experiment.samples import Samples
from attrib.methods.baselines import Random
from attrib.methods.input_iba import InputIBA
from attrib.methods.parts.wgan import WGAN, critic_parameters
from attrib.metrics.ehr import EHR
from attrib.models import Classifier
from attrib.models.device_memory import is_lost, is_out_of_memory, of_the_device
from attrib.process import free_memory as process_memory
from attrib.process.free_memory import Peak, free_memory
from attrib.running import batch_size
from attrib.running.batch_size import FIXED, Budget, fitting
from attrib.running.options import Options
from attrib.running.run import run as run_experiment
from attrib.running.summary import Summary
from attrib.types import Batch, SampleError, UserError

CPU = torch.device("cpu")
GB = 2**30
SAMPLES = 11
OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nand a page more"),
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:113] DefaultCPUAllocator: can't allocate memory"),
    SampleError("out of memory even with one row at a time: CUDA out of memory."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
]


@pytest.fixture(scope="module")
def cell(tmp_path_factory) -> Experiment:
    images = pictures(tmp_path_factory.mktemp("data"), SAMPLES)
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = compose(
            "run",
            [
                *("dataset=boxed_images", f"dataset.root={images}", "dataset.classes=null"),
                *("model=small_cnn", "method=random", "metric=[ehr]"),
                f"hydra.searchpath=[{ROOT / 'tests' / 'configs'}]",
            ],
        )
    return experiment(resolved(config))


@pytest.fixture
def run(cell, tmp_path) -> Callable[..., Summary]:
    """Without metrics unless told so, and every time with the rows that are asked for."""

    def run_here(root: str = "work", rows: int = 64, metric: bool = False, **options: Any) -> Summary:
        cell.model.rows = rows
        one = cell if metric else dataclasses.replace(cell, metrics={})
        return run_experiment(one, Options(root=str(tmp_path / root), rows=rows, progress=False, **options))

    return run_here


@pytest.fixture
def greedy(monkeypatch) -> Callable[..., list[tuple[str, ...]]]:
    """Make ``random`` run out of memory above a batch size, and tell which batches it was given."""

    def limit(most: int, error: Exception = OUT_OF_MEMORY[0], never: str = "") -> list[tuple[str, ...]]:
        given: list[tuple[str, ...]] = []

        def attribute(self, model, batch, state, noise):
            given.append(batch.uids)
            if len(batch) > most or never in batch.uids:
                raise error
            return {"map": noise.uniform(*batch.x.shape[-2:])}

        monkeypatch.setattr(Random, "attribute", attribute)
        return given

    return limit


def sizes(given: list[tuple[str, ...]]) -> list[int]:
    return [len(uids) for uids in given]


def logged(root: Path) -> str:
    return "\n".join(p.read_text() for p in only_cell(root).folder.glob("runs/*/*.log"))


# ---- out of memory ------------------------------------------------------------------------------


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda e: type(e).__name__)
def test_batches_are_halved_and_it_is_remembered(run, greedy, tmp_path, error):
    expected = greedy(SAMPLES)
    assert run("single", batch=1).failed == 0
    given = greedy(2, error)
    assert run(batch=8) == Summary(maps_computed=11)
    # The next batch had been read already, eight samples that are cut at once, and nothing is tried twice in vain.
    assert sizes(given) == [8, 4, 2, 2, 2, 2, 2, 1]
    assert not only_cell(tmp_path / "work").ledger.entries()
    one, other = maps(tmp_path / "single"), maps(tmp_path / "work")
    assert one.keys() == other.keys()
    assert len(expected) == len(one) == SAMPLES
    for uid, map_ in one.items():
        np.testing.assert_array_equal(map_, other[uid])
    (record,) = only_cell(tmp_path / "work").folder.glob("runs/*/summary.json")
    assert json.loads(record.read_text())["batch"] == 2
    log = logged(tmp_path / "work")
    assert log.count("out of memory with") == 2
    assert "out of memory with 4 samples at once; going on with 2" in log


def test_what_is_read_later_is_read_in_the_smaller_size(run, greedy):
    given = greedy(1)
    assert run(batch=2) == Summary(maps_computed=11)
    # Three batches of two were read ahead of the failure and are cut; after them samples come one by one.
    assert sizes(given) == [2] + [1] * SAMPLES
    assert len({uid for uids in given for uid in uids}) == SAMPLES


def test_other_errors_still_cost_the_guilty_alone_and_no_size(run, greedy, tmp_path):
    given = greedy(SAMPLES, ValueError("no luck"), never="p001")
    assert run(batch=4) == Summary(maps_computed=10, failed=1)
    assert sizes(given) == [4, 1, 1, 1, 1, 4, 3]
    (entry,) = only_cell(tmp_path / "work").ledger.entries()
    assert entry["reason"] == "ValueError: no luck"


def test_a_sample_that_never_fits_is_in_the_ledger_and_says_what_to_do(run, greedy, tmp_path):
    given = greedy(4, never="p002")
    assert run(batch=8) == Summary(maps_computed=10, failed=1)
    assert sizes(given)[:7] == [8, 4, 2, 2, 1, 1, 1]  # p000 p001, then p002 and p003 alone
    (entry,) = only_cell(tmp_path / "work").ledger.entries()
    assert entry["uid"] == "p002"
    assert "Tried to allocate 2.00 GiB.; this sample does not fit into memory even alone" in entry["reason"]
    assert "model.input.size" in entry["reason"]
    greedy(SAMPLES)
    assert run(batch=8) == Summary(maps_computed=1, maps_present=10)  # on a machine with more memory


def test_rows_that_were_halved_in_vain_come_back(run, monkeypatch):
    """A net that has no room beside eight samples' own tensors must not go on row by row with four."""
    rows: list[tuple[int, int]] = []

    def attribute(self, model, batch, state, noise):
        def piece(part: slice) -> torch.Tensor:
            if len(batch) > 4 or batch.uids == ("p001",):
                raise torch.OutOfMemoryError("CUDA out of memory")
            return batch.x[part].sum(1)

        found = model.chunked(piece, len(batch))
        rows.append((len(batch), model.rows))
        return {"map": found}

    monkeypatch.setattr(Random, "attribute", attribute)
    assert run(batch=8, rows=16) == Summary(maps_computed=11)
    assert rows == [(4, 16), (4, 16), (3, 16)]
    rows.clear()
    assert run("single", batch=1, rows=16) == Summary(maps_computed=10, failed=1)
    assert rows == [(1, 16)] * 10


def test_a_metric_that_runs_out_of_memory(run, greedy, monkeypatch, tmp_path):
    greedy(SAMPLES)
    assert run("single", batch=1, metric=True).failed == 0
    score, given = EHR.score, []

    def limited(self, model, batch, map, noise):
        given.append(len(batch))
        if len(batch) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return score(self, model, batch, map, noise)

    monkeypatch.setattr(EHR, "score", limited)
    assert run(batch=6, metric=True) == Summary(maps_computed=11, scores_computed=11)
    assert given == [6, 3, 3, 3, 2]
    assert scores(tmp_path / "work") == scores(tmp_path / "single")


def test_a_device_without_room_for_the_inputs(monkeypatch):
    class Data:
        def batch(self, uids):
            return Batch(tuple(uids), torch.zeros(len(uids), 3), torch.zeros(len(uids), dtype=torch.long))

    whole = Samples._ready
    tried: list[int] = []

    def ready(self, batch):
        tried.append(len(batch))
        if len(batch) > 2 or "4" in batch.uids:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(self, batch)

    monkeypatch.setattr(Samples, "_ready", ready)
    loaded = list(Samples(Data(), Classifier(nn.Identity()), "01234567").load([tuple("01234"), tuple("567")]))
    assert [batch.uids if batch else None for batch, _ in loaded] == [
        ("0", "1"), ("2",), ("3",), None, ("5",), ("6", "7"),
    ]  # fmt: skip
    assert [bad for _, bad in loaded if bad] == [[("4", "OutOfMemoryError: CUDA out of memory")]]
    assert tried == [5, 2, 3, 1, 2, 1, 1, 3, 1, 2]


@pytest.mark.parametrize(("error", "full"), [*((e, True) for e in OUT_OF_MEMORY), (RuntimeError("shape"), False)])
def test_what_counts_as_out_of_memory(error, full):
    assert is_out_of_memory(error) == full
    assert of_the_device(error) == full


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("CUDA error: device-side assert triggered"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling cublasSgemm"), True),
        (RuntimeError("CUDA error: out of memory"), False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_what_counts_as_a_device_that_is_lost(error, lost):
    assert is_lost(error) == lost
    assert of_the_device(error) == ("CUDA error" in str(error))


# ---- auto ---------------------------------------------------------------------------------------


@pytest.fixture
def machine(monkeypatch):
    """A machine with so much free memory, on which one sample takes so much."""

    def fake(free: int | None, peak: int | None) -> None:
        monkeypatch.setattr(batch_size, "free_memory", lambda device: free)
        monkeypatch.setattr(Peak, "bytes", lambda self: peak)

    return fake


@pytest.mark.parametrize(
    ("free", "need", "most", "expected"),
    [
        (16 * GB, GB, 64, 8),
        (16 * GB, GB, 5, 5),
        (17 * GB, GB, 64, 8),
        (18 * GB, GB, 64, 9),
        (GB, GB, 64, 1),
        (0, GB, 64, 1),
        (10**15, 1, 64, 64),
    ],
)
def test_formula(free, need, most, expected):
    assert fitting(free, need, most) == expected


def test_auto_measures_one_sample_and_takes_what_fits(run, greedy, machine, tmp_path, caplog):
    given = greedy(SAMPLES)
    machine(10 * GB, GB)
    with caplog.at_level(logging.INFO, "attrib"):
        assert run(batch="auto", metric=True) == Summary(maps_computed=11, scores_computed=11)
    assert sizes(given) == [1, 5, 5]
    assert "run.batch=auto: 5 samples at once (10.00 GiB free, 1.00 GiB per sample, run.rows=64)" in caplog.messages
    greedy(SAMPLES)
    assert run("single", batch=1, metric=True).failed == 0
    names = [only_cell(tmp_path / root).folder.name for root in ("work", "single")]
    assert names[0] == names[1]
    assert scores(tmp_path / "work") == scores(tmp_path / "single")


def test_auto_stays_under_rows_and_under_memory(run, greedy, machine):
    machine(1000 * GB, 1)
    given = greedy(SAMPLES)
    run(batch="auto", rows=3)
    assert sizes(given) == [1, 3, 3, 3, 1]
    machine(14 * GB, GB)
    given = greedy(3)
    run("other", batch="auto")  # it was too hopeful
    assert sizes(given) == [1, 7, 3, 3, 1, 3]


def test_auto_measures_a_sample_that_succeeds(run, greedy, machine):
    machine(8 * GB, GB)
    given = greedy(SAMPLES, ValueError("no luck"), never="p000")
    assert run(batch="auto") == Summary(maps_computed=10, failed=1)
    assert sizes(given) == [1, 1, 4, 4, 1]


def test_auto_goes_on_where_it_was(run, greedy, machine):
    machine(8 * GB, GB)
    greedy(SAMPLES)
    run(batch="auto", limit=3)
    given = greedy(SAMPLES)
    assert run(batch="auto") == Summary(maps_computed=8, maps_present=3)
    assert sizes(given) == [1, 4, 3]
    given = greedy(SAMPLES)
    run(batch="auto")
    assert not given


@pytest.mark.parametrize(("free", "peak"), [(None, GB), (GB, None)])
def test_auto_where_nothing_can_be_measured(run, greedy, machine, tmp_path, free, peak):
    machine(free, peak)
    given = greedy(SAMPLES)
    run(batch="auto")
    assert sizes(given) == [1, FIXED, SAMPLES - 1 - FIXED]
    assert "no way to tell" in logged(tmp_path / "work")


def test_a_method_may_say_what_it_needs(run, greedy, machine, monkeypatch, tmp_path):
    asked: list[int] = []

    def need(self, model, batch):
        asked.append(len(batch))
        return 3 * GB

    monkeypatch.setattr(Random, "bytes_per_sample", need)
    machine(12 * GB, GB)
    given = greedy(SAMPLES)
    run(batch="auto")
    assert sizes(given) == [1, 2, 2, 2, 2, 2]  # half of 12 holds two of 3, and the word of the method counts
    given = greedy(SAMPLES)
    run("fixed", batch=8)
    assert sizes(given) == [4, 4, 3]  # the next batch had been read already
    assert "run.batch=8 needs 24.00 GiB, and 12.00 GiB is free; going on with 4" in logged(tmp_path / "fixed")
    machine(25 * GB, GB)
    given = greedy(SAMPLES)
    run("large", batch=8)
    assert sizes(given) == [8, 3]
    assert asked == [1, 8, 8]


def test_a_method_that_does_not_know_what_it_needs(run, greedy, monkeypatch, tmp_path):
    monkeypatch.setattr(Random, "bytes_per_sample", lambda self, model, batch: 1 // 0)
    given = greedy(SAMPLES)
    assert run(batch=8) == Summary(maps_computed=11)
    assert sizes(given) == [8, 3]
    assert "Random.bytes_per_sample: ZeroDivisionError" in logged(tmp_path / "work")


def test_work_that_is_no_methods_is_not_measured():
    model = Classifier(nn.Linear(2, 2))
    scoring = Budget("auto", model)
    assert (scoring.open, scoring.most) == (False, FIXED)
    assert list(scoring.portions("abc")) == ["abc"]
    assert list(Budget("auto", model, Random()).portions("")) == []


def test_by_default_nothing_is_measured_on_a_cpu():
    """So that the same bits come out whatever memory is free; test_device.py has the default of a GPU."""
    here = Budget(None, Classifier(nn.Linear(2, 2)), Random())
    assert (here.open, here.most) == (False, FIXED)


@pytest.mark.parametrize("value", [0, -3])
def test_impossible_sizes(value):
    with pytest.raises(UserError, match=rf"run\.batch must be at least 1, or auto, not {value}"):
        options_of({"batch": value})


@pytest.mark.parametrize("value", ["lots", 2.5, True])
def test_other_values_are_named(value):
    with pytest.raises(UserError, match=rf"run\.batch must be int or 'auto' or null, not {value!r}"):
        options_of({"batch": value})


def test_options():
    assert (Options().batch, Options().read) == (None, FIXED)
    assert (options_of({"batch": "auto"}).read, Options(batch=3).read) == (FIXED, 3)


def test_the_command_line_takes_it(monkeypatch, capfd, tmp_path):
    images = pictures(tmp_path, 3)
    result = command(capfd)(
        *("dataset=tiny", "model=small_cnn", "method=input_iba", "metric=[]", "run.progress=false", "run.batch=auto"),
        *("method.gan.epochs=1", "method.gan.dataset_size=4", "method.gan.batch=2", "method.input.steps=2"),
        *("method.feature.steps=2", f"dataset.root={images}", f"run.root={tmp_path / 'work'}"),
    )
    assert result.status == 0, result.err
    assert "maps_computed=3" in result.out


# ---- free memory --------------------------------------------------------------------------------


def folder(root: Path, **files: str) -> Path:
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def group(root: Path, path: str, limit: str, used: int, cache: int, names: tuple[str, str, str]) -> None:
    home = root / "sys/fs/cgroup" / path
    home.mkdir(parents=True, exist_ok=True)
    (home / names[0]).write_text(f"{limit}\n")
    (home / names[1]).write_text(f"{used}\n")
    (home / "memory.stat").write_text(f"anon 5\n{names[2]} {cache}\n")


MEMINFO = f"MemTotal: {64 * 2**20} kB\nMemFree: 5 kB\nMemAvailable: {20 * 2**20} kB\n"


def test_the_machines_free_memory(tmp_path):
    assert free_memory(CPU, tmp_path) is None  # neither proc nor sys
    assert free_memory(torch.device("meta"), tmp_path) is None
    folder(tmp_path, proc__meminfo=MEMINFO)
    assert free_memory(CPU, tmp_path) == 20 * GB


def test_a_job_of_cgroup_version_2(tmp_path):
    folder(tmp_path, proc__meminfo=MEMINFO, proc__self__cgroup="0::/slurm/job_7/step_0\n")
    group(tmp_path, "slurm/job_7/step_0", "max", 3 * GB, 0, process_memory._GROUPS_V2)
    assert free_memory(CPU, tmp_path) == 20 * GB
    group(tmp_path, "slurm/job_7", str(8 * GB), 3 * GB, GB, process_memory._GROUPS_V2)  # the limit is the job's
    assert free_memory(CPU, tmp_path) == 6 * GB
    group(tmp_path, "slurm/job_7", str(80 * GB), 3 * GB, GB, process_memory._GROUPS_V2)  # more than the machine has
    assert free_memory(CPU, tmp_path) == 20 * GB
    group(tmp_path, "slurm/job_7", str(8 * GB), 9 * GB, 0, process_memory._GROUPS_V2)
    assert free_memory(CPU, tmp_path) == 0


def test_a_container_of_cgroup_version_1(tmp_path):
    groups = "9:name=systemd:/docker/abc\n4:cpu,memory:/docker/abc\n0::/\n"
    folder(tmp_path, proc__meminfo=MEMINFO, proc__self__cgroup=groups)
    group(tmp_path, "memory", "9223372036854771712", 3 * GB, 0, process_memory._GROUPS_V1)  # no limit
    assert free_memory(CPU, tmp_path) == 20 * GB
    # Inside, the container's own group stands at the top; its path is the machine's.
    group(tmp_path, "memory", str(4 * GB), 2 * GB, GB // 2, process_memory._GROUPS_V1)
    assert free_memory(CPU, tmp_path) == 2.5 * GB
    (tmp_path / "proc/meminfo").unlink()
    assert free_memory(CPU, tmp_path) == 2.5 * GB


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux only")
def test_the_peak_of_this_process():
    batch_size._free(CPU)
    peak = Peak(CPU)
    kept = torch.ones(32, 2**20)  # 128 MiB
    del kept
    assert 120 * 2**20 < peak.bytes() < 400 * 2**20
    assert free_memory(CPU) > 0


def test_the_peak_where_nothing_tells(tmp_path):
    assert Peak(CPU, tmp_path).bytes() is None
    assert Peak(torch.device("meta"), tmp_path).bytes() is None
    folder(tmp_path, proc__self__status="VmHWM:\t 900 kB\nVmRSS:\t 700 kB\n")
    assert Peak(CPU, tmp_path).bytes() == 200 * 1024


def test_input_iba_knows_its_critics():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 64, 4))
    model = Classifier(net, {"bottleneck": "1"})
    batch = Batch(("a", "b"), torch.rand(2, 3, 16, 16), torch.tensor([0, 1]))
    found = InputIBA(gan=WGAN(batch=5)).bytes_per_sample(model, batch)
    assert found == 4 * (3 * critic_parameters(8, (8, 8)) + 5 * (8 * 8 * 64 + 4 * math.prod((3, 16, 16))))
    assert InputIBA(gan=WGAN(epochs=0)).bytes_per_sample(model, batch) is None
    assert Random().bytes_per_sample(model, batch) is None
