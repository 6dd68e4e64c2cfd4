"""From what people say, names, files or objects, to the objects that the runner works with, by the runner's code."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from attrib.api.inputs import given
from attrib.api.names import Given, Input
from attrib.api.nets import RUN, Net, named, net_of, overrides_of, snake
from attrib.config.compose import compose, compose_node, plain
from attrib.config.objects import (
    completed,
    dataset_of,
    estimation_of,
    method_of,
    metrics_of,
    no_field,
)
from attrib.config.places import presets
from attrib.datasets import Dataset, ImageTransform, Selection, TextDataset, WaveTransform
from attrib.methods import Method
from attrib.metrics import Metric
from attrib.types import UserError

# ---- methods and metrics ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Explainer:
    """A method as it was given. ``preset`` and ``fields``: of one that was chosen by its name."""

    method: Method
    name: str
    node: Mapping[str, Any]
    preset: str | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)


def explainer(method: Any, fields: Mapping[str, Any] | None = None, overrides: Sequence[str] = ()) -> Explainer:
    """A preset's name, the path of a YAML, or a method. Raises UserError."""
    fields, own = fields or {}, overrides_of("method", overrides)
    if isinstance(method, str) and not method.endswith((".yaml", ".yml")):
        name = named("method", method)
        values = compose("run", ["~dataset", "~model", "metric=[]", f"method={name}", *own])
        node = {**values.values["method"], **fields}
        made = _with_fields(node, f"method {name}" if fields else values.files["method"], fields)
        return Explainer(made, str(node.get("name", name)), node, name, dict(fields))
    if isinstance(method, str | Path):
        node = {**yaml_of(Path(method)), **fields}
        return Explainer(_with_fields(node, str(method), fields), str(node.get("name", Path(method).stem)), node)
    if isinstance(method, type) or not all(hasattr(method, name) for name in ("attribute", "MAPS", "fit")):
        raise UserError(
            f"method is {_what(method)}; give a method such as attrib.methods.iba.IBA(), the path of a YAML or a name "
            f"(there are: {', '.join(presets('method'))})"
        )
    if fields:
        known = [f.name for f in dataclasses.fields(method)]
        for name in fields:
            if name not in known:
                raise UserError(no_field(type(method).__name__, name, known) + _of_a_run(name, fields[name]))
        method = dataclasses.replace(method, **fields)
    return Explainer(method, snake(type(method).__name__), {})


def _with_fields(node: Mapping[str, Any], where: str, fields: Mapping[str, Any]) -> Method:
    """What ``method_of`` makes. Raises UserError, also for an argument that is no field of the method but of a run."""
    try:
        return method_of(node, where)
    except UserError as error:
        for name, value in fields.items():
            if f"has no field {name!r}" in str(error) and (advice := _of_a_run(name, value)):
                raise UserError(f"{error}{advice}") from error
        raise


def _of_a_run(name: str, value: Any) -> str:
    return f"; {name} is a setting of the run: run={{{name!r}: {value!r}}}" if name in RUN else ""


def _what(thing: Any) -> str:
    return f"the class {thing.__name__}" if isinstance(thing, type) else type(thing).__name__


