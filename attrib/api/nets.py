"""Networks: from a preset's name, a module or a Classifier to the net as methods see it, and how it wants its data."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from attrib.api.compositions import image_transform
from attrib.api.names import Input
from attrib.config.compose import compose, parse_overrides
from attrib.config.objects import DTYPES, build, classifier, completed, options_of
from attrib.config.places import presets
from attrib.datasets import Dataset, HuggingFaceEncoder, ImageTransform, WaveTransform
from attrib.experiment.samples import parse_device
from attrib.keys import tensor_digest
from attrib.methods import Method
from attrib.methods.parts.inputs import EMBEDDING
from attrib.metrics import Metric
from attrib.models import Classifier, HuggingFaceClassifier, HuggingFaceImageClassifier
from attrib.models.forms import tensors, unwrapped
from attrib.models.precision import Precision
from attrib.models.structure import structure
from attrib.models.zoo import input_of, timm_net
from attrib.running.options import Options
from attrib.types import UserError, did_you_mean

RUN = ("device", "dtype", "batch", "rows", "fold", "compile")  # the settings of run.* that mean something here


def named(group: str, name: str) -> str:
    """``name`` if it is a preset of the group. Raises UserError that lists what there is, the nearest first."""
    known = list(presets(group))
    if name in known:
        return name
    near = difflib.get_close_matches(snake(name), known, n=3, cutoff=0.5)
    others = ", ".join([*near, *(one for one in known if one not in near)])
    raise UserError(f"there is no {group} {name!r} (there are: {others})")


def snake(name: str) -> str:
    """
    >>> snake("InputIBAStages"), snake("GradCAM")
    ('input_iba_stages', 'grad_cam')
    """
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def settings(run: Mapping[str, Any] | None) -> Options:
    """``run={"device": "cuda"}`` as the options of a run. Raises UserError."""
    for name in run or {}:
        if name not in RUN:
            raise UserError(f"run: {name!r} means nothing here (only: {', '.join(RUN)})")
    options = options_of(run or {})
    if options.batch == "auto":
        raise UserError("run: batch is a number here, not auto")
    if options.dtype not in DTYPES:
        raise UserError(f"run.dtype must be one of {', '.join(DTYPES)}, not {options.dtype!r}")
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

    @property
    def pad(self) -> int | None:
        """The id of padding that the net itself names (``pad_id``); None if it names none."""
        if self.preset is not None:
            own = self.config.get("pad_id")
        else:
            net = self.given.module if isinstance(self.given, Classifier) else unwrapped(self.given)
            own = getattr(net, "pad_id", None)
        return own if isinstance(own, int) and not isinstance(own, bool) else None

    @property
    def weights(self) -> str | None:
        """The digest of a module's weights, as they are now; None for what holds none of the caller's."""
        return tensor_digest(tensors(unwrapped(self._wrapped()))) if isinstance(self.given, nn.Module) else None

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
        if net is not self.given:  # a wrapper, in which the user's own net is called so
            own = {name for name, _ in self.given.named_modules()}
            layers = {role: f"net.{path}" if path in own else path for role, path in layers.items()}
        said = getattr(net, "spec", None)  # a layer may be called so
        spec = said if isinstance(said, Mapping) and said else structure(net)
        model = Classifier(
            net,
            {**getattr(net, "default_layers", {}), **layers},
            rows=self.options.rows,
            device=parse_device(self.options.device),
            dtype=getattr(torch, self.options.dtype),
            spec=spec,
            input_shape=shape,
            fold=self.options.fold,
            compile=self.options.compile,
        )
        if not isinstance(self.input, ImageTransform | WaveTransform | None):
            for name, token in (("pad_id", self.input.pad), ("mask_id", self.input.mask)):
                if not hasattr(model.module, name):  # of the copy: the tokenizer knows what the net does not say
                    setattr(model.module, name, token)
        return model

    def _wrapped(self) -> nn.Module:
        """A net of transformers as attrib's own wrapper, which knows its padding and its logits."""
        if "PreTrainedModel" not in {kind.__name__ for kind in type(self.given).__mro__}:
            return self.given
        if isinstance(self.input, ImageTransform):
            return HuggingFaceImageClassifier(self.given)
        if self.input is None or isinstance(self.input, WaveTransform):
            raise UserError(f"{self.name}: a net of transformers needs its tokenizer (tokenizer=...)")
        return HuggingFaceClassifier(self.given, self.input.pad, self.input.mask)

    def check_roles(self, readers: Iterable[Method | Metric]) -> None:
        """Raises UserError for a layer that was named for a role that none of them reads."""
        known = dict.fromkeys(role for one in readers for role in _roles(one))
        for role, path in self.layers.items() if isinstance(self.layers, Mapping) else ():
            if role not in known and role != EMBEDDING:  # which all methods read of texts, and declare for none
                read = f"only {', '.join(known)} is read" if known else "no layer is read"
                raise UserError(f"layers: {role}={path!r}: {read} here{did_you_mean(role, known)}")

    def named_layers(self, method: Method | None) -> Mapping[str, str]:
        """Role -> path of those that were named. Raises UserError if it is not clear which role a path is for."""
        if not isinstance(self.layers, str):
            return self.layers or {}
        roles = dict.fromkeys(_roles(method) if method else ())
        if len(roles) != 1:
            read = ", ".join(roles) or "none"
            raise UserError(
                f"layers={self.layers!r}: the method reads {read}; give a path for each: layers={{ROLE: PATH}}"
            )
        return dict.fromkeys(roles, self.layers)


