"""Running an experiment: maps first, then scores from the stored maps; only what is missing.

The loop is mmengine's: a ``Runner`` whose test loop walks over samples and calls hooks at its
usual moments, so that any mmengine ``Hook`` or ``VisBackend`` works (``run.hooks``,
``run.vis_backends``). The store decides what is missing, so a run may be killed at any moment.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import os
import platform
import secrets
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import BaseLoop, Runner
from mmengine.utils.dl_utils import collect_env
from torch import nn

from attrib.experiment import Experiment
from attrib.hooks import standard_hooks
from attrib.loop import Loop, Summary
from attrib.methods import State
from attrib.plan import Options, Plan, check_metrics, git_commit, plan, spec_of
from attrib.states import load_state
from attrib.store import write_json
from attrib.types import UserError

log = logging.getLogger(__name__)


class AttributionRunner(Runner):
    """mmengine's runner with what it gets wrong for frozen models on one CPU put right."""

    def __init__(self, net: nn.Module, folder: Path, name: str, options: Options, seed: int) -> None:
        self._run_name = folder.name
        self.attribution: Loop | None = None
        unused = ("runtime_info", "timer", "sampler_seed", "logger", "param_scheduler", "checkpoint")
        super().__init__(
            model=net,
            work_dir=str(folder.parent),
            test_dataloader=[],
            test_evaluator=[],
            test_cfg={},
            default_hooks=dict.fromkeys(unused),  # training hooks, which would run in a test loop too
            custom_hooks=[*standard_hooks(progress=options.progress, png=options.png), *options.hooks],
            visualizer={"type": "Visualizer", "vis_backends": list(options.vis_backends), "save_dir": str(folder)},
            env_cfg={"cudnn_benchmark": False},
            randomness={"seed": seed},
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
            else:
                handler.setLevel(logging.ERROR)
        return logger

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        return model  # mmengine would move it to a device of its choice

    def dump_config(self) -> None:
        """The composed configuration is written as config.json instead."""

    def _log_env(self, env_cfg: dict) -> None:
        found = {k: str(v) for k, v in _environment().items()}
        about = {
            "command": sys.argv,
            "machine": f"{platform.node()}, {platform.machine()}, {os.cpu_count()} cores",
            "git": git_commit(),
        }
        write_json(Path(self.log_dir) / "environment.json", {**found, **about})

    def build_test_loop(self, loop: BaseLoop | dict) -> BaseLoop:
        return self.attribution

    def attribute(self, work: Plan, state: State, options: Options) -> Summary:
        self.attribution = Loop(self, work, state, options)
        self.test()
        return self.attribution.summary


@functools.cache
def _environment() -> Mapping[str, Any]:
    """Asks compilers and drivers for their versions, which takes seconds: once per process."""
    return collect_env()


def run(experiment: Experiment, options: Options) -> Summary:
    """Compute what is missing of one cell and leave a record under ``runs/``.

    Raises UserError for what a person must put right; samples that fail are in the summary, the
    ledger and, with ``strict``, in the exit status of the tool.
    """
    start = time.time()
    stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(start))
    writer = f"{stamp}-{os.getpid()}-{options.shard}-{secrets.token_hex(2)}"
    work = plan(experiment, options, writer)
    check_metrics(work)
    try:
        return _run(work, options, start)
    except OSError as error:  # a sample's own errors never come this far
        again = "What was stored is safe; run the same command again"
        raise UserError(f"{work.cell.folder} cannot be written or read: {error}. {again}") from error


def _run(work: Plan, options: Options, start: float) -> Summary:
    experiment, cell = work.experiment, work.cell
    folder = cell.folder / "runs" / cell.writer
    _open(work)
    write_json(folder / "config.json", {**experiment.config, "run": _options_record(options)})
    try:
        runner = AttributionRunner(experiment.model.module, folder, cell.folder.name, options, experiment.seed)
    except (KeyError, TypeError, ValueError) as error:  # how mmengine says that a name is not registered
        raise UserError(f"run.hooks or run.vis_backends cannot be built: {error}") from error
    package = logging.getLogger("attrib")
    package.addHandler(runner.file_handler)
    for name in cell.maps.broken:
        log.warning("damaged, its samples are computed again: %s", name)
    summary, finished, at_once = Summary(), False, None
    try:
        state: State = {}
        if work.state_key is not None and work.explains:
            samples = experiment.estimation_samples(options.read)
            state = load_state(Path(options.root), work.state_key, experiment.method.fit, experiment.model, samples)
        runner.attribute(work, state, options)
        finished = True
    finally:
        if runner.attribution is not None:
            # Also of a run that was interrupted.
            summary, at_once = runner.attribution.summary, runner.attribution.at_once
        record = {"finished": finished, "seconds": time.time() - start, "cell": cell.folder.name, "batch": at_once}
        write_json(folder / "summary.json", {**dataclasses.asdict(summary), **record})
        package.removeHandler(runner.file_handler)
        runner.visualizer.close()
        runner.file_handler.close()
    return summary


def _open(work: Plan) -> None:
    """Say what the cell is. Raises UserError in the one case in four thousand million that its name is taken."""
    spec = spec_of(work)
    work.cell.write_spec(spec)
    if work.cell.spec["key"] != spec["key"]:
        raise UserError(f"{work.cell.folder} holds another experiment whose key begins alike; take another run.root")
    work.cell.write_samples(work.selected, work.fingerprints)


def _options_record(options: Options) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(options), default=repr))
