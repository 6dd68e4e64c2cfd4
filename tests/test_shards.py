"""Images in shards: tar archives of WebDataset, Parquet and Arrow tables of Hugging Face."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tiny import command, only_cell, pixels

from attrib.datasets import ArrowShards, ImageFolder, ImageTransform, ParquetShards, TarShards
from attrib.store import listing
from attrib.types import UNREADABLE, SampleError, UserError

SMALL = ImageTransform(16)


def png(seed: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels(seed=seed)).save(stream, "PNG")
    return stream.getvalue()


def write_tar(path: Path, members: Mapping[str, bytes] | list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items() if isinstance(members, Mapping) else members:
            about = tarfile.TarInfo(name)
            about.size = len(content)
            archive.addfile(about, io.BytesIO(content))
    return path


def web(root: Path) -> Path:
    for shard in (0, 1):
        members = {}
        for i in (2 * shard, 2 * shard + 1):
            members |= {f"n0144/{i:06d}.png": png(i), f"n0144/{i:06d}.cls": str(i).encode()}
        write_tar(root / f"imagenet-val-{shard:06d}.tar", members)
    return root


FEATURES = {"image": {"_type": "Image"}, "label": {"names": ["ape", "bee", "cat", "dog"], "_type": "ClassLabel"}}


def table(numbers, paths=True) -> pa.Table:
    images = [{"bytes": png(i), "path": f"ILSVRC_val_{i:06d}.JPEG" if paths else None} for i in numbers]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    made = pa.table({"image": pa.array(images, kind), "label": pa.array(list(numbers), pa.int64())})
    return made.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": FEATURES}})})


def parquet(root: Path) -> Path:
    (root / "data").mkdir(parents=True)
    for shard, numbers in enumerate(((0, 1, 2), (3,))):
        pq.write_table(table(numbers), root / "data" / f"validation-{shard:05d}-of-00002.parquet", row_group_size=2)
    return root


def arrow(root: Path) -> Path:
    root.mkdir(parents=True)
    made = table((0, 1, 2, 3))
    with pa.OSFile(str(root / "data-00000-of-00001.arrow"), "wb") as sink, pa.ipc.new_stream(sink, made.schema) as out:
        out.write_table(made, max_chunksize=3)
    (root / "state.json").write_text("{}")
    return root


def folder(root: Path) -> ImageFolder:
    """The same images in files of their own."""
    (root / "flat").mkdir()
    for i in range(4):
        (root / "flat" / f"{i}.png").write_bytes(png(i))
    (root / "labels.csv").write_text("file,label\n" + "".join(f"{i}.png,{i}\n" for i in range(4)))
    return ImageFolder(str(root / "flat"), SMALL, labels=str(root / "labels.csv"))


KINDS = {"tar": (web, TarShards), "parquet": (parquet, ParquetShards), "arrow": (arrow, ArrowShards)}


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_samples_as_from_single_files(kind, tmp_path):
    """Pixels, labels and fingerprints, in any order."""
    write, build = KINDS[kind]
    made, plain = build(str(write(tmp_path / "shards")), SMALL), folder(tmp_path)
    names = "n0144/{:06d}" if kind == "tar" else "ILSVRC_val_{:06d}"
    assert made.uids == tuple(names.format(i) for i in range(4))
    order = [3, 0, 2, 1]
    ours, theirs = made.batch([made.uids[i] for i in order]), plain.batch([plain.uids[i] for i in order])
    assert torch.equal(ours.x, theirs.x)
    assert torch.equal(ours.target, theirs.target)
    assert [made.fingerprint(u) for u in made.uids] == [plain.fingerprint(u) for u in plain.uids]
    assert np.array_equal(made.picture(made.uids[1]), plain.picture(plain.uids[1]))
    assert made.names == ({} if kind == "tar" else dict(enumerate(("ape", "bee", "cat", "dog"))))


@pytest.mark.parametrize("kind", KINDS)
def test_the_index_is_remembered_until_its_shard_changes(kind, tmp_path, monkeypatch):
    write, build = KINDS[kind]
    root, work = write(tmp_path / "shards"), str(tmp_path / "work")
    monkeypatch.setattr(listing, "RACY", 0)
    scanned: list[str] = []
    scan = build.scan
    monkeypatch.setattr(build, "scan", lambda self, shard: (scanned.append(shard.name), scan(self, shard))[1])
    first = build(str(root), SMALL, index=work)
    shards = sorted(p.name for p in root.rglob(f"*.{'tar' if kind == 'tar' else kind}"))
    assert sorted(scanned) == shards
    assert len(list((tmp_path / "work" / "state" / "fingerprints" / "shards").iterdir())) == len(shards)
    prints = {u: first.fingerprint(u) for u in first.uids}
    monkeypatch.setattr(build, "read", lambda *a: pytest.fail("an image is read"))
    again = build(str(root), SMALL, index=work)
    assert sorted(scanned) == shards, "nothing is read again"
    assert {u: again.fingerprint(u) for u in again.uids} == prints
    assert again.key == first.key
    touched = next(root.rglob(shards[0]))
    touched.write_bytes(touched.read_bytes())
    build(str(root), SMALL, index=work)
    assert scanned[len(shards) :] == [shards[0]], "only what has changed"
    for memory in (tmp_path / "work" / "state" / "fingerprints" / "shards").iterdir():
        memory.write_bytes(b"damaged")
    assert build(str(root), SMALL, index=work).uids == first.uids
    assert build(str(root), SMALL).uids == first.uids, "no work directory, no memory"


def test_a_shard_that_has_just_been_written_is_not_remembered(tmp_path):
    TarShards(str(web(tmp_path / "shards")), SMALL, index=str(tmp_path / "work"))
    assert not (tmp_path / "work").exists()


def test_splits(tmp_path):
    parquet(tmp_path)
    pq.write_table(table((7, 8)), tmp_path / "data" / "train-00000-of-00001.parquet")
    with pytest.raises(UserError, match=r"dataset\.split: which one\? .* holds shards of train, validation"):
        ParquetShards(str(tmp_path), SMALL)
    assert len(ParquetShards(str(tmp_path), SMALL, split="train").uids) == 2
    assert len(ParquetShards(str(tmp_path), SMALL, split="validation").uids) == 4
    with pytest.raises(UserError, match="no shards of test, only of train, validation"):
        ParquetShards(str(tmp_path), SMALL, split="test")
    web(tmp_path / "tars")
    assert len(TarShards(str(tmp_path / "tars"), SMALL, split="val").uids) == 4
    with pytest.raises(UserError, match=r"holds no \*\.arrow"):
        ArrowShards(str(tmp_path), SMALL)
    one = tmp_path / "data" / "train-00000-of-00001.parquet"
    assert len(ParquetShards(str(one), SMALL).uids) == 2


def test_a_split_is_the_one_that_is_meant(tmp_path):
    for name in ("train-0", "train-extra-0", "test-0", "imagenet-val-0", "imagenet-val-1"):
        write_tar(tmp_path / f"{name}.tar", {f"{name}.png": png(0), f"{name}.cls": b"1"})

    def found(split: str | None) -> list[str]:
        return list(TarShards(str(tmp_path), SMALL, split=split).uids)

    assert found("train") == ["train-0"], "named so, not only beginning so"
    assert found("extra") == found("train-extra") == found("train-e") == ["train-extra-0"]
    assert found("val") == found("imagenet") == ["imagenet-val-0", "imagenet-val-1"]
    assert len(found("*")) == 5
    with pytest.raises(UserError, match=r"t may be test or train or train-extra; give the whole name"):
        found("t")


def test_shards_of_the_same_name_in_folders_of_several_splits(tmp_path):
    for i, folder in enumerate(("train", "test", "00", "01")):
        write_tar(tmp_path / "a" / folder / "data-0.tar", {f"{i}.png": png(i), f"{i}.cls": b"1"})
    root = tmp_path / "a"
    with pytest.raises(
        UserError, match=r"which one\? .* holds shards of data, test/data, train/data; .*'\*' takes all"
    ):
        TarShards(str(root), SMALL)
    assert TarShards(str(root), SMALL, split="test").uids == ("1",)
    with pytest.raises(UserError, match=r"holds several sets of data: data, test/data, train/data; name one's folder"):
        TarShards(str(root), SMALL, split="data")
    shutil.rmtree(root / "train")
    shutil.rmtree(root / "test")
    assert TarShards(str(root), SMALL).uids == ("2", "3"), "numbered folders are of one set"


def test_what_datasets_caches_is_no_shard(tmp_path):
    root = arrow(tmp_path / "data")
    shutil.copy(root / "data-00000-of-00001.arrow", root / "cache-1f00.arrow")
    assert len(ArrowShards(str(root), SMALL).uids) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_names_of_shards_and_images_that_are_not_utf8(kind, tmp_path):
    write, read = KINDS[kind]
    written = write(tmp_path / "data")
    shards = sorted(written.rglob(f"*{read.SUFFIX}"))
    for i, shard in enumerate(shards):
        shard.rename(shard.parent / os.fsdecode(b"caf\xe9-%d" % i + read.SUFFIX.encode()))
    dataset = read(str(written), SMALL)
    assert torch.equal(dataset.batch(dataset.uids).x, folder(tmp_path).batch(["0", "1", "2", "3"]).x)
    assert all(rf"caf\xe9-0{read.SUFFIX}" in dataset.file(uid) for uid in dataset.uids[:2])


def test_texts_in_a_table_that_are_not_utf8(tmp_path):
    """Nothing checks what others write into a column of texts."""

    def texts(*values: bytes) -> pa.Array:
        made = pa.array(values, pa.binary())
        return pa.StringArray.from_buffers(len(made), made.buffers()[1], made.buffers()[2])

    images = pa.StructArray.from_arrays(
        [pa.array([png(0), png(1)]), texts(b"caf\xe9.png", b"b.png")], ["bytes", "path"]
    )
    pq.write_table(pa.table({"image": images, "label": texts(b"\xe9", b"ape")}), tmp_path / "a.parquet")
    dataset = ParquetShards(str(tmp_path), SMALL)
    assert dataset.uids == ("b", r"caf\xe9")
    assert [dataset.names[dataset.label(uid)] for uid in dataset.uids] == ["ape", r"\xe9"]


def test_labels_that_are_no_whole_numbers(tmp_path):
    def made(labels: pa.Array) -> ParquetShards:
        pq.write_table(
            pa.table({"image": [png(i) for i in range(len(labels))], "label": labels}), tmp_path / "a.parquet"
        )
        return ParquetShards(str(tmp_path), SMALL)

    gaps = made(pa.array([3.0, None, float("nan"), 1.5]))
    assert [gaps.label(uid) for uid in gaps.uids] == [3, -1, -1, -1]
    with pytest.raises(SampleError, match=r"its label is 1\.5, not one class; dataset\.label=null reads none"):
        gaps.batch(["a/000003"])
    for wrong in (pa.array([True, False]), pa.array([[1], [2]])):
        with pytest.raises(UserError, match="not one class"):
            made(wrong)
    coded = made(pa.array(["bee", "ape", "bee"]).dictionary_encode())
    assert [coded.names[coded.label(uid)] for uid in coded.uids] == ["bee", "ape", "bee"]
    pq.write_table(pa.table({"image": ["a.png"], "label": [1]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="its image is a str, not the bytes of an encoded image"):
        ParquetShards(str(tmp_path), SMALL)


def test_names_that_repeat_get_their_shard_in_front(tmp_path):
    for shard in ("a-0", "a-1"):
        write_tar(tmp_path / f"{shard}.tar", {"0.png": png(1), "0.cls": b"1"})
    assert TarShards(str(tmp_path), SMALL).uids == ("a-0/0", "a-1/0")
    pq.write_table(table((4, 5), paths=False), tmp_path / "test-00000-of-00001.parquet")
    found = ParquetShards(str(tmp_path), SMALL)
    assert found.uids == ("test-00000-of-00001/000000", "test-00000-of-00001/000001")
    assert found.names[3] == "dog"


# WebDataset -------------------------------------------------------------------------------------


def test_where_a_label_may_stand(tmp_path):
    (tmp_path / "classes.csv").write_text("label,wnid,name\n0,n1,ape\n1,n2,bee\n")
    members = {
        "./n2/a.JPG": png(0), "n2/a.cls": b"bee\n", "n2/a.json": b'{"label": 1, "other": {"x": 1}}',
        "n2/a.seg.png": png(1), "n2/a.txt": b"a bee",
    }  # fmt: skip
    write_tar(tmp_path / "x.tar", members)
    for label, expected in (("cls", 1), ("json.label", 1), ("folder", 1), (None, -1)):
        dataset = TarShards(str(tmp_path), SMALL, label=label, classes=str(tmp_path / "classes.csv"))
        assert dataset.batch(["n2/a"]).target.tolist() == [expected]
    segmentation = TarShards(str(tmp_path), SMALL, label=None, image="seg.png")
    assert segmentation.fingerprint("n2/a") != dataset.fingerprint("n2/a")
    assert segmentation.key != dataset.key
    with pytest.raises(UserError, match=r"no sample of .*x\.tar has a label by 'lab'; .*: \.jpg, \.cls, \.json, \.seg"):
        TarShards(str(tmp_path), SMALL, label="lab")
    with pytest.raises(UserError, match=r"dataset\.classes: with dataset\.label=folder"):
        TarShards(str(tmp_path), SMALL, label="folder")


def test_bad_members_cost_their_samples_only(tmp_path, caplog):
    members = [
        ("good.png", png(0)), ("good.cls", b"1"),
        ("two.png", png(0)), ("two.jpg", png(1)), ("two.cls", b"1"),
        ("none.cls", b"1"),
        ("twice.png", png(0)), ("twice.cls", b"1"), ("twice.png", png(3)),
        ("broken.png", png(0)[:50]), ("broken.cls", b"1"),
        ("unlabelled.png", png(0)),
        ("wrong.png", png(0)), ("wrong.cls", b"ape"),
        ("latin.png", png(0)), ("latin.cls", b"\xe9"),
    ]  # fmt: skip
    write_tar(tmp_path / "x.tar", members)
    dataset = TarShards(str(tmp_path), SMALL)
    for uid, reason in {
        "two": "has 2 images among png, jpg, cls; dataset.image says which",
        "none": "has no image among cls",
        "twice": r"twice has two members \.png",
        "broken": r"x\.tar: broken: ",
        "latin": "its label cannot be read: 'utf-8' codec",
    }.items():
        with pytest.raises(SampleError, match=reason):
            dataset.batch([uid])
    assert dataset.fingerprint("two") == UNREADABLE
    assert dataset.batch(["good", "unlabelled", "wrong"]).target.tolist() == [1, -1, -1]
    assert dataset.label_problems == {"wrong": "its label 'ape' is neither a class index nor a known name"}
    assert "4 of 8 samples cannot be used" in caplog.text


@pytest.mark.parametrize("cut", ["in a member", "in a header", "between members", "before its end"])
def test_a_truncated_tar_is_one_failure_and_what_is_whole_goes_on(tmp_path, cut):
    path = write_tar(
        tmp_path / "a-0.tar", {f"{i}.{e}": c for i in range(3) for e, c in (("png", png(i)), ("cls", b"1"))}
    )
    write_tar(tmp_path / "a-1.tar", {"9.png": png(9), "9.cls": b"1"})
    with tarfile.open(path) as archive:
        at = {m.name: (m.offset, m.offset_data, m.size) for m in archive}
    whole, content = path.stat().st_size, path.read_bytes()
    length = {
        "in a member": at["2.png"][1] + 40,
        "in a header": at["2.png"][0] + 100,
        "between members": at["2.png"][0],
        "before its end": at["2.cls"][1] + 512,
    }[cut]
    assert length < whole
    path.write_bytes(content[:length])
    dataset = TarShards(str(tmp_path), SMALL)
    good = {"0", "1", "9", *(("2",) if cut == "before its end" else ())}
    bad = set(dataset.uids) - good
    assert bad == {"a-0.tar", *(("2",) if cut == "in a member" else ())}
    assert dataset.batch(sorted(good)).x.shape[0] == len(good)
    for uid in bad:
        with pytest.raises(SampleError, match="cut short"):
            dataset.batch([uid])


def test_a_packed_tar_is_refused(tmp_path):
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz"):
        pass
    with pytest.raises(UserError, match=r"holds no \*\.tar; a\.tar\.gz is packed, and must be unpacked"):
        TarShards(str(tmp_path), SMALL)
    (tmp_path / "a.tar.gz").rename(tmp_path / "a.tar")
    with pytest.raises(UserError, match=r"a\.tar is packed by gzip"):
        TarShards(str(tmp_path), SMALL)


def test_names_in_a_tar_lead_nowhere_and_may_be_any_bytes(tmp_path):
    write_tar(tmp_path / "x.tar", {"../../etc/caf\udce9.png": png(0), "../../etc/caf\udce9.cls": b"1"})
    assert TarShards(str(tmp_path), SMALL).uids == (r"../../etc/caf\xe9",)


def test_classes_whose_names_are_numbers(tmp_path):
    """A number in a table is an index; text may be a name, and is refused where it could be both."""
    names = {str(i): str((i + 1) % 4) for i in range(4)}  # class 0 is called "1"
    (tmp_path / "classes.json").write_text(json.dumps(names))
    parquet(tmp_path / "a")
    numbers = ParquetShards(str(tmp_path / "a"), SMALL, classes=str(tmp_path / "classes.json"))
    assert [numbers.label(u) for u in numbers.uids] == [0, 1, 2, 3]
    write_tar(tmp_path / "b.tar", {"0.png": png(0), "0.cls": b"1", "1.png": png(1), "1.json": b'{"label": 1}'})
    with pytest.raises(UserError, match="no sample of"):
        TarShards(str(tmp_path / "b.tar"), SMALL, classes=str(tmp_path / "classes.json"))
    made = TarShards(str(tmp_path / "b.tar"), SMALL, label="json.label", classes=str(tmp_path / "classes.json"))
    assert [made.label(u) for u in made.uids] == [-1, 1]


def test_what_was_read_badly_is_not_remembered(tmp_path, monkeypatch):
    """A file server that fails once must not cost the samples for ever."""
    monkeypatch.setattr(listing, "RACY", 0)
    root, work = str(web(tmp_path / "shards")), str(tmp_path / "work")
    scan = TarShards.scan

    def failing(self, shard):
        yield next(scan(self, shard))
        if shard.name.endswith("1.tar"):
            raise OSError("the server is gone")
        yield from list(scan(self, shard))[1:]

    with monkeypatch.context() as patch:
        patch.setattr(TarShards, "scan", failing)
        assert len(TarShards(root, SMALL, index=work).uids) == 2 + 1 + 1
    assert len(TarShards(root, SMALL, index=work).uids) == 4


# Hugging Face -----------------------------------------------------------------------------------


def test_bad_rows_and_shards_cost_what_they_hold(tmp_path):
    parquet(tmp_path)
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = [
        {"bytes": None, "path": "x/a.jpg"},
        None,
        {"bytes": b"junk", "path": "b.jpg"},
        {"bytes": png(5), "path": "c"},
    ]
    pq.write_table(
        pa.table({"image": pa.array(images, kind), "label": pa.array([0, 1, 2, 9])}),
        tmp_path / "data" / "validation-00002-of-00002.parquet",
    )
    cut = tmp_path / "data" / "validation-00001-of-00002.parquet"
    cut.write_bytes(cut.read_bytes()[:-30])
    dataset = ParquetShards(str(tmp_path), SMALL)
    assert len(dataset.uids) == 3 + 1 + 4
    stem = "validation-00002-of-00002"
    for uid, reason in {
        "validation-00001-of-00002.parquet": "damaged or cut short after 0 images",
        "x/a": r"its image is a path without bytes \(x/a\.jpg\)",
        "b": "not an image that Pillow knows",
    }.items():
        (name,) = (u for u in dataset.uids if u.endswith(uid))
        with pytest.raises(SampleError, match=reason):
            dataset.batch([name])
    (empty,) = (u for u in dataset.uids if u == f"{stem}/000001")
    with pytest.raises(SampleError, match="row 1 of group 0: its image is empty"):
        dataset.batch([empty])
    (unknown,) = (u for u in dataset.uids if u.endswith("/c"))
    assert "label 9 is not one of the 4 classes" in dataset.label_problems[unknown]


def test_wrong_columns_say_which_there_are(tmp_path):
    parquet(tmp_path)
    with pytest.raises(UserError, match=r"dataset\.image: .* has no column 'img'; it has image, label"):
        ParquetShards(str(tmp_path), SMALL, image="img")
    with pytest.raises(UserError, match=r"dataset\.label: .* has no column 'fine'; it has image, label"):
        ParquetShards(str(tmp_path), SMALL, label="fine")
    assert ParquetShards(str(tmp_path), SMALL, label=None).batch(["ILSVRC_val_000000"]).target.tolist() == [-1]


def test_nothing_usable_is_an_error(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not a table")
    with pytest.raises(UserError, match=r"no image in .* can be used: .*a\.parquet: damaged or cut short"):
        ParquetShards(str(tmp_path), SMALL)


def test_a_row_group_is_read_once_for_its_neighbours(tmp_path, monkeypatch):
    dataset = ParquetShards(str(parquet(tmp_path)), SMALL)
    read, groups = pq.ParquetFile.read_row_group, []
    monkeypatch.setattr(
        pq.ParquetFile, "read_row_group", lambda self, i, **k: (groups.append(i), read(self, i, **k))[1]
    )
    for uid in dataset.uids * 2:
        dataset.image(uid)
    assert len(groups) <= 6
    dataset.batch(dataset.uids[:2])
    assert len(groups) <= 7


# A run ------------------------------------------------------------------------------------------


def test_a_run_on_shards_with_a_truncated_one(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(listing, "RACY", 0)
    web(tmp_path / "shards")
    cut = tmp_path / "shards" / "imagenet-val-000001.tar"
    cut.write_bytes(cut.read_bytes()[:1700])
    run = command(capfd)
    arguments = (
        "dataset=webdataset", f"dataset.root={tmp_path / 'shards'}", "model=small_cnn", "method=random", "metric=[]",
        f"run.root={tmp_path / 'work'}", "run.progress=false",
    )  # fmt: skip
    result = run(*arguments)
    assert "maps_computed=2" in result.out, result.err
    cell = only_cell(tmp_path / "work")
    assert {e["uid"] for e in cell.ledger.entries()} >= {"imagenet-val-000001.tar"}
    assert list((tmp_path / "work" / "state" / "fingerprints" / "shards").glob("*.cache"))
    scanned, scan = [], TarShards.scan
    monkeypatch.setattr(TarShards, "scan", lambda self, shard: (scanned.append(shard.name), scan(self, shard))[1])
    assert "maps_present=2" in run(*arguments).out
    assert scanned == ["imagenet-val-000001.tar"], "the whole one is remembered, the damaged one may have got better"