def _roles(reader: Method | Metric) -> list[str]:
    fit = getattr(reader, "fit", None)
    return [*getattr(reader, "roles", ()), *(fit.roles if fit is not None else ())]


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
    if layers is not None and not isinstance(layers, str):
        layers = _paths(layers)
    options, how, arithmetic = settings(run), _input(transform, tokenizer), Precision.of(precision)
    own = tuple(overrides_of("model", overrides))
    if isinstance(net, str):
        name = named("model", net)
        values = compose("run", ["~dataset", "method=random", "metric=[]", f"model={name}", *own])
        config = completed({**values.values, "dataset": {}}, values.files)["model"]
        if how is not None:
            raise UserError(
                f"model {name} says itself how it wants its data; overrides=['model.input.size=...'] changes that, as "
                "on the command line"
            )
        how = _preset_input(config, name)
        return Net(net, str(config.get("name", name)), how, options, layers, name, own, config, arithmetic)
    if own:
        raise UserError(f"{own[0]}: only a model that is chosen by its name takes overrides")
    if isinstance(net, Classifier):
        if set(run or {}) - {"batch"}:
            raise UserError(
                "run: a Classifier has its own device, dtype, rows, fold and compile; only batch can be set here"
            )
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


def _paths(layers: Any) -> Mapping[str, str]:
    if not isinstance(layers, Mapping) or not all(isinstance(t, str) for pair in layers.items() for t in pair):
        raise UserError(
            f"layers is {type(layers).__name__}; give the path of a layer, a str as net.named_modules() has it, or "
            "{ROLE: PATH}"
        )
    return layers


_OVERRIDDEN = ("model.", "dataset.", "method.", "metric.")


def overrides_of(part: str, overrides: Sequence[str]) -> list[str]:
    """Those of ``part``: model, dataset, method or metric. Raises UserError for what is set in another way."""
    return [text for key, text in _keyed(overrides).items() if key.startswith(f"{part}.")]


def _keyed(overrides: Sequence[str]) -> dict[str, str]:
    """The overrides by their keys. Raises UserError for what is set in another way."""
    several = isinstance(overrides, Iterable) and not isinstance(overrides, str)
    if not several or not all(isinstance(one, str) for one in overrides):
        raise UserError("overrides: give a list of what the command line would say, such as ['method.steps=3']")
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
        own = all(hasattr(tokenizer, name) for name in ("key", "pad", "unknown", "mask", "encode"))
        return tokenizer if own else HuggingFaceEncoder.of(tokenizer)
    if transform is None or isinstance(transform, ImageTransform | WaveTransform):
        return transform
    if isinstance(transform, Mapping):
        kind = "audio.WaveTransform" if "rate" in transform else "transform.ImageTransform"
        return build({"_target_": f"attrib.datasets.{kind}", **transform}, "transform")
    return image_transform(transform)


def _library_input(net: nn.Module) -> Input:
    """What a module says itself of the images that it was made for: nets of timm do (``pretrained_cfg``)."""
    known = getattr(net, "pretrained_cfg", None)
    if not isinstance(known, Mapping) or not known.get("architecture"):
        return None
    arch = ".".join(filter(None, (known["architecture"], known.get("tag"))))
    fields = input_of(timm_net, arch=arch)
    return ImageTransform(**fields) if {"size", "mean", "std", "resize", "interpolation"} <= set(fields) else None
