"""Metrics that need regions of interest, and data that have none."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence

from attrib.datasets import Dataset
from attrib.metrics import Metric
from attrib.types import UserError

log = logging.getLogger(__name__)

TRIED = 8  # samples, among which one is looked for that can be read


def has_none(dataset: Dataset, uids: Iterable[str]) -> bool:
    """Whether samples have no regions at all, as the first that can be read says; of an image no more than its size."""
    for uid in uids:
        try:
            found = dataset.regions([uid]) if hasattr(dataset, "regions") else dataset.batch([uid]).roi
        except Exception:  # the ledger will say so when its map is due
            continue
        return found is None
    return False


def _of_regions(metrics: Mapping[str, Metric]) -> list[str]:
    return [name for name, metric in metrics.items() if metric.NEEDS_ROI]


def _refused(names: Sequence[str], metrics: Mapping[str, Metric], dataset: str) -> UserError:
    others = ",".join(name for name in metrics if name not in _of_regions(metrics))
    need = "needs" if len(names) == 1 else "need"
    return UserError(
        f"{' and '.join(names)} {need} regions of interest, and dataset {dataset} has none; take metric=[{others}]"
    )


def check_regions(metrics: Mapping[str, Metric], dataset: Dataset, uids: Iterable[str], name: str) -> None:
    """Raises UserError for metrics of regions on a dataset, called ``name``, that has none."""
    names = _of_regions(metrics)
    if names and has_none(dataset, uids):
        raise _refused(names, metrics, name)


def fitting(metrics: Mapping[str, Metric], assumed: Collection[str], dataset: Dataset, name: str) -> dict[str, Metric]:
    """The metrics, without those of regions that nobody named (``assumed``) where the data have none.

    It needs no net, which takes seconds to load. Raises UserError for a metric of regions that was named.
    """
    # That a metric that was named is not for such data at all, an Experiment says.
    suited = [one for one in _of_regions(metrics) if dataset.modality in metrics[one].MODALITIES]
    out = [one for one in _of_regions(metrics) if one in assumed and one not in suited]
    if suited and has_none(dataset, dataset.uids[:TRIED]):
        if named := [one for one in suited if one not in assumed]:
            raise _refused(named, metrics, name)
        out += suited
    if out:
        log.info(
            "dataset %s has no regions of interest: the default metrics are taken without %s (metric=[...] chooses)",
            name,
            " and ".join(out),
        )
    return {one: metric for one, metric in metrics.items() if one not in out}
