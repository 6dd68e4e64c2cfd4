"""Where configurations lie: attrib's own, and those of a user's ``--config-dir``."""

from __future__ import annotations

from pathlib import Path

import attrib
from attrib.errors import UserError


def configs() -> Path:
    """The folder of attrib's own configurations: ``attrib/configs`` of a wheel, ``configs`` in a checkout."""
    package = Path(attrib.__file__).resolve().parent
    for place in (package / "configs", package.parent / "configs"):
        if (place / "run.yaml").is_file():
            return place
    raise UserError(f"attrib's configurations are missing beside {package}: install it anew")


def checked_folder(folder: Path | None) -> Path | None:
    """A ``--config-dir`` as an absolute path. Raises UserError if it is no folder."""
    if folder is not None and not folder.is_dir():
        raise UserError(f"--config-dir {folder}: there is no such folder")
    return folder.resolve() if folder else None


def presets(group: str, folder: Path | None = None) -> dict[str, Path]:
    """The files that ``group=NAME`` chooses from: name -> file. Those of attrib hide others of the same name."""
    found: dict[str, Path] = {}
    for place in (configs(), *([folder] if folder else [])):
        for path in sorted((place / group).glob("**/*.yaml")):
            found.setdefault(path.relative_to(place / group).with_suffix("").as_posix(), path)
    return found


def shown(path: Path) -> str:
    """A file of configurations as people know it: ``configs/method/iba.yaml``, or where it lies."""
    home, here = configs(), Path.cwd()
    if path.is_relative_to(home):
        return f"configs/{path.relative_to(home).as_posix()}"
    return str(path.relative_to(here) if path.is_relative_to(here) else path)
