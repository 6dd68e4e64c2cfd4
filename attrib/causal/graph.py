"""The causal graph of a class: the neurons, layer by layer, without which its logit falls.

The search goes from the logit down. In every weighted layer, the edges from each candidate (an input channel) to the
outputs that are nodes already are set to u; a candidate is a cause if that lowers the logit. Its channel, in the layer
or layers that it comes from, is then a node there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from scipy import stats
from torch import Tensor

from attrib.causal.interventions import Sites, edges, estimate, intervene
from attrib.causal.structure import OUTPUT, Structure
from attrib.checks import require
from attrib.fit import Fit, FitData, Partial, Progress, State
from attrib.models import Classifier
from attrib.models.precision import rounding
from attrib.noise import Noise
from attrib.types import SampleError, UserError

WIDTH = 0.01  # of the interval from which soft weights are drawn
NOT_REACHED, TESTED, FALLEN_BACK, NONE_FOUND, FIRST = range(5)  # how a layer's causes were chosen


@dataclass(frozen=True)
class Search:
    """How a graph is searched for.

    soft        the weight of an edge becomes u ~ U(beta, beta + 0.01), drawn per class and layer; otherwise 0
    z           one-sided test at every candidate: mean < mean of reference - z * sqrt(s^2 / n + s_ref^2 / n)
    correction  of the p-values of a layer's candidates, at the level that belongs to z: Holm (family-wise error
                rate) or BH (Benjamini and Hochberg, false discovery rate)
    fallback    if no candidate of a layer passes the test, those whose mean relative change of the logit is below this
                number are causes; with None there are none, and the search ends there
    layers      how many of the last weighted layers are searched, or the paths of some; None for all
    candidates  how many candidates per layer are tested at most: by a first-order approximation
                (``interventions.estimate``), those that should lower the logit most; None for all
    seed        of the random u
    """

    NAME: ClassVar[str] = "attrib.causal.graph.Search"
    soft: bool = False
    beta: float = 0.0
    z: float = 1.65
    correction: Literal["none", "holm", "bh"] = "none"
    fallback: float | None = -0.001
    layers: int | tuple[str, ...] | None = None
    candidates: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        require(self, "beta", "z")
        require(self, "fallback", or_none=True)
        require(self, "candidates", at_least=1, or_none=True)
        require(self, "correction", one_of=("none", "holm", "bh"))

    def u(self, target: int, path: str) -> float:
        """The value that the weights of one layer are set to, for one class."""
        if not self.soft:
            return 0.0
        draw = Noise([f"class {target}/{path}"], self.seed, dtype=torch.float64).uniform(1).item()
        return self.beta + WIDTH * draw


class GraphLayer(NamedTuple):
    """One layer of a class's graph."""

    effects: Tensor  # (out,) bool: the layer's output channels that are nodes
    causes: Tensor  # (units,) bool: the candidates that are causes of these nodes
    effect: Tensor  # (units,) float64: mean change of the logit; NaN where nothing was tested
    p: Tensor  # (units,) float64: one-sided, corrected; NaN where nothing was tested
    how: int  # NOT_REACHED ... FIRST
    u: float  # what the weights of the edges were set to


class ClassGraph(NamedTuple):
    """The graph of one class; ``layers`` by path from the last to the first layer searched."""

    target: int
    samples: int
    reference: tuple[float, float]  # mean and standard deviation (ddof 1) of the logit without interventions
    layers: dict[str, GraphLayer]

    @property
    def reached(self) -> dict[str, GraphLayer]:
        """The layers that have causes."""
        return {path: found for path, found in self.layers.items() if found.causes.any()}


class Nodes:
    """Which output channels of which layers are nodes of a class's graph so far, from the logit down."""

    def __init__(self, structure: Structure, target: int) -> None:
        """Raises UserError for a class that the net does not have."""
        self._structure = structure
        self._found: dict[str, Tensor] = {}
        logits = len(structure.layer(OUTPUT).units)
        if not 0 <= target < logits:
            raise UserError(f"class {target} does not exist: the net has {logits} classes")
        self.reach(OUTPUT, torch.arange(logits) == target)

    def of(self, path: str) -> Tensor:
        """The nodes of a layer, (out,) bool."""
        if path not in self._found:
            self._found[path] = torch.zeros(self._structure.outputs(path), dtype=torch.bool)
        return self._found[path]

    def reach(self, path: str, units: Tensor) -> None:
        """Make what the chosen units (U,) bool of a layer come from nodes of those layers."""
        layer = self._structure.layer(path)
        for number in units.nonzero()[:, 0].tolist():
            for source, channel in layer.units[number].origin:
                if source in self._structure.paths:
                    self.of(source)[channel] = True


