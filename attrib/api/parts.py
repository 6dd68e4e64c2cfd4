"""From what people say, names, files or objects, to the objects that the runner works with, by the runner's code."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor, nn

from attrib.api.inputs import Given, Input, given
from attrib.config.compose import compose, compose_node, parse_overrides, plain
from attrib.config.objects import (
    build,
    classifier,
    completed,
    dataset_of,
    estimation_of,
    method_of,
    metrics_of,
    options_of,
)
from attrib.config.places import presets
from attrib.datasets import Dataset, HuggingFaceEncoder, ImageTransform, Selection, TextDataset, WaveTransform
from attrib.experiment.samples import parse_device
from attrib.methods import Method
from attrib.metrics import Metric
from attrib.models import Classifier, HuggingFaceClassifier, HuggingFaceImageClassifier
from attrib.models.precision import Precision
from attrib.running.options import Options
from attrib.types import UserError

RUN = ("device", "dtype", "batch", "rows")  # the settings of run.* that mean something here


def named(group: str, name: str) -> str:
    """``name`` if it is a preset of the group. Raises UserError that lists what there is, the nearest first."""
    known = list(presets(group))
    if name in known:
        return name
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    others = ", ".join([*near, *(one for one in known if one not in near)])
    raise UserError(f"there is no {group} {name!r} (there are: {others})")


def settings(run: Mapping[str, Any] | None) -> Options:
    """``run={"device": "cuda"}`` as the options of a run. Raises UserError."""
    for name in run or {}:
        if name not in RUN:
            raise UserError(f"run: {name!r} means nothing here (only: {', '.join(RUN)})")
    options = options_of(run or {})
    if options.batch == "auto":
        raise UserError("run: batch is a number here, not auto")
    return options


# ---- networks ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Net:
    """A network as it was given, and how it wants its data.

    preset      its name, if it is a preset's
    overrides   of the preset: ``model.*``
    """

    given: Any
    name: str
    input: Input
    options: Options
    layers: Mapping[str, str] | str | None = None
    preset: str | None = None
    overrides: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)  # of a preset: its node, complete
    precision: Precision = field(default_factory=Precision)

    def classifier(self, method: Method | None, shape: tuple[int, ...] | None, dataset: Dataset) -> Classifier:
        """The net as methods see it. ``shape`` is that of an image or sound. Raises UserError."""
        if isinstance(self.given, Classifier):
            if self.layers is not None:
                raise UserError("layers: a Classifier has its own; give them to it")
            return self.given
        layers = self.named_layers(method)
        if self.preset is not None:
            node = {**self.config, "layers": {**(self.config.get("layers") or {}), **layers}}
            return classifier(node, self.options, f"model {self.preset}", dataset)
        net = self._wrapped()
        return Classifier(
            net,
            {**getattr(net, "default_layers", {}), **layers},
            rows=self.options.rows,
            device=parse_device(self.options.device),
            dtype=_dtype(self.options.dtype),
            spec=getattr(net, "spec", {}),
            input_shape=shape,
        )

    def _wrapped(self) -> nn.Module:
        """A net of transformers as attrib's own wrapper, which knows its padding and its logits."""
        if "PreTrainedModel" not in {kind.__name__ for kind in type(self.given).__mro__}:
            return self.given
        if isinstance(self.input, ImageTransform):
            return HuggingFaceImageClassifier(self.given)
        if self.input is None or isinstance(self.input, WaveTransform):
            raise UserError(f"{self.name}: a net of transformers needs its tokenizer (tokenizer=...)")
        return HuggingFaceClassifier(self.given, self.input.pad, self.input.mask)

    def named_layers(self, method: Method | None) -> Mapping[str, str]:
        """Role -> path of those that were named. Raises UserError if it is not clear which role a path is for."""
        if not isinstance(self.layers, str):
            return self.layers or {}
        roles = dict.fromkeys([*(method.roles if method else ()), *(method.fit.roles if method and method.fit else ())])
        if len(roles) != 1:
            read = ", ".join(roles) or "none"
            raise UserError(
                f"layers={self.layers!r}: the method reads {read}; give a path for each: layers={{ROLE: PATH}}"
            )
        return dict.fromkeys(roles, self.layers)


