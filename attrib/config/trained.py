"""A trained checkpoint and the configuration that asks for it: what must agree, and which of them wins."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from attrib.classes import ClassNames
from attrib.datasets import Encoder, ImageTransform, WordEncoder
from attrib.datasets.files import read_class_table
from attrib.metadata import read_metadata, resolve
from attrib.models import Classifier, HuggingFaceImageClassifier, HuggingFaceImageText
from attrib.models.huggingface_images import hf_input
from attrib.models.zoo import classes_of
from attrib.types import UserError

log = logging.getLogger(__name__)

# Of a model YAML; the rest builds the net.
NOT_OF_THE_NET = ("name", "layers", "input", "checkpoint", "match", "randomise", "output", "classes")


def with_checkpoint(config: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """The configuration with the arguments that the net of ``model.checkpoint`` was built with.

    They replace those of the model YAML, which are what a training would start from; another value
    than the YAML's is logged. ``where`` names the YAML in messages.

    Raises UserError if there is no such file, or it holds another kind of net.
    """
    model = config["model"]
    path = model.get("checkpoint")
    if not path:
        return config
    if not resolve(str(path)).is_file():
        folder = Path(str(path)).parent
        ours = folder.parent.name == "train"  # where attrib train puts them
        how = f"; make it with attrib train train={folder.name}" if ours else ""
        raise UserError(f"{where}: checkpoint: no such file: {path}{how}")
    about = read_metadata(str(path))
    trained = about.get("arguments", {})
    if not isinstance(trained, Mapping):
        raise UserError(f"{where}: checkpoint: {path}: its arguments are {type(trained).__name__}, not an object")
    net, wanted = (str(t).rpartition(".")[2] for t in (about.get("target", model["_target_"]), model["_target_"]))
    if net != wanted:
        raise UserError(f"{where}: checkpoint: {path} holds a {net}, not a {wanted}")
    # A file may say with what a net is built, but not what, nor from where: the tokenizer is of model.path too.
    own = {k for k in model if k not in (*NOT_OF_THE_NET, "path") and not k.startswith("_")}
    plain = {k: v for k, v in trained.items() if k in own and _plain(v)}
    other = [f"{k}={v} instead of {model[k]}" for k, v in plain.items() if model[k] not in (None, v)]
    if other:
        log.info("%s: as %s was trained: %s", where, path, ", ".join(other))
    return {**config, "model": {**model, **plain}}


def takes_classes(builder: Callable[..., Any]) -> bool:
    """Whether ``model.classes`` is an argument of the net's own builder, and no names of classes."""
    try:
        return "classes" in inspect.signature(builder).parameters
    except (TypeError, ValueError):  # some that are written in C
        return False


def names_of_classes(node: Mapping[str, Any], builder: Callable[..., Any], where: str) -> ClassNames | None:
    """What ``model.classes``, else the checkpoint, else the library of the loaded weights says.

    builder   what the net is built by

    None: nobody but the net itself, if it does. Raises UserError.
    """
    given, checkpoint = None if takes_classes(builder) else node.get("classes"), node.get("checkpoint")
    field = f"{where}: classes"
    if given == "none":
        return ClassNames((), "model.classes")
    if isinstance(given, list):
        return ClassNames.of(["" if name is None else str(name) for name in given], "model.classes")
    if given not in (None, "imagenet"):
        table = read_class_table(str(given), field)
        if not table:
            raise UserError(f"{field}: {given} names no class")
        wnids, names = zip(*(table.get(i, ("", "")) for i in range(max(table) + 1)), strict=True)
        return ClassNames(names, "model.classes", wnids)
    known = read_metadata(str(checkpoint)).get("classes") if checkpoint else None
    if isinstance(known, list) and known and all(isinstance(name, str) for name in known):
        return ClassNames.of(known, f"the checkpoint {checkpoint}")
    if given is not None:  # a preset says so of its usual weights: a checkpoint that knows better comes first
        return ClassNames.imagenet("model.classes")
    if checkpoint:  # not the weights that the library loads
        return None
    fields = {k: v for k, v in node.items() if k not in NOT_OF_THE_NET and not k.startswith("_")}
    return classes_of(builder, **fields)


def _plain(value: Any) -> bool:
    return isinstance(value, str | int | float | None) or (isinstance(value, list) and all(map(_plain, value)))


def check_encoder(encoder: Encoder | None, model: Classifier, checkpoint: Any, where: str) -> None:
    """Raises UserError for other token ids than the net was trained with, which would be wrong in silence."""
    if encoder is None:
        return
    try:
        embedding = model.roles.layer("embedding")
    except UserError:  # whatever needs it will say so
        return
    pad = getattr(model.module, "pad_id", encoder.pad)
    size = embedding.num_embeddings if isinstance(embedding, nn.Embedding) else encoder.size
    if encoder.pad != pad or encoder.size > size:
        raise UserError(
            f"{where}: the net has {size} ids and pads with {pad}, but its input has "
            f"{encoder.size} and pads with {encoder.pad}: its vocabulary is not the one that the net was trained with"
        )
    known = read_metadata(str(checkpoint)).get("vocabulary") if checkpoint else None
    if isinstance(encoder, WordEncoder) and known is not None and list(encoder.vocabulary) != known:
        raise UserError(
            f"{where}: model.input.vocabulary is not the one in {checkpoint}, with which the net was trained"
        )


def check_transform(transform: Any, config: Mapping[str, Any], model: Classifier, where: str) -> None:
    """Of Hugging Face nets over images, which come with an image processor; ``config`` is the model's.

    Raises UserError if the images are prepared in another way than ``model.input`` says, which would be wrong in
    silence. Where it says something else than the image processor, that is logged.
    """
    wanted = isinstance(model.module, HuggingFaceImageClassifier | HuggingFaceImageText)
    if not wanted or not isinstance(transform, ImageTransform):
        return
    path = str(config["path"])
    used, given, theirs = map(_preparation, (vars(transform), config["input"], hf_input(path)))
    for name, value in used.items():
        if given.get(name) != value:
            raise UserError(
                f"{where}: dataset.transform.{name} is {value}, but model.input.{name} is {given.get(name)}; set "
                f"dataset.transform.{name}=${{model.input.{name}}}, or model.input.{name} if the net wants that"
            )
        if theirs.get(name, value) != value:
            log.warning("%s: %s is %s, but the image processor of %s has %s", where, name, value, path, theirs[name])


def _preparation(fields: Mapping[str, Any]) -> dict[str, Any]:
    """How images are prepared, in one form for each meaning."""
    found = {name: fields[name] for name in ("size", "mean", "std") if name in fields}
    if isinstance(found.get("size"), int):
        found["size"] = (found["size"], found["size"])
    return {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}