def adjusted(p: Tensor, correction: str) -> Tensor:
    """p-values (m,) after the correction for m tests."""
    if correction == "none" or not len(p):
        return p
    m, order = len(p), p.argsort(stable=True)
    ranks = torch.arange(1, m + 1, dtype=p.dtype)
    if correction == "holm":
        steps = (p[order] * (m + 1 - ranks)).cummax(0).values
    else:
        steps = (p[order] * m / ranks).flip(0).cummin(0).values.flip(0)
    return torch.empty_like(p).scatter_(0, order, steps.clamp(max=1.0))


def select(y: Tensor, reference: Tensor, search: Search) -> tuple[Tensor, Tensor, Tensor, int]:
    """Causes (m,) bool, mean effects (m,), p-values (m,), and how the causes were chosen (TESTED ...).

    y (m, n) is the logit under an intervention on each of m candidates, reference (n,) the one without, both in the
    net's dtype. A difference by rounding alone is none: of logits that hardly vary it would decide the test, so that a
    neuron that says nothing became a cause.
    """
    error = rounding(y.dtype) * torch.cat((y, reference[None])).abs().max().double()
    y, reference = y.double(), reference.double()
    n = len(reference)
    gap = reference.mean() - y.mean(1)
    spread = (y.var(1) / n + reference.var() / n).sqrt()
    gap = gap.masked_fill((gap.abs() <= error) & (spread <= error), 0.0)
    score = torch.where(spread > 0, gap / spread, gap.sign() * float("inf")).nan_to_num(0.0)
    p = adjusted(torch.from_numpy(stats.norm.sf(score.numpy())), search.correction)
    causes = gap > search.z * spread if search.correction == "none" else p < stats.norm.sf(search.z)
    how = TESTED if causes.any() else NONE_FOUND
    if not causes.any() and search.fallback is not None:
        change = y - reference
        relative = (change / reference.abs()).masked_fill(change.abs() <= error, 0.0).mean(1)
        causes = relative < search.fallback
        how = FALLEN_BACK if causes.any() else NONE_FOUND
    return causes, -gap, p, how


def find(sites: Sites, x: Tensor, target: int, search: Search, u: Mapping[str, float] | None = None) -> ClassGraph:
    """The graph of a class, searched for with n of its samples, x (n, *input), of which texts may be padded.

    ``u`` gives the weights of some layers, by path, instead of ``search.u``. Raises UserError for fewer than two
    samples, and for a layer that cannot be searched.
    """
    model, structure = sites.model, sites.structure
    if len(x) < 2:
        raise UserError(f"class {target}: a causal graph needs at least 2 samples, there is {len(x)}")
    nodes = Nodes(structure, target)
    parts = model.of_one_length(x)
    reference = torch.cat([_reference(model, part)[:, target] for part in parts]).cpu()
    layers: dict[str, GraphLayer] = {}
    scope = structure.scope(search.layers)
    for path in reversed(scope):
        layer, effects = structure.layer(path), nodes.of(path).clone()
        m = len(layer.units)
        chosen = torch.zeros(m, dtype=torch.bool)
        nothing = torch.full((m,), torch.nan, dtype=torch.float64)
        value = search.u(target, path) if u is None or path not in u else u[path]
        if not effects.any():
            layers[path] = GraphLayer(effects, chosen, nothing, nothing.clone(), NOT_REACHED, value)
            continue
        if layer.refused and path != scope[0]:
            raise UserError(layer.refused)
        if layer.first:
            layers[path] = GraphLayer(effects, ~chosen, nothing, nothing.clone(), FIRST, value)
            continue
        y, units = _tested(sites, path, parts, effects, target, value, search.candidates)
        causes, effect, p, how = select(y.cpu(), reference, search)
        chosen[units] = causes
        layers[path] = GraphLayer(
            effects, chosen, nothing.index_copy(0, units, effect), nothing.index_copy(0, units, p), how, value
        )
        nodes.reach(path, chosen)
    reference = reference.double()
    return ClassGraph(target, len(x), (reference.mean().item(), reference.std().item()), layers)


