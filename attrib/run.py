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
from attrib.hooks import Heartbeat, standard_hooks
from attrib.interrupt import Interrupted, Stop, watching
from attrib.loop import Loop, Summary
from attrib.methods import State
from attrib.plan import Options, Plan, check_metrics, git_commit, plan, spec_of
from attrib.states import load_state
from attrib.store import write_json
from attrib.types import UserError
from attrib.writing import writer_name

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


@functools.cache
def _environment() -> Mapping[str, Any]:
    """Asks compilers and drivers for their versions, which takes seconds: once per process."""
    return collect_env()


def run(experiment: Experiment, options: Options) -> Summary:
    """Compute what is missing of one cell and leave a record under ``runs/``.

    Told to stop (``attrib.interrupt``) it ends early: ``stopped`` and ``left`` of the summary say so. A caller with
    more to do watches for itself, or the next run goes on as if nothing had happened.

    Raises UserError for what a person must put right, Interrupted if told to stop before anything could be computed;
    samples that fail are in the summary, the ledger and, with ``strict``, in the exit status of the tool.
    """
    start = time.monotonic()  # the clock may be set while we run
    writer = writer_name(options.shard)
    with watching(options.grace) as stop:
        with stop.at_once():
            try:
                work = plan(experiment, options, writer, stop)
            except OSError as error:
                raise UserError(f"run.root={options.root} cannot be read: {error}") from error
            check_metrics(work)
        stop.hold()  # once there is a summary, the caller gets it
        try:
            summary = _run(work, options, start, stop)
        except OSError as error:  # a sample's own errors never come this far
            raise _refused(work, error) from error
        stop.work_left = summary.stopped is not None
    return summary


def _run(work: Plan, options: Options, start: float, stop: Stop) -> Summary:
    experiment, cell = work.experiment, work.cell
    folder = cell.folder / "runs" / cell.writer
    with stop.at_once():
        _open(work)
        write_json(folder / "config.json", {**experiment.config, "run": _options_record(options)})
        try:
            runner = AttributionRunner(experiment.model.module, folder, cell.folder.name, options, experiment.seed)
        except (KeyError, TypeError, ValueError) as error:  # how mmengine says that a name is not registered
            raise UserError(f"run.hooks or run.vis_backends cannot be built: {error}") from error

    @functools.cache
    def state() -> State:
        if work.state_key is None:
            return {}
        samples = experiment.estimation_samples(options.read)
        return load_state(Path(options.root), work.state_key, experiment.method.fit, experiment.model, samples, stop)

    with stop.held():
        package = logging.getLogger("attrib")
        package.addHandler(runner.file_handler)
        for name in cell.maps.broken:
            log.warning("damaged, its samples are computed again: %s", name)
        loop, finished = Loop(runner, work, state, options, stop), False
        runner.attribution, summary = loop, loop.summary
        heartbeat = Heartbeat(work, options)
        runner.register_hook(heartbeat)
        heartbeat.start()
        failure: OSError | None = None
        try:
            with stop.finishing():
                if work.explains:
                    state()
                runner.test()
            finished = summary.stopped is None
        except Interrupted:
            summary.stopped = stop.name
        except OSError as error:
            failure = error
        finally:
            summary.left = loop.left + loop.unwritten
            if summary.stopped:
                log.warning("%s", summary.ending)
            heartbeat.stop()
            package.removeHandler(runner.file_handler)
            runner.visualizer.close()
            runner.file_handler.close()
            record = {"seconds": time.monotonic() - start, "cell": cell.folder.name, "batch": loop.at_once}
            try:
                write_json(folder / "summary.json", {**dataclasses.asdict(summary), "finished": finished, **record})
            except OSError as error:
                failure = failure or error
        if failure is not None:
            raise _refused(work, failure, loop.unwritten) from failure
    return summary


def _refused(work: Plan, error: OSError, unwritten: int = 0) -> UserError:
    lost = f" {unwritten} maps and scores that were computed could not be written." if unwritten else ""
    again = "What was stored is safe; run the same command again"
    return UserError(f"{work.cell.folder} cannot be written or read: {error}.{lost} {again}")


def _open(work: Plan) -> None:
    """Say what the cell is. Raises UserError in the one case in four thousand million that its name is taken."""
    spec = spec_of(work)
    work.cell.write_spec(spec)
    if work.cell.spec["key"] != spec["key"]:
        raise UserError(f"{work.cell.folder} holds another experiment whose key begins alike; take another run.root")
    work.cell.write_samples(work.selected, work.fingerprints)


def _options_record(options: Options) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(options), default=repr))
