"""Samples: read ahead in order, a bad one costs the others nothing, targets are resolved."""

from __future__ import annotations

import dataclasses
import gc
import threading
import time
from collections.abc import Sequence

import pytest
import torch
from tiny import pictures, quickly
from torch import nn

from attrib.datasets import ImageDataset
from attrib.experiment import reading
from attrib.experiment.reading import Kept, Reader, can_be_kept
from attrib.experiment.samples import Samples, parse_device
from attrib.models import Classifier
from attrib.types import Batch, SampleError, UserError

UIDS = tuple("abcdefghij")


class Data:
    """Sample i is the vector (i, 1) of class i % 3; some are damaged or unlabelled."""

    uids, key, modality = UIDS, "data", "image"

    def __init__(self, bad: dict[str, Exception] | None = None, unlabelled: Sequence[str] = ()) -> None:
        self.bad, self.unlabelled = bad or {}, unlabelled
        self.asked: list[tuple[str, ...]] = []

    def batch(self, uids: Sequence[str]) -> Batch:
        self.asked.append(tuple(uids))
        for uid in uids:
            if uid in self.bad:
                raise self.bad[uid]
        rows = [UIDS.index(u) for u in uids]
        target = [-1 if u in self.unlabelled else r % 3 for u, r in zip(uids, rows)]
        return Batch(tuple(uids), torch.tensor([[float(r), 1.0] for r in rows]), torch.tensor(target))


def classifier(dtype: torch.dtype = torch.float64) -> Classifier:
    """Predicts class 2 for samples 0 to 4 and class 0 behind them."""
    net = nn.Linear(2, 3)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[1.0, -4.5], [0.0, -100.0], [-1.0, 4.5]]))
        net.bias.zero_()
    return Classifier(net, dtype=dtype)


def samples(data: Data, target: str = "label", batch: int = 3, uids: Sequence[str] = UIDS) -> Samples:
    return Samples(data, classifier(), uids, target=target, batch=batch)


def threads() -> int:
    return sum(t.name.startswith(("attrib-batches", "attrib-parts")) for t in threading.enumerate())


# Batches ----------------------------------------------------------------------------------------


def test_order_and_sizes():
    for size in (1, 3, 10, 99):
        found = list(samples(Data(), batch=size))
        assert [u for b in found for u in b.uids] == list(UIDS)
        assert max(len(b) for b in found) == min(size, 10)
        assert torch.cat([b.x for b in found])[:, 0].tolist() == list(range(10))
        assert all(b.x.dtype == torch.float64 for b in found)
    assert list(samples(Data(), uids=())) == []


def test_results_keep_their_order_when_reading_takes_unequally_long():
    class Slow(Data):
        def batch(self, uids):
            time.sleep(0.03 if uids[0] in "aei" else 0)
            return super().batch(uids)

    assert [b.uids[0] for b in samples(Slow(), batch=1)] == list(UIDS)


def test_reads_two_ahead_and_no_more(monkeypatch):
    monkeypatch.setattr(reading, "readers", lambda: 2)
    data = Data()
    stream = samples(data, batch=1).load([(u,) for u in UIDS])
    for done in range(1, 11):
        next(stream)
        time.sleep(0.01)
        assert len(data.asked) <= min(10, done + 2)
    assert list(stream) == []


@pytest.mark.parametrize("size", [1, 5, 9, 64, 99])
def test_as_many_threads_as_cores(monkeypatch, size):
    """Whatever the size of a batch, all threads read at once; batches are what one thread would give."""
    monkeypatch.setattr(reading, "readers", lambda: 6)
    busy, most = [], []

    class Large(Data):
        def batch(self, uids):
            busy.append(1)
            most.append(len(busy))
            time.sleep(0.02)
            busy.pop()
            rows = [int(uid) for uid in uids]
            return Batch(tuple(uids), torch.tensor(rows)[:, None] / 1, torch.tensor(rows) % 3)

    uids = [str(i) for i in range(120)]
    found = list(samples(Large(), target=None, batch=size, uids=uids))
    assert [uid for b in found for uid in b.uids] == uids
    assert torch.cat([b.x for b in found])[:, 0].tolist() == list(range(120))
    assert {len(b) for b in found[:-1]} <= {size}
    assert 6 <= max(most) <= 7  # a last batch that is small is read beside the parts of those before it
    gc.collect()
    assert threads() == 0


