"""Text datasets: IMDb's folders, tables, batches, and what happens to bad data."""

from __future__ import annotations

import csv
import gzip
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from texts import both, preset
from tiny import ROOT

from attrib.datasets import IMDb, TextTable, WordEncoder
from attrib.types import UNREADABLE, SampleError, UserError

ENCODER = WordEncoder(["<unk>", "<pad>", "good", "bad", "film"])
SHARED = ROOT.parent / "shared" / "data"


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def imdb(root: Path) -> Path:
    for split in ("train", "test"):
        write(root / split / "neg" / "3_1.txt", "Bad film<br />")
        write(root / split / "pos" / "0_10.txt", "A good, GOOD film.")
        write(root / split / "pos" / "10_7.txt", "")
    write(root / "test" / "unsup" / "9_0.txt", "neither")
    write(root / "test" / "pos" / ".hidden.txt", "no")
    write(root / "test" / "urls_pos.txt", "no")
    return root


def table(tmp_path: Path, content: str | bytes, name: str = "t.tsv", **fields) -> TextTable:
    return TextTable(str(write(tmp_path / name, content)), **{"encoder": ENCODER, **fields})


# IMDb -------------------------------------------------------------------------------------------


def test_imdb_folders(tmp_path):
    dataset = IMDb(str(imdb(tmp_path)), ENCODER)
    assert dataset.uids == ("test/neg/3_1", "test/pos/0_10", "test/pos/10_7")
    assert (dataset.modality, dataset.names) == ("text", {0: "negative", 1: "positive"})
    assert dataset.text("test/pos/0_10") == "A good, GOOD film."
    batch = dataset.batch(dataset.uids[::-1])
    assert batch.uids == dataset.uids[::-1]
    assert batch.target.tolist() == [1, 1, 0]
    assert batch.x.tolist() == [[0, 1, 1, 1, 1, 1], [0, 2, 0, 2, 4, 0], [3, 4, 1, 1, 1, 1]]
    assert batch.words.tolist() == [[0, *[-1] * 5], [0, 1, 2, 3, 4, 5], [0, 1, *[-1] * 4]]
    assert batch.lengths.tolist() == [1, 6, 2]
    assert {batch.x.dtype, batch.words.dtype, batch.lengths.dtype, batch.target.dtype} == {torch.long}
    assert batch.roi is None
    assert batch.mask.tolist() == [[n > i for i in range(6)] for n in (1, 6, 2)]
    assert dataset.tokens("test/pos/0_10") == ("a", "good", ",", "good", "film", ".")
    assert dataset.box_area("test/pos/0_10") is None
    assert IMDb(str(tmp_path), ENCODER, split="train").uids[0] == "train/neg/3_1"


def test_imdb_layout_is_explained(tmp_path):
    with pytest.raises(UserError, match=r"dataset.root: .*none does not exist"):
        IMDb(str(tmp_path / "none"))
    imdb(tmp_path / "aclImdb")
    with pytest.raises(UserError, match=r"no \*\.txt in .*test/neg; root must be .* aclImdb with \{train,test\}"):
        IMDb(str(tmp_path))
    with pytest.raises(UserError, match=r"no \*\.txt in .*dev/neg"):
        IMDb(str(tmp_path / "aclImdb"), split="dev")


def test_a_bad_file_is_one_bad_sample(tmp_path):
    dataset = IMDb(str(imdb(tmp_path)), ENCODER)
    write(tmp_path / "test" / "neg" / "3_1.txt", "first\nna\xefve".encode("latin-1"))
    (tmp_path / "test" / "pos" / "0_10.txt").unlink()
    with pytest.raises(SampleError, match=r"3_1.txt, line 2: byte 0xef at position 8 is not utf-8; set dataset"):
        dataset.batch(["test/neg/3_1"])
    with pytest.raises(SampleError, match=r"0_10.txt: cannot be read: No such file"):
        dataset.tokens("test/pos/0_10")
    assert [dataset.fingerprint(u) == UNREADABLE for u in dataset.uids] == [True, True, False]
    write(tmp_path / "test" / "pos" / "0_10.txt", "back")
    assert dataset.fingerprint("test/pos/0_10") != UNREADABLE
    assert IMDb(str(tmp_path), encoding="latin-1").text("test/neg/3_1") == "first\nnaïve"
    with pytest.raises(UserError, match=r"dataset.encoding: 'klingon' is not known"):
        IMDb(str(tmp_path), encoding="klingon")


