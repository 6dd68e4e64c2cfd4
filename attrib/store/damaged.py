"""A chunk of maps that turns out to be damaged: what is good in it is written anew, the rest counts as missing."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attrib.errors import UserError
from attrib.store.cell import Arrays
from attrib.store.files import Key

log = logging.getLogger(__name__)

DAMAGED = ".damaged"  # folder of the work directory to which damaged files are moved; nobody reads it


def put_aside(path: Path, root: Path) -> None:
    """Move a file of the work directory to ``<root>/.damaged/``, unless somebody else has."""
    place = root / DAMAGED / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}" / path.relative_to(root)
    place.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        os.rename(path, place)


def recover(maps: Arrays, path: Path, root: Path) -> dict[Key, Mapping[str, Any]]:
    """Write the good samples of the chunk ``path`` anew and move it to ``<root>/.damaged/``.

    Returns those that are lost, with what was noted beside them (target, seconds).

    The copies are durable before the chunk goes, and carry what was noted beside the samples. Nothing is moved for a
    chunk that is gone (another process has been here). Raises UserError if the disk does not take the copies.
    """
    held = {key: record for key, record in maps.index().items() if record.path == path}
    if os.path.lexists(path):
        for key, record in held.items():
            with contextlib.suppress(OSError):
                maps.add(*key, maps.read(key), **record.info)
        try:
            maps.flush()
            put_aside(path, root)
        except OSError as error:  # of the disk; the sample that is asked for must not be blamed
            raise UserError(f"{path} is damaged, and what is good in it cannot be written anew: {error}") from error
    maps.forget(path.name)
    there = maps.index()
    lost = {key: record.info for key, record in held.items() if key not in there}
    log.warning("%s is damaged or gone: %d of its %d samples are computed again", path, len(lost), len(held))
    return lost
