"""On what numbers were made: versions, how torch was built, devices."""

from __future__ import annotations

import functools
import importlib.metadata
import sys
from collections.abc import Mapping
from typing import Any

import torch


@functools.cache
def environment() -> Mapping[str, Any]:
    """As plain data, found out without importing anything and without starting a program.

    >>> sorted(environment())
    ['cuda', 'devices', 'packages', 'python', 'torch']
    """
    packages = {found.name: found.version for found in importlib.metadata.distributions()}
    return {
        "python": sys.version,
        "torch": torch.__config__.show(),
        "cuda": torch.version.cuda,
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "packages": dict(sorted(packages.items(), key=lambda item: item[0].lower())),
    }