def test_nothing_depends_on_the_place(tmp_path):
    one, two = (IMDb(str(imdb(tmp_path / name)), ENCODER) for name in ("one", "two"))
    assert (one.uids, one.key) == (two.uids, two.key)
    assert [one.fingerprint(u) for u in one.uids] == [two.fingerprint(u) for u in two.uids]
    keys = {one.key, IMDb(str(tmp_path / "one"), ENCODER, "train").key, IMDb(str(tmp_path / "one")).key}
    assert len(keys | {one.with_encoder(WordEncoder(["<unk>", "<pad>"])).key}) == 4


# Every text dataset ------------------------------------------------------------------------------


def test_without_an_encoder_only_texts_can_be_read(tmp_path):
    dataset = IMDb(str(imdb(tmp_path)))
    assert dataset.text("test/neg/3_1") == "Bad film<br />"
    for ask in (dataset.batch, lambda uids: dataset.tokens(uids[0])):
        with pytest.raises(UserError, match=r"dataset\.encoder: without one"):
            ask(dataset.uids)
    other = dataset.with_encoder(ENCODER)
    assert other.batch(["test/neg/3_1"]).x.tolist() == [[3, 4]]
    assert dataset.encoder is None
    with pytest.raises(UserError, match=r"dataset.encoder: .*needs a text model"):
        IMDb(str(tmp_path), {"size": 224, "mean": [0.5]})


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(alphabet="god bafilm.<>", max_size=20), min_size=1, max_size=6))
def test_a_row_does_not_depend_on_its_batch(texts):
    class Given(IMDb):
        def __init__(self):
            super(IMDb, self).__init__([f"{i}" for i in range(len(texts))], ENCODER)

        def text(self, uid):
            return texts[int(uid)]

        def label(self, uid):
            return 0

    dataset = Given()
    together = dataset.batch(dataset.uids)
    assert together.x.shape == together.words.shape == (len(texts), int(together.lengths.max()))
    assert torch.equal(together.x != ENCODER.pad, together.mask)
    for i, uid in enumerate(dataset.uids):
        alone, n = dataset.batch([uid]), int(together.lengths[i])
        assert torch.equal(alone.x[0], together.x[i, :n])
        assert torch.equal(alone.words[0], together.words[i, :n])
        assert len(dataset.tokens(uid)) == n >= 1
        assert (together.x[i, n:] == ENCODER.pad).all()
        assert (together.words[i, n:] == -1).all()


def test_fingerprint_is_of_text_and_label(tmp_path):
    first = table(tmp_path, "text\tlabel\ngood\t1\nbad\t0\n")
    other = table(tmp_path, "text\tlabel\ngood\t0\nbad!\t0\n")
    same = table(tmp_path / "x", "label,text,more\r\n1,good,x\r\n0,bad,y\r\n", "t.csv")
    assert [same.fingerprint(u) for u in same.uids] == [first.fingerprint(u) for u in first.uids]
    assert not {first.fingerprint(u) for u in first.uids} & {other.fingerprint(u) for u in other.uids}


# Tables -----------------------------------------------------------------------------------------


def test_tsv_quotes_are_characters(tmp_path):
    dataset = table(tmp_path, 'text\tlabel\n"good film\t1\n\nit \'s "bad"\t0\nwhat\t\nan\u2028other\r?\t-1\r\n')
    assert dataset.uids == ("t/000002", "t/000004", "t/000005", "t/000006")  # the lines of the file
    assert [dataset.text(u) for u in dataset.uids] == ['"good film', 'it \'s "bad"', "what", "an\u2028other\r?"]
    assert dataset.batch(dataset.uids).target.tolist() == [1, 0, -1, -1]


def test_csv_fields_may_be_quoted(tmp_path):
    content = '\ufeffid,label,text\r\na,pos,"good, ""very"" good\r\nfilm"\r\nb,neg,bad\r\n'
    fields = {"classes": ["neg", "pos"]}
    dataset = table(tmp_path, content, "some.csv", **fields)
    assert dataset.uids == ("some/000002", "some/000004")
    assert dataset.text("some/000002") == 'good, "very" good\r\nfilm'
    assert dataset.batch(dataset.uids).target.tolist() == [1, 0]
    assert dataset.names == {0: "neg", 1: "pos"}
    named = table(tmp_path, content, "some.csv", id="id", **fields)
    assert named.uids == ("some/a", "some/b")
    unlabelled = table(tmp_path, content, "some.csv", label=None)
    assert unlabelled.batch(unlabelled.uids).target.tolist() == [-1, -1]


