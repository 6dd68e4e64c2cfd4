"""Several processes of one machine that torchrun starts: each takes its part of the job's samples, and its own GPU.

torchrun says who is who by WORLD_SIZE, RANK and LOCAL_RANK. Nothing is sent between the processes: the work directory
is all that they share, so there is no process group and no back end to set up.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch

from attrib.running.options import Options
from attrib.types import UserError

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


def of_rank(options: Options, environment: Mapping[str, str]) -> Options:
    """The options of this process: the job's shard cut again into ``WORLD_SIZE`` parts, and GPU ``LOCAL_RANK``.

    The same options where ``WORLD_SIZE`` is not set. A device that was chosen by its number stays. Raises UserError if
    the variables make no sense.
    """
    if "WORLD_SIZE" not in environment:
        return options
    given = {name: environment.get(name, "") for name in NAMES}
    if not all(value.isdecimal() for value in given.values()) or int(given["RANK"]) >= int(given["WORLD_SIZE"]):
        values = " ".join(f"{name}={value}" for name, value in given.items())
        raise UserError(f"{values} make no sense; torchrun sets them, else unset WORLD_SIZE")
    rank, world, local = (int(given[name]) for name in NAMES)
    device = options.device
    if device in ("auto", "cuda") and torch.cuda.is_available():
        device = f"cuda:{local % torch.cuda.device_count()}"  # one is visible where each process was given its own
    return dataclasses.replace(
        options,
        shard=options.shard * world + rank,
        shards=options.shards * world,
        device=device,
        progress=options.progress and rank == 0,  # one bar on a terminal
    )
