"""Fingerprints of samples in files, without reading every file at every start.

A fingerprint is made of bytes, and fifty thousand images take minutes to read. What it was is remembered below
``<root>/state/fingerprints/`` under everything that it depends on: the kind of dataset, label and boxes, and for each
file its absolute path, size and both times of change. A file whose content changes gets another time, also where
somebody restores the first of the two (``touch``, ``cp -p``): the second one cannot be set. A file that was changed
less than two seconds before it was read is not remembered, because a second change within a tick of the clock would
not show. What can be missed is a change on a file system without the second time, to the same size and first time.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TypeGuard

import pyarrow as pa

import attrib
from attrib.datasets import Dataset
from attrib.datasets.files import InFiles
from attrib.datasets.protocols import Files
from attrib.store.files import write_atomic
from attrib.store.listing import Stamp, pack, settled, stamp_of, unpack
from attrib.store.reading import LISTING, content
from attrib.types import UNREADABLE

log = logging.getLogger(__name__)

SUFFIX = ".cache"
VERSION = 2  # of how fingerprints are made: raise it, and every file is read again
READERS = 8  # files at once: a file server answers many as fast as one
MOST = 64  # files of memories, before they are put together

_SCHEMA = pa.schema([("key", pa.binary(16)), ("fingerprint", pa.string())])


class Fingerprints:
    """What was remembered, and what is found meanwhile.

    Each writer adds a file of its own, so several may do so at once; without a name nothing is written.
    """

    def __init__(self, root: Path, writer: str = "") -> None:
        self.folder, self.writer = Path(root) / "state" / "fingerprints", writer
        self._known: dict[bytes, str] | None = None
        self._files: list[Path] = []  # that were read
        self._new: dict[bytes, str] = {}

    def of(self, dataset: Dataset, uids: Sequence[str]) -> dict[str, str]:
        """What ``dataset.fingerprint`` says of each; the dataset itself knows it then, too."""
        if not _names_its_files(dataset):
            return {uid: dataset.fingerprint(uid) for uid in uids}
        known = self._known = self._read() if self._known is None else self._known
        missing = []
        for uid in uids:
            if uid in dataset.fingerprints:
                continue  # this process has read it; what became of the file since then is the next one's business
            value = known.get(_key(dataset, uid, _stamps(dataset, uid)))
            if value is None:
                missing.append(uid)
            else:
                dataset.fingerprints[uid] = value
        pool = ThreadPoolExecutor(READERS)
        try:
            for key, value in pool.map(lambda uid: _found(dataset, uid), missing):
                if key is not None:
                    known[key] = self._new[key] = value
        except BaseException:  # told to stop
            self.save()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
        return {uid: dataset.fingerprint(uid) for uid in uids}

    def save(self) -> None:
        """Nothing depends on it, so a full or read-only disk does no harm."""
        if not self._new or not self.writer:
            return
        together = len(self._files) >= MOST
        entries = self._known or {} if together else self._new
        columns = [pa.array(list(entries), pa.binary(16)), pa.array(list(entries.values()), pa.string())]
        path = self.folder / f"{self.writer}-{secrets.token_hex(2)}{SUFFIX}"
        try:
            write_atomic(path, pack([pa.Table.from_arrays(columns, schema=_SCHEMA)]))
            for old in self._files if together else ():
                old.unlink(missing_ok=True)
        except OSError as error:
            log.info("%s is not written: %s", path, error)
        self._new = {}

    def _read(self) -> dict[bytes, str]:
        known: dict[bytes, str] = {}
        for path in sorted(self.folder.glob(f"[!.]*{SUFFIX}")):
            try:
                (table,) = unpack(content(path, LISTING), [_SCHEMA])
            except FileNotFoundError:
                continue  # somebody has put the files together
            except (OSError, ValueError, pa.ArrowException) as error:
                log.info("%s is not used: %s", path, error)
                continue
            self._files.append(path)
            known |= zip(table["key"].to_pylist(), table["fingerprint"].to_pylist(), strict=True)
        return known


def _names_its_files(dataset: Dataset) -> TypeGuard[Files]:
    """A subclass may read other files, so it must say itself which."""
    return isinstance(dataset, InFiles) and "sources" in vars(type(dataset))


def _stamps(dataset: Files, uid: str) -> list[tuple[str, Stamp | None]]:
    """Absolute path and stamp of each file, None where there is none."""
    found: list[tuple[str, Stamp | None]] = []
    for path in dataset.sources(uid):
        stamp = None
        with suppress(OSError):
            stamp = stamp_of(path)
        found.append((path, stamp))
    return found


def _key(dataset: Files, uid: str, stamps: list[tuple[str, Stamp | None]]) -> bytes:
    kind = type(dataset)
    parts = VERSION, attrib.__version__, kind.__module__, kind.__qualname__, dataset.described(uid), stamps
    return hashlib.blake2b(repr(parts).encode(errors="surrogatepass"), digest_size=16).digest()


def _found(dataset: Files, uid: str) -> tuple[bytes | None, str]:
    """The fingerprint, read, and what to remember it under; None if it must not be."""
    now, before = time.time_ns(), _stamps(dataset, uid)
    value = dataset.fingerprint(uid)
    sure = all(stamp is None or settled(stamp, now) for _, stamp in before) and before == _stamps(dataset, uid)
    return _key(dataset, uid, before) if sure and value != UNREADABLE else None, value
