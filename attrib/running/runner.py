"""mmengine's runner, with what it gets wrong for frozen models on one CPU put right."""

from __future__ import annotations

import io
import logging
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import BaseLoop, Runner
from torch import nn

from attrib.process.environment import environment
from attrib.process.git import git_commit
from attrib.running.options import Options
from attrib.store.files import write_json
from attrib.types import UserError

if TYPE_CHECKING:
    from attrib.running.loop import Loop


class AttributionRunner(Runner):
    """Its test loop is ``attribution``, which is set before ``test()`` is called."""

    attribution: Loop

    def __init__(
        self, net: nn.Module, folder: Path, name: str, options: Options, seed: int, hooks: Sequence[Hook]
    ) -> None:
        self._run_name = folder.name
        unused = ("runtime_info", "timer", "sampler_seed", "logger", "param_scheduler", "checkpoint")
        super().__init__(
            model=net,
            work_dir=str(folder.parent),
            test_dataloader=[],
            test_evaluator=[],
            test_cfg={},
            default_hooks=dict.fromkeys(unused),  # training hooks, which would run in a test loop too
            custom_hooks=[*hooks, *options.hooks],
            visualizer={"type": "Visualizer", "vis_backends": list(options.vis_backends), "save_dir": str(folder)},
            env_cfg={"cudnn_benchmark": False},
            # It seeds Python, numpy and torch for the whole process, which is the run's: for what a user's parts draw
            # from them. numpy takes 32 bits.
            randomness={"seed": seed % 2**32},
            # Two runners of one second share their logger and visualizer, unless their names differ.
            experiment_name=f"{name}.{folder.name}",
            cfg=Config(),
        )
        for hook in self.hooks:
            if not isinstance(hook, Hook):
                raise UserError(f"run.hooks: {hook!r} is not an mmengine Hook")

    def setup_env(self, env_cfg: dict) -> None:
        super().setup_env(env_cfg)
        self._timestamp = self._run_name  # names mmengine's log folder, which is our run's folder

    def build_logger(self, *args: Any, **kwargs: Any) -> Any:
        """The log goes to the run's folder whole; only warnings disturb the progress bar."""
        logger = super().build_logger(*args, **kwargs)
        for handler in logger.handlers:
            if isinstance(handler, logging.FileHandler):
                self.file_handler = handler
                if isinstance(handler.stream, io.TextIOWrapper):
                    handler.stream.reconfigure(errors="backslashreplace")  # names of files need not be UTF-8
                handler.handleError = _lost_line(handler)  # type: ignore[method-assign]
            else:
                handler.setLevel(logging.ERROR)
        return logger

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        return model  # mmengine would move it to a device of its choice

    def dump_config(self) -> None:
        """The composed configuration is written as config.json instead."""

    def _log_env(self, env_cfg: dict) -> None:
        about = {
            "command": sys.argv,
            "machine": f"{platform.node()}, {platform.machine()}, {os.cpu_count()} cores",
            "git": git_commit(),
        }
        write_json(Path(self.log_dir) / "environment.json", {**environment(), **about})

    def build_test_loop(self, loop: BaseLoop | dict) -> BaseLoop:
        return self.attribution


def _lost_line(handler: logging.FileHandler) -> Any:
    """What a log says of a line that its file does not take: so, once, and no traceback for each."""
    said = False

    def lost(record: logging.LogRecord) -> None:
        nonlocal said
        if not said:
            said = True
            print(f"{handler.baseFilename} cannot be written: {sys.exc_info()[1]}", file=sys.stderr, flush=True)

    return lost