@torch.no_grad()
def _reference(model: Classifier, x: Tensor) -> Tensor:
    """(N, K), the net's logits by the graph, whose rounding is that of interventions."""
    graph = model.graph(x)
    return model.chunked(lambda rows: graph(x[rows]), len(x))


def _tested(
    sites: Sites, path: str, parts: Sequence[Tensor], effects: Tensor, target: int, u: float, most: int | None
) -> tuple[Tensor, Tensor]:
    """The logits (m, n) under an intervention on each of the m candidates that are tested, and the candidates' numbers.

    Those that have an edge to an effect; of these the ``most`` with the lowest estimate.
    """
    found = [sites.at(path, part) for part in parts]
    outputs = effects.nonzero()[:, 0]
    connected = [i for i in range(len(found[0].layer.units)) if len(edges(found[0], i, outputs).effects)]
    if most is not None and len(connected) > most:
        each = [estimate(sites.model, site, outputs, target, u) * len(site.z) for site in found]
        expected = torch.stack(each).sum(0)[connected]
        connected = sorted(connected[i] for i in expected.argsort(stable=True)[:most].tolist())
    y = [intervene(sites.model, site, connected, outputs, target, u) for site in found]
    return torch.cat(y, 1), torch.tensor(connected)


# ---- the graphs of several classes as a fitted state -----------------------------------------------

_PARTS = ("effects", "causes", "effect", "p")


def to_state(graphs: Mapping[int, ClassGraph], sought: Iterable[int] | None = None) -> State:
    """Tensors classes (K,), samples (K,), reference (K, 2), and per layer ``<path>.effects`` (K, out) and so on.

    ``sought`` are the classes that graphs were looked for, as far as these were not all.
    """
    state: State = {
        "classes": torch.tensor(list(graphs)),
        "samples": torch.tensor([g.samples for g in graphs.values()]),
        "reference": torch.tensor([g.reference for g in graphs.values()], dtype=torch.float64),
    }
    for path in next(iter(graphs.values())).layers:
        found = [g.layers[path] for g in graphs.values()]
        for part in _PARTS:
            values = torch.stack([getattr(f, part) for f in found])
            state[f"{path}.{part}"] = values.to(torch.uint8) if values.dtype == torch.bool else values
        state[f"{path}.how"] = torch.tensor([f.how for f in found])
        state[f"{path}.u"] = torch.tensor([f.u for f in found], dtype=torch.float64)
    if sought is not None:
        state["sought"] = torch.tensor(sorted(sought), dtype=torch.long)
    return state


def _sought(*states: State) -> frozenset[int] | None:
    """The classes that graphs were looked for in any of these states; None if in one of them for all."""
    if not all("sought" in state for state in states):
        return None
    return frozenset(target for state in states for target in state["sought"].tolist())


def from_state(structure: Structure, state: State) -> dict[int, ClassGraph]:
    """The inverse of ``to_state``. Raises UserError for the state of another net."""
    paths = [path for path in reversed(structure.paths) if f"{path}.how" in state]
    if not paths:
        raise UserError(f"the stored graphs are not of this net, whose layers are {', '.join(structure.paths)}")
    state = {name: value.cpu() for name, value in state.items()}
    graphs = {}
    for k, target in enumerate(state["classes"].tolist()):
        layers = {
            path: GraphLayer(
                effects=state[f"{path}.effects"][k].bool(),
                causes=state[f"{path}.causes"][k].bool(),
                effect=state[f"{path}.effect"][k],
                p=state[f"{path}.p"][k],
                how=int(state[f"{path}.how"][k]),
                u=float(state[f"{path}.u"][k]),
            )
            for path in paths
        }
        mean, spread = state["reference"][k].tolist()
        graphs[target] = ClassGraph(target, int(state["samples"][k]), (mean, spread), layers)
    return graphs