def _dtype(name: str) -> Any:
    import torch

    if name not in ("float32", "float64"):
        raise UserError(f"run.dtype must be float32 or float64, not {name!r}")
    return getattr(torch, name)


def net_of(
    net: Any,
    layers: Mapping[str, str] | str | None = None,
    precision: Any = None,
    *,
    transform: Any = None,
    tokenizer: Any = None,
    run: Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
) -> Net:
    """Raises UserError for what is neither a preset's name, a module nor a Classifier."""
    options, how, arithmetic = settings(run), _input(transform, tokenizer), Precision.of(precision)
    own = tuple(_of("model", overrides))
    if isinstance(net, str):
        name = named("model", net)
        values = compose("run", ["~dataset", "method=random", "metric=[]", f"model={name}", *own])
        config = completed({**values.values, "dataset": {}}, values.files)["model"]
        if how is None:
            how = _preset_input(config, name)
        return Net(net, str(config.get("name", name)), how, options, layers, name, own, config, arithmetic)
    if own:
        raise UserError(f"{own[0]}: only a model that is chosen by its name takes overrides")
    if isinstance(net, Classifier):
        if set(run or {}) - {"batch"}:
            raise UserError("run: a Classifier has its own device, dtype and rows; only batch can be set here")
        if net.precision != "float32":
            if precision is not None:
                raise UserError(f"precision: this Classifier is computed in {net.precision} already")
            arithmetic = Precision(net.precision, net.precision)
        how = how or _library_input(net.module)
        return Net(net, type(net.module).__name__, how, options, layers, precision=arithmetic)
    if isinstance(net, nn.Module):
        return Net(net, type(net).__name__, how or _library_input(net), options, layers, precision=arithmetic)
    raise UserError(
        f"net is {type(net).__name__}; give a torch.nn.Module, an attrib.models.Classifier or the name of a model "
        f"(there are: {', '.join(presets('model'))})"
    )


_OVERRIDDEN = ("model.", "dataset.", "method.", "metric.")


def _of(part: str, overrides: Sequence[str]) -> list[str]:
    return [text for key, text in _keyed(overrides).items() if key.startswith(f"{part}.")]


def _keyed(overrides: Sequence[str]) -> dict[str, str]:
    """The overrides by their keys. Raises UserError for what is set in another way."""
    found = {key: str(o.input_line) for key, o in parse_overrides(overrides, "overrides").items()}
    for key, text in found.items():
        if not key.startswith(_OVERRIDDEN):
            raise UserError(f"overrides: {text}: only {', '.join(f'{p}*' for p in _OVERRIDDEN)} are set so")
    return found


def _preset_input(config: Mapping[str, Any], name: str) -> Input:
    node = config["input"]
    if "_target_" in node:
        made: Input = build(node, f"model {name}: input")
        return made
    return build({"_target_": ImageTransform.NAME, **node}, f"model {name}: input")


def _input(transform: Any, tokenizer: Any) -> Input:
    """What the arguments ``transform`` and ``tokenizer`` say. Raises UserError."""
    if transform is not None and tokenizer is not None:
        raise UserError("give transform (of images or sounds) or tokenizer (of texts), not both")
    if tokenizer is not None:
        if isinstance(tokenizer, str):
            return HuggingFaceEncoder(tokenizer)
        return tokenizer if hasattr(tokenizer, "unknown") else HuggingFaceEncoder.of(tokenizer)
    if transform is None or isinstance(transform, ImageTransform | WaveTransform):
        return transform
    if isinstance(transform, Mapping):
        kind = "audio.WaveTransform" if "rate" in transform else "transform.ImageTransform"
        return build({"_target_": f"attrib.datasets.{kind}", **transform}, "transform")
    return _torchvision(transform)


def _torchvision(preset: Any) -> ImageTransform:
    """``weights.transforms()`` of torchvision. Raises UserError for anything else."""
    from torchvision.transforms._presets import ImageClassification

    if not isinstance(preset, ImageClassification) or len(preset.crop_size) != 1 or len(preset.resize_size) != 1:
        raise UserError(
            f"transform is {type(preset).__name__}; give an attrib.datasets.ImageTransform or WaveTransform, its "
            "fields, or weights.transforms() of a classifier of torchvision. What other transforms make of an image "
            "can be handed over as a tensor"
        )
    return ImageTransform(
        size=preset.crop_size[0],
        mean=tuple(preset.mean),
        std=tuple(preset.std),
        resize="crop",
        resize_size=preset.resize_size[0],
        interpolation=preset.interpolation.value,
    )