def test_bad_samples_among_the_parts_of_a_batch(monkeypatch):
    monkeypatch.setattr(reading, "PIECE", 3)
    data = Data({"b": OSError("gone"), **dict.fromkeys("def", SampleError("bad"))})
    ((batch, bad),) = samples(data, batch=99).load([UIDS])
    assert batch.uids == tuple("acghij")
    assert [uid for uid, _ in bad] == list("bdef")


def test_a_dataset_that_pads_its_batches_is_asked_for_the_whole(monkeypatch):
    monkeypatch.setattr(reading, "PIECE", 3)

    class Sounds(Data):
        def batch(self, uids):
            longest = max(UIDS.index(uid) for uid in uids) + 1
            return Batch(tuple(uids), torch.ones(len(uids), 1, longest), torch.zeros(len(uids)).long())

    ((batch, _),) = samples(Sounds(), target=None, batch=99).load([UIDS])
    assert batch.x.shape == (10, 1, 10)


def test_batches_behind_one_another():
    x, target = torch.rand(5, 2), torch.arange(5)
    whole = Batch(UIDS[:5], x, target, roi=x > 0.5)
    again = Batch.joined([whole[:2], whole[[2]], whole[3:]])
    assert again.uids == whole.uids
    assert all(torch.equal(getattr(again, name), getattr(whole, name)) for name in ("x", "target", "roi"))
    with pytest.raises(ValueError, match="lack a field"):
        Batch.joined([whole[:2], dataclasses.replace(whole[2:], roi=None)])
    with pytest.raises(RuntimeError):
        Batch.joined([whole, dataclasses.replace(whole, x=torch.rand(5, 3))])


def test_a_region_that_some_parts_lack_is_the_datasets_business(monkeypatch):
    monkeypatch.setattr(reading, "PIECE", 5)

    class Boxed(Data):
        """Against the protocol: without any box in it a batch has no regions at all."""

        def batch(self, uids):
            batch, inside = super().batch(uids), torch.tensor([[uid < "c"] for uid in uids])
            return dataclasses.replace(batch, roi=inside) if inside.any() else batch

    ((batch, _),) = samples(Boxed(), batch=99).load([UIDS])
    assert batch.roi[:, 0].tolist() == [True] * 2 + [False] * 8


def test_a_user_error_does_not_wait_for_what_hangs(monkeypatch):
    monkeypatch.setattr(reading, "PIECE", 5)
    monkeypatch.setattr(reading, "PATIENCE", 0.1)
    back = threading.Event()

    class Hanging(Data):
        def batch(self, uids):
            if "j" in uids:
                back.wait(20)
            raise UserError("dataset.root is wrong")

    start = time.monotonic()
    with pytest.raises(UserError):
        next(samples(Hanging(), batch=99).load([UIDS]))
    assert time.monotonic() - start < 10
    back.set()
    deadline = time.monotonic() + 5
    while threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threads() == 0


def test_large_batches_are_not_read_far_ahead(monkeypatch):
    monkeypatch.setattr(reading, "readers", lambda: 8)
    data = Data()
    for room, far in ((3 * data.batch("a").bytes, 3), (2**30, 8)):
        monkeypatch.setattr(reading, "ROOM", room)
        data.asked.clear()
        stream = samples(data, batch=1).load([(u,) for u in UIDS])
        next(stream)
        next(stream)
        time.sleep(0.1)
        assert len(data.asked) <= 2 + far
        stream.close()


# Kept images ------------------------------------------------------------------------------------


def test_what_was_read_is_not_read_again():
    data = Data({"b": SampleError("bad")})
    first, second = (Reader(data, kept=kept) for kept in [Kept(10**6)] * 2)
    assert first.read("abc")[0].uids == ("a", "c")
    asked = len(data.asked)
    batch, bad = second.read("edcba")
    assert batch.uids == tuple("edca")
    assert [uid for uid, _ in bad] == ["b"]
    assert batch.x[:, 0].tolist() == [4, 3, 2, 0]
    assert batch.target.tolist() == [1, 0, 2, 0]
    assert not {"a", "c"} & {uid for uids in data.asked[asked:] for uid in uids}
    batch.x.zero_()  # whoever changes it changes a copy
    assert second.batch("a").x.tolist() == [[0, 1]]
    assert second.batch("ed").x.tolist() == [[4, 1], [3, 1]]
    second.batch("e").x.zero_()
    assert second.batch("e").x.tolist() == [[4, 1]]


