"""The memory that this process may still take, and its peak: of a GPU by torch, of the machine by /proc."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

_GROUPS_V2 = ("memory.max", "memory.current", "inactive_file")
_GROUPS_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def free_memory(device: torch.device, root: Path = Path("/")) -> int | None:
    """Bytes that this process may still take on a device; None where there is no way to tell.

    ``root`` is the folder of ``proc`` and ``sys``.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    machine = _named(_text(root / "proc/meminfo"), "MemAvailable:")
    left = [*_left_by_groups(root), *([] if machine is None else [machine * 1024])]
    return max(0, min(left)) if left else None


def _left_by_groups(root: Path) -> Iterator[int]:
    """What each control group above this process leaves of its limit, if it has one. A job's limit is seldom the last.

    Inside a container the paths may be those of the machine: levels that do not exist are passed over.
    """
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            home, (limit, used, cache) = root / "sys/fs/cgroup/memory", _GROUPS_V1
        elif not controllers:
            home, (limit, used, cache) = root / "sys/fs/cgroup", _GROUPS_V2
        else:
            continue
        below = Path(path.strip("/"))
        for level in (home / p for p in (below, *below.parents)):
            most, now = _text(level / limit).strip(), _text(level / used).strip()
            if most.isdecimal() and now.isdecimal():  # not "max"
                yield int(most) - int(now) + (_named(_text(level / "memory.stat"), cache) or 0)


def _text(path: Path | str) -> str:
    try:
        with open(path) as file:
            return file.read()
    except OSError:
        return ""


def _named(text: str, name: str) -> int | None:
    """The number behind a name, of lines such as ``MemAvailable:   123 kB``."""
    found = re.search(rf"^{re.escape(name)}\s+(\d+)", text, re.MULTILINE)
    return None if found is None else int(found[1])


class Peak:
    """What this process takes at its peak beyond what it has now, from here on."""

    def __init__(self, device: torch.device, root: Path = Path("/")) -> None:
        self.device, self.status = device, f"{root}/proc/self/status"  # a string: this is done for every batch
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before: int | None = torch.cuda.memory_allocated(device)
            return
        # Let it begin anew (proc(5)), else it is the peak of the process's whole life, which is larger.
        with suppress(OSError), open(f"{root}/proc/self/clear_refs", "w") as file:
            file.write("5")
        self.before = self._kilobytes("VmRSS:")

    def _kilobytes(self, name: str) -> int | None:
        found = _named(_text(self.status), name) if self.device.type == "cpu" else None
        return None if found is None else found * 1024

    def bytes(self) -> int | None:
        """None where there is no way to tell."""
        cuda = self.device.type == "cuda"
        most = torch.cuda.max_memory_allocated(self.device) if cuda else self._kilobytes("VmHWM:")
        return None if most is None or self.before is None else max(1, most - self.before)