def yaml_of(path: Path, resolve: bool = True) -> dict[str, Any]:
    """The fields of a YAML file; ``resolve``: with what they refer to. Raises UserError."""
    try:
        node = OmegaConf.load(path.expanduser())
        plain_node = OmegaConf.to_container(node, resolve=resolve)
    except (OSError, OmegaConfBaseException, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    except Exception as error:  # of the YAML parser, which has no class of its own above all
        raise UserError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(plain_node, dict):
        raise UserError(f"{path} holds no fields; a method's begins with _target_: attrib.methods.iba.IBA")
    return {str(key): value for key, value in plain_node.items()}


def measures(metrics: Any, overrides: Sequence[str] = ()) -> dict[str, Metric]:
    """Names, paths of YAMLs and metrics; of a mapping, its keys are what they are called. Raises UserError."""
    if isinstance(metrics, str | Path) or hasattr(metrics, "score"):
        metrics = [metrics]
    if not isinstance(metrics, Iterable):
        raise UserError(f"metrics is {type(metrics).__name__}; give names (there are: {', '.join(presets('metric'))})")
    items = metrics.items() if isinstance(metrics, Mapping) else [(None, one) for one in metrics]
    found: dict[str, Metric] = {}
    for called, one in items:
        name, made = _measure(one, overrides)
        name = str(called or name)
        if name in found:
            raise UserError(f"metrics: {name} comes twice; name them: metrics={{'a': ..., 'b': ...}}")
        found[name] = made
    if not found:
        raise UserError(f"metrics: none is given (there are: {', '.join(presets('metric'))})")
    return found


def _measure(one: Any, overrides: Sequence[str]) -> tuple[str, Metric]:
    if isinstance(one, str) and not one.endswith((".yaml", ".yml")):
        name = named("metric", one)
        own = [text for text in overrides_of("metric", overrides) if text.lstrip("+").startswith(f"metric.{name}.")]
        nodes = compose("run", ["~dataset", "~model", "method=random", f"metric=[{name}]", *own]).values["metric"]
        ((name, made),) = metrics_of(nodes).items()
        return name, made
    if isinstance(one, str | Path):
        stem = Path(one).stem
        return stem, metrics_of({stem: yaml_of(Path(one))})[stem]
    if isinstance(one, type) or not all(hasattr(one, name) for name in ("score", "COLUMNS", "NEEDS_ROI")):
        raise UserError(
            f"metrics: {_what(one)}; give metrics such as attrib.metrics.EHR(), paths of YAMLs or names "
            f"(there are: {', '.join(presets('metric'))})"
        )
    return snake(type(one).__name__), one


# ---- data ----------------------------------------------------------------------------------------------


def _composed_dataset(name: str, net: Net, overrides: Sequence[str]) -> tuple[Mapping[str, Any], str]:
    """The node of a dataset's preset for the net, and what messages call it. Raises UserError."""
    chosen = [f"dataset={named('dataset', name)}", "method=random", "metric=[]", *overrides_of("dataset", overrides)]
    if net.preset is not None:
        values = compose("run", [*chosen, f"model={net.preset}", *net.overrides])
        return completed(values.values, values.files)["dataset"], values.files["dataset"]
    config = compose_node("run", chosen)
    OmegaConf.update(config, "model", {"name": net.name, "input": _as_node(net.input)}, merge=False, force_add=True)
    values = plain(config)
    return values.values["dataset"], values.files["dataset"]


def _as_node(how: Input) -> Any:
    """How a net that has no YAML wants its data, as the YAML would say it. An encoder is put in afterwards."""
    if isinstance(how, WaveTransform):
        return {"_target_": WaveTransform.NAME, **dataclasses.asdict(how)}
    if isinstance(how, ImageTransform):
        fields = dataclasses.asdict(how)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items() if not k.startswith("max_")}
    return None


def _with_input(dataset: Dataset, net: Net) -> Dataset:
    if isinstance(dataset, TextDataset) and net.preset is None:
        if net.input is None or isinstance(net.input, ImageTransform | WaveTransform):
            raise UserError(f"{net.name}: a dataset of texts needs the net's tokenizer (tokenizer=...)")
        return dataset.with_encoder(net.input)
    return dataset


def dataset(
    name: str, net: Any, *, transform: Any = None, tokenizer: Any = None, overrides: Sequence[str] = ()
) -> Dataset:
    """The data set of a preset, as a net wants it: what ``attrib run dataset=NAME model=NET`` explains.

    net         as for :func:`attrib.explain`; ``transform`` and ``tokenizer`` as there
    overrides   what else the command line would say: ``["dataset.root=/data/imagenet", "dataset.split=val"]``

    Its rules of selection are not applied. Raises UserError.

    >>> photos = dataset("photos", "efficientnet_lite0", overrides=["dataset.packages=[scikit-image]"])
    >>> tuple(photos.batch(photos.uids[:1]).x.shape)
    (1, 3, 224, 224)
    """
    own = overrides_of("model", overrides)
    chosen = net_of(net, transform=transform, tokenizer=tokenizer, overrides=own)
    node, where = _composed_dataset(name, chosen, overrides)
    return _with_input(dataset_of(node, where), chosen)


def estimation(fit: Any, net: Net, method: str, overrides: Sequence[str] = ()) -> tuple[Dataset, Selection]:
    """What a method is fitted on: that of a dataset's preset (its ``estimation``), or samples. Raises UserError."""
    if isinstance(fit, str):
        node, where = _composed_dataset(fit, net, overrides)
        data, select = estimation_of(node, where, method)
        return _with_input(data, net), select
    return given(fit, net.input, what="fit", pad=net.pad).dataset, Selection()


def samples(x: Any, net: Net, uids: Sequence[str] | None, target: Any) -> tuple[Given, Any]:
    """``x`` by name, and the rule that says which class is explained. Raises UserError.

    A class for each sample becomes the samples' label.
    """
    if hasattr(target, "__array__") and np.ndim(target) == 0:  # a number of numpy, or a tensor without axes
        target = int(target)
    labels = labels_of(target)
    found = given(x, net.input, uids, labels, pad=net.pad)
    return found, "label" if labels is not None else "predicted" if target is None else target


def labels_of(target: Any) -> Any:
    """What ``target`` says of each sample by itself, such as (N,) classes; None if it says one thing of all."""
    each = isinstance(target, list | tuple) or (hasattr(target, "__array__") and np.ndim(target) > 0)
    return target if each else None
