"""From a resolved configuration (configs/train.yaml) to a trained checkpoint and its record.

``<root>/train/<name>/`` holds ``config.json`` (what is trained), ``state.safetensors`` (until it is
finished), ``model.safetensors`` (the best epoch), ``metrics.jsonl``, ``curve.png``, ``result.json``
and a log and environment for each start under ``runs/``.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from attrib.config.objects import build, output_of, with_input
from attrib.config.trained import NOT_OF_THE_NET
from attrib.datasets import Dataset
from attrib.datasets.vectors import word_vectors
from attrib.experiment.samples import parse_device
from attrib.keys import stable_hash
from attrib.models.checkpoint import load_weights, save_checkpoint
from attrib.models.output import Output
from attrib.models.zoo import seeded
from attrib.process.git import git_commit
from attrib.store.files import write_atomic, write_json
from attrib.store.temporary import sweep
from attrib.training.batches import LoadedSamples
from attrib.training.data import Splits, TrainingData, readable, splits, text_baseline, text_encoder
from attrib.training.loop import Hyperparameters, evaluate, fit
from attrib.training.record import ConfigNode, TrainingResult, check_same, curve, read, weight_settings
from attrib.training.state import Progress
from attrib.types import SampleError, UserError, did_you_mean

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingOptions:
    """Where and how a training runs; nothing here changes the trained weights.

    name         of the folder, ``<root>/train/<name>``
    device       "auto" takes a GPU if there is one
    progress     show a progress bar, on a terminal only
    restart      delete what the folder holds and begin anew
    hooks        further mmengine hooks
    vis_backends   of mmengine, such as TensorBoard: where the log's numbers are shown as well
    """

    name: str
    root: str = "workdirs"
    device: str = "auto"
    progress: bool = True
    restart: bool = False
    hooks: Sequence[Any] = ()
    vis_backends: Sequence[Any] = ()


def parts(node: ConfigNode) -> tuple[TrainingOptions, TrainingData, Hyperparameters]:
    """The ``train`` node. Raises UserError for an unknown field or one of the wrong type."""
    kinds = (TrainingOptions, TrainingData, Hyperparameters)
    known = [f.name for kind in kinds for f in dataclasses.fields(kind)]
    for name in node:
        if name not in known:
            hint = did_you_mean(name, known)
            raise UserError(f"configs/train: train has no field {name!r}{hint} (fields: {', '.join(known)})")
    made = []
    for kind in kinds:
        fields = {f.name: node[f.name] for f in dataclasses.fields(kind) if f.name in node}
        made.append(build({"_target_": f"{kind.__module__}.{kind.__qualname__}", **fields}, "configs/train"))
    return tuple(made)


# ---- net ----------------------------------------------------------------------------------------


def _classes(dataset: Dataset, *targets: torch.Tensor) -> list[str]:
    """The names of all classes; one without a name is called by its number."""
    count = 1 + max(int(t.max()) for t in targets)
    count = max(count, 1 + max(dataset.names, default=-1))
    return [dataset.names.get(i, str(i)) for i in range(count)]


def _net_node(model: ConfigNode, of_the_data: Mapping[str, Any]) -> dict[str, Any]:
    """What builds the net; an argument that is null takes its value from ``of_the_data``."""
    node = {k: v for k, v in model.items() if k not in NOT_OF_THE_NET}
    return {k: of_the_data.get(k) if v is None else v for k, v in node.items()}


def _initial(node: ConfigNode, input_node: ConfigNode, encoder: Any, data: TrainingData, seed: int) -> nn.Module:
    """The net before the first epoch. Raises UserError for word vectors that do not fit."""
    net = seeded(lambda: build(node, "configs/model"), stable_hash(f"{seed}/initialisation"))
    if data.weights is not None:
        load_weights(net, data.weights)
    if data.vectors is not None:
        if encoder is None or "vocabulary" not in input_node:
            raise UserError("train.vectors is for nets that read words; set train.vectors=null")
        tables = [m for m in net.modules() if isinstance(m, nn.Embedding)]
        vectors = word_vectors(data.vectors, encoder.vocabulary)
        if len(tables) != 1 or tables[0].weight.shape != vectors.values.shape:
            shapes = ", ".join(str(tuple(t.weight.shape)) for t in tables) or "none"
            want = tuple(vectors.values.shape)
            raise UserError(
                f"train.vectors: {data.vectors} fits a net with one embedding, of {want}; this one has {shapes}"
            )
        with torch.no_grad():
            tables[0].weight.copy_(vectors.values)
        log.info("%d of %d words have a vector in %s", int(vectors.found.sum()), encoder.size, data.vectors)
    return net


# ---- training -----------------------------------------------------------------------------------


def train(config: ConfigNode) -> TrainingResult:
    """Train as a plain, resolved configuration says, or go on with a training that was stopped.

    The result of a finished training is only read.

    Raises UserError for anything that a person can put right.
    """
    for part in ("dataset", "model", "train"):
        if not isinstance(config.get(part), Mapping):
            raise UserError(f"no {part} chosen; add train=... (see configs/train/)")
    options, data, hyperparameters = parts(config["train"])
    folder, seed = Path(options.root).expanduser() / "train" / options.name, config.get("seed", 0)
    try:
        device = parse_device(options.device)
    except UserError as error:
        raise UserError(str(error).replace("run.device", "train.device")) from error
    given = splits(config["dataset"], data)
    text = given.train.modality == "text"
    if data.baseline and not text:
        raise UserError("train.baseline is for texts; set train.baseline=false")
    if data.baseline and find_spec("sklearn") is None:
        raise UserError("train.baseline needs scikit-learn: pip install scikit-learn, or set train.baseline=false")
    if not text:
        config = with_input(config)
    given, fingerprints = readable(given, data)
    config = {**config, "seed": seed, "data": fingerprints}
    try:
        if options.restart:
            for name in ("result.json", "state.safetensors", "model.safetensors", "metrics.jsonl", "config.json"):
                (folder / name).unlink(missing_ok=True)
        sweep(folder)  # of a training that was killed
        if (folder / "config.json").exists():
            check_same(folder, config)
        else:
            write_json(folder / "config.json", config)
        if (folder / "result.json").exists() and (folder / "model.safetensors").exists():
            log.info("%s is trained already; train.restart=true trains it again", folder)
            result = read(folder / "result.json", TrainingResult)
        else:
            result = _train(config, given, options, data, hyperparameters, folder, seed, device)
        if data.baseline and result.baseline is None:
            result = dataclasses.replace(result, baseline=text_baseline(given))
            write_json(folder / "result.json", dataclasses.asdict(result))
        return result
    except SampleError as error:
        raise UserError(f"a sample cannot be read, so nothing is trained: {error}") from error
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written or read: {error}. When that is put right, the same command goes on"
        ) from error


def _train(
    config: ConfigNode,
    given: Splits,
    options: TrainingOptions,
    data: TrainingData,
    hyperparameters: Hyperparameters,
    folder: Path,
    seed: int,
    device: torch.device,
) -> TrainingResult:
    model = config["model"]
    encoder = None
    if given.train.modality == "text":
        encoder = text_encoder(model["input"], given, data)
        given = given.with_encoder(encoder)
    pad = 0 if encoder is None else encoder.pad
    samples = {name: LoadedSamples(getattr(given, name), uids, pad=pad) for name, uids in given.uids.items()}
    classes = _classes(given.train, *(part.targets for part in samples.values()))
    of_the_data = {"num_classes": len(classes), "num_labels": len(classes)}
    if encoder is not None:
        of_the_data |= {"vocab_size": encoder.size, "pad_id": encoder.pad, "mask_id": encoder.mask}
    node = _net_node(model, of_the_data)
    net = _initial(node, model["input"], encoder, data, seed)
    output = Output.of(output_of(model.get("output"), "configs/model: output"))
    if output.read.link_of(net) != "softmax":
        raise UserError(
            f"configs/model: output: read={output.read.READ} has no classes that a training could tell apart"
        )
    output.attach(net)
    outputs = _outputs(net, samples["train"])
    if outputs < len(classes):
        raise UserError(f"configs/model: the net has {outputs} outputs, the data have {len(classes)} classes")
    arguments = {k: v for k, v in node.items() if not k.startswith("_")}
    record: dict[str, Any] = {"what": weight_settings(config), "git": git_commit(), "torch": torch.__version__}
    # What Hugging Face's encoders know is not the training texts' and comes with their model.
    vocabulary = list(encoder.vocabulary) if encoder is not None and "vocabulary" in model["input"] else None
    file = folder / "model.safetensors"

    def save(net: nn.Module, progress: Progress, accuracy: Mapping[str, float] | None = None) -> None:
        about = {"epoch": progress.best_epoch, "accuracy": accuracy or {"validation": progress.best}}
        metadata = {
            "target": node["_target_"],
            "arguments": arguments,
            "vocabulary": vocabulary,
            "classes": classes,
            "training": {**record, **about},
        }
        save_checkpoint(file, net, metadata)

    stamp = time.strftime("%Y%m%d-%H%M%S")
    progress = fit(
        net,
        samples["train"],
        samples["validation"],
        hyperparameters,
        seed=seed,
        device=device,
        folder=folder,
        run=folder / "runs" / f"{stamp}-{os.getpid()}-{secrets.token_hex(2)}",
        save_best=save,
        progress_bar=options.progress,
        hooks=options.hooks,
        vis_backends=options.vis_backends,
    )
    load_weights(net, str(file))
    accuracy = {name: evaluate(net, part, device)["accuracy"] for name, part in samples.items()}
    save(net, progress, accuracy)
    write_atomic(folder / "curve.png", curve(progress.history, progress.best_epoch))
    result = TrainingResult(
        name=options.name,
        folder=str(folder),
        accuracy=accuracy,
        samples={name: len(part) for name, part in samples.items()},
        epochs=len(progress.history),
        best_epoch=progress.best_epoch,
        seconds=sum(row["seconds"] for row in progress.history),
    )
    write_json(folder / "result.json", dataclasses.asdict(result))
    (folder / "state.safetensors").unlink()
    return result


@torch.no_grad()
def _outputs(net: nn.Module, samples: LoadedSamples) -> int:
    """How many logits the net has, from one sample."""
    was_training = net.training
    x, _ = samples.pick([0])
    count = net.eval()(x).shape[1]
    net.train(was_training)
    return count