CELLS = st.text(st.characters(exclude_characters="\0", codec="utf-8"))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(CELLS, st.integers(0, 3)), min_size=1))
def test_what_is_written_as_csv_is_read_back(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("csv") / "t.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows([("text", "label"), *rows])
    dataset = TextTable(str(path))
    found = {(dataset.text(u), dataset.label(u)) for u in dataset.uids}
    assert found == set(rows)
    assert len(dataset.uids) == len(rows)


def test_where_a_table_lies_and_how_it_is_written(tmp_path):
    plain = table(tmp_path, "text;label\ncaf\xe9;1\n".encode("cp1252"), "a.txt", separator=";", encoding="cp1252")
    assert plain.text("a/000002") == "café"
    write(tmp_path / "in" / "b.tsv.gz", gzip.compress(b"label\ttext\n1\tgood\n"))
    dataset = TextTable("{split}.tsv.gz", ENCODER, root=str(tmp_path / "in"), split="b")
    assert dataset.batch(["b/000002"]).x.tolist() == [[2]]
    with pytest.raises(UserError, match=r"dataset\.split: which one"):
        TextTable("{split}.tsv", root=str(tmp_path))
    with pytest.raises(UserError, match=r"dataset\.split: dev has no place in dataset.path=b.tsv"):
        TextTable("b.tsv", root=str(tmp_path), split="dev")


def test_a_record_of_another_width_is_a_bad_sample(tmp_path):
    dataset = table(tmp_path, "label\ttext\n1\tgood\nlost its label\n0\tbad\tfilm\n0\tbad\n")
    bad = ["t/000003", "t/000004"]
    assert [dataset.fingerprint(u) == UNREADABLE for u in dataset.uids] == [u in bad for u in dataset.uids]
    with pytest.raises(SampleError, match=r"t.tsv, line 3: 1 fields instead of 2"):
        dataset.batch(dataset.uids)
    with pytest.raises(SampleError, match=r"t.tsv, line 4: 3 fields instead of 2"):
        dataset.text("t/000004")
    assert [dataset.label(u) for u in bad] == [-1, -1]


@pytest.mark.parametrize(
    ("content", "fields", "message"),
    [
        ("text\tlabel\n", {}, "dataset.path: .*t.tsv has no rows"),
        ("", {}, "t.tsv is empty; its first line must name the columns"),
        ("a\tlabel\nx\t1\n", {}, "dataset.text: .*t.tsv has no column 'text'; it has a, label"),
        ("text\ttext\nx\t1\n", {}, "dataset.text: .*more than one column 'text'"),
        ("text\nx\n", {}, "dataset.label: .*no column 'label'"),
        ("text\tlabel\nx\t1\n", {"id": "name"}, "dataset.id: .*no column 'name'"),
        ("text\tlabel\nx\t1\ny\tpos\n", {}, "line 3: label 'pos' is neither .* give the names as dataset.classes"),
        ("text\tlabel\nx\tape\n", {"classes": ["neg", "pos"]}, "line 2: label 'ape' .*dataset.classes has neg, pos"),
        ("text\tlabel\nx\t2\n", {"classes": ["neg", "pos"]}, "line 2: label 2 is not one of the 2"),
        ("text\tlabel\nx\t-2\n", {}, "line 2: label '-2'"),
        ("text\tlabel\tid\nx\t1\ta\ny\t1\ta\n", {"id": "id"}, "line 3: a second sample with the id a"),
        ("text\tlabel\tid\nx\t1\t\n", {"id": "id"}, "line 2: id '' is empty"),
        ("text\tlabel\tid\nx\t1\t../../x\n", {"id": "id"}, "line 2: id '../../x' is empty or no name"),
        ("text\tlabel\nx\t1\ny\0y\t1\n", {}, "line 3: a NUL character"),
        (b"text\tlabel\nx\t1\n\xff\t1\n", {}, "line 3: byte 0xff .*is not utf-8; set dataset.encoding"),
        ('text\tlabel\nx\t1\n"y\t1\nz\t0\n', {"quoting": True}, "line 3: .*dataset.quoting=false"),
        ('text\tlabel\n"' + "y" * 200_000 + '"\t1\n', {"quoting": True}, "line 2: field larger than field limit"),
        ("text\tlabel\nx\t1\n", {"separator": "::"}, "dataset.separator: one character .*not '::'"),
        ("text\tlabel\nx\t1\n", {"encoding": "rot13"}, "dataset.encoding: 'rot13' is not known"),
    ],
)
def test_what_is_wrong_with_a_table_is_said(tmp_path, content, fields, message):
    with pytest.raises(UserError, match=message):
        table(tmp_path, content, **fields)


def test_a_table_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=r"dataset.path: .*none.tsv cannot be read: .*No such file"):
        TextTable(str(tmp_path / "none.tsv"))
    with pytest.raises(UserError, match=r"dataset.path: .*a.tsv.gz cannot be read"):
        table(tmp_path, gzip.compress(b"text\tlabel\n" * 99)[:-12], "a.tsv.gz")
    with pytest.raises(UserError, match=r"dataset.path: .*b.tsv.gz cannot be read: Not a gzipped file"):
        table(tmp_path, "text\tlabel\n", "b.tsv.gz")
    with pytest.raises(UserError, match=r"dataset.separator: .*c.txt; only .csv and .tsv files need not say which"):
        table(tmp_path, "text\tlabel\n", "c.txt")


