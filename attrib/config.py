"""From a resolved configuration to the objects of an experiment: the only module that knows Hydra."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

import hydra.utils
import torch
from hydra.errors import InstantiationException

from attrib.datasets import Selection
from attrib.experiment import Experiment
from attrib.models import Classifier, load_weights
from attrib.plan import Options
from attrib.samples import parse_device
from attrib.types import UserError

Node = Mapping[str, Any]

DTYPES = ("float32", "float64")


def _known(what: str, given: str, known: list[str]) -> str:
    near = difflib.get_close_matches(given, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{what} has no field {given!r}{hint} (fields: {', '.join(known) or 'none'})"


def build(node: Node, where: str) -> Any:
    """The object that a node describes by ``_target_`` and its arguments.

    Raises UserError that names ``where`` and the field for an unknown field, a target that
    cannot be imported, or arguments that the target refuses.
    """
    target = node.get("_target_")
    if not isinstance(target, str):
        raise UserError(f"{where}: no _target_: it must name the class to build, such as attrib.methods.iba.IBA")
    try:
        what = hydra.utils.get_object(target)
    except Exception as error:  # importing a user's module can raise anything
        raise UserError(f"{where}: cannot import _target_ {target}: {error}") from error
    parameters = inspect.signature(what).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        for field in node:
            if not field.startswith("_") and field not in parameters:
                raise UserError(f"{where}.yaml: {_known(target, field, list(parameters))}")
    try:
        return hydra.utils.instantiate(dict(node), _convert_="all")
    except InstantiationException as error:
        cause = error.__cause__ or error
        while cause.__cause__ is not None and not isinstance(cause, UserError):
            cause = cause.__cause__
        if isinstance(cause, UserError):
            raise UserError(f"{where}: {cause}") from error
        raise UserError(f"{where}: {target} cannot be built: {type(cause).__name__}: {cause}") from error


def _without(node: Node, *names: str) -> dict[str, Any]:
    return {k: v for k, v in node.items() if k not in names}


def classifier(node: Node, options: Options, where: str = "model") -> Classifier:
    """``node`` is a model YAML: what builds the net, and ``checkpoint``, ``match``, ``layers``, ``input``."""
    arguments = _without(node, "name", "layers", "input", "checkpoint", "match")
    net = build(arguments, where)
    if node.get("checkpoint"):
        load_weights(net, node["checkpoint"], node.get("match", "name"))
    if options.dtype not in DTYPES:
        raise UserError(f"run.dtype must be one of {', '.join(DTYPES)}, not {options.dtype!r}")
    size, mean = node["input"]["size"], node["input"]["mean"]
    height, width = (size, size) if isinstance(size, int) else size
    return Classifier(
        net,
        node.get("layers") or {},
        rows=options.rows,
        device=parse_device(options.device),
        dtype=getattr(torch, options.dtype),
        spec=_without(arguments, "weights", "pretrained"),  # where weights come from; they are in the key themselves
        input_shape=(len(mean), height, width),
    )


def experiment(config: Node) -> Experiment:
    """All objects of one cell, from a plain, resolved configuration (see configs/run.yaml).

    Raises UserError for anything that a person wrote wrong.
    """
    for part in ("dataset", "model", "method", "run"):
        if not isinstance(config.get(part), Mapping):
            raise UserError(f"no {part} chosen; add {part}=... (see configs/{part}/)")
    options = options_of(config["run"])
    data, method_node = config["dataset"], config["method"]
    names = {part: str(config[part].get("name", part)) for part in ("dataset", "model", "method")}
    reserved = ("name", "target", "select", "estimation")
    where = {part: f"configs/{part}/{names[part]}" for part in names}
    method = build(_without(method_node, "name"), where["method"])
    metrics = {
        name: build(node, f"configs/metric/{name}") for name, node in (config.get("metric") or {}).items() if node
    }
    dataset = build(_without(data, *reserved), where["dataset"])
    model = classifier(config["model"], options, where["model"])
    for role in (*method.roles, *(method.fit.roles if method.fit else ())):
        model.path(role)

    estimation, estimation_select = None, Selection()
    if method.fit is not None:
        node = data.get("estimation")
        if node is None:
            raise UserError(f"{where['dataset']}.yaml: {names['method']} is fitted on data first; add estimation: ...")
        estimation = build(_without(node, *reserved), f"{where['dataset']}.yaml: estimation")
        estimation_select = _selection(node, f"{where['dataset']}.yaml: estimation.select")
    return Experiment(
        names=names,
        dataset=dataset,
        target=data.get("target", "label"),
        select=_selection(data, f"{where['dataset']}.yaml: select"),
        estimation=estimation,
        estimation_select=estimation_select,
        model=model,
        method=method,
        metrics=metrics,
        seed=int(config.get("seed", 0)),
        config={k: v for k, v in config.items() if k != "run"},
    )


def _selection(node: Node, where: str) -> Selection:
    if not node.get("select"):
        return Selection()
    return build({"_target_": "attrib.datasets.Selection", **node["select"]}, where)


def options_of(node: Node) -> Options:
    """The ``run`` node: how to compute, never what."""
    known = list(inspect.signature(Options).parameters)
    for field in node:
        if field not in known:
            raise UserError(f"configs/run: {_known('run', field, known)}")
    return Options(**node)
