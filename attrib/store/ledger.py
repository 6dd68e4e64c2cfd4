"""The failure ledger of a cell."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any


class Ledger:
    """What could not be computed, and why: a history, nothing is ever taken out of it.

    Each writer appends to a file of its own, ``failures/<writer>.jsonl`` (without a name, ``failures.jsonl``),
    because file servers lose lines where two machines append to one file.
    """

    MAX_REASON = 1500  # keeps a line below the size that one write() delivers whole
    FIELDS = ("uid", "fingerprint", "stage", "reason")

    def __init__(self, folder: Path, writer: str = "") -> None:
        self.folder = Path(folder)
        self.path = self.folder / (f"failures/{writer}.jsonl" if writer else "failures.jsonl")
        self._known: set[tuple[str, ...]] | None = None

    def add(self, uid: str, fingerprint: str, stage: str, reason: str) -> None:
        """``stage`` is "load", "maps" or the metric's folder of scores, ``<name>.<key8>``.

        What the ledger said already when this object first wrote is not said again.
        """
        if self._known is None:
            self._known = {tuple(entry[name] for name in self.FIELDS) for entry in self.entries()}
        fields = (uid, fingerprint, stage, reason[: self.MAX_REASON])
        if fields in self._known:
            return
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

    def entries(self) -> list[dict[str, Any]]:
        """What all writers noted, in the order of time."""
        found = []
        for path in (self.folder / "failures.jsonl", *sorted(self.folder.glob("failures/[!.]*.jsonl"))):
            for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
                try:
                    found.append(json.loads(line))
                except json.JSONDecodeError:
                    continue  # blank, or torn by a kill
        return sorted(found, key=lambda entry: entry["time"])