def test_only_so_many_are_kept():
    data = Data()
    row = data.batch("a").bytes
    reader = Reader(data, kept=Kept(3 * row + 1))
    assert reader.batch("abcd").uids == reader.batch("abcd").uids == tuple("abcd")
    assert data.asked[-1] == ("d",)
    assert reader.batch("e").uids == reader.batch("e").uids == ("e",)
    assert data.asked[-2:] == [("e",)] * 2


def test_what_is_kept_is_what_a_batch_would_be():
    """Padding depends on the batch, and so do fields that some samples lack: the dataset is asked anew."""

    class Padded(Data):
        def batch(self, uids):
            longest = max(UIDS.index(uid) for uid in uids) + 1
            return Batch(tuple(uids), torch.ones(len(uids), 1, longest), torch.zeros(len(uids)).long())

    assert not can_be_kept(Padded())
    assert Reader(Padded(), kept=Kept(10**6)).batch("ac").x.shape == (2, 1, 3)


def test_a_run_reads_each_image_once(tmp_path, monkeypatch, capfd):
    """For its maps and for the metrics that look at it; not for those that need its region alone."""
    read = []
    row = ImageDataset._row
    monkeypatch.setattr(ImageDataset, "_row", lambda self, uid: read.append(uid) or row(self, uid))
    run, images, found = quickly(capfd), pictures(tmp_path), []
    for metrics in ("[]", "[ehr,insertion_deletion,road]"):
        read.clear()
        made = run(
            "dataset=tiny", "model=small_cnn", "method=random", f"metric={metrics}", "run.batch=2",
            f"dataset.root={images}", f"run.root={tmp_path / metrics[:2]}", "run.progress=false",
        )  # fmt: skip
        assert made.status == 0, made.err
        found.append(len(read))
    assert found[1] <= found[0]


def test_wrong_settings():
    with pytest.raises(UserError, match=r"dataset\.target must be label, predicted or second.*, not 'truth'"):
        samples(Data(), target="truth")
    with pytest.raises(UserError, match=r"run\.batch must be at least 1, not 0"):
        samples(Data(), batch=0)


# Bad samples ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, 10])
@pytest.mark.parametrize("error", [SampleError("bad file"), OSError("gone"), KeyError("x"), MemoryError()])
def test_a_bad_sample_costs_the_others_nothing(size, error):
    data = Data({"b": error, "j": error})
    stream = samples(data, batch=size)
    loaded = list(stream.load(stream.chunks()))
    assert [u for b, _ in loaded if b for u in b.uids] == [u for u in UIDS if u not in "bj"]
    assert [bad for _, bad in loaded for bad in bad] == [(u, f"{type(error).__name__}: {error}") for u in ("b", "j")]
    assert [u for b in stream for u in b.uids] == [u for u in UIDS if u not in "bj"]


def test_a_chunk_of_bad_samples_only():
    data = Data(dict.fromkeys("abc", SampleError("bad")))
    batch, bad = next(samples(data).load([tuple("abc")]))
    assert batch is None
    assert [u for u, _ in bad] == list("abc")


def test_a_user_error_stops_the_run():
    stream = samples(Data({"e": UserError("dataset.root is wrong")}))
    with pytest.raises(UserError, match=r"dataset\.root is wrong"):
        list(stream)
    assert threads() == 0


def test_samples_that_do_not_stack():
    class Ragged(Data):
        def batch(self, uids):
            batches = [super(Ragged, self).batch([u]) for u in uids]
            return Batch(
                tuple(uids), torch.stack([b.x[0, : 1 + (u == "b")] for b, u in zip(batches, uids)]), batches[0].target
            )

    with pytest.raises(UserError, match=r"a to c can be read one by one, but not as a batch .* try run\.batch=1"):
        list(samples(Ragged()))


def test_unlabelled_samples_are_named_and_read_once():
    data = Data(unlabelled="ad")
    stream = samples(data)
    loaded = list(stream.load(stream.chunks()))
    assert [u for b, _ in loaded if b for u in b.uids] == [u for u in UIDS if u not in "ad"]
    reasons = dict(bad for _, bad in loaded for bad in bad)
    assert sorted(reasons) == ["a", "d"]
    assert all("has no label" in r and "dataset.target=predicted" in r for r in reasons.values())
    assert len(data.asked) == 4
    with pytest.raises(SampleError, match="d has no label"):
        stream.batch(["c", "d"])


def test_unlabelled_beside_unreadable():
    stream = samples(Data({"b": OSError("gone")}, unlabelled="a"))
    batch, bad = next(stream.load([tuple("abc")]))
    assert batch.uids == ("c",)
    assert [u for u, _ in bad] == ["b", "a"]


