"""Movie review snippets with human ratings: texts for a machine that has nothing but pip."""

from __future__ import annotations

import hashlib
import io
import re
import sys
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

from attrib.datasets.text import SENTIMENT, TextDataset
from attrib.datasets.tokens import Encoder
from attrib.keys import stable_hash
from attrib.types import UserError

ARCHIVE = "vaderSentiment-3.3.2.tar.gz"
COMMAND = "pip download --no-deps --no-binary :all: vaderSentiment==3.3.2 -d data"
INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
FILE = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
SHA256 = "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350"
LIMIT = 64 << 20  # bytes that an archive may unpack to; the two hold 3 and 6 million


class _Snippet(NamedTuple):
    text: str
    rating: float


def find_archive(archive: str | None) -> Path:
    """``archive``, else ``data/`` here or ``share/attrib/`` of this Python's environment. Raises UserError."""
    places = [Path("data") / ARCHIVE, Path(sys.prefix) / "share" / "attrib" / ARCHIVE]
    if archive is not None:
        places = [Path(archive).expanduser()]
    for place in places:
        if place.is_file():
            return place
    raise UserError(f"dataset.archive: there is no {' or '.join(map(str, places))}; get it: {COMMAND}")


def _member(stream: BinaryIO, name: str) -> bytes:
    """A file of a .tar.gz, in memory. Raises ValueError if it is not there, or if the archive unpacks to too much."""
    total = 0
    with tarfile.open(fileobj=stream, mode="r:gz") as tar:
        for member in tar:
            total += member.size
            if total > LIMIT:
                raise ValueError(f"it unpacks to more than {LIMIT >> 20} MiB")
            found = tar.extractfile(member) if member.name == name and member.isreg() else None
            if found is not None:
                return found.read()
    raise ValueError(f"there is no {name} in it")


def read_snippets(path: Path) -> dict[str, _Snippet]:
    """id -> text and mean rating from -4 (negative) to 4, all 10,605. Raises UserError naming the archive."""
    try:
        with open(path, "rb") as file:
            content = _member(io.BytesIO(_member(file, INNER)), FILE)
    except (OSError, EOFError, zlib.error, tarfile.TarError, ValueError) as error:
        raise UserError(f"dataset.archive: {path} is not {ARCHIVE}, or damaged ({error}); {COMMAND}") from error
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise UserError(f"dataset.archive: {FILE} in {path} is not the known one (SHA-256 differs); {COMMAND}")
    return dict(_parse(content.decode("utf-8")))


def _parse(content: str) -> Iterator[tuple[str, _Snippet]]:
    for line in filter(None, content.split("\n")):
        number, rating, text = line.split("\t")
        yield number.zfill(5), _Snippet(text.strip(), float(rating))


def words_of(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def split_of(text: str) -> str:
    """80 % train, 10 % val, 10 % test. The words alone decide, so that a text that occurs twice is in one part."""
    fold = stable_hash(words_of(text)) % 10
    return ("test", "val")[fold] if fold < 2 else "train"


class MovieSnippets(TextDataset):
    """Sentences from Rotten Tomatoes, rated by 20 people each (Hutto and Gilbert, ICWSM 2014): 0 negative, 1 positive.

    They come with the source package of vaderSentiment 3.3.2 (MIT), which is read and never installed:
    ``pip download --no-deps --no-binary :all: vaderSentiment==3.3.2 -d data``.

    min_rating  texts whose mean rating is nearer to 0 than this, or 0, are left out; at 1.0 there are 9,173
    archive     None looks in ``data/`` and in ``share/attrib/`` of the environment

    Most sentences of SST-2 are here too, so never train on one and test on the other.

    Raises UserError naming the archive and the command that fetches it.
    """

    def __init__(
        self,
        encoder: Encoder | None = None,
        split: Literal["train", "val", "test"] = "test",
        min_rating: float = 1.0,
        archive: str | None = None,
    ) -> None:
        if split not in ("train", "val", "test"):
            raise UserError(f"dataset.split must be train, val or test, not {split!r}")
        if not 0 <= min_rating <= 3:
            raise UserError(f"dataset.min_rating must be between 0 and 3, not {min_rating}")
        self._snippets = {
            f"{split}/{number}": snippet
            for number, snippet in read_snippets(find_archive(archive)).items()
            if snippet.rating and abs(snippet.rating) >= min_rating and split_of(snippet.text) == split
        }
        super().__init__(self._snippets, encoder, SENTIMENT, about=(split, min_rating))

    def text(self, uid: str) -> str:
        return self._snippets[uid].text

    def label(self, uid: str) -> int:
        return int(self._snippets[uid].rating > 0)

    def rating(self, uid: str) -> float:
        """Mean of the people's ratings, from -4 to 4."""
        return self._snippets[uid].rating
