"""Keys: short digests of *what* is computed, never of *how* (device, batch size, paths)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

# Metadata of a dataclass's field that was added when results had been stored: at its default, with which everything is
# computed as before, it does not enter keys.
ADDED: Mapping[str, Any] = MappingProxyType({"key": "unless default"})
# Metadata of a field that changes no number, such as a limit: it never enters keys.
HOW: Mapping[str, Any] = MappingProxyType({"key": "never"})


def stable_name(kind: type) -> str:
    """The name by which a class enters keys: its own ``NAME``, by default its path.

    A class that moves to another module keeps its results if it says ``NAME = "old.path.Class"``. A subclass does not
    inherit the name.

    >>> class Moved:
    ...     NAME = "my_module.Mine"
    >>> stable_name(Moved)
    'my_module.Mine'
    """
    return str(vars(kind).get("NAME") or f"{kind.__module__}.{kind.__qualname__}")


def short_name(kind: type) -> str:
    """The name by which the class of a dataset enters keys: its own ``NAME``, by default its name without the module.

    A class that is renamed keeps its results if it says ``NAME = "OldName"``. A subclass does not inherit the name.

    >>> class Renamed:
    ...     NAME = "Scans"
    >>> short_name(Renamed)
    'Scans'
    """
    return str(vars(kind).get("NAME") or kind.__qualname__)


def spec(thing: Any) -> Any:
    """A plain, JSON-ready description of ``thing``.

    A dataclass becomes its class (``stable_name``), its VERSION and its fields; two objects with the same spec
    compute the same numbers.

    Raises TypeError for anything that has no stable description (a lambda, an open file).
    """
    if thing is None or isinstance(thing, (bool, int, str)):
        return thing
    if isinstance(thing, float):
        # json writes inf and nan in a way that other readers refuse.
        return thing if thing == thing and abs(thing) != float("inf") else repr(thing)
    if dataclasses.is_dataclass(thing) and not isinstance(thing, type):
        kind = type(thing)
        fields = {
            f.name: spec(getattr(thing, f.name))
            for f in dataclasses.fields(thing)
            if f.metadata.get("key") != "never"
            and (ADDED.items() - f.metadata.items() or getattr(thing, f.name) != f.default)
        }
        return {
            "class": stable_name(kind),
            # In capitals, as a field may be called "version"; of the thing, as one case may have a VERSION of its own.
            "VERSION": getattr(thing, "VERSION", 0),
            **fields,
        }
    if isinstance(thing, Mapping):
        return {str(k): spec(v) for k, v in sorted(thing.items(), key=lambda item: str(item[0]))}
    if isinstance(thing, (list, tuple)):
        return [spec(v) for v in thing]
    if isinstance(thing, (set, frozenset)):
        return sorted((spec(v) for v in thing), key=json.dumps)
    torch = sys.modules.get("torch")  # without it there are no tensors, and it takes two seconds to import
    if torch is not None and isinstance(thing, torch.Tensor):
        return {"tensor": tensor_digest({"": thing})}
    raise TypeError(f"no stable description for {type(thing).__name__}: {thing!r}")


def digest(*things: Any) -> str:
    """64 hex digits that identify the specs of ``things``."""
    text = json.dumps([spec(t) for t in things], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def tensor_digest(tensors: Mapping[str, Tensor]) -> str:
    """Digest of names, dtypes, shapes and values. Independent of device and of memory layout."""
    import torch

    total = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().resolve_conj().resolve_neg().contiguous()
        total.update(f"{name}:{value.dtype}:{tuple(value.shape)};".encode())
        total.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def stable_hash(text: str) -> int:
    """A 64-bit hash of a string that is the same in every process (Python's own is salted)."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def shard_of(uid: str, shards: int) -> int:
    """The shard in 0 .. shards-1 that a sample belongs to."""
    return stable_hash(uid) % shards
