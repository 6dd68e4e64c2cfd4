"""What the JSON of a work directory holds: the types that :mod:`attrib.store.reading` demands.

Fields that are not named here are allowed, so that an older program reads what a newer one wrote.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypedDict

from msgspec import UNSET, Meta, Struct, UnsetType, field

Finite = Annotated[float, Meta(ge=-1e300, le=1e300)]
Amount = Annotated[float, Meta(ge=0, le=1e300)]
Count = Annotated[int, Meta(ge=0, le=2**53)]


# ---- samples ----------------------------------------------------------------------------------------


class Info(TypedDict, total=False):
    """What is noted beside an array: costs of a map or a score, or what an input is."""

    seconds: float | None
    rows: float | None
    memory: float | None
    device: str
    target: Any  # of several labels a list
    name: str
    tokens: list[str]
    rate: Annotated[float, Meta(ge=1, le=1e9)]
    predicted: int  # the class that the net takes the sample for
    predicted_name: str
    probability: Annotated[float, Meta(ge=0, le=1)]  # of that class
    right: bool  # whether it is the sample's label


class SampleNote(TypedDict):
    """What a chunk says of each of its samples: ``crc`` has the checksum of every array by name."""

    uid: str
    fingerprint: str
    crc: dict[str, Annotated[int, Meta(ge=0, lt=2**32)]]
    info: Info


class Entry(TypedDict):
    """A line of the ledger."""

    uid: str
    fingerprint: str
    stage: str
    reason: str
    time: Finite


Confidences = dict[str, tuple[str, float]]  # uid -> fingerprint and the model's confidence
SampleList = dict[str, str | None]  # samples.json: uid -> fingerprint that counts, see Cell.samples


# ---- cells ------------------------------------------------------------------------------------------


class Randomised(TypedDict):
    """How a net was randomised (``attrib.sanity``)."""

    original: str | None
    layers: list[str]
    place: Count
    total: Count
    mode: str
    seed: int


class Axes(TypedDict):
    """The names that people gave."""

    dataset: str
    model: str
    method: str


class Spec(TypedDict, total=False):
    """spec.json, see ``attrib.running.plan.spec_of``: what tables and the report read of it."""

    format: Annotated[int, Meta(ge=1)]  # absent in cells of before it was counted, which are of format 1
    names: Axes
    dataset_key: str
    model_key: str
    state_key: str | None
    weights: str
    layers: dict[str, str]
    seed: int
    method: dict[str, Any]
    maps: dict[str, str]
    pictures: str
    config: dict[str, Any]
    versions: dict[str, str]
    git: str | None
    code: dict[str, str]
    key: str
    modality: str
    extras: dict[str, str]
    documents: dict[str, str]
    randomised: Randomised


class Needs(TypedDict):
    """What of a spec says which states it needs."""

    key: str
    state_key: str | None
    pictures: str


class MetricNote(Struct):
    """metric.json of a folder of scores."""

    name: str = ""
    spec: dict[str, Any] | None = None
    columns: dict[str, Literal["higher", "lower", "none"]] = {}
    curves: dict[str, str] = {}
    about: dict[str, str] = {}
    bounds: dict[str, tuple[float, float]] = {}


# ---- runs -------------------------------------------------------------------------------------------


class Progress(Struct):
    """progress.json: a worker's signs of life."""

    stage: str = ""
    done: Count = 0
    total: Count = 0
    failed: Count = 0
    rate: Amount | None = None
    shard: int | None = None
    shards: Count | None = None
    limit: Count | None = None
    metrics: list[str] | None = None
    host: str = ""
    pid: Count | None = None
    process: str | None = None
    job: str | None = None


class RunSummary(Struct):
    """summary.json: how a run ended.

    stopped   a signal, None if it was not told to; earlier versions do not say
    refused   why what was asked for cannot be done, if that ended it
    """

    finished: bool = False
    failed: Count | None = None
    left: Count | None = None
    seconds: Amount = 0.0
    stopped: str | UnsetType | None = UNSET
    refused: str | None = None


class RunOptions(Struct):
    """``run`` of config.json: how the work was shared out."""

    shards: Count | None = None
    limit: Count | None = None


class RunConfig(Struct):
    run: RunOptions | None = None


class Environment(Struct):
    """environment.json: on what a run ran."""

    command: list[str] = []
    machine: str = ""


# ---- causal graphs ----------------------------------------------------------------------------------


GRAPH_TABLES: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {  # file -> columns of text, and of numbers
    "effect.csv": (("class", "change", "network"), ("logit", "accuracy", "others")),
    "bootstrap.csv": (("layer",), ("nodes", "edges", "nodes_reference", "edges_reference")),
}


class GraphLayer(Struct):
    """A layer of a causal graph (``attrib graph``): how many of its candidates are causes, and how they were chosen."""

    path: str
    causes: Count
    candidates: Count
    how: str


class ClassGraph(Struct):
    class_: int | str = field(name="class")
    name: str
    samples: Count
    layers: list[GraphLayer]


class CausalGraph(Struct):
    graph: ClassGraph
