"""Running an experiment: maps first, then scores from the stored maps; only what is missing.

The loop is mmengine's: a ``Runner`` whose test loop walks over samples and calls hooks at its
usual moments, so that any mmengine ``Hook`` or ``VisBackend`` works (``run.hooks``,
``run.vis_backends``). The store decides what is missing, so a run may be killed at any moment.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import json
import logging
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

from attrib.errors import GoneError
from attrib.experiment.cell import Experiment
from attrib.experiment.samples import classes_of
from attrib.experiment.targets import check_labels
from attrib.fit import Progress, State
from attrib.process.repeatable import repeatable
from attrib.process.signals import Interrupted, Stop, watching
from attrib.running.hooks import FitBar, Heartbeat, ProgressHook, standard_hooks
from attrib.running.loop import Loop
from attrib.running.options import Options
from attrib.running.plan import Plan, check_metrics, exam_of, make_plan, spec_of
from attrib.running.runner import AttributionRunner
from attrib.running.states import load_state
from attrib.running.summary import Summary
from attrib.store.files import write_json, writer_name
from attrib.store.reading import UnreadableError
from attrib.store.temporary import sweep
from attrib.store.workers import SUMMARY, clock
from attrib.types import UserError

log = logging.getLogger(__name__)

EXAMINED = 8  # samples of a run, among which two different ones are looked for before it begins


def run(experiment: Experiment, options: Options) -> Summary:
    """Compute what is missing of one cell and leave a record under ``runs/``.

    Told to stop (``attrib.process.signals``) it ends early: ``stopped`` and ``left`` of the summary say so. A
    caller with more to do watches for itself, or the next run goes on as if nothing had happened.

    Raises UserError for what a person must put right, Interrupted if told to stop before anything could be computed;
    samples that fail are in the summary, the ledger and, with ``strict``, in the exit status of the tool.
    """
    start = time.monotonic()  # the clock may be set while we run
    writer = writer_name(options.shard)
    with watching(options.grace) as stop, repeatable(options.deterministic):
        with stop.immediately():
            plan = make_plan(experiment, options, writer, stop)
            check_metrics(plan)
            check_labels(experiment.dataset, plan.selected, experiment.target)
            _tidy(plan, Path(options.root))
        stop.defer()  # once there is a summary, the caller gets it
        try:
            summary = _run(plan, options, start, stop)
        except OSError as error:  # a sample's own errors never come this far
            plan.cell.check()
            raise _refused(plan, error) from error
        stop.work_left = summary.stopped is not None
    return summary


def _run(plan: Plan, options: Options, start: float, stop: Stop) -> Summary:
    experiment, cell = plan.experiment, plan.cell
    folder = cell.folder / "runs" / cell.writer
    with stop.immediately():
        _open(plan)
        plain = json.loads(json.dumps(dataclasses.asdict(options), default=repr))
        write_json(folder / "config.json", {**experiment.config, "run": plain})
        hooks = standard_hooks(progress=options.progress, png=options.png)
        try:
            net, name = experiment.model.module, cell.folder.name
            runner = AttributionRunner(net, folder, name, options, experiment.seed, hooks)
        except (KeyError, TypeError, ValueError) as error:  # how mmengine says that a name is not registered
            raise UserError(f"run.hooks or run.vis_backends cannot be built: {error}") from error

    @functools.cache
    def state() -> State:
        fit = experiment.method.fit
        if fit is None or plan.state_key is None:
            return {}
        samples = experiment.estimation_samples(options.read)
        asked = classes_of(experiment.samples(plan.to_explain or plan.uids, options.read)) if fit.BY_CLASS else None
        bar = FitBar()

        def show(progress: Progress) -> None:
            heartbeat.fitting(progress)
            if options.progress:
                bar.show(progress)

        try:
            return load_state(Path(options.root), plan.state_key, fit, experiment.model, samples, stop, asked, show)
        finally:
            bar.close()

    with stop.deferred():
        package = logging.getLogger("attrib")
        package.addHandler(runner.file_handler)
        for name in cell.maps.broken:
            log.warning("damaged, its samples are computed again: %s", name)
        loop, finished = Loop(runner, plan, state, options, stop), False
        runner.attribution, summary = loop, loop.summary
        heartbeat = Heartbeat(plan, options)
        runner.register_hook(heartbeat)
        heartbeat.start()
        failure: OSError | GoneError | None = None
        refused: str | None = None
        try:
            with stop.finishing():
                if plan.explains:
                    state()
                runner.test()
            finished = summary.stopped is None
        except Interrupted:
            summary.stopped = stop.name
        except (OSError, GoneError) as error:
            failure = error
        except UserError as error:  # whoever looks at the work directory later asks why nothing is there
            refused = str(error)
            raise
        finally:
            for hook in hooks:
                if isinstance(hook, ProgressHook):
                    hook.close()  # else what is said next stands behind the bar
            summary.left = loop.left + loop.unwritten
            if summary.stopped:
                log.warning("%s", summary.ending)
            heartbeat.stop()
            package.removeHandler(runner.file_handler)
            runner.visualizer.close()
            runner.file_handler.close()
            record = {"seconds": time.monotonic() - start, "cell": cell.folder.name, "batch": loop.batch_size}
            record |= {"exam": exam_of(experiment.model), "refused": refused}
            try:
                cell.check()
                write_json(folder / "summary.json", {**dataclasses.asdict(summary), "finished": finished, **record})
            except (OSError, GoneError) as error:
                # That the folder is gone explains whatever failed before.
                failure = error if isinstance(error, GoneError) else failure or error
        if isinstance(failure, GoneError):
            _forget(plan.cell.folder, plan.cell.writer)
            raise failure
        if failure is not None:
            raise _refused(plan, failure, loop.unwritten) from failure
    return summary


def _forget(folder: Path, writer: str) -> None:
    """Remove what this writer wrote at the moment at which the cell's folder was deleted: nothing tells what it is.

    A folder that lost no more than its spec.json, or holds what others wrote, stays as it is.
    """
    stored = [path for kind in ("maps", "scores") for path in (folder / kind).rglob("*") if not path.is_dir()]
    described = any((folder / name).exists() for name in ("spec.json", "samples.json"))
    if not described and all(writer in path.name for path in stored):
        shutil.rmtree(folder, ignore_errors=True)


def _refused(plan: Plan, error: OSError, unwritten: int = 0) -> UserError:
    """Says that what was stored is safe only where something was, and what can be done about it."""
    what = f"{plan.cell.folder} cannot be written or read: {error}"
    lost = f" {unwritten} maps and scores that were computed could not be written." if unwritten else ""
    stored = any(plan.cell.folder.glob("maps/[!.]*.safetensors"))
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and stored and not lost:
        done = not plan.explains and all(len(scored) == len(plan.uids) for scored in plan.scored.values())
        kept = "All that this run would compute is stored there" if done else "What was stored is safe"
        how = "read it" if done else "read it, and another run.root, or the right to write there, computes the rest"
        return UserError(f"{what}. {kept}; `attrib table` and `attrib report --out FILE` {how}")
    if stored:
        return UserError(f"{what}.{lost} What was stored is safe; run the same command again")
    return UserError(f"{what}.{lost} Nothing is stored; run it again" if lost else f"{what}; take another run.root")


def _tidy(plan: Plan, root: Path) -> None:
    """Remove the temporary files of dead writers, deep in the cell only if a run of it ended without a word."""
    now = clock(root)
    sweep(root, deep=False, now=now)
    sweep(root / "state", now=now)
    silent = any(not (run / SUMMARY).exists() for run in plan.cell.folder.glob("runs/[!.]*/"))
    sweep(plan.cell.folder, deep=silent, now=now)


def _open(plan: Plan) -> None:
    """Say what the cell is.

    Raises UserError for a net that is refused, and in the one case in four thousand million that its name is taken.
    """
    if plan.explains or not (plan.cell.folder / "spec.json").exists():
        plan.experiment.examine(plan.uids[:EXAMINED])
    spec = spec_of(plan)
    plan.cell.write_spec(spec)
    try:
        there = plan.cell.spec
    except UnreadableError as error:
        raise UserError(f"{error}; if it is damaged, `attrib cache repair` moves it away") from error
    if there.get("key") != spec["key"]:
        raise UserError(f"{plan.cell.folder} holds another experiment whose key begins alike; take another run.root")
    first = there.get("code")
    for part, code in spec.get("code", {}).items():
        if isinstance(first, Mapping) and first.get(part, code) != code:
            log.warning(
                "the code of the %s is another one than when %s was begun; what is stored there still counts. If it "
                "computes something else now, take another run.root, or delete that folder",
                part,
                plan.cell.folder,
            )
    plan.cell.write_samples(plan.selected, plan.fingerprints, plan.asked)
    plan.cell.begin()
