"""Writing whole files, and gathering samples until they are worth a file."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import quote

from attrib.store.temporary import temporary

Key = tuple[str, str]  # (uid, fingerprint)

_LONGEST = 200  # characters of a part of a path; a suffix and a temporary name need room too


def writer_name(shard: int = 0) -> str:
    """A name that no other writer has: time, process, shard, and something random, as clocks and numbers repeat."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-{shard}-{secrets.token_hex(2)}"


def write_atomic(path: Path, data: bytes | Sequence[bytes | memoryview]) -> None:
    """Write a whole file, of bytes or of parts, or nothing, also when the machine dies in between."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = temporary(path)
    try:
        write_synced(unfinished, data)
        os.replace(unfinished, path)
    except BaseException:
        with contextlib.suppress(OSError):  # then the next run removes it
            unfinished.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_synced(path: Path, data: bytes | Sequence[bytes | memoryview]) -> None:
    with open(path, "wb") as file:
        file.writelines([data] if isinstance(data, bytes) else data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable: a file's own fsync does not. Where folders cannot be synced, they are not."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def picture_path(folder: Path, uid: str, suffix: str = ".png") -> Path:
    """A uid as a path below ``folder``: uids come from data, so nothing in them may lead out of it.

    File systems allow names of 255 bytes. Of a longer one, a digest stands for what is cut off, so that no two uids
    share a path.
    """
    parts = [quote(part, safe=" ,+=@()", errors="surrogateescape") for part in uid.split("/")]
    parts = [part.replace(".", "%2E") if set(part) <= {"."} else part for part in parts]
    parts = [part if len(part) <= _LONGEST else _shortened(part) for part in parts]
    return folder.joinpath(*parts[:-1], f"{parts[-1]}{suffix}")


def _shortened(part: str) -> str:
    return f"{part[: _LONGEST - 17]}~{hashlib.sha256(part.encode()).hexdigest()[:16]}"


KEY8 = re.compile(r"[0-9a-f]{8}")


def key8(folder: Path) -> str:
    """The beginning of a cell's key, with which the name of its folder ends; "" if somebody has renamed it."""
    end = folder.name.rpartition(".")[2]
    return end if KEY8.fullmatch(end) else ""


def owner(folder: Path) -> str:
    """Whose the files of a folder of a cell are, such as ``9605142c/maps``; "" where the folder's place does not say.

    It stands in the files: one that lies in another cell's folder, or among another metric's scores, is not read.
    """
    key = key8(folder.parent.parent if folder.parent.name == "scores" else folder.parent)
    return key and f"{key}/{folder.name}"


def check_owner(said: str | None, path: Path) -> None:
    """Raises ValueError for a file that says it is another folder's; earlier versions wrote nothing."""
    mine = owner(path.parent)
    if said and mine and said != mine:
        raise ValueError(f"was written for {said}, not for {mine}")


class Buffered:
    """Samples gathered in memory until there are enough of them, or enough seconds passed.

    A fast method therefore writes few files, and a slow one (more than ``seconds`` a sample)
    flushes after each sample. With ``background`` a thread writes while the next samples are gathered.
    ``before`` is called before each file and may refuse it.
    """

    SUFFIX: ClassVar[str]
    MOST: ClassVar[int] = 64 * 2**20  # bytes of arrays that wait to be written

    def __init__(
        self,
        folder: Path,
        writer: str,
        *,
        seconds: float,
        count: int,
        background: bool = False,
        before: Callable[[], None] = lambda: None,
    ) -> None:
        self.folder, self.writer = Path(folder), writer
        self._seconds, self._count, self._background = seconds, count, background
        self._before = before
        self._pending: dict[Key, Any] = {}
        self._bytes = 0
        self._writing: dict[Key, Any] = {}  # what the thread writes
        self._pool: ThreadPoolExecutor | None = None
        self._job: Future[None] | None = None
        self._since = time.monotonic()
        self._number = 0
        self.broken: list[str] = []  # files that could not be read; their samples count as missing

    @property
    def unwritten(self) -> int:
        """Samples that were added and are not durable yet."""
        return len(self._pending) + len(self._writing)

    def _add(self, key: Key, value: Any, size: int = 0) -> None:
        self._pending[key] = value
        self._bytes += size

    def flush_if_due(self) -> bool:
        """Called between batches, when all parts of a sample have been added."""
        due = len(self._pending) >= self._count or time.monotonic() - self._since >= self._seconds
        if not (due or self._bytes >= self.MOST) or not self._pending:
            return False
        if not self._background:
            self.flush()
            return True
        self._finish()
        self._pool = self._pool or ThreadPoolExecutor(1)
        self._writing, self._pending, self._bytes = self._pending, {}, 0
        self._job = self._pool.submit(self._write, self._writing)
        self._since = time.monotonic()
        return True

    def flush(self) -> None:
        """Make everything added so far durable."""
        self._finish()
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None
        if self._pending:
            self._write(self._pending)
            self._pending, self._bytes = {}, 0
        self._since = time.monotonic()

    def _finish(self) -> None:
        """Wait for the thread. Raises what it raised; its samples then wait to be written again."""
        if self._job is None:
            return
        try:
            self._job.result()
        except Exception:
            self._pending = self._writing | self._pending
            raise
        finally:
            if self._job.done():  # else the waiting was interrupted
                self._job, self._writing = None, {}

    def _write(self, samples: Mapping[Key, Any]) -> None:
        self._before()
        write_atomic(self._next(), self._encoded(samples))

    def _next(self) -> Path:
        """A name that is not taken, also not by an earlier object of the same writer."""
        while True:
            self._number += 1
            path = self.folder / f"{self.writer}-{self._number:05d}{self.SUFFIX}"
            if not path.exists():
                return path

    def _encoded(self, samples: Mapping[Key, Any]) -> bytes | Sequence[bytes | memoryview]:
        """Samples as the content of one file, or the parts of it."""
        raise NotImplementedError
