"""On what numbers were made: versions, how torch was built, devices."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import sys
from collections.abc import Mapping
from typing import Any

import torch


@functools.cache
def environment() -> Mapping[str, Any]:
    """As plain data, found out without importing anything and without starting a program.

    >>> sorted(environment())
    ['cuda', 'devices', 'hip', 'packages', 'platform', 'python', 'torch']
    """
    return {
        "python": sys.version,
        "platform": platform.platform(),
        "torch": torch.__config__.show(),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "devices": devices(),
        "packages": packages(),
    }


def devices() -> list[str]:
    """Names of the GPUs that torch can use, or why it cannot: a run on a CPU must not end because of them."""
    try:
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        return [torch.cuda.get_device_name(i) for i in range(count)]
    except RuntimeError as error:  # a driver that is too old, a GPU that is in use or broken
        return [f"{type(error).__name__}: {error}"]


def packages() -> dict[str, str | None]:
    """What is installed, in the versions that are imported: the first on the path. Broken ones are left out."""
    found: dict[str, str | None] = {}
    for one in importlib.metadata.distributions():
        try:
            about = one.metadata  # read and parsed each time
            name, version = about["Name"], about["Version"]
        except Exception:  # a file that is cut off, or no text: a record of a run must not end it
            continue
        if name:
            found.setdefault(name, version)
    return found
