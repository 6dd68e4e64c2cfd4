"""From a resolved configuration to the objects of an experiment."""

from __future__ import annotations

import dataclasses
import inspect
import types
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import hydra.utils
import torch
from hydra.errors import InstantiationException
from torch import nn

from attrib import keys
from attrib.config.fields import checked_value, hints_of, is_node
from attrib.config.network import by_hand
from attrib.config.trained import (
    NOT_OF_THE_NET,
    check_encoder,
    check_transform,
    names_of_classes,
    takes_classes,
    with_checkpoint,
)
from attrib.datasets import Dataset, Selection, TextDataset
from attrib.experiment.cell import Experiment
from attrib.experiment.regions import fitting
from attrib.experiment.samples import example, parse_device
from attrib.methods import Method
from attrib.metrics import Metric
from attrib.models import Classifier, load_weights
from attrib.models.precision import Precision
from attrib.models.randomise import randomised
from attrib.models.zoo import input_of, seeded
from attrib.running.options import Options
from attrib.types import UserError, did_you_mean

Node = Mapping[str, Any]

DTYPES = ("float32", "float64")
INPUT = ("size", "mean", "std", "resize", "resize_size", "interpolation")  # the fields of model.input


def no_field(what: str, given: str, known: Iterable[str]) -> str:
    return f"{what} has no field {given!r}{did_you_mean(given, known)} (fields: {', '.join(known) or 'none'})"


def target(node: Node, where: str) -> Callable[..., Any]:
    """The class or function that a node's ``_target_`` names. Raises UserError that begins with ``where``."""
    path = node.get("_target_")
    if not isinstance(path, str):
        raise UserError(f"{where}: no _target_: it must name the class to build, such as attrib.methods.iba.IBA")
    try:
        what = hydra.utils.get_object(MOVED.get(path, path))
    except Exception as error:  # importing a user's module can raise anything
        raise UserError(f"{where}: cannot import _target_ {path}: {error}") from error
    if not callable(what):
        raise UserError(f"{where}: _target_ {path} is {type(what).__name__}, not a class or function")
    return what


def _checked(node: Node, where: str) -> tuple[Callable[..., Any], dict[str, Any]]:
    """What a node's ``_target_`` names, and the node with its fields, and those of nodes in it, as their types want."""
    what = target(node, where)
    checked = {k: _checked(v, f"{where}: {k}")[1] if is_node(v) else v for k, v in node.items()}
    try:
        parameters = inspect.signature(what).parameters
    except (TypeError, ValueError):  # some builtins have none
        return what, checked
    known, named = hints_of(what), [n for n, p in parameters.items() if p.kind is not p.VAR_KEYWORD]
    for field, value in node.items():
        if field.startswith("_"):
            continue
        if field in named:
            sloppy = value is None and parameters[field].default is None  # x: int = None
            if field in known and not is_node(value) and not sloppy:
                checked[field] = checked_value(f"{where}: {field}", known[field], value)
        elif len(named) == len(parameters):
            raise UserError(f"{where}: {no_field(str(node['_target_']), field, named)}")
    return what, checked


def _where_it_is_now(node: Any) -> Any:
    """A node, and the nodes in it, with the paths of classes that have moved (``MOVED``) replaced."""
    if not isinstance(node, Mapping):
        return node
    return {k: MOVED.get(v, v) if k == "_target_" else _where_it_is_now(v) for k, v in node.items()}


def build(node: Node, where: str) -> Any:
    """The object that a node describes by ``_target_`` and its arguments.

    Raises UserError that begins with ``where`` and names the field for an unknown field or one of
    the wrong type, a target that cannot be imported, or arguments that the target refuses.
    """
    _, checked = _checked(node, where)
    try:
        return hydra.utils.instantiate(_where_it_is_now(checked), _convert_="all")
    except InstantiationException as error:
        cause = error.__cause__ or error
        if (advice := by_hand(node, cause)) is not None:
            raise UserError(f"{where}: {node['_target_']} {advice}") from error
        while cause.__cause__ is not None and not isinstance(cause, UserError):
            cause = cause.__cause__
        if isinstance(cause, UserError):
            raise UserError(f"{where}: {cause}") from error
        raise UserError(f"{where}: {node['_target_']} cannot be built: {type(cause).__name__}: {cause}") from error