@dataclass(frozen=True)
class CausalGraphs(Fit):
    """The causal graphs of several classes, from samples of the estimation set.

    A run searches for those of the classes that it explains; later ones are added to the state.

    samples   how many samples of each class are used, at least 2: the first ones of the estimation set
    classes   whose graphs are searched for; None for all that are explained and of which the estimation set has two
              samples
    correct   use only samples that the net classifies correctly
    search    see ``Search``
    """

    NAME: ClassVar[str] = "attrib.causal.graph.CausalGraphs"
    VERSION: ClassVar[int] = 2  # in 1 rounding chose causes where a class's logits hardly vary
    BY_CLASS: ClassVar[bool] = True

    samples: int = 50
    classes: tuple[int, ...] | None = None
    correct: bool = True
    search: Search = Search()

    def __post_init__(self) -> None:
        require(self, "samples", at_least=2)

    @property
    def roles(self) -> tuple[str, ...]:
        return ()

    def choose(self, model: Classifier, data: FitData, report: Callable[[str], None]) -> dict[int, list[str]]:
        """The uids of the samples that are used, by class, in the order of the data.

        Raises UserError where a class has fewer than two, and SampleError for data with several labels per sample.
        """
        chosen: dict[int, list[str]] = {}
        wanted, seen = data.asked if self.classes is None else self.classes, 0
        for batch in data:
            if batch.target.ndim != 1:
                raise SampleError("causal graphs need samples with one class each")
            right = model.logits(batch.x).argmax(1) == batch.target
            for uid, target, keep in zip(batch.uids, batch.target.tolist(), right.tolist(), strict=True):
                mine = chosen.setdefault(target, [])
                if (keep or not self.correct) and len(mine) < self.samples:
                    mine.append(uid)
            seen += len(batch)
            report(Progress("samples for causal graphs", seen, len(data.uids), "samples"))
            if wanted is not None and all(len(chosen.get(k, ())) == self.samples for k in wanted):
                break
        if self.classes is not None:
            chosen = {target: chosen.get(target, []) for target in self.classes}
            for target, uids in chosen.items():
                if len(uids) < 2:
                    which = "correctly classified samples" if self.correct else "samples"
                    raise UserError(f"class {target} has {len(uids)} {which} in the estimation set; 2 are needed")
        asked = chosen if wanted is None else wanted
        found = {target: chosen[target] for target in sorted(chosen) if len(chosen[target]) > 1 and target in asked}
        if not found:
            which = " that the net classifies correctly" if self.correct else ""
            whose = "no class" if wanted is None else "none of the classes that are explained"
            raise UserError(f"{whose} has two samples in the estimation set{which}")
        return found

    def run(self, model: Classifier, data: FitData, partial: Partial, report: Callable[[str], None]) -> State:
        stored, graphs = partial.load(), {}
        try:
            chosen = self.choose(model, data, report)
        except UserError:
            if self.classes is not None or not stored:
                raise
            chosen = {}  # there are graphs of other classes; a sample of these fails by itself
        asked = data.asked if self.classes is None else None
        sites: Sites | None = None
        for done, (target, uids) in enumerate(chosen.items()):
            x = data.batch(uids).x
            if sites is None:
                sites = Sites(model, Structure.of(model, x))
                graphs = from_state(sites.structure, stored) if stored else {}
            if target not in graphs:
                graphs[target] = find(sites, x, target, self.search)
                partial.save(to_state(graphs, None if asked is None else ()))
            report(Progress("causal graphs", done + 1, len(chosen), "classes"))
        if sites is None:  # nothing new
            return {**stored, "sought": torch.tensor(sorted(asked or ()))} if stored else {}
        return to_state(graphs, asked)

    def covers(self, state: State, asked: frozenset[int] | None) -> bool:
        sought = _sought(state)
        return sought is None or (asked is not None and asked <= sought)

    def united(self, stored: State, new: State) -> State:
        sought, both = _sought(stored, new), [set(s["classes"].tolist()) for s in (stored, new)]
        if both[1] <= both[0] and sought == _sought(stored):
            return stored
        more = torch.tensor([target not in both[0] for target in new["classes"].tolist()])
        state = {name: torch.cat((value, new[name][more])) for name, value in stored.items() if name != "sought"}
        return state if sought is None else {**state, "sought": torch.tensor(sorted(sought))}
