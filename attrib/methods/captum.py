"""Any method of the package captum, by its name, one sample at a time."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import inspect
import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, get_args

import torch
from captum import attr
from torch import Tensor, nn

from attrib.checks import require
from attrib.fit import State
from attrib.methods import Method
from attrib.methods.parts.captum_names import OBJECTS, OURS, named, signature, tuples
from attrib.methods.parts.inputs import EMBEDDING, Inputs, Reduce
from attrib.methods.parts.layout import Layout, on_image, resize
from attrib.methods.parts.losses import target_score
from attrib.methods.parts.modules import check_modules_alone, check_relus
from attrib.models import Classifier
from attrib.models.device_memory import of_the_device
from attrib.models.forms import copied
from attrib.models.reading import check_layout
from attrib.models.sizes import START
from attrib.models.ways_back import with_contiguous_norms
from attrib.noise import Noise, global_states
from attrib.types import Batch, SampleError, UserError, did_you_mean
from attrib.units import Units

GUIDED = (attr.GuidedBackprop, attr.Deconvolution, attr.GuidedGradCam, attr.NeuronGuidedBackprop,
          attr.NeuronDeconvolution)  # fmt: skip
CONVOLUTIONAL = (attr.LayerGradCam, attr.GuidedGradCam)  # they take dimension 1 of a layer for its channels


@dataclass(frozen=True)
class Captum(Method):
    """A method of captum (Kokhlikyan et al., *Captum*, 2020, arXiv:2009.07896).

    algorithm   its class's name in ``captum.attr``, such as DeepLift or LayerConductance. NoiseTunnel takes the name
                of another one as its argument ``attribution_method``
    arguments   of its constructor and of ``attribute``, by name; what is left out has captum's own default. A list
                becomes a tuple; a number for ``baselines`` is the value of all numbers of the baseline
    tiles       for algorithms with a ``feature_mask``: an image is divided into tiles x tiles features, a sound into so
                many along time; None: every number is one. Every token of a text is one feature. The map has the
                value of a feature at all of its places
    layer       role of the layer, for algorithms that read one: those at a layer, of a neuron, guided Grad-CAM
    layout      which axes of the layer are places, see ``iba.IBA``
    reduce      how channels become one value, see ``baselines``
    version     that of captum, so that maps by another one have another key; not to be given

    The target's logit is explained. Each sample is a call of its own, with the process-wide random states seeded from
    the sample's stream and put back afterwards, so batch, order and padding do not matter. An algorithm that sends more
    rows through the net at a time than ``run.rows`` is refused when it does. Those that replace parts of a net get a
    copy of it, so whatever they leave behind is gone.

    What cannot be right is found out, and refused:
    - captum's DeepLIFT sees modules, not functions, and only some: its map must be complete, or the sample fails;
    - guided backpropagation and deconvolution: every ReLU of the net's graph must be an ``nn.ReLU``;
    - LRP: every call of the graph must be one of a module (it passes the relevance of a sum to both terms);
    - random numbers that are drawn on an accelerator, which are others than the CPU's.
    What replaces parts of the net, or reads a layer, is not for texts, whose net begins at the embedding.

    Raises UserError for an unknown algorithm or argument, and for what is refused; what captum itself refuses is a
    SampleError that says why.

    >>> import attrib, torch
    >>> net, x = attrib.models.LeNet(), torch.rand(1, 1, 32, 32)
    >>> attrib.explain(net, x, method=Captum("Saliency")).map.shape
    torch.Size([1, 32, 32])
    """

    NAME: ClassVar[str] = "attrib.methods.captum.Captum"
    VERSION: ClassVar[int] = 2
    CONTRASTS: ClassVar[bool] = True
    TEXT_ROLES: ClassVar[tuple[str, ...]] = (EMBEDDING,)
    MAPS: ClassVar[Mapping[str, str]] = {"map": "as captum defines it, signed; upsampled from a layer"}

    algorithm: str = "IntegratedGradients"
    arguments: Mapping[str, Any] | None = None
    tiles: int | None = None
    layer: str = "cam"
    layout: str = "auto"
    reduce: Reduce = "sum"
    version: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "version", importlib.metadata.version("captum"))
        check_layout(type(self).__name__, self.layout)
        require(self, "reduce", one_of=get_args(Reduce))
        if self.arguments is not None and not isinstance(self.arguments, Mapping):
            raise UserError(f"Captum.arguments is {self.arguments!r}, must be names and values")
        object.__setattr__(self, "arguments", self.arguments or None)  # one key for what is the same
        named(self.algorithm)
        if self.algorithm == "NoiseTunnel":
            if "attribution_method" not in self._given:
                raise UserError(
                    "captum's NoiseTunnel needs arguments.attribution_method, the name of another algorithm"
                )
            if self._inner is attr.NoiseTunnel:
                raise UserError("captum's NoiseTunnel does not go around another one")
        self._check_arguments()
        if self.tiles is not None:
            require(self, "tiles", at_least=1)
            if "feature_mask" not in self._parameters:
                raise UserError(f"captum's {self.algorithm} has no features that could be tiles; leave tiles out")

    def _check_arguments(self) -> None:
        known = [name for name in self._parameters if name not in (*OURS, *OBJECTS)]
        required = [name for name, p in self._parameters.items() if p.default is inspect.Parameter.empty]
        if objects := [name for name in required if name in OBJECTS]:
            raise UserError(
                f"captum's {self.algorithm} cannot be used here: it needs {' and '.join(objects)}, for which there is "
                "no plain value"
            )
        for name, value in self._given.items():
            if name in (*OURS, *OBJECTS):
                why = "is set by attrib" if name in OURS else "has no plain value"
                raise UserError(f"Captum.arguments: {name} {why}, take it out")
            if name not in known:
                hint = did_you_mean(name, known)
                has = ", ".join(known) or "none"
                raise UserError(f"captum's {self.algorithm} has no argument {name!r}{hint} (it has: {has})")
            if self._parameters[name].annotation is int and (type(value) is not int or value < 1):
                raise UserError(f"Captum.arguments: {name} is {value!r}, must be a whole number of at least 1")
        if issubclass(self._inner, attr.DeepLift) and self._given.get("multiply_by_inputs") is False:
            raise UserError(
                "captum's DeepLift cannot be checked with multiply_by_inputs=false, as its multipliers sum to nothing"
            )
        for name in required:
            if name not in (*OURS, *self._given):
                raise UserError(f"captum's {self.algorithm} needs {name}; set method.arguments.{name}")

    # ---- what it declares ---------------------------------------------------------------------

    @property
    def _given(self) -> Mapping[str, Any]:
        return self.arguments or {}

    @property
    def _kind(self) -> Any:
        return named(self.algorithm)

    @property
    def _inner(self) -> Any:
        """The algorithm inside a NoiseTunnel; else the algorithm itself."""
        inner = self.algorithm == "NoiseTunnel"
        return named(str(self._given["attribution_method"])) if inner else self._kind

    @property
    def _parameters(self) -> dict[str, inspect.Parameter]:
        kinds = (self._kind, self._inner)
        return {k: v for kind in kinds for f in (kind.__init__, kind.attribute) for k, v in signature(f).items()}

    @property
    def _replaces(self) -> bool:
        return "model" in signature(self._inner.__init__)

    @property
    def _reads(self) -> bool:
        return "layer" in signature(self._inner.__init__)

    @property
    def _at_layer(self) -> bool:
        return issubclass(self._inner, attr.LayerAttribution)

    @property
    def _has_delta(self) -> bool:
        scaled = self._given.get("multiply_by_inputs") is not False
        return scaled and "return_convergence_delta" in signature(self._kind.attribute)

    @property
    def MODALITIES(self) -> tuple[str, ...]:  # type: ignore[override]  # noqa: N802
        if self._reads:
            return ("image",)
        return ("image", "audio") if self._replaces else ("image", "text", "audio")

    @property
    def EXTRAS(self) -> Mapping[str, str]:  # noqa: N802
        return (
            {"delta": "captum's convergence delta, its size; of several draws, of their mean"}
            if self._has_delta
            else {}
        )

    @property
    def COLUMNS(self) -> Mapping[str, str]:  # noqa: N802
        return dict.fromkeys(self.EXTRAS, "lower")

    @property
    def roles(self) -> tuple[str, ...]:
        return (self.layer,) if self._reads else ()

    @property
    def laid(self) -> Mapping[str, str]:
        return {self.layer: self.layout} if self._reads else {}

    # ---- maps ---------------------------------------------------------------------------------

    def attribute(self, model: Classifier, batch: Batch, state: State, noise: Noise) -> Mapping[str, Tensor]:
        places, net = None, None
        if self._reads:
            z = model.record([self.layer], batch.x)[self.layer]  # it runs once
            places = on_image(model, self.layer, batch.x, z, self.layout)
            self._check_places(model, places)
        if self._replaces or self._reads:
            model.check_precision(f"captum's {self.algorithm}")
            model.examine(batch.x)
            self._check_seen(model, batch.x[:1])
            net = copied(model.module)
        seeds = noise.child("captum").bits(1)[:, 0].tolist()
        maps, deltas = [], []
        for i, seed in enumerate(seeds):
            one = batch[[i]] if batch.lengths is None else batch[[i]].cut(int(batch.lengths[i]))
            found, delta = self._one(model, net, one, seed, places)
            map = torch.zeros_like(batch.x[:1, 0] if batch.mask is None else batch.x[:1], dtype=found.dtype)
            map[..., : found.shape[-1]] = found  # the padding of a text
            maps.append(map)
            deltas.append(delta)
        return {"map": torch.cat(maps)} | ({"delta": torch.stack(deltas)} if self._has_delta else {})

    def _one(
        self, model: Classifier, net: nn.Module | None, one: Batch, seed: int, places: Layout | None
    ) -> tuple[Tensor, Tensor]:
        """The map (1, *places) of one sample, and captum's delta ()."""
        inputs = Inputs.of(model, one)
        if net is not None:
            inputs = dataclasses.replace(inputs, net=net)
        score = _Score(inputs.net, model)
        takes = signature(self._kind.attribute).keys() | signature(self._inner.attribute).keys()
        layer = None if net is None or not self._reads else net.get_submodule(model.roles.path(self.layer))

        def piece(_: slice) -> tuple[Tensor, Tensor]:
            method = self._made(self._inner, score, layer)
            given = self._arguments(self._kind.attribute, inputs) | self._arguments(self._inner.attribute, inputs)
            if self._inner is not self._kind:
                method = self._kind(method)
            more = {
                "perturbations_per_eval": model.rows, "internal_batch_size": model.rows, "nt_samples_batch_size": 1,
                "feature_mask": self._features(one, inputs),
            }  # fmt: skip
            given |= {name: value for name, value in more.items() if name in takes}
            given |= {"return_convergence_delta": True} if self._has_delta else {}
            with warnings.catch_warnings(), torch.enable_grad(), global_states(seed, model.device) as drawn:
                warnings.simplefilter("ignore")
                # captum's LayerDeepLift needs gradients of the input; elsewhere they would keep what is not needed.
                x = inputs.x.clone().requires_grad_(self._replaces)
                found = method.attribute(x, additional_forward_args=inputs.args(slice(None)), **given)
            if drawn():
                raise UserError(
                    f"captum's {self.algorithm} draws random numbers on {model.device}, which are others than the "
                    "CPU's; set run.device=cpu"
                )
            found, delta = found if self._has_delta else (found, torch.zeros(1))
            if not isinstance(found, Tensor):
                raise UserError(
                    f"captum's {self.algorithm} gives {len(found)} maps for what it reads; take another layer"
                )
            # Of algorithms that draw, captum gives a delta for each draw, and their mean is that of the map.
            return found.detach().to(inputs.x), delta.detach().mean().abs().to(inputs.x)[None]

        fewer = takes & {"perturbations_per_eval", "internal_batch_size"}  # it can do with fewer rows at a time
        try:
            found, delta = model.chunked(piece, 1, least=1 if fewer else None)
        except (UserError, SampleError):
            raise
        except Exception as error:  # captum raises anything
            if _of_the_net(error) or of_the_device(error):
                raise
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise SampleError(f"{one.uids[0]}: captum's {self.algorithm} refuses it: {reason}") from error
        finally:
            model.passed += max(0, score.rows - 1)  # ``chunked`` has counted one
        self._check_complete(one.uids[0], found, delta)
        return self._placed(found, inputs, places), delta[0]

    def _made(self, kind: Any, score: nn.Module, layer: nn.Module | None) -> Any:
        first = {"forward_func": score, "model": score, "layer": layer}
        known = signature(kind.__init__)
        given = {name: value for name, value in {**self._given, **first}.items() if name in known}
        return kind(**given)

    def _arguments(self, function: Callable[..., Any], inputs: Inputs) -> dict[str, Any]:
        known, given = signature(function), {}
        for name, value in self._given.items():
            if name in known:
                number = name == "baselines" and isinstance(value, (int, float))
                given[name] = torch.full_like(inputs.x, value) if number else tuples(value)
        return given

    def _features(self, one: Batch, inputs: Inputs) -> Tensor | None:
        """(1, ...) the number of the feature of each number of the input; None for captum's own, one for each."""
        if inputs.mask is not None:
            return torch.arange(inputs.x.shape[1], device=inputs.x.device)[None, :, None]
        if self.tiles is None:
            return None
        units = Units.tiles(one, self.tiles) if one.x.ndim == 4 else Units.windows(one, self.tiles)
        return units.of.to(inputs.x.device).unsqueeze(1)

    def _placed(self, found: Tensor, inputs: Inputs, places: Layout | None) -> Tensor:
        """The attributions as a map (1, *places)."""
        if not self._at_layer or places is None:
            if found.shape != inputs.x.shape:
                raise UserError(
                    f"captum's {self.algorithm} gives {tuple(found.shape)} for an input of {tuple(inputs.x.shape)}, "
                    "which is no map of it"
                )
            if "feature_mask" in self._parameters and (self.tiles is not None or inputs.mask is not None):
                found = found[:, :1] if inputs.mask is None else found[..., :1]  # all channels have the feature's value
            return inputs.reduce(found, self.reduce)
        if found.shape[1:] != places.shape and (found.shape[1] != 1 or found.shape[2:] != places.shape[1:]):
            raise UserError(
                f"captum's {self.algorithm} gives {tuple(found.shape)} for a layer of {(1, *places.shape)}, which is "
                "no map of it"
            )
        grid = places.to_grid(found)
        grid = (
            grid.sum(1)
            if self.reduce == "sum"
            else grid.abs().sum(1)
            if self.reduce == "abs_sum"
            else grid.abs().amax(1)
        )
        return resize(grid, places.image)

    # ---- what is found out --------------------------------------------------------------------

    def _check_places(self, model: Classifier, places: Layout) -> None:
        path = model.roles.path(self.layer)
        if self._at_layer and places.name == "vector":
            raise UserError(
                f"{path} gives one vector for the whole image, which is no map; set model.layers.{self.layer}"
            )
        if issubclass(self._inner, CONVOLUTIONAL) and places.name != "channels_first":
            raise UserError(
                f"captum's {self.algorithm} takes dimension 1 for channels, and {path} is {places.name}; take "
                "method=grad_cam or method=guided_grad_cam"
            )

    def _check_seen(self, model: Classifier, x: Tensor) -> None:
        """Raises UserError if the net, on x, has calls that captum would have to replace and does not see."""
        what = f"captum's {self.algorithm}"
        if issubclass(self._inner, GUIDED):
            check_relus(model, x, what, "method=guided_backprop, deconvolution or guided_grad_cam")
        elif issubclass(self._inner, attr.LRP):
            check_modules_alone(model, x, what)

    def _check_complete(self, uid: str, found: Tensor, delta: Tensor) -> None:
        if not issubclass(self._inner, attr.DeepLift) or not self._has_delta:
            return
        share = 1e-3 if torch.finfo(delta.dtype).bits >= 32 else 0.1  # rounding grows with what is added up
        missing, size = float(delta), float(found.abs().sum())
        if not missing <= share * size:
            raise SampleError(
                f"{uid}: captum's {self.algorithm} is not complete: it misses the change of the logit by "
                f"{missing:.2g}, where its map has {size:.2g} in all. It does not see activations that are functions, "
                "or of other classes than it knows; take method=deep_lift_shap"
            )