# Paths that YAML files of earlier versions name, and where the classes are now.
MOVED = {
    "attrib.methods.covariance.Covariance": "attrib.methods.parts.covariance.Covariance",
    "attrib.methods.statistics.FeatureStatistics": "attrib.methods.parts.statistics.FeatureStatistics",
    "attrib.methods.wgan.WGAN": "attrib.methods.parts.wgan.WGAN",
}

# What a part of an experiment must have; see the protocols in the packages of the same names.
MEMBERS = {
    "dataset": ("fingerprint", "batch", "uids", "key", "names", "modality", "box_area"),
    "method": (
        *("attribute", "VERSION", "MAPS", "EXTRAS", "COLUMNS", "DOCUMENTS", "TOKENS", "MODALITIES", "TEXT_ROLES"),
        *("roles", "fit"),
    ),
    "metric": ("score", "VERSION", "COLUMNS", "CURVES", "NEEDS_ROI", "NEEDS_EXPLAIN", "MODALITIES", "roles"),
}
# ... and a dataset, to be shown to people: see the protocols Images, Texts and Sounds.
OF_MODALITY = {"image": ("picture",), "text": ("tokens",), "audio": ("wave", "rate")}


def _build_as(part: str, node: Node, where: str) -> Any:
    made = build(node, where)
    if part != "dataset" and not dataclasses.is_dataclass(made):
        raise UserError(
            f"{where}: {node['_target_']} must be a frozen dataclass, whose fields are what the YAML may set and what "
            "tells its results from others: write @dataclass(frozen=True) above the class (docs/how-to/add-a-"
            f"{part}.md)"
        )
    wanted = (*MEMBERS[part], *(OF_MODALITY.get(getattr(made, "modality", ""), ()) if part == "dataset" else ()))
    missing = [name for name in wanted if not hasattr(made, name)]
    if missing:
        base = {"method": "attrib.methods.Method", "metric": "attrib.metrics.Metric"}.get(part)
        advice = f"; derive the class from {base}, which has the defaults" if base else ""
        raise UserError(f"{where}: {node['_target_']} is not a {part}: it has no {', '.join(missing)}{advice}")
    if part != "dataset":
        try:
            keys.spec(made)
        except TypeError as error:
            raise UserError(f"{where}: {node['_target_']} cannot have a key ({error}); see docs/how-to") from error
    return made


def _without(node: Node, *names: str) -> dict[str, Any]:
    return {k: v for k, v in node.items() if k not in names}


def _filled(given: Node, known: Node) -> dict[str, Any]:
    """``known`` where ``given`` is null. A resize_size belongs to one size and one way to resize."""
    full = {k: known.get(k) if v is None else v for k, v in given.items()}
    if given.get("resize_size", 0) is None and any(full.get(k) != known.get(k) for k in ("size", "resize")):
        full["resize_size"] = None
    return full


