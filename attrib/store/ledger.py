"""The failure ledger of a cell."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

from attrib.store.reading import LISTING, content, parsed
from attrib.store.schemas import Entry


class Ledger:
    """What could not be computed, and why: a history, nothing is ever taken out of it.

    Each writer appends to a file of its own, ``failures/<writer>.jsonl`` (without a name, ``failures.jsonl``),
    because file servers lose lines where two machines append to one file. ``before``: see ``Buffered``.
    """

    MAX_REASON = 1500  # keeps a line below the size that one write() delivers whole
    FIELDS = ("uid", "fingerprint", "stage", "reason")

    def __init__(self, folder: Path, writer: str = "", before: Callable[[], None] = lambda: None) -> None:
        self.folder, self._before = Path(folder), before
        self.path = self.folder / (f"failures/{writer}.jsonl" if writer else "failures.jsonl")
        self._known: set[tuple[str, str, str, str]] | None = None
        self.broken: list[str] = []  # what could not be read when the entries were last asked for

    def add(self, uid: str, fingerprint: str, stage: str, reason: str) -> None:
        """``stage`` is "load", "maps" or the metric's folder of scores, ``<name>.<key8>``.

        What the ledger said already when this object first wrote is not said again.
        """
        if self._known is None:
            self._known = {(e["uid"], e["fingerprint"], e["stage"], e["reason"]) for e in self.entries()}
        fields = (uid, fingerprint, stage, reason[: self.MAX_REASON])
        if fields in self._known:
            return
        self._before()
        self._known.add(fields)
        entry = {**dict(zip(self.FIELDS, fields, strict=True)), "time": time.time()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # The leading newline ends a line that a killed writer left unfinished.
        line = ("\n" + json.dumps(entry) + "\n").encode()
        handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(handle, line)
            os.fsync(handle)
        finally:
            os.close(handle)

    @property
    def files(self) -> list[Path]:
        """Those of all writers."""
        first = self.folder / "failures.jsonl"
        return [*([first] if os.path.lexists(first) else []), *sorted(self.folder.glob("failures/[!.]*.jsonl"))]

    def entries(self) -> list[Entry]:
        """What all writers noted, in the order of time; files and lines that are none are left out, see ``broken``."""
        found: list[Entry] = []
        self.broken = []
        for path in self.files:
            entries, problem = read_ledger(path)
            found += entries
            self.broken += [f"{path}: {problem}"] if problem else []
        return sorted(found, key=lambda entry: entry["time"])


def read_ledger(path: Path) -> tuple[list[Entry], str]:
    """The entries of one file, and what is wrong with it ("": nothing). A line that a kill cut off is no mistake."""
    try:
        lines = content(path, LISTING).split(b"\n")
    except FileNotFoundError:
        return [], ""
    except OSError as error:
        return [], str(error).removeprefix(f"{path}: ")
    found, odd, why = [], 0, ""
    for line in lines:
        try:
            if line.strip():
                found.append(parsed(line, Entry))
        except ValueError as error:
            if _torn(line):
                continue
            odd, why = odd + 1, why or f"{line[:80].decode(errors='replace')}: {error}"
    return found, f"{odd} {'line' if odd == 1 else 'lines'} that are no entries, the first: {why}" if odd else ""


def _torn(line: bytes) -> bool:
    """Whether the end is missing: an entry ends with a bracket."""
    return line.lstrip().startswith(b"{") and not line.rstrip().endswith(b"}")