# Presets ----------------------------------------------------------------------------------------


def test_preset_of_imdb_folders(tmp_path):
    data, estimation = both(preset("imdb", f"dataset.root={imdb(tmp_path)}"))
    assert data.uids[0] == "test/neg/3_1"
    assert estimation.uids[0] == "train/neg/3_1"
    assert data.batch(data.uids[:1]).x.tolist() == [[0, 0]]


@pytest.mark.parametrize(("name", "files"), [("sst2", "{}.tsv"), ("imdb_table", "{}_2000.tsv.gz")])
def test_presets_of_tables(tmp_path, name, files):
    for split in ("train", "dev", "test"):
        content = f'rating\ttext\tlabel\n9\tgood "{split}\t1\n'.encode()
        write(tmp_path / files.format(split), gzip.compress(content) if "gz" in files else content)
    data, estimation = both(preset(name, f"dataset.root={tmp_path}"))
    assert data.names == {0: "negative", 1: "positive"}
    assert data.text(data.uids[0]) == 'good "test'
    assert estimation.text(estimation.uids[0]) == 'good "train'
    data, _ = both(preset(name, f"dataset.root={tmp_path}", "dataset.split=dev"))
    assert data.text(data.uids[0]) == 'good "dev'


def test_preset_of_own_texts(tmp_path):
    path = write(tmp_path / "own.csv", "title,text,label\nx,good,0\n")
    data, estimation = both(preset("text_csv", f"dataset.path={path}", "dataset.text=title"))
    assert data.text("own/000002") == estimation.text("own/000002") == "x"


# Real files -------------------------------------------------------------------------------------


@pytest.mark.skipif(not (SHARED / "sst2").is_dir(), reason="no SST-2 beside the project")
def test_sst2():
    counts = {"train": (3310, 3610), "dev": (428, 444), "test": (912, 909)}
    for split, expected in counts.items():
        dataset, _ = both(preset("sst2", f"dataset.root={SHARED / 'sst2'}", f"dataset.split={split}"))
        labels = Counter(map(dataset.label, dataset.uids))
        assert (labels[0], labels[1], len(labels)) == (*expected, 2)
        assert all(dataset.fingerprint(u) != UNREADABLE for u in dataset.uids)


@pytest.mark.skipif(not (SHARED / "imdb").is_dir(), reason="no IMDb tables beside the project")
def test_imdb_tables():
    """Some lines of these files lost their label: they are bad samples, and none of the others is."""
    for split, expected in {"train": (968, 971, 57), "test": (945, 1001, 52)}.items():
        dataset, _ = both(preset("imdb_table", f"dataset.root={SHARED / 'imdb'}", f"dataset.split={split}"))
        labels = Counter(map(dataset.label, dataset.uids))
        assert (labels[0], labels[1], labels[-1]) == expected
        unread = [u for u in dataset.uids if dataset.fingerprint(u) == UNREADABLE]
        assert unread == [u for u in dataset.uids if dataset.label(u) == -1]


def test_files_of_the_same_name_in_a_folder_for_each_split(tmp_path):
    for split in ("train", "test"):
        write(tmp_path / split / "reviews.csv", f"text,label\n{split},1\n")
    made = [TextTable("{split}/reviews.csv", ENCODER, root=str(tmp_path), split=split) for split in ("train", "test")]
    assert [d.uids for d in made] == [("train/reviews/000002",), ("test/reviews/000002",)]
    assert TextTable("train/reviews.csv", ENCODER, root=str(tmp_path)).uids == ("reviews/000002",)


# Classes whose names are numbers ----------------------------------------------------------------

STARS = ["1", "2", "3", "4", "5"]


def test_a_number_that_is_a_name_is_read_as_a_name(tmp_path):
    dataset = table(tmp_path, "text\tlabel\na\t1\nb\t5\nc\t\nd\t2.0\n", classes=STARS)
    assert [dataset.label(u) for u in dataset.uids] == [0, 4, -1, 1]


def test_names_that_are_numbers_and_indices_in_one_column_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"line 4: label '0' .* '1' \(.*line 2\) is the name of class 0"):
        table(tmp_path, "text\tlabel\na\t1\nb\t4\nc\t0\n", classes=STARS)
    digits = [str(i) for i in range(3)]
    same = table(tmp_path, "text\tlabel\na\t1\nb\tlast\nc\t3\n", "s.tsv", classes=[*digits, "last"])
    assert [same.label(u) for u in same.uids] == [1, 3, 3]
