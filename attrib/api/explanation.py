"""What ``explain`` gives back: maps, pictures of them, and the way to the same for a whole data set."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import safetensors.torch
import torch
from torch import Tensor

import attrib
from attrib import keys
from attrib.api import pictures
from attrib.api.computing import One
from attrib.api.inputs import given
from attrib.api.lines import Origin, command_of
from attrib.api.maps import with_roi
from attrib.api.modes import undisturbed
from attrib.api.names import Given
from attrib.api.parts import measures
from attrib.api.scoring import scores
from attrib.classes import shown_target
from attrib.datasets.memory import Tensors
from attrib.drawing.pictures import png
from attrib.experiment.cell import Experiment
from attrib.fit import State
from attrib.results.formats import title
from attrib.running.kept_inputs import plain, shown_input, target_name
from attrib.store.files import picture_path, write_atomic, write_json
from attrib.types import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class Explanation:
    """The maps of some samples. Made by :func:`attrib.explain`; in a notebook it shows itself.

    uids      names of the N samples that have maps, in the order in which they were given
    failures  uid -> why it has no map, of the others that were given
    asked     all that were given: ``uids`` and those of ``failures``
    known     uid -> arrays and target as a run stores them, and what they cost

    >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 4 * 4, 2))
    >>> explanation = attrib.explain(net, torch.rand(1, 3, 4, 4), method="gradient", uids=["mine"])
    >>> explanation
    Explanation(gradient of 1 sample: map (1, 4, 4))
    >>> explanation.uids
    ('mine',)
    """

    cell: Experiment = field(repr=False)
    uids: tuple[str, ...]
    known: Mapping[str, One] = field(repr=False)
    state: State = field(repr=False)
    origin: Origin = field(repr=False)
    failures: Mapping[str, str] = field(default_factory=dict, repr=False)
    asked: tuple[str, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "asked", self.asked or self.uids)

    def __len__(self) -> int:
        return len(self.uids)

    def __repr__(self) -> str:
        what = ", ".join(f"{name} {tuple(value.shape)}" for name, value in self.maps.items())
        some = f"{len(self)} sample{'s' if len(self) > 1 else ''}"
        some += f", {len(self.failures)} failed" if self.failures else ""
        return f"Explanation({self.cell.names['method']} of {some}: {what})"

    # ---- numbers --------------------------------------------------------------------------------

    @cached_property
    def maps(self) -> dict[str, Tensor]:
        """name -> (N, H, W), of sounds (N, L), of texts (N, T) with zeros on padding; float32, as a run stores them."""
        return {name: self._stacked(name) for name in self.cell.method.MAPS}

    @property
    def map(self) -> Tensor:
        """The map of a method that has one. Raises UserError for a method with several."""
        if len(self.maps) > 1:
            raise UserError(
                f"{self.cell.names['method']} has several maps: maps[{'], maps['.join(map(repr, self.maps))}]"
            )
        return next(iter(self.maps.values()))

    @cached_property
    def extras(self) -> dict[str, Tensor]:
        """What else the method keeps (its ``EXTRAS``): name -> (N, ...)."""
        return {name: self._stacked(name) for name in self.cell.method.EXTRAS}

    @cached_property
    def documents(self) -> dict[str, list[Any]]:
        """What it writes as JSON (its ``DOCUMENTS``), such as trees: name -> one for each sample."""
        names = self.cell.method.DOCUMENTS
        return {name: [json.loads(self.known[uid].arrays[name].tobytes()) for uid in self.uids] for name in names}

    @property
    def target(self) -> Tensor:
        """(N,) classes, or (N, K), see :class:`attrib.types.Batch`."""
        return torch.stack([self.known[uid].target for uid in self.uids])

    @property
    def target_names(self) -> list[str]:
        """What is explained of each sample, in words."""
        named = ((target_name(self.cell, plain(t)), plain(t)) for t in self.target)
        return [shown_target(name, number) for name, number in named]

    def _stacked(self, name: str) -> Tensor:
        arrays = [np.asarray(self.known[uid].arrays[name]) for uid in self.uids]
        longest = max((a.shape[:1] for a in arrays), default=())
        data, of_tokens = self.cell.dataset, (*self.cell.method.MAPS, *self.cell.method.TOKENS)
        if isinstance(data, Tensors) and data.modality == "text" and name in of_tokens:  # as wide as they were given
            longest = (max(data.width, *longest),)
        if any(a.shape[:1] != longest for a in arrays):  # of texts
            arrays = [np.pad(a, [(0, longest[0] - len(a)), *[(0, 0)] * (a.ndim - 1)]) for a in arrays]
        if len({a.shape for a in arrays}) > 1:
            raise UserError(f"{name}: the samples have different sizes; explain each alone, as a list of one")
        return torch.from_numpy(np.stack(arrays))

    def check_is_of(self, net: Any, x: Any, others: Sequence[str] = ()) -> None:
        """Raises UserError unless ``net`` and ``x``, each of which may be None, are what was explained.

        ``others`` are arguments of :func:`attrib.evaluate` that an explanation brings itself.
        """
        if others:
            raise UserError(f"{', '.join(others)}: an Explanation brings its own; leave that out, or give its maps")
        if net is not None and net is not self.origin.net.given and net != self.origin.net.preset:
            raise UserError("net is not the one that was explained; to have maps scored by another, give .maps")
        if net is not None and self.origin.net.weights not in (None, self.cell.model.weights):
            raise UserError(
                "net was changed since it was explained: its weights are others now. To have maps scored by the net as "
                "it is, give .maps; by the net as it was, leave it out (None)"
            )
        if x is None or x is self.cell.dataset:
            return
        net_input, pad = self.origin.net.input, self.origin.net.pad
        found, data = given(x, net_input, self.asked, self.origin.labels, pad=pad), self.cell.dataset
        if any(found.dataset.fingerprint(uid) != data.fingerprint(uid) for uid in self.asked):
            raise UserError("x is not what was explained; to have maps scored on other samples, give .maps")

    @undisturbed
    def evaluate(self, metrics: Any = None, roi: Any = None) -> pd.DataFrame:
        """Scores of the maps, see :func:`attrib.evaluate`. ``roi``: of all that were given (``asked``)."""
        cell, found = self.cell, Given(self.cell.dataset, self.asked)
        if roi is not None:
            cell = dataclasses.replace(cell, dataset=with_roi(found, roi).dataset)
        if metrics is not None:
            cell = dataclasses.replace(cell, metrics=measures(metrics))
        known = {uid: self.known[uid] for uid in self.uids}
        return scores(cell, known, self.origin.net.options.read, self.state, self.asked, self.failures)

    # ---- for people -----------------------------------------------------------------------------

    def plot(self) -> Figure:
        """The samples (the first 24) and their maps as a figure of matplotlib (``.savefig("map.png")``)."""
        return pictures.figure(self.drawn())

    def _repr_html_(self) -> str:
        return pictures.html(self.drawn(), of=len(self), problems=self.problems)

    @property
    def problems(self) -> list[str]:
        """A line for each sample without a map."""
        return [f"no map: {reason}" for reason in self.failures.values()]

    def drawn(self) -> list[pictures.Drawn]:
        """What is drawn: of many samples the first."""
        return [self._drawn(uid) for uid in self.uids[: pictures.MOST]]

    def _drawn(self, uid: str) -> pictures.Drawn:
        samples = self.cell.stored_samples(self.uids, 1)
        arrays, info = shown_input(samples, uid)
        (content,) = arrays.values()
        roi = samples.dataset.batch([uid]).roi
        target = plain(self.known[uid].target)
        name = shown_target(target_name(self.cell, target), target)
        maps = {kind: self.known[uid].arrays[kind] for kind in self.cell.method.MAPS}
        tree = self.known[uid].arrays.get("tree") if "tree" in self.cell.method.DOCUMENTS else None
        signed = {kind: pictures.signed(m) for kind, m in maps.items()}
        mask = None if roi is None or not roi[0].any() else roi[0].numpy()
        return pictures.Drawn(uid, name, content, mask, info, maps, signed, self.cell.names["method"], tree)

    # ---- files ----------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> Path:
        """Writes maps and pictures; returns the folder.

        ``maps.safetensors`` has maps and extras, one row for each sample; ``explanation.json`` what was computed;
        ``explanation.html`` is a page; and each sample has ``<map>/<uid>.png`` (of texts only the page) and its
        documents. Files of the same names are replaced. Raises UserError if the folder cannot be written.
        """
        folder = Path(folder).expanduser()
        try:
            self._write(folder)
        except OSError as error:
            raise UserError(f"{folder} cannot be written: {error.strerror or error}") from error
        return folder

    def _write(self, folder: Path) -> None:
        arrays = {name: value.contiguous() for name, value in {**self.maps, **self.extras}.items()}
        write_atomic(folder / "maps.safetensors", safetensors.torch.save(arrays, {"uids": json.dumps(self.uids)}))
        write_json(folder / "explanation.json", self.about)
        text = pictures.page(self.drawn(), repr(self), "", len(self), self.problems)
        write_atomic(folder / "explanation.html", text.encode())
        for one in map(self._drawn, self.uids):
            for kind in one.maps:
                image = pictures.image(one, kind)
                if image is not None:
                    write_atomic(picture_path(folder / kind, one.uid), png(image))
        for name, documents in self.documents.items():
            for uid, document in zip(self.uids, documents):
                write_json(picture_path(folder / name, uid, ".json"), document)

    @property
    def about(self) -> dict[str, Any]:
        """What was computed, as plain data."""
        cell = self.cell
        return {
            "names": {name: value for name, value in cell.names.items() if name != "dataset"},
            "method": keys.spec(cell.method),
            "model_key": cell.model.key,
            "layers": cell.layers,
            "seed": cell.seed,
            "target": keys.spec(cell.target),
            "samples": {
                uid: {"target": plain(t), "name": n} for uid, t, n in zip(self.uids, self.target, self.target_names)
            },
            "asked": list(self.asked),
            "failures": dict(self.failures),
            "versions": {"attrib": attrib.__version__, "torch": torch.__version__},
        }

    # ---- from one sample to a data set ------------------------------------------------------------

    def command(self, dataset: str | None = None) -> str:
        """The command line that computes such maps of a data set: ``attrib run ...``.

        dataset   name of a data set; by default the one that the method was fitted on, else that of the samples. Of
                  samples that were handed over one by one the command has FOLDER or FILE for where they lie.

        Raises UserError if the net or the method was handed over as an object that no name stands for.
        """
        return command_of(self.origin, self.cell, dataset)


def together(explanations: Sequence[Explanation]) -> list[pictures.Drawn]:
    """Several methods' maps of the same samples, side by side; of a sample that one of them failed for, the others'."""
    found = []
    there = [uid for uid in explanations[0].asked if any(uid in e.known for e in explanations)]
    for uid in there[: pictures.MOST]:
        drawn = [e._drawn(uid) for e in explanations if uid in e.known]
        maps: dict[str, np.ndarray] = {}
        signed: dict[str, bool] = {}
        for one in drawn:
            for kind in one.maps:
                label = title(one.method, kind if len(one.maps) > 1 else "")
                maps[label], signed[label] = one.maps[kind], one.signed[kind]
        found.append(dataclasses.replace(drawn[0], maps=maps, signed=signed, tree=None))
    return found