def _library_input(net: nn.Module) -> Input:
    """What a module says itself of the images that it was made for: nets of timm do (``pretrained_cfg``)."""
    known = getattr(net, "pretrained_cfg", None)
    if not isinstance(known, Mapping) or not known.get("architecture"):
        return None
    from attrib.models.zoo import input_of, timm_net

    arch = ".".join(filter(None, (known["architecture"], known.get("tag"))))
    fields = input_of(timm_net, arch=arch)
    return ImageTransform(**fields) if {"size", "mean", "std", "resize", "interpolation"} <= set(fields) else None


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
    fields, own = fields or {}, _of("method", overrides)
    if isinstance(method, str) and not method.endswith((".yaml", ".yml")):
        name = named("method", method)
        values = compose("run", ["~dataset", "~model", "metric=[]", f"method={name}", *own])
        node = {**values.values["method"], **fields}
        return Explainer(method_of(node, values.files["method"]), str(node.get("name", name)), node, name, dict(fields))
    if isinstance(method, str | Path):
        node = {**yaml_of(Path(method)), **fields}
        return Explainer(method_of(node, str(method)), str(node.get("name", Path(method).stem)), node)
    if isinstance(method, type) or not all(hasattr(method, name) for name in ("attribute", "MAPS", "fit")):
        raise UserError(
            f"method is {_what(method)}; give a method such as attrib.methods.iba.IBA(), the path of a YAML or a name "
            f"(there are: {', '.join(presets('method'))})"
        )
    if fields:
        known = [f.name for f in dataclasses.fields(method)]
        for name in fields:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise UserError(f"{type(method).__name__} has no field {name!r}{hint} (fields: {', '.join(known)})")
        method = dataclasses.replace(method, **fields)
    return Explainer(method, _snake(type(method).__name__), {})


def _what(thing: Any) -> str:
    return f"the class {thing.__name__}" if isinstance(thing, type) else type(thing).__name__


def _snake(name: str) -> str:
    """
    >>> _snake("InputIBAStages"), _snake("GradCAM")
    ('input_iba_stages', 'grad_cam')
    """
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def yaml_of(path: Path) -> dict[str, Any]:
    """The fields of a YAML file. Raises UserError."""
    try:
        node = OmegaConf.load(path.expanduser())
        plain_node = OmegaConf.to_container(node, resolve=True)
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
        own = [text for text in _of("metric", overrides) if text.lstrip("+").startswith(f"metric.{name}.")]
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
    return _snake(type(one).__name__), one


# ---- data ----------------------------------------------------------------------------------------------


def _composed_dataset(name: str, net: Net, overrides: Sequence[str]) -> tuple[Mapping[str, Any], str]:
    """The node of a dataset's preset for the net, and what messages call it. Raises UserError."""
    chosen = [f"dataset={named('dataset', name)}", "method=random", "metric=[]", *_of("dataset", overrides)]
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
    chosen = net_of(
        net, transform=transform, tokenizer=tokenizer, overrides=[o for o in overrides if o.startswith("model")]
    )
    node, where = _composed_dataset(name, chosen, overrides)
    return _with_input(dataset_of(node, where), chosen)


def estimation(fit: Any, net: Net, method: str, overrides: Sequence[str] = ()) -> tuple[Dataset, Selection]:
    """What a method is fitted on: that of a dataset's preset (its ``estimation``), or samples. Raises UserError."""
    if isinstance(fit, str):
        node, where = _composed_dataset(fit, net, overrides)
        data, select = estimation_of(node, where, method)
        return _with_input(data, net), select
    return given(fit, net.input, what="fit").dataset, Selection()


def samples(x: Any, net: Net, uids: Sequence[str] | None, target: Any) -> tuple[Given, Any]:
    """``x`` by name, and the rule that says which class is explained. Raises UserError.

    A class for each sample becomes the samples' label.
    """
    several = isinstance(target, Tensor | list | tuple) or hasattr(target, "__array__")
    if isinstance(target, Tensor) and target.ndim == 0:
        target, several = int(target), False
    found = given(x, net.input, uids, target if several else None)
    return found, "label" if several else "predicted" if target is None else target
