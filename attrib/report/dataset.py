"""What a dataset holds and what the net makes of it: a page to look at before the first run."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import Tensor

from attrib.classes import shown_target
from attrib.datasets import Selection, holds_images, holds_sounds, holds_texts
from attrib.drawing import pictures, spectrogram
from attrib.experiment.cell import Experiment
from attrib.experiment.samples import Samples
from attrib.experiment.targets import labels_of, matched
from attrib.report import environment
from attrib.report.label_order import LabelOrder, label_order
from attrib.types import UserError

TRIED = 100  # samples that the net is tried on
SHOWN = 10


class ClassRow(NamedTuple):
    """number, name: of the dataset's class; net: the net's class."""

    number: int
    name: str
    net: str
    samples: int | None


class Thumbnail(NamedTuple):
    uid: str
    label: str
    predicted: str
    image: str  # a data: URI
    text: str = ""


@dataclass(frozen=True)
class Found:
    """What is known of a dataset, and ``problems`` in plain words."""

    title: str
    facts: Sequence[tuple[str, str]]
    classes: Sequence[ClassRow]
    order: LabelOrder | None
    thumbnails: Sequence[Thumbnail]
    problems: Sequence[str]


def look(cell: Experiment, batch: int = 8) -> Found:
    """Reads a hundred samples, mixed over the classes, and asks the net for their classes. Raises UserError."""
    dataset, model, problems = cell.dataset, cell.model, []
    tried = Selection(count=TRIED).apply(dataset, lambda uids: {})
    mapping: Mapping[int, int] | None = None
    comparable = True
    try:
        mapping = matched(dataset, model.classes, dataset.uids)
    except UserError as error:
        problems.append(str(error))
        comparable = False
    samples = Samples(dataset, model, tried, target=None, batch=batch)
    truth: dict[str, frozenset[int]] = {}
    said: dict[str, int] = {}  # of a net that decides for a class
    shares: list[float] = []  # of the images that regions cover
    bad: dict[str, str] = {}
    several = False
    for found, unread in samples.load(samples.chunks()):
        bad |= dict(unread)
        if found is None:
            continue
        if model.output.read.decides:
            said |= dict(zip(found.uids, model.logits(found.x).argmax(1).tolist()))
        if found.roi is not None:
            shares += [share for share in found.roi.flatten(1).double().mean(1).tolist() if share > 0]
        truth |= dict(zip(found.uids, _labels(found.target)))
        several |= found.target.ndim == 2
    if bad:
        uid, reason = next(iter(bad.items()))
        problems.append(f"{len(bad)} of {len(tried)} samples cannot be read; the first: {uid}: {reason}")
    labelled = {uid: labels for uid, labels in truth.items() if labels}
    if len(labelled) < len(truth):
        without = next(uid for uid in truth if uid not in labelled)
        why = getattr(dataset, "label_problems", {}).get(without)
        more = f"; the first: {without}: {why}" if why else ""
        some = "" if len(tried) == len(dataset.uids) else " that were looked at"
        problems.append(f"{len(truth) - len(labelled)} of {len(truth)} samples{some} have no label{more}")
    order = None
    if comparable and labelled and said:
        own = [labels if mapping is None else {mapping.get(i, -1) for i in labels} for labels in labelled.values()]
        order = label_order(own, [said[uid] for uid in labelled])
        if order.warning:
            problems.append(f"the net's accuracy is {order.accuracy:.0%} of {order.n}; {order.warning}")
    facts = [("samples", f"{len(dataset.uids):,}"), *_sizes(cell, tried), _regions(len(truth), shares)]
    if several:
        facts.append(("labels", "several each"))
    if order is not None:
        how = ", the predicted class being one of the labels" if several else ""
        share = f"{order.accuracy:.0%} of {order.n} samples{how} (chance: {order.chance:.1%})"
        facts.append(("accuracy of the net", share))
    known = "no names" if model.classes is None else f"{len(model.classes)}, named by {model.classes.source}"
    facts.append(("classes of the net", known))
    rows = _classes(cell, mapping, comparable)
    facts.append(("classes of the data", str(len(rows)) if rows else "no names"))
    good = [uid for uid in tried if uid in truth]
    shown = good[:: max(1, len(good) // SHOWN)][:SHOWN]
    thumbnails = [_thumbnail(cell, uid, truth[uid], said.get(uid)) for uid in shown]
    return Found(cell.names["dataset"], facts, rows, order, thumbnails, problems)


def _labels(target: Tensor) -> list[frozenset[int]]:
    """The labels of each sample, of which there are several where the target is (B, K); none where it is unknown."""
    if target.ndim == 1:
        return [frozenset([label] if label >= 0 else []) for label in target.tolist()]
    known = ((target == 0) | (target == 1)).all(1).tolist()
    return [frozenset(row.nonzero().flatten().tolist() if sure else []) for row, sure in zip(target, known)]


def _sizes(cell: Experiment, uids: Sequence[str]) -> list[tuple[str, str]]:
    size = getattr(cell.dataset, "size", None)
    if size is None:
        return []
    found = []
    for uid in uids:
        try:
            found.append(size(uid))
        except Exception:  # named among the problems
            continue
    if not found:
        return []
    (w0, h0), (w1, h1) = np.min(found, axis=0), np.max(found, axis=0)
    whole = f"{w0} x {h0}" if (w0, h0) == (w1, h1) else f"{w0} to {w1} x {h0} to {h1}"
    return [("pixels (width x height)", f"{whole}, in {len(found)} samples")]


def _regions(read: int, shares: Sequence[float]) -> tuple[str, str]:
    if not shares:
        return "boxes or masks", "none"
    return "boxes or masks", f"{len(shares)} of {read} samples; they cover {np.median(shares):.0%} (median)"


def _classes(cell: Experiment, mapping: Mapping[int, int] | None, comparable: bool) -> list[ClassRow]:
    """One for each class of the samples, or for each that has a name."""
    dataset, net = cell.dataset, cell.model.classes
    counts = labels_of(dataset, dataset.uids)
    rows = []
    for i in sorted(dataset.names if counts is None else counts.keys() - {-1}):
        number = i if mapping is None else mapping.get(i, -1)
        known = net is not None and 0 <= number < len(net)
        shown = f"{number} {net.shown(number) if known and net is not None else ''}".strip() if comparable else "?"
        rows.append(ClassRow(i, dataset.names.get(i, ""), shown, None if counts is None else counts[i]))
    return rows


def _thumbnail(cell: Experiment, uid: str, labels: Collection[int], predicted: int | None) -> Thumbnail:
    dataset, net = cell.dataset, cell.model.classes
    own = ", ".join(shown_target(dataset.names.get(i, ""), i) for i in sorted(labels)) or "no label"
    said = shown_target("" if net is None or predicted is None else net.shown(predicted), predicted)
    roi = dataset.batch([uid]).roi
    region = None if roi is None else roi[0].numpy()
    if holds_texts(dataset):
        return Thumbnail(uid, own, said, "", " ".join(dataset.tokens(uid))[:300])
    if holds_sounds(dataset):
        drawn = spectrogram.draw(dataset.wave(uid), dataset.rate, roi=region)
        return Thumbnail(uid, own, said, pictures.data_uri(drawn))
    assert holds_images(dataset)
    image = pictures.outlined(dataset.picture(uid), region)
    return Thumbnail(uid, own, said, pictures.data_uri(image, photo=max(image.shape) > 64, longest=224))


def page(found: Found) -> str:
    """Self-contained HTML."""
    return environment().get_template("dataset.html.jinja").render(found=found)


def file_name(cell: Experiment) -> str:
    return f"dataset.{re.sub(r'[^A-Za-z0-9_-]', '-', cell.names['dataset'])}.html"