def with_input(config: Node, where: str = "model") -> Node:
    """The configuration without nulls in ``model.input``.

    They stand for what the library that the net comes from says of its weights. The nulls that
    the transforms of the dataset took over from there are filled as well; what is given stays.
    The input of a text net is an encoder, and has none.

    Raises UserError that names the fields of which the library says nothing.
    """
    model = config["model"]
    given = model.get("input")
    if not isinstance(given, Mapping):
        raise UserError(
            f"{where}: no input; it says how images are prepared ({', '.join(INPUT)}), "
            "or texts (the _target_ of an encoder)"
        )
    if is_node(given):
        return config
    if all(v is not None for k, v in given.items() if k != "resize_size"):
        return config
    builder, arguments = _checked(_net(model), where)
    known = input_of(builder, **{k: v for k, v in arguments.items() if not k.startswith("_")})
    if any(given.get(k) not in (None, known.get(k)) for k in ("size", "resize")):
        known = {**known, "resize_size": None}  # the transform's own default
    missing = [f"model.input.{k}" for k in INPUT if given.get(k) is None and k not in known]
    if missing:
        name = model.get("arch", arguments["_target_"])
        raise UserError(f"{where}: how {name} wants its images is not known; set {', '.join(missing)}")
    full = _filled({k: given.get(k) for k in INPUT}, known)

    def followed(data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        transform, rest = data.get("transform"), _without(data, "transform")
        rest = {k: followed(v) if k in ("estimation", "each") else v for k, v in rest.items()}
        return {**rest, "transform": _filled(transform, full)} if isinstance(transform, Mapping) else rest

    return {**config, "model": {**model, "input": full}, "dataset": followed(config["dataset"])}


def _net(model: Node) -> dict[str, Any]:
    """Of a model YAML, what builds the net."""
    path = model.get("_target_")
    own = "classes" in model and isinstance(path, str) and takes_classes(target(model, "model"))
    return _without(model, *(name for name in NOT_OF_THE_NET if name != "classes" or not own))


def classifier(node: Node, options: Options, where: str = "model", dataset: Dataset | None = None) -> Classifier:
    """``node`` is a model YAML: what builds the net, and ``checkpoint``, ``match``, ``layers``, ``input``,
    ``output``.

    With ``randomise`` it is a copy with randomised layers; a sample of ``dataset`` shows their order.
    """
    arguments, shape = _net(node), None
    if not is_node(node["input"]):
        size = checked_value(f"{where}: input.size", int | tuple[int, int], node["input"].get("size"))
        mean = checked_value(f"{where}: input.mean", tuple[float, ...], node["input"].get("mean"))
        shape = (len(mean), size, size) if isinstance(size, int) else (len(mean), *size)
    layers = node.get("layers") or {}
    if not isinstance(layers, Mapping):
        raise UserError(f"{where}: layers must give a path to each role, not {layers!r}")
    if options.dtype not in DTYPES:
        raise UserError(f"run.dtype must be one of {', '.join(DTYPES)}, not {options.dtype!r}")
    net = seeded(lambda: build(arguments, where))  # random weights are the same in every run
    if not isinstance(net, nn.Module):
        raise UserError(f"{where}: {arguments['_target_']} gives {type(net).__name__}, not a torch.nn.Module")
    if node.get("checkpoint"):
        load_weights(net, str(node["checkpoint"]), node.get("match", "name"))
    known = getattr(net, "default_layers", {})
    paths = {role: known.get(role) if path is None else str(path) for role, path in layers.items()}
    how = build({"_target_": "attrib.models.Randomise", **(node.get("randomise") or {})}, f"{where}: randomise")
    model = Classifier(
        net,
        paths,
        rows=options.rows,
        device=parse_device(options.device),
        dtype=getattr(torch, options.dtype),
        # Where weights come from does not matter: they are in the key themselves.
        spec={**_without(arguments, "weights", "pretrained", "path"), **getattr(net, "spec", {})},
        input_shape=shape,
        output=output_of(node.get("output"), f"{where}: output"),
        classes=names_of_classes(node, target(arguments, where), where),
        fold=options.fold,
        compile=options.compile,
    )
    if not how.layers:
        return model
    if dataset is None:
        raise UserError(f"{where}: randomise needs a dataset, whose samples show the order of the layers")
    return randomised(model, net, how, example(dataset))


def output_of(given: Any, where: str) -> Any:
    """What ``model.output`` says, with functions in the place of nodes that name them."""
    if is_node(given):
        return build(given, where)
    if isinstance(given, Mapping) and is_node(given.get("take")):
        return {**given, "take": build(given["take"], f"{where}.take")}
    return given


def method_of(node: Node, where: str) -> Method:
    """What a method YAML describes. Raises UserError."""
    made: Method = _build_as("method", _without(node, "name", "modalities"), where)
    return made


def metrics_of(nodes: Mapping[str, Node | None]) -> dict[str, Metric]:
    """name -> metric, of those that are not null. Raises UserError."""
    return {name: _build_as("metric", node, f"metric {name}") for name, node in nodes.items() if node}


def dataset_of(node: Node, where: str) -> Dataset:
    """What a dataset YAML describes, without its rules of selection. Raises UserError."""
    made: Dataset = _build_as("dataset", _without(node, "name", "target", "select", "estimation"), where)
    return made


def estimation_of(node: Node, where: str, method: str) -> tuple[Dataset, Selection]:
    """What ``method`` is fitted on with the dataset YAML ``node``. Raises UserError."""
    estimation, at = node.get("estimation"), f"{where}: estimation"
    if estimation is None:
        raise UserError(f"{where}: {method} is fitted on data first; add estimation: ...")
    return dataset_of(estimation, at), _selection(estimation, f"{at}.select")


Files = Mapping[str, str]  # part -> the file it was composed from


def _where(config: Node, part: str, files: Files) -> str:
    """How messages call a part: by its file, or, where that is not known, by its name."""
    return files.get(part) or f"{part} {config[part].get('name', '')}".rstrip()


def completed(config: Node, files: Files = types.MappingProxyType({})) -> Node:
    """The configuration with what it leaves to the checkpoint and to the net's library. Raises UserError."""
    where = _where(config, "model", files)
    return with_input(with_checkpoint(config, where), where)


def experiment(config: Node, files: Files = types.MappingProxyType({}), assumed: Collection[str] = ()) -> Experiment:
    """All objects of one cell, from a plain, resolved configuration (see configs/run.yaml).

    files     the files that its parts were composed from, for messages
    assumed   metrics that nobody named; those that need regions are left out where the data have none

    Raises UserError for anything that a person wrote wrong.
    """
    for part in ("dataset", "model", "method", "run"):
        if not isinstance(config.get(part), Mapping):
            raise UserError(f"no {part} chosen: add {part}=NAME (attrib list {part}s)")
    options = options_of(config["run"])
    config = completed(config, files)
    data, method_node = config["dataset"], config["method"]
    names = {part: str(config[part].get("name", part)) for part in ("dataset", "model", "method")}
    where = {part: _where(config, part, files) for part in names}
    method = method_of(method_node, where["method"])
    dataset = dataset_of(data, where["dataset"])
    select = _selection(data, f"{where['dataset']}: select")
    metrics = fitting(metrics_of(config.get("metric") or {}), assumed, dataset, names["dataset"])
    if config.get("metric"):
        config = {**config, "metric": {k: v for k, v in config["metric"].items() if not v or k in metrics}}
    model = classifier(config["model"], options, where["model"], dataset)
    precision = Precision.of(config.get("precision"))
    model, scorer = model.with_precision(precision.explain), model.with_precision(precision.score)
    if model.variant is not None:
        names["model"] += f"-{model.variant.name}"
    estimation, estimation_select = None, Selection()
    if method.fit is not None:
        estimation, estimation_select = estimation_of(data, where["dataset"], names["method"])
    cell = Experiment(
        names=names,
        dataset=dataset,
        target=data.get("target", "label"),
        select=select,
        estimation=estimation,
        estimation_select=estimation_select,
        model=model,
        scorer=scorer,
        method=method,
        metrics=metrics,
        seed=checked_value("seed", int, config.get("seed", 0)),
        config=_without(config, "run", "paper"),
    )
    check_modality(method_node, cell)
    cell.check_layers()
    check_transform(getattr(dataset, "transform", None), config["model"], model, where["model"])
    if isinstance(dataset, TextDataset):
        check_encoder(dataset.encoder, model, config["model"].get("checkpoint"), where["model"])
    return cell


def check_modality(node: Node, cell: Experiment) -> None:
    """Raises UserError for a method whose values are meant for other data (``modalities`` of its preset)."""
    meant, holds = node.get("modalities"), cell.dataset.modality
    if meant and holds not in meant:
        raise UserError(
            f"method {cell.names['method']} has the values for {' and '.join(meant)} data, but dataset "
            f"{cell.names['dataset']} holds {holds}; attrib list methods shows what fits"
        )


def _selection(node: Node, where: str) -> Selection:
    if not node.get("select"):
        return Selection()
    return build({"_target_": "attrib.datasets.Selection", **node["select"]}, where)


def options_of(node: Node) -> Options:
    """The ``run`` node: settings that change speed and storage, never results. Raises UserError."""
    known = hints_of(Options)
    for field in node:
        if field not in known:
            raise UserError(no_field("run", field, known))
    return Options(**{field: checked_value(f"run.{field}", known[field], value) for field, value in node.items()})
