"""What is computed once for a whole dataset and shared: fitted states, confidences."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError

from attrib import keys
from attrib.experiment.samples import Samples
from attrib.fit import Fit, Partial, Progress, State
from attrib.models import Classifier
from attrib.process.signals import Stop
from attrib.running.fingerprints import Fingerprints
from attrib.store.files import sync_folder, write_atomic, write_json, write_synced
from attrib.store.reading import LISTING, document, regular
from attrib.store.schemas import Confidences
from attrib.store.temporary import temporary
from attrib.types import SampleError, UserError

log = logging.getLogger(__name__)

PORTION = 256  # samples whose confidence is asked for together
SAVE_SECONDS = 30.0
SAY_SECONDS = 10.0  # between two lines of progress of a fit


class _Partial:
    """An unfinished fit on disk."""

    def __init__(self, path: Path, stop: Stop, fit: Fit, stored: State | None) -> None:
        self.path, self._stop, self._fit, self._stored = path, stop, fit, stored

    def load(self) -> State | None:
        saved = _read(self.path)
        if saved is None or self._stored is None:
            return self._stored if saved is None else saved
        return self._fit.united(self._stored, saved)

    def save(self, state: State) -> None:
        write_atomic(self.path, safetensors.torch.save({k: v.contiguous() for k, v in state.items()}))

    def wanted(self) -> bool:
        return self._stop()


def _read(path: Path) -> State | None:
    try:
        regular(path)
        return safetensors.torch.load_file(path)
    except FileNotFoundError:
        return None
    except (SafetensorError, OSError, ValueError) as error:
        log.warning("%s cannot be read (%s); fitting it again", path, error)
        return None


def fit_state(fit: Fit, model: Classifier, samples: Samples, partial: Partial, report: Callable[[str], None]) -> State:
    """The state as it is stored, on the CPU. Raises UserError if the estimation set cannot be used."""
    try:
        fitted = fit.run(model, samples, partial, report)
    except SampleError as error:
        raise UserError(f"{type(fit).__name__} cannot be fitted: {error}") from error
    return {name: value.contiguous().cpu() for name, value in fitted.items()}


def state_path(root: Path, key: str) -> Path:
    return root / "state" / f"{key[:8]}.safetensors"


def load_state(
    root: Path,
    key: str,
    fit: Fit,
    model: Classifier,
    samples: Samples,
    stop: Stop | None = None,
    asked: frozenset[int] | None = None,
    show: Callable[[Progress], None] | None = None,
) -> State:
    """The fitted state, from ``state/<key8>.safetensors`` or fitted now.

    Jobs that need it at once all fit it, but the first to finish decides: the others take its
    file, so that all shards work with the same numbers also where a GPU does not repeat itself.

    ``asked`` are the classes that are explained: a state that goes by classes (``Fit.BY_CLASS``) and lacks some of
    them is extended. ``show`` is told how far the fit is.

    Raises UserError if the estimation set cannot be used, Interrupted if ``stop`` says so when the fit next reports.
    """
    stop = stop or Stop()
    path = state_path(root, key)
    state = _read(path)
    if state is not None and fit.covers(state, asked):
        return state
    samples.asked = asked
    partial = _Partial(path.with_suffix(".partial.safetensors"), stop, fit, state)
    said = time.monotonic()

    def report(line: str) -> None:
        nonlocal said
        if time.monotonic() - said >= SAY_SECONDS:
            said = time.monotonic()
            log.info(line)
        if show is not None and isinstance(line, Progress):
            show(line)
        stop.check()  # a fit reports after it has saved

    log.info("fitting %s on %d samples", type(fit).__name__, len(samples.uids))
    with stop.deferred():
        with stop.finishing():
            fitted = fit_state(fit, model, samples, partial, report)
        about = {"key": key, "fit": keys.spec(fit), "samples": list(samples.uids), "skipped": samples.skipped}
        write_json(path.with_suffix(".json"), about)
        # Another process may have been faster, perhaps with other classes.
        while (state := _read(path)) is None or not fit.covers(state, asked):
            whole = fitted if state is None else fit.united(state, fitted)
            _publish(path, safetensors.torch.save(whole), over=state is not None)
        partial.path.unlink(missing_ok=True)
    return state


def _publish(path: Path, data: bytes, over: bool = False) -> None:
    """Write the file, but ``over`` another only if told so; a damaged one is replaced, in one step.

    A link is refused where the file is there, so that the first of several jobs decides. On a file system without links
    the last one does, and whoever has read the file of another before goes on with numbers of its own: no job is hurt,
    but shards of a net that does not repeat itself may differ by its noise.
    """
    if not over and _read(path) is not None:
        return
    mine = temporary(path)
    try:
        write_synced(mine, data)
        if os.path.lexists(path):  # and is damaged, or lacks something
            os.replace(mine, path)
        else:
            _link(mine, path)
    finally:
        with contextlib.suppress(OSError):  # then the next run removes it
            mine.unlink(missing_ok=True)
    sync_folder(path.parent)


def _link(mine: Path, path: Path) -> None:
    try:
        os.link(mine, path)
    except FileExistsError:
        pass
    except OSError as error:
        log.info("%s cannot be linked (%s); it is renamed", path, error)
        os.replace(mine, path)


def load_confidence(
    root: Path, samples: Samples, uids: Sequence[str], stop: Stop | None = None, prints: Fingerprints | None = None
) -> Mapping[str, float]:
    """The model's probability of each sample's target, remembered per content of the sample.

    Written now and then, so that selecting from a large dataset may be stopped and go on. Raises Interrupted then.
    """
    stop = stop or Stop()
    more = [] if samples.classes is None else [sorted(samples.classes.items())]
    key = keys.digest(samples.model.original.key, samples.dataset.key, samples.target, *more)
    path = root / "state" / f"confidence.{key[:8]}.json"
    known = _known(path)
    fingerprints = (prints or Fingerprints(root)).of(samples.dataset, uids)
    missing = [u for u in uids if known.get(u, [None])[0] != fingerprints[u]]
    saved = time.monotonic()
    with stop.deferred():
        try:
            with stop.finishing():
                for start in range(0, len(missing), PORTION):
                    found = samples.confidence(missing[start : start + PORTION])
                    known |= {u: [fingerprints[u], p] for u, p in found.items()}
                    if time.monotonic() - saved >= SAVE_SECONDS:
                        write_json(path, known)
                        saved = time.monotonic()
                    stop.check()
        finally:
            if missing:
                write_json(path, known)
    return {u: known[u][1] for u in uids if u in known and known[u][0] == fingerprints[u]}


def _known(path: Path) -> dict[str, list]:
    """uid -> [fingerprint, confidence]."""
    try:
        return {uid: list(known) for uid, known in document(path, Confidences, LISTING).items()}
    except FileNotFoundError:
        return {}
    except OSError as error:
        log.warning("%s cannot be read (%s); asking the model again", path, error)
        return {}
