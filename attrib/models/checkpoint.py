"""Reads weights, never code: from safetensors, or torch files with ``weights_only=True``. Writes safetensors."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from torch import Tensor, nn

from attrib.metadata import KEY, resolve
from attrib.store.files import write_atomic
from attrib.types import UserError

_WRAPPERS = ("state_dict", "model_state_dict", "model")  # where training scripts put the weights


def read_weights(path: str) -> dict[str, Tensor]:
    """The state dict in a file; a training checkpoint's wrapper and a ``module.`` prefix are removed.

    Raises UserError that names the file if it is missing, damaged or holds anything but tensors.
    """
    file = resolve(path)
    if not file.is_file():
        raise UserError(f"model.checkpoint: no such file: {file}")
    try:
        if file.suffix == ".safetensors":
            loaded: object = safetensors.torch.load_file(file)
        else:
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's own message advises to switch the protection off, so only the name in it is passed on.
        culprit = re.search(r"GLOBAL (\S+)", str(error))
        if culprit is None:
            raise UserError(f"model.checkpoint: {file} is damaged, or no checkpoint at all") from error
        raise UserError(
            f"model.checkpoint: {file} holds more than weights ({culprit[1]}), and unpickling that could run code. "
            "Save only model.state_dict(), best as .safetensors"
        ) from error
    except Exception as error:  # damaged files raise anything from KeyError to AssertionError
        raise UserError(f"model.checkpoint: {file} cannot be read: {type(error).__name__}: {error}") from error
    while isinstance(loaded, Mapping):
        inner = next((loaded[w] for w in _WRAPPERS if isinstance(loaded.get(w), Mapping)), None)
        if inner is None:
            break
        loaded = inner
    if not isinstance(loaded, Mapping) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in loaded.items()
    ):
        raise UserError(f"model.checkpoint: {file} holds no state dict (name -> tensor)")
    if loaded and all(k.startswith("module.") for k in loaded):
        loaded = {k.removeprefix("module."): v for k, v in loaded.items()}
    return dict(loaded)


def _some(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def load_weights(module: nn.Module, path: str, match: Literal["name", "order"] = "name") -> None:
    """Load a checkpoint into a module, strictly.

    ``match="order"`` pairs tensors by their position, for files whose names come from another
    implementation of the same net; counts and shapes must agree.

    Raises UserError that names the file and the missing, unexpected or misshapen keys.
    """
    if match not in ("name", "order"):
        raise UserError(f"model.match must be name or order, not {match!r}")
    weights, own = read_weights(path), module.state_dict()
    if match == "order":
        if len(weights) != len(own):
            raise UserError(f"model.checkpoint: {path} holds {len(weights)} tensors, the net has {len(own)}")
        weights = dict(zip(own, weights.values(), strict=True))
    missing = [k for k in own if k not in weights]
    unexpected = [k for k in weights if k not in own]
    misshapen = [
        f"{k} {tuple(weights[k].shape)} instead of {tuple(own[k].shape)}"
        for k in own
        if k in weights and weights[k].shape != own[k].shape
    ]
    problems = {"missing": missing, "unexpected": unexpected, "wrong shape": misshapen}
    if any(problems.values()):
        text = "; ".join(f"{kind}: {_some(names)}" for kind, names in problems.items() if names)
        raise UserError(f"model.checkpoint: {path} does not fit {type(module).__name__}: {text}")
    module.load_state_dict(weights)


def save_checkpoint(path: str | Path, module: nn.Module, metadata: Mapping[str, Any]) -> None:
    """Write the module's weights, and ``metadata`` about them (anything that JSON can hold), whole or not at all.

    ``load_weights`` and ``attrib.metadata.read_metadata`` read the file.

    Raises UserError if the name does not end in .safetensors.
    """
    file = Path(path).expanduser()
    if file.suffix != ".safetensors":
        raise UserError(f"a checkpoint's name ends in .safetensors, not {file.suffix or 'nothing'}: {file}")
    # Copies, because safetensors refuses tensors that share memory, as tied weights do.
    weights = {name: value.detach().cpu().clone().contiguous() for name, value in module.state_dict().items()}
    text = json.dumps(dict(metadata), sort_keys=True, allow_nan=False)
    write_atomic(file, safetensors.torch.save(weights, {KEY: text}))
