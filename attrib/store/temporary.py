"""Names of files that are being written, and which of them nobody writes any more.

A file is written under a hidden name that says who writes it: the machine (its boot and its space of process numbers),
the process and when that began. So on the same machine a dead writer is known at once, and a live one is never
mistaken for it. Of another machine's file only the file itself gives signs of life: every write sets its time.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import secrets
import time
from pathlib import Path

ELSEWHERE = 3600.0  # seconds without a write after which another machine's file is dead; files are written in seconds
TEMPORARY = re.compile(
    r"\..+\.(?:(?P<machine>[0-9a-f]{8})-(?P<pid>\d+)-(?P<start>\d+)-[0-9a-f]{6}|(?:\d+-)?[0-9a-f]{8,16})\.tmp"
)  # the second form is that of earlier versions


def identity(pid: int | str = "self") -> str | None:
    """What tells a process of this machine from every other: boot, namespace of process numbers, number, start.

    A number alone comes again, and containers of one machine have the same numbers. None where there is no such
    process, or no /proc.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        space = os.readlink("/proc/self/ns/pid")
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        number = os.getpid() if pid == "self" else int(pid)
    except (OSError, ValueError):
        return None
    if fields[0] in "ZX":
        return None  # dead, and nobody has asked for its exit status
    return f"{boot} {space} {number} {fields[19]}"


@functools.lru_cache(maxsize=1)
def _own(pid: int) -> str:
    """Machine, number and start of this process, which ``pid`` is: a fork is another one."""
    said = identity()
    if said is None:
        return f"{'0' * 8}-{pid}-0"
    boot, space, number, start = said.split()
    return f"{hashlib.sha256(f'{boot} {space}'.encode()).hexdigest()[:8]}-{number}-{start}"


def temporary(path: Path) -> Path:
    """A name beside ``path`` that no other writer has, for what becomes ``path`` when it is whole."""
    return path.with_name(f".{path.name}.{_own(os.getpid())}-{secrets.token_hex(3)}.tmp")


def is_dead(name: str, age: float) -> bool:
    """Whether nobody writes the file of this name any more; ``age``: seconds since the last write."""
    found = TEMPORARY.fullmatch(name)
    if found is None:
        return False
    machine, _, start = _own(os.getpid()).split("-")
    if found["machine"] != machine or start == "0":
        return age > ELSEWHERE
    said = identity(int(found["pid"]))
    return said is None or said.split()[3] != found["start"]


def sweep(folder: Path, *, deep: bool = True, now: float | None = None) -> int:
    """Remove what dead writers left in a folder and, if ``deep``, below it; returns how many files that were.

    now   the file server's time, this machine's if None
    Nothing depends on it, so what cannot be listed or removed stays. Links are not followed.
    """
    removed, now = 0, time.time() if now is None else now
    for place, folders, files in os.walk(folder):
        for name in files:
            if name.endswith(".tmp"):
                path = os.path.join(place, name)
                with contextlib.suppress(OSError):
                    if is_dead(name, now - os.lstat(path).st_mtime):
                        os.unlink(path)
                        removed += 1
        if not deep:
            folders.clear()
    return removed