def test_closed_early():
    """No thread goes on reading, whether the consumer breaks, fails or closes."""
    data = Data()
    stream = samples(data, batch=1)
    for _ in stream:
        break
    gc.collect()
    assert threads() == 0
    generator = stream.load(stream.chunks())
    next(generator)
    generator.close()
    assert threads() == 0
    assert len(data.asked) <= 2 * 4


# Targets ----------------------------------------------------------------------------------------


def test_label_and_predicted():
    assert [t for b in samples(Data()) for t in b.target.tolist()] == [i % 3 for i in range(10)]
    predicted = samples(Data(unlabelled=UIDS), "predicted")
    assert [t for b in predicted for t in b.target.tolist()] == [2] * 5 + [0] * 5
    assert predicted.batch(["j", "a"]).target.tolist() == [0, 2]


def test_multi_label_targets():
    class Multi(Data):
        def batch(self, uids):
            batch = super().batch(uids)
            rows = torch.tensor([[1, 0, -1 if u in self.unlabelled else 1] for u in uids])
            return Batch(batch.uids, batch.x, rows)

    loaded = list(samples(Multi(unlabelled="c"), batch=5).load([UIDS[:5]]))
    assert loaded[0][0].uids == tuple("abde")
    assert [u for u, _ in loaded[0][1]] == ["c"]


def test_confidence():
    data = Data({"b": SampleError("bad")}, unlabelled="c")
    stream = samples(data)
    found = stream.confidence(("a", "b", "c", "d", "e"))
    assert list(found) == ["a", "d", "e"]
    logits = stream.model.logits(torch.tensor([[0.0, 1.0], [3.0, 1.0], [4.0, 1.0]], dtype=torch.float64))
    expected = logits.softmax(1)[[0, 1, 2], [0, 0, 1]].tolist()
    assert list(found.values()) == pytest.approx(expected)
    sure = samples(data, "predicted").confidence(UIDS)
    assert len(sure) == 9
    assert min(sure.values()) > 0.49
    assert stream.confidence(()) == {}


def test_a_label_outside_the_models_classes_costs_that_sample_only():
    stream = Samples(Data(), Classifier(nn.Linear(2, 2)), UIDS, batch=4)
    with pytest.raises(SampleError, match="c has class 2, but the model has 2 classes"):
        stream.batch(UIDS)
    assert [uid for batch in stream for uid in batch.uids] == [u for u in UIDS if u not in "cfi"]
    assert list(stream.skipped) == ["c", "f", "i"]


def test_why_a_sample_has_no_label():
    data = Data(unlabelled="a")
    data.label_problems = {"a": "labels.csv has no row for a.png"}
    with pytest.raises(
        SampleError, match=r"a has no label \(labels.csv has no row for a.png\); explain the model's own"
    ):
        samples(data).batch(("a",))


def test_targets_left_alone():
    """For work that needs none: also unlabelled samples come, with the dataset's own target."""
    data = Data(unlabelled=("b",))
    batch = Samples(data, Classifier(nn.Linear(2, 2)), UIDS, target=None).batch(UIDS)
    assert torch.equal(batch.target, data.batch(UIDS).target)


def test_what_iterating_skips_is_said(caplog):
    samples = Samples(Data({"d": OSError("gone")}), Classifier(nn.Linear(2, 3)), UIDS, batch=3)
    assert [uid for batch in samples for uid in batch.uids] == [u for u in UIDS if u != "d"]
    assert samples.skipped == {"d": "OSError: gone"}
    assert "d is left out of the estimation" in caplog.text


# Devices ----------------------------------------------------------------------------------------


def test_parse_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert parse_device("auto") == parse_device("cpu") == torch.device("cpu")
    for name in ("cuda", "cuda:0", "cuda:1"):
        with pytest.raises(UserError, match=rf"run.device={name}: this machine has 0 CUDA devices .* run.device=cpu"):
            parse_device(name)
    for name in ("gpu", "", "cuda:x", "cpu0"):
        with pytest.raises(UserError, match=rf"run.device={name}: not a device; try auto"):
            parse_device(name)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert parse_device("auto") == parse_device("cuda") == torch.device("cuda")
    assert parse_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(UserError, match="this machine has 2 CUDA devices"):
        parse_device("cuda:2")


def test_parse_device_mps(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError, match="no MPS on this machine"):
        parse_device("mps")
