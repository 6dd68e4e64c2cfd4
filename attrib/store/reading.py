"""The one door through which everything that lies in a work directory is read.

Files there are untrusted: a disk flips bits, a kill tears lines, people put things in odd places. So only regular files
are opened (a FIFO would wait for ever), no larger than they can sensibly be, and JSON must have the types that
``attrib.store.schemas`` declares, no deeper than its readers can follow. Whatever does not fit raises
:class:`UnreadableError`, which names file and reason. Tools collect these lines, show the rest, and say what they left
out.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any, TypeVar

import msgspec

T = TypeVar("T")

DOCUMENT = 64 * 2**20  # bytes of one description: spec, metric, progress and the like
LISTING = 2**31  # bytes of a file that grows with the samples: samples.json, a ledger, an index
DEPTH = 64  # of JSON; what attrib writes is about ten deep


class UnreadableError(OSError):
    """A file is there, but is not what belongs in its place."""


def regular(path: str | os.PathLike[str]) -> os.stat_result:
    """What ``stat`` says of a regular file. Raises UnreadableError for anything else, OSError if it cannot be found."""
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise UnreadableError(f"{os.fspath(path)}: not a regular file")
    return found


def content(path: Path, most: int = DOCUMENT) -> bytes:
    """A file's bytes. Raises FileNotFoundError where there is none, UnreadableError if it is larger than ``most``."""
    size = regular(path).st_size
    if size > most:
        raise UnreadableError(f"{path}: {size / 1e6:.0f} MB, but at most {most / 1e6:.0f} MB belong there")
    with open(path, "rb") as file:
        return file.read(most)


def document(path: Path, kind: type[T], most: int = DOCUMENT) -> T:
    """A JSON file as ``kind``. Raises FileNotFoundError if it is not there, UnreadableError if it is something else."""
    data = content(path, most)
    try:
        return parsed(data, kind)
    except ValueError as error:
        raise UnreadableError(f"{path}: {error}") from error


def parsed(data: str | bytes, kind: type[T]) -> T:
    """JSON as ``kind``; numbers and objects that ``kind`` does not declare are left out. Raises ValueError.

    The standard parser, because msgspec's own takes neither NaN nor names of files that are no UTF-8, both of which
    work directories hold.
    """
    try:
        value = json.loads(data)
        check_depth(value)
        return msgspec.convert(value, kind)
    except RecursionError:
        raise ValueError(f"nested more than {DEPTH} deep") from None
    except msgspec.ValidationError as error:
        raise ValueError(str(error)) from error


def fits(value: Any, kind: type) -> None:
    """Raises ValueError unless ``value``, which was parsed, has the types of ``kind``; it may hold more."""
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise ValueError(str(error)) from error


def check_depth(value: Any) -> None:
    """Raises ValueError if lists and objects are nested more than ``DEPTH`` deep."""
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(DEPTH):
        if not level:
            return
        level = [
            below
            for one in level
            for below in (one.values() if isinstance(one, dict) else one)
            if isinstance(below, (dict, list))
        ]
    raise ValueError(f"nested more than {DEPTH} deep")


def line(path: Path, error: Exception) -> str:
    return f"{path}: {reason(path, error)}"


def reason(path: Path, error: Exception) -> str:
    """What an error says, without the file."""
    return str(error).removeprefix(f"{path}: ")
