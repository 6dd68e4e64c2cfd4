"""Small pictures with boxes, and the command line in this process: what end-to-end tests need."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from attrib.cli.main import dispatch
from attrib.config.compose import compose_node, plain
from attrib.store.cell import Cell, cells

ROOT = Path(__file__).parent.parent


def pixels(width: int = 20, height: int = 14, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def save(path: Path, seed: int = 0, width: int = 20, height: int = 14) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(width, height, seed)).save(path)
    return path


def write_image(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.RandomState(seed).randint(0, 255, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def pictures(folder: Path, count: int = 6) -> Path:
    """``count`` images of 40 x 40 with labels and boxes beside them; returns the images' folder."""
    images = folder / "images"
    labels, boxes = ["file,label"], ["file,x1,y1,x2,y2"]
    for i in range(count):
        write_image(images / f"p{i:03d}.png", i)
        labels.append(f"p{i:03d}.png,{i % 10}")
        boxes.append(f"p{i:03d}.png,5,5,25,{20 + i % 10}")
    (folder / "labels.csv").write_text("\n".join(labels) + "\n")
    (folder / "boxes.csv").write_text("\n".join(boxes) + "\n")
    return images


def tool(name: str) -> ModuleType:
    """The module of a subcommand."""
    return importlib.import_module(f"attrib.cli.{name}")


class Result(NamedTuple):
    status: int
    out: str
    err: str


def called(capfd, work: Callable[[], int]) -> Result:
    """The exit status that ``work`` gives or exits with, and what it printed."""
    capfd.readouterr()
    try:
        status = work()
    except SystemExit as exit_:
        status = int(exit_.code or 0)
    return Result(status, *capfd.readouterr())


def command(capfd, name: str = "run") -> Callable[..., Result]:
    """``attrib run ARGS`` with the configurations of the tests, without starting Python again."""
    return lambda *arguments: called(
        capfd, lambda: dispatch([name, "--config-dir", str(ROOT / "tests" / "configs"), *arguments])
    )


@functools.cache
def _composed(groups: tuple[str, ...]) -> DictConfig:
    return compose_node("run", groups, ROOT / "tests" / "configs")


def quickly(capfd) -> Callable[..., Result]:
    """:func:`command` without Hydra's time for each: ``dataset=``, ``model=``, ``method=``, ``metric=[...]``
    are composed once, other arguments put in their places."""

    def run(*arguments: str) -> Result:
        groups = tuple(a for a in arguments if "." not in a.partition("=")[0])
        config = _composed(groups).copy()
        for path, value in (a.split("=", 1) for a in arguments if a not in groups):
            OmegaConf.update(config, path.lstrip("+"), OmegaConf.create(f"value: {value}").value, force_add=True)
        return called(capfd, lambda: tool("run").cell(plain(config)).status)

    return run


# ---- what a run has left behind ---------------------------------------------------------------------


def only_cell(root: Path) -> Cell:
    (cell,) = cells(root)
    return cell


def stored(root: Path) -> dict[str, dict[str, np.ndarray]]:
    """What IBA keeps of each sample, by uid."""
    cell = only_cell(root)
    return {uid: cell.maps.read((uid, f), ["map", "capacity"]) for uid, f in cell.maps.index()}
