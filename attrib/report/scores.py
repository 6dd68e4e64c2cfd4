"""The scores of every sample as the page's script reads them: one JSON text per dataset and model."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence

import pandas as pd

MOST = 2_000  # samples


def contenders(frame: pd.DataFrame) -> list[str]:
    """The methods (and maps) of a dataset and model, in the order of their numbers in ``as_json``."""
    return list(dict.fromkeys(frame["contender"].astype(str)))


def as_json(frame: pd.DataFrame, about: Mapping[tuple[str, str], str]) -> str:
    """``frame``: of one dataset and model, from ``tables.rows``. "" if there are no scores.

    {"methods": names, "uids": names, "columns": [{"name", "direction", "about", "values": for each method a list with
    a number or null for each uid}]}. A sample whose content changed is there twice, so that methods are compared on the
    same content. There are ``MOST`` samples at most, of those with scores.
    """
    scored = frame[frame["state"] == "ok"].astype({"contender": str, "metric": str, "column": str, "direction": str})
    if scored.empty:
        return ""
    keys = list(dict.fromkeys(zip(scored["uid"], scored["fingerprint"])))[:MOST]
    index = pd.MultiIndex.from_tuples(keys, names=["uid", "fingerprint"])
    methods = contenders(frame)
    columns, several = [], scored.groupby("column")["metric"].nunique() > 1
    for (metric, column, direction), group in scored.groupby(["metric", "column", "direction"], sort=False):
        table = group.pivot(index=["uid", "fingerprint"], columns="contender", values="value").reindex(index)
        values = [_numbers(table[name]) if name in table else [] for name in methods]
        name = f"{column} \N{MIDDLE DOT} {metric}" if several[column] else column
        said = about.get((metric, column), "")
        columns.append({"name": name, "direction": direction, "about": said, "values": values})
    return json.dumps({"methods": methods, "uids": [uid for uid, _ in keys], "columns": columns}, separators=(",", ":"))


def _numbers(values: Sequence[float] | pd.Series) -> list[float | None]:
    """Four digits are more than a picture shows."""
    return [float(f"{v:.4g}") if math.isfinite(v) else None for v in values]
