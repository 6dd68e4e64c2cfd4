"""From Python to the command line that computes the same of a data set, and back."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from attrib import keys
from attrib.api.nets import RUN, Net, named
from attrib.api.parts import Explainer, explainer, yaml_of
from attrib.config.compose import CommandLine, compose, compose_node, plain, spelled
from attrib.config.objects import completed, dataset_of, metrics_of
from attrib.config.places import presets
from attrib.datasets import Dataset
from attrib.datasets.memory import Pictures, Sentences, Tensors, Waves
from attrib.experiment.cell import Experiment
from attrib.experiment.regions import fitting
from attrib.experiment.targets import Contrast
from attrib.models.precision import Precision
from attrib.types import UserError

# For samples that were handed over one by one: the place of FOLDER and FILE is the reader's to say.
LOOSE = {
    "image": "dataset=image_folder dataset.root=FOLDER",
    "text": "dataset=text_csv dataset.path=FILE",
    "audio": "dataset=audio_folder dataset.root=FOLDER",
}
IN_MEMORY = (Pictures, Sentences, Waves, Tensors)


@dataclass(frozen=True)
class Origin:
    """What an explanation was asked for with.

    fit     the name of a dataset, or None
    labels  what was explained of each sample, where that was said beside the samples (``parts.labels_of``)
    """

    net: Net
    explainer: Explainer
    fit: str | None
    overrides: tuple[str, ...] = ()
    labels: Any = None


def command_of(origin: Origin, cell: Experiment, dataset: str | None = None) -> str:
    """``attrib run ...``. Raises UserError for what has no name on a command line."""
    net = origin.net
    if net.preset is None:
        raise UserError(
            f"{net.name} was handed over as an object, and a command line needs a name; write five lines of YAML "
            "(docs/how-to/add-a-model.md), and explain model=NAME"
        )
    words = [f"model={net.preset}", *net.overrides, *_layers(origin), *_method(origin.explainer, origin.overrides)]
    if dataset is not None:
        named("dataset", dataset)
    chosen = dataset or origin.fit
    own = [o for o in origin.overrides if o.startswith("dataset.")] if dataset in (None, origin.fit) else []
    words += [f"dataset={chosen}", *_to_fill_in(chosen, own)] if chosen else _data(cell.dataset)
    words += own
    words += [f"dataset.target={_target(cell)}", *([f"seed={cell.seed}"] if cell.seed else []), "metric=[]"]
    if net.precision != Precision():
        words.append(f"precision={written(dataclasses.asdict(net.precision))}")
    default = type(net.options)()
    words += [f"run.{n}={getattr(net.options, n)}" for n in RUN if getattr(net.options, n) != getattr(default, n)]
    return shlex.join(["attrib", "run", *words])


def _data(dataset: Dataset) -> list[str]:
    """The data that were explained: the preset of their class, or what to fill in."""
    loose = LOOSE[dataset.modality].split()
    if isinstance(dataset, IN_MEMORY):
        return loose
    kind = type(dataset).__name__
    nodes = {name: yaml_of(path, resolve=False) for name, path in presets("dataset").items()}
    found = [name for name, node in nodes.items() if str(node.get("_target_")).rpartition(".")[2] == kind]
    if len(found) != 1:
        return ["dataset=NAME"]
    return [f"dataset={found[0]}", *_to_fill_in(found[0], ())]


def _to_fill_in(name: str, own: Sequence[str]) -> list[str]:
    """What a preset of data leaves open, such as where they lie, unless the overrides ``own`` say it."""
    fields = yaml_of(presets("dataset")[name], resolve=False)
    given = {o.partition("=")[0] for o in own}
    return [f"dataset.{k}={k.upper()}" for k, v in fields.items() if v == "???" and f"dataset.{k}" not in given]


def written(value: Any) -> str:
    """A value as people write it in an override.

    >>> [written(v) for v in (None, True, 0.5, "conv1", "1", [1, "a b"], {"of": 3})]
    ['null', 'true', '0.5', 'conv1', "'1'", "[1,'a b']", '{of:3}']
    """
    return spelled(value, quoted=False)


def _layers(origin: Origin) -> list[str]:
    return [
        f"+model.layers.{r}={written(path)}" for r, path in origin.net.named_layers(origin.explainer.method).items()
    ]


def _target(cell: Experiment) -> str:
    if isinstance(cell.target, Contrast):
        return written({"of": cell.target.of, "against": cell.target.against})
    return str(cell.target)


def _method(given: Explainer, overrides: Sequence[str]) -> list[str]:
    own = [o for o in overrides if o.lstrip("+").startswith("method.")]
    if given.preset is not None:
        return [f"method={given.preset}", *own, *(f"+method.{k}={written(v)}" for k, v in given.fields.items())]
    name, fields = _nearest(given)
    return [f"method={name}", *(f"+method.{k}={written(v)}" for k, v in fields.items())]


def _nearest(given: Explainer) -> tuple[str, Mapping[str, Any]]:
    """The preset of the same class with the fewest other fields, and these. Raises UserError."""
    wanted, best = keys.spec(given.method), None
    for name, path in presets("method").items():
        if str(yaml_of(path).get("_target_")).rpartition(".")[2] != type(given.method).__name__:
            continue  # composing all of them would take seconds
        try:
            made = explainer(name).method
        except UserError:  # one that needs more than its defaults, such as the name of an algorithm
            continue
        if type(made) is not type(given.method):
            continue
        known = keys.spec(made)
        fields = [f.name for f in dataclasses.fields(cast(Any, made)) if known.get(f.name) != wanted.get(f.name)]
        if best is None or len(fields) < len(best[1]):
            best = name, {field: getattr(given.method, field) for field in fields}
    kinds = (bool, int, float, str, list, tuple, type(None))
    if best is None or not all(isinstance(value, kinds) for value in best[1].values()):
        raise UserError(
            f"{given.name} was handed over as an object that no preset describes; write a YAML for it "
            "(docs/how-to/add-a-method.md), and explain method=NAME"
        )
    return best


# ---- from the command line to Python -------------------------------------------------------------------


def python_of(line: CommandLine) -> str:
    """The lines of Python that explain, and score, the first sample of what ``attrib run`` would.

    Raises UserError for what has no counterpart there.
    """
    if line.multirun:
        raise UserError("--python prints the lines of one experiment; leave -m out")
    if line.folder is not None:
        raise UserError("--python knows attrib's own configurations, not those of --config-dir")
    overrides = {key: str(override.input_line) for key, override in line.overrides.items()}
    node = compose_node("run", list(overrides.values()))
    values, choices = plain(node).values, node.hydra.runtime.choices
    chosen = {part: str(choices[part]) for part in ("model", "dataset", "method")}
    known = set(values["method"])
    more, fields, run, seed, precision, target = [], {}, {}, 0, None, values["dataset"].get("target", "label")
    for key, text in overrides.items():
        group, _, name = key.partition(".")
        if key in chosen or key in ("metric", "dataset.target") or (group == "run" and name not in RUN):
            continue
        if key == "seed":
            seed = values["seed"]
        elif group == "precision":
            precision = values["precision"]
        elif group == "run":
            if name != "batch" or isinstance(values["run"][name], int):  # else it is as the device suggests
                run[name] = values["run"][name]
        elif group == "method" and name in known and "." not in name and name.isidentifier():
            fields[name] = values["method"][name]
        elif group in ("model", "dataset", "method", "metric") and not text.startswith("~"):
            more.append(text)
        else:
            raise UserError(f"{text}: attrib.explain has no argument for it")
    metrics = _metrics(list(overrides.values()))
    extra = f", overrides={more!r}" if more else ""
    data = [o for o in more if o.split(".")[0].lstrip("+") in ("model", "dataset")]
    with_data = f", overrides={data!r}" if data else ""
    arguments = {"method": chosen["method"], "fit": chosen["dataset"], **({"seed": seed} if seed else {})}
    arguments |= {} if precision is None else {"precision": precision}
    arguments |= {**({"run": run} if run else {}), **fields}
    if explainer(chosen["method"], overrides=[o for o in more if "method." in o]).method.fit is None:
        del arguments["fit"]
    written = "".join(f", {name}={value!r}" for name, value in arguments.items())
    lines = [
        "import attrib",
        "",
        f"net = {chosen['model']!r}",
        f"data = attrib.dataset({chosen['dataset']!r}, net{with_data})",
        f"explanation = attrib.explain(net, data, {target!r}, uids=data.uids[:1]{written}{extra})",
        'explanation.save("explanation")',
    ]
    if metrics:
        lines.append(f"print(attrib.evaluate(net, data, explanation, {metrics!r}{extra}))")
    return "\n".join(lines) + "\n"


def _metrics(overrides: Sequence[str]) -> list[str]:
    """The metrics that a run would take: of the default ones those that fit the data, if these are there."""
    found = compose("run", overrides)
    nodes = found.values.get("metric") or {}
    try:
        data = completed(found.values, found.files)["dataset"]
        return list(fitting(metrics_of(nodes), found.assumed, dataset_of(data, "dataset"), str(data.get("name"))))
    except UserError:  # whoever runs it will be told
        return list(nodes)
