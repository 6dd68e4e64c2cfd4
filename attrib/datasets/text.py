"""What all text datasets share, and IMDb in its own folders."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch

from attrib.classes import Numbering
from attrib.datasets.audio import WaveTransform
from attrib.datasets.files import existing_folder, note, shown, uids_of
from attrib.datasets.tokens import Encoded, Encoder
from attrib.keys import digest, short_name
from attrib.store.reading import content
from attrib.types import UNREADABLE, Batch, SampleError, UserError

SENTIMENT = {0: "negative", 1: "positive"}


def check_encoding(encoding: str) -> None:
    """Raises UserError for a name that is not one of Python's text encodings."""
    try:
        "a".encode(encoding)
    except (LookupError, ValueError) as error:
        raise UserError(f"dataset.encoding: {encoding!r} is not known; for example utf-8, latin-1 or cp1252") from error


def decode(data: bytes, encoding: str, where: str) -> str:
    """The text, without a byte order mark. Raises SampleError that begins with ``where`` and names line and byte."""
    try:
        return data.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise SampleError(
            f"{where}, line {line}: byte 0x{data[error.start]:02x} at position {error.start} is not {encoding}; "
            "set dataset.encoding if the file has another one, for example latin-1"
        ) from error


class TextDataset(ABC):
    """Texts by name. A subclass says what a sample's text and label are.

    names  class index -> class name, where known
    about  what else determines the samples, such as the split; it is part of the key

    Without an encoder the texts and labels can be read, as training does to build a vocabulary, but no batches.
    """

    modality = "text"

    def __init__(
        self, uids: Iterable[str], encoder: Encoder | None, names: Mapping[int, str] | None = None, about: Any = None
    ) -> None:
        if isinstance(encoder, Mapping | WaveTransform):
            raise UserError(
                "dataset.encoder: the chosen model does not say how texts become ids (its input is not an encoder); "
                "this dataset needs a text model"
            )
        self.uids = tuple(sorted(uids))
        self.encoder = encoder
        self.names = dict(names or {})
        self.numbering: Numbering = "given"  # see ``attrib.classes``
        self._about = about
        self._fingerprints: dict[str, str] = {}

    @abstractmethod
    def text(self, uid: str) -> str:
        """The whole text as it is stored. Raises SampleError naming the file."""

    @abstractmethod
    def label(self, uid: str) -> int:
        """Class index, -1 where unknown."""

    @property
    def key(self) -> str:
        return digest(short_name(type(self)), self._about, self.encoder.key if self.encoder else None)

    def with_encoder(self, encoder: Encoder) -> Self:
        """The same samples for another network."""
        other = copy.copy(self)
        other.encoder = encoder
        return other

    def _encoded(self, uid: str) -> Encoded:
        encoder, text = self._need(), self.text(uid)
        if type(self).fingerprint is TextDataset.fingerprint:
            note(self._fingerprints, uid, digest(text, self.label(uid))[:16], uid)
        return encoder.encode(text)

    def _need(self) -> Encoder:
        if self.encoder is None:
            raise UserError("dataset.encoder: without one, texts have no ids; text models have one (model.input)")
        return self.encoder

    def tokens(self, uid: str) -> tuple[str, ...]:
        """One for each of the sample's ids in ``batch``. Raises like ``batch``."""
        return tuple(self._encoded(uid).tokens)

    def fingerprint(self, uid: str) -> str:
        if uid not in self._fingerprints:
            try:
                self._fingerprints[uid] = digest(self.text(uid), self.label(uid))[:16]
            except SampleError:
                return UNREADABLE  # not remembered: the file server may come back
        return self._fingerprints[uid]

    def batch(self, uids: Sequence[str]) -> Batch:
        """x (B, T) padded to the longest of these texts, lengths (B,), words (B, T).

        Raises SampleError naming the file if a text cannot be read, UserError without an encoder.
        """
        pad, rows = self._need().pad, [self._encoded(uid) for uid in uids]
        lengths = [len(row.ids) for row in rows]
        longest = max(lengths, default=0)
        return Batch(
            uids=tuple(uids),
            x=torch.tensor([row.ids + [pad] * (longest - n) for row, n in zip(rows, lengths)], dtype=torch.long),
            target=torch.tensor([self.label(uid) for uid in uids], dtype=torch.long),
            lengths=torch.tensor(lengths, dtype=torch.long),
            words=torch.tensor([row.words + [-1] * (longest - n) for row, n in zip(rows, lengths)], dtype=torch.long),
        )

    def box_area(self, uid: str) -> float | None:
        return None


class IMDb(TextDataset):
    """Reviews in the folders of Maas et al. (2011): ``aclImdb/{train,test}/{neg,pos}/<id>_<rating>.txt``.

    root   the folder aclImdb
    split  "train" or "test"

    A uid is ``test/pos/0_10``. ``unsup`` is not read. Raises UserError that says which folders are expected.
    """

    def __init__(self, root: str, encoder: Encoder | None = None, split: str = "test", encoding: str = "utf-8") -> None:
        check_encoding(encoding)
        self._root, self._encoding = existing_folder(root, "dataset.root"), encoding
        labels: dict[str, int] = {}
        self._files: dict[str, Path] = {}
        for label, folder in enumerate(("neg", "pos")):
            files = sorted((self._root / split / folder).glob("[!.]*.txt"))
            if not files:
                raise UserError(
                    f"dataset.root: no *.txt in {self._root / split / folder}; root must be IMDb's folder "
                    "aclImdb with {train,test}/{neg,pos}/*.txt (data/README.md)"
                )
            uids = uids_of([file.name for file in files])
            labels |= {f"{split}/{folder}/{uid}": label for uid in uids}
            self._files |= {f"{split}/{folder}/{uid}": self._root / split / folder / name for uid, name in uids.items()}
        self._labels = labels
        super().__init__(labels, encoder, SENTIMENT, about=split)

    def _file(self, uid: str) -> Path:
        return self._files[uid]

    def text(self, uid: str) -> str:
        try:
            data = content(self._file(uid))
        except OSError as error:
            raise SampleError(f"{shown(str(self._file(uid)))}: cannot be read: {error.strerror}") from error
        return decode(data, self._encoding, shown(str(self._file(uid))))

    def label(self, uid: str) -> int:
        return self._labels[uid]