class _Score(nn.Module):
    """(x, target, *rest) -> (N,) the target's logit: what captum takes for the net.

    ``rows`` counts those that went through.
    """

    def __init__(self, net: Callable[..., Tensor], model: Classifier) -> None:
        super().__init__()
        self.net = net
        rows = max(model.rows, START) if model.rows_given == "auto" else model.rows
        self._limit = max(rows, 2)  # an input and its baseline cannot be parted
        self.rows = 0

    def forward(self, x: Tensor, target: Tensor, *rest: Tensor) -> Tensor:
        if len(x) > self._limit:
            raise UserError(
                f"this method of captum sends {len(x)} rows through the net at a time, and run.rows is {self._limit}; "
                "lower its number of samples in method.arguments, or raise run.rows"
            )
        self.rows += len(x)
        return target_score(with_contiguous_norms(self.net(x.clone(), *rest), len(x)), target)


def _of_the_net(error: Exception) -> bool:
    """Whether an error comes from the net, rather than from captum, which calls it and is called by it in hooks."""
    modules = [str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(error.__traceback__)]
    inside = len(modules) - 1 - modules[::-1].index(__name__)  # ``_Score``, if it got so far
    return inside > 0 and modules[inside - 1] != __name__ and not any(m.startswith("captum.") for m in modules[inside:])
