"""The front door: explain, evaluate and compare in a line each, by the objects and the code of the runner."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import itertools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from attrib.api.comparison import SHOWN, Comparison
from attrib.api.computing import (
    Handed,
    One,
    cell_of,
    classifier_of,
    explained,
    state_of,
    targets_of,
)
from attrib.api.explanation import Explanation
from attrib.api.lines import Origin
from attrib.api.maps import as_computed, maps_of, with_roi
from attrib.api.modes import undisturbed
from attrib.api.names import Given
from attrib.api.nets import net_of
from attrib.api.parts import Explainer, explainer, labels_of, measures, samples
from attrib.api.scoring import check_metrics, scores
from attrib.api.speech import to_callers
from attrib.experiment.cell import Experiment
from attrib.fit import State
from attrib.models import Classifier
from attrib.models.device_memory import is_lost
from attrib.types import SampleError, UserError

log = logging.getLogger(__name__)


@undisturbed
def explain(
    net: Any,
    x: Any,
    target: Any = None,
    method: Any = "iba",
    fit: Any = None,
    layers: Mapping[str, str] | str | None = None,
    *,
    transform: Any = None,
    tokenizer: Any = None,
    uids: Sequence[str] | None = None,
    seed: int = 0,
    precision: Any = None,
    run: Mapping[str, Any] | None = None,
    root: str | Path | None = None,
    overrides: Sequence[str] = (),
    **fields: Any,
) -> Explanation:
    """Which parts of some inputs a network's decision rests on, as ``attrib run`` computes it, to the bit.

    net        a torch.nn.Module, an ``attrib.models.Classifier``, or the name of a model (``attrib list models``)
    x          a tensor as the net reads it; images (PIL, uint8 arrays, files), sentences or sounds (arrays, pairs of an
               array and its rate, files); a ``Batch``, a torch dataset or DataLoader (of inputs, or of inputs and
               labels, as its ``collate_fn`` makes them), a dataset (:func:`dataset`). What stands behind the ids of a
               text and is the net's ``pad_id`` is padding
    target     the class that is explained: None or "predicted", "second", a number, a name, a number for each sample,
               "label" (a dataset's), or a contrast {"of": ..., "against": ...}
    method     the name of a method (``attrib list methods``), the path of a YAML, or a method
    fit        what a method that learns from data first is fitted on: the name of a dataset, or anything that ``x`` may
               be
    layers     role -> path of a layer, or the path alone where the method reads one; by default the preset's, or found
               out (of a net of texts with one embedding that too)
    transform  how images or sounds are prepared for a module: an ``ImageTransform``, a ``WaveTransform``, fields of
               one, or of torchvision ``weights.transforms()`` or a ``Compose`` of Resize, CenterCrop, ToTensor and
               Normalize. Presets and nets of timm bring their own
    tokenizer  of a module that reads texts: an encoder of attrib, a fast tokenizer of transformers, or its name
    uids       the samples' names, to which their random numbers belong; of a dataset: which of its samples. By default
               files are called what they are called, samples of a DataLoader by their places, and all else by digests
               of the contents, so that an image is explained alike wherever it stands
    seed       of all random numbers
    precision  of the net: "tf32", "bfloat16" or "float16", or {"explain": ..., "score": ...}; None: float32
    run        how to compute: {"device": ..., "dtype": ..., "batch": 8, "rows": 64}
    root       a work directory where what is fitted is kept for the next time; None: nothing is written
    overrides  what the command line would say of a named model or dataset: ["model.arch=resnet18"]
    fields     of the method, such as ``beta=20``

    As in a run, a sample that cannot be read or explained costs the others nothing: a warning names it, its reason is
    in ``failures``, and the maps are those of ``uids``.

    Raises UserError for what can be put right; if no sample is left, what the method raised, or SampleError.

    >>> import torch
    >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 4 * 4, 2))
    >>> explanation = explain(net, torch.rand(2, 3, 4, 4), target=0, method="gradient")
    >>> tuple(explanation.map.shape)
    (2, 4, 4)
    """
    try:
        chosen = explainer(method, fields, overrides)
    except UserError as error:
        near = [one for name in fields for one in difflib.get_close_matches(name, ARGUMENTS, n=1, cutoff=0.75)]
        if not near:
            raise
        raise UserError(f"{error}; explain itself has the argument {near[0]!r}") from error
    door = net_of(
        net, layers, transform=transform, tokenizer=tokenizer, run=run, overrides=overrides, precision=precision
    )
    door.check_roles([chosen.method])
    found, rule = samples(x, door, uids, target)
    cell = cell_of(door, found, rule, chosen, {}, seed, fit, overrides)
    state = state_of(cell, found.uids, door.options.read, root)
    made = _explanation(cell, found, state, Origin(door, chosen, _name(fit), tuple(overrides), labels_of(target)))
    _warn({chosen.name: made.failures})
    return made


def _explanation(cell: Experiment, found: Given, state: State, origin: Origin) -> Explanation:
    known, failures = explained(cell, found.uids, origin.net.options.read, state)
    there = tuple(uid for uid in found.uids if uid in known)
    return Explanation(cell, there, known, state, origin, failures, found.uids)


@undisturbed
def evaluate(
    net: Any,
    x: Any,
    maps: Any,
    metrics: Any = ("insertion_deletion",),
    roi: Any = None,
    *,
    target: Any = None,
    layers: Mapping[str, str] | None = None,
    transform: Any = None,
    tokenizer: Any = None,
    uids: Sequence[str] | None = None,
    seed: int = 0,
    precision: Any = None,
    run: Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
) -> pd.DataFrame:
    """Scores of maps, a row for each sample, map and column: as the runner stores them.

    maps      an :class:`Explanation` of ``net`` and ``x``, which may be None then: its target, uids, seed and so on are
              taken, and no others are. Or maps (N, H, W), of sounds (N, L), of texts (N, T) with anything on padding or
              N maps (T,), or {name: maps}
    metrics   names (``attrib list metrics``), paths of YAMLs or metrics; {name: metric} says what they are called
    roi       regions of interest, bool: of pictures (H, W) in the pixels of each picture, of tensors as the net reads
              them, of sounds (L,)

    The other arguments are those of :func:`explain`. Columns: uid, map, metric, column, direction ("higher" is better,
    "lower" or "none"), value, state ("ok" or "failed") and reason. A sample that cannot be read, or has no map, has
    failed; so has every sample under a metric that is refused, if another metric is left. Raises UserError.

    >>> import torch
    >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 4 * 4, 2))
    >>> x, region = torch.rand(1, 3, 4, 4), torch.eye(4, dtype=torch.bool)
    >>> evaluate(net, x, region[None].float(), "ehr", roi=region)["value"].round(6).tolist()
    [1.0]
    """
    named = measures(metrics, overrides)
    if isinstance(maps, Explanation):
        others = {"target": target, "layers": layers, "transform": transform, "tokenizer": tokenizer, "uids": uids}
        others |= {"precision": precision, "run": run, "seed": seed or None}
        maps.check_is_of(net, x, [name for name, value in others.items() if value is not None])
        return maps.evaluate(named, roi)
    door = net_of(net, layers, precision, transform=transform, tokenizer=tokenizer, run=run, overrides=overrides)
    found, rule = samples(x, door, uids, target)
    found = found if roi is None else with_roi(found, roi)
    arrays = {
        name: maps_of(one, name, len(found.uids))
        for name, one in (maps if isinstance(maps, Mapping) else {"map": maps}).items()
    }
    if not arrays:
        raise UserError("maps: none is given")
    method = Explainer(Handed(tuple(arrays)), "maps", {})
    cell = cell_of(door, found, rule, method, named, seed)
    size = door.options.read
    check_metrics(cell, found.uids)
    targets, failures = targets_of(cell, found.uids, size)
    _warn({"maps": failures})
    dtype = cell.model.dtype
    known = {
        uid: One({n: as_computed(each[i], dtype, f"{n} of {uid}") for n, each in arrays.items()}, targets[uid], {})
        for i, uid in enumerate(found.uids)
        if uid in targets
    }
    return scores(cell, known, size, None, found.uids, failures)


@undisturbed
def compare(
    net: Any,
    x: Any,
    methods: Any,
    metrics: Any = ("insertion_deletion",),
    roi: Any = None,
    *,
    target: Any = None,
    fit: Any = None,
    layers: Mapping[str, str] | None = None,
    transform: Any = None,
    tokenizer: Any = None,
    uids: Sequence[str] | None = None,
    seed: int = 0,
    precision: Any = None,
    run: Mapping[str, Any] | None = None,
    root: str | Path | None = None,
    overrides: Sequence[str] = (),
) -> Comparison:
    """Several methods on the same samples: their maps, and a table with intervals and paired tests.

    methods   names, paths of YAMLs or methods; {name: method} says what they are called

    The other arguments are those of :func:`explain` and :func:`evaluate`. Methods whose fits are equal share one state.
    As in a grid of runs, a method that is refused, or fails, costs the others nothing: a warning names it, and its
    reason is in ``refused``. Raises as they do, if no method is left.

    >>> import torch
    >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 4 * 4, 2))
    >>> region = torch.eye(4, dtype=torch.bool).expand(3, 4, 4)
    >>> found = compare(net, torch.rand(3, 3, 4, 4), ["gradient", "random"], "ehr", region)
    >>> list(found.table["method"]), len(found.tests)
    (['gradient', 'random'], 1)
    """
    listed = methods.items() if isinstance(methods, Mapping) else [(None, m) for m in _several(methods)]
    chosen: dict[str, Explainer] = {}
    for called, method in listed:
        one = explainer(method, overrides=overrides)
        name = str(called or one.name)
        if name in chosen:
            raise UserError(f"methods: {name} comes twice; name them: methods={{'a': ..., 'b': ...}}")
        chosen[name] = dataclasses.replace(one, name=name)
    if not chosen:
        raise UserError("methods: none is given (attrib list methods says what there is)")
    named = measures(metrics, overrides)
    door = net_of(
        net, layers, transform=transform, tokenizer=tokenizer, run=run, overrides=overrides, precision=precision
    )
    door.check_roles([*(one.method for one in chosen.values()), *named.values()])
    found, rule = samples(x, door, uids, target)
    found = found if roi is None else with_roi(found, roi)
    explanations: dict[str, Explanation] = {}
    scored: dict[str, pd.DataFrame] = {}
    errors: dict[str, Exception] = {}
    states: dict[str, State] = {}
    model: Classifier | None = None
    for name, one in chosen.items():
        try:
            model = model or classifier_of(door, found, one)
            cell = cell_of(door, found, rule, one, named, seed, fit, overrides, model)
        except UserError as error:
            errors[name] = _refusal(name, error)
            continue
        check_metrics(cell, found.uids)
        try:
            state = state_of(cell, found.uids, door.options.read, root, states)
            made = _explanation(cell, found, state, Origin(door, one, _name(fit), tuple(overrides), labels_of(target)))
            explanations[name] = made
            scored[name] = made.evaluate()
        except Exception as error:  # a method may raise anything
            if is_lost(error):
                raise
            errors[name] = _refusal(name, error)
    if not scored:
        raise _none_left(errors)
    _warn({name: made.failures for name, made in explanations.items()})
    return Comparison(explanations, scored, {name: _said(error) for name, error in errors.items()})


def _warn(failures: Mapping[str, Mapping[str, str]]) -> None:
    """Of the samples that methods left out (method -> uid -> why): one line, for whatever many of them, per reason."""
    methods: dict[str, list[str]] = {}
    for name, reasons in failures.items():
        for reason in reasons.values():
            methods.setdefault(reason, []).append(name)
    for reason, names in itertools.islice(methods.items(), SHOWN):
        log.warning("%s left out a sample: %s", ", ".join(names), reason)
    if len(methods) > SHOWN:
        log.warning("and %d more are left out; failures has all reasons", len(methods) - SHOWN)


def _refusal(name: str, error: Exception) -> Exception:
    expected = isinstance(error, UserError | SampleError)
    log.warning("method %s is left out: %s", name, _said(error), exc_info=None if expected else error)
    return error


def _said(error: Exception) -> str:
    expected = isinstance(error, UserError | SampleError)
    return to_callers(str(error) if expected else f"{type(error).__name__}: {error}")


def _none_left(errors: Mapping[str, Exception]) -> Exception:
    """The error of all methods, or one that lists them."""
    first = next(iter(errors.values()))
    if len({_said(error) for error in errors.values()}) == 1:
        return first
    return UserError("no method is left:\n" + "\n".join(f"  {name}: {_said(error)}" for name, error in errors.items()))


ARGUMENTS = tuple(name for name in inspect.signature(explain).parameters if name != "fields")


def _name(fit: Any) -> str | None:
    return fit if isinstance(fit, str) else None


def _several(things: Any) -> Sequence[Any]:
    return list(things) if isinstance(things, list | tuple) else [things]
