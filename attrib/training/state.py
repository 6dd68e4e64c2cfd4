"""All that the next epoch depends on, in one file: weights, optimiser, counters, history.

mmengine's own checkpoints are not used: they are pickles, which ``weights_only`` refuses.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from attrib.store.files import write_atomic
from attrib.store.reading import parsed, regular
from attrib.types import UserError


@dataclass
class Progress:
    """Where a training stands after some whole epochs.

    iteration   updates so far
    best        the best validation accuracy, that of ``best_epoch``
    waited      epochs since then
    stopped     whether early stopping has ended the training
    history     a row of numbers for each epoch
    """

    epoch: int = 0
    iteration: int = 0
    best: float = -math.inf
    best_epoch: int = 0
    waited: int = 0
    stopped: bool = False
    history: list[dict[str, float]] = field(default_factory=list)


def save_state(path: Path, net: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
    """Write the state whole or not at all. The numbers in an optimiser's state become tensors."""
    tensors = {f"net/{name}": value for name, value in net.state_dict().items()}
    for number, values in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{number}/{k}": torch.as_tensor(v) for k, v in values.items() if v is not None}
    # Copies, since safetensors refuses tensors that share memory (tied weights).
    tensors = {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
    write_atomic(path, to_safetensors(tensors, {"progress": json.dumps(asdict(progress))}))


def load_state(path: Path, net: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
    """Put the stored state into ``net`` and ``optimizer``, and return the progress.

    Raises UserError that names the file if it is damaged or belongs to another net.
    """
    try:
        regular(path)
        with safe_open(path, framework="pt") as file:
            progress = parsed(file.metadata()["progress"], Progress)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
        net.load_state_dict({k.removeprefix("net/"): v for k, v in tensors.items() if k.startswith("net/")})
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"{path} cannot be resumed from ({error}); begin anew with train.restart=true") from error
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer/"):
            _, number, key = name.split("/", 2)
            state.setdefault(int(number), {})[key] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return progress
