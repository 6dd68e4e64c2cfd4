"""From a command line to composed configurations: the only module that asks Hydra to compose one.

A command line is options (``-m``, ``--config-dir``) and *overrides*: ``method=iba`` chooses the file
``method/iba.yaml``, ``method.beta=20`` sets a field. Hydra accepts more than attrib reads, and explains what it does
not accept at length; here both end in one sentence.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import shlex
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import hydra
import yaml
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, QuotedString, RangeSweep
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError, MissingMandatoryValue, OmegaConfBaseException

from attrib.config.places import checked_folder, configs, presets, shown
from attrib.errors import UserError, did_you_mean

__all__ = [
    "CommandLine",
    "Composition",
    "Override",
    "RangeSweep",
    "compose",
    "compose_node",
    "parse_overrides",
    "plain",
    "preset",
    "resolved",
    "spelled",
]

TARGETS = "dataset.targets"
HIDDEN = ("_target_", "_convert_", "name")  # fields of presets that nobody sets on a command line
# Fields that are no argument of what a preset builds. Whoever reads them refuses an unknown field in them.
OPTIONAL = (
    *(f"model.{field}" for field in ("checkpoint", "match", "randomise", "output", "classes")),
    *(f"dataset.{field}" for field in ("target", "select")),
)


# ---- the command line --------------------------------------------------------------------------


def parse_overrides(overrides: Sequence[str], where: str = "command line") -> dict[str, Override]:
    """``["model=vgg16", "~metric"]`` by what they set. Raises UserError for what is not an override.

    Hydra wants quotes around a text with characters that are not ASCII or mean something to it (``/data/café (1)``);
    here a text goes without them.
    """
    found: dict[str, Override] = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        try:
            override = _parsed(text)
        except HydraException as error:
            try:
                # What may be a list, a mapping, a function or several values is left to whoever wrote it.
                plain_text = equals and not re.match(r"""["'\[{]|\w+\(""", value) and "," not in value
                override = _parsed(f"{key}={spelled(value)}" if plain_text else text)
            except HydraException:
                why = str(error).splitlines()[0]
                if why.startswith("Lexer"):
                    why = "put texts in it that are not plain ASCII in quotes, as in model.classes=['Straße','b']"
                raise UserError(
                    f"{where}: {text!r} is not understood: {why if equals else 'expected KEY=VALUE'}"
                ) from error
        found[override.key_or_group] = override
    return found


def _parsed(text: str) -> Override:
    [override] = OverridesParser.create().parse_overrides([text])
    return override


def _one_target_each(given: Mapping[str, Override]) -> dict[str, Override]:
    """With ``dataset.targets`` as a sweep of ``dataset.target``. Raises UserError."""
    values = given[TARGETS].value()
    if not isinstance(values, list) or not values:
        raise UserError(f"{given[TARGETS].input_line}: give a list, such as {TARGETS}=[label,predicted]")
    if "dataset.target" in given:
        raise UserError(f"{given[TARGETS].input_line} and {given['dataset.target'].input_line}: give one of them")
    sweep = parse_overrides([f"dataset.target={','.join(map(spelled, values))}"])["dataset.target"]
    return {("dataset.target" if key == TARGETS else key): sweep if key == TARGETS else o for key, o in given.items()}


_WORDS = ("null", "true", "false", "nan", "inf")  # that mean more than themselves


def spelled(value: Any, quoted: bool = True) -> str:
    """A value as it is written in an override. ``quoted``: whether words that need no quotes have some, too.

    >>> [spelled(v) for v in (None, True, 0.5, "conv1", [1, "a b"], {"of": 3})]
    ['null', 'true', '0.5', "'conv1'", "[1,'a b']", '{of:3}']
    """
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{spelled(one, quoted)}" for key, one in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(spelled(one, quoted) for one in value) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int | float):
        return repr(value)
    text = value.text if isinstance(value, QuotedString) else str(value)
    if not quoted and re.fullmatch(r"[A-Za-z_][\w./-]*", text) and text.lower() not in _WORDS:
        return text
    # Only in front of a quote, a backslash is more than itself.
    return "'" + re.sub(r"(\\*)'", r"\1\1\\'", re.sub(r"(\\+)$", r"\1\1", text)) + "'"


@dataclass(frozen=True)
class CommandLine:
    """What follows a subcommand that composes configurations.

    multirun    ``-m``: overrides may list several values, and the command computes every combination
    folder      ``--config-dir``: configurations beside attrib's own
    overrides   by the key or group that they set, in the order in which they were given
    """

    multirun: bool
    folder: Path | None
    overrides: Mapping[str, Override]

    @classmethod
    def of(cls, overrides: Sequence[str], folder: Path | None = None, multirun: bool = False) -> CommandLine:
        """Raises UserError for what is not an override, and for several values without ``-m``.

        ``dataset.targets=[label,predicted]`` stands for ``-m dataset.target=label,predicted``.
        """
        given = parse_overrides(overrides)
        if TARGETS in given:
            given, multirun = _one_target_each(given), True
        line = cls(multirun, checked_folder(folder), given)
        for override in line.overrides.values():
            if override.is_sweep_override() and not multirun:
                raise UserError(f"{override.input_line} has several values; add -m to run them one after the other")
        return line

    def with_override(self, text: str) -> CommandLine:
        return dataclasses.replace(self, overrides={**self.overrides, **parse_overrides([text])})

    def cells(self, without: Sequence[str] = ()) -> list[tuple[str, ...]]:
        """The overrides of every combination of values, without those of some keys; the last one varies fastest."""
        ways = []
        for key, override in self.overrides.items():
            if key not in without:
                name, many = override.get_key_element(), override.is_sweep_override()
                values = [f"{name}={value}" for value in override.sweep_string_iterator()] if many else []
                ways.append(values or [str(override.input_line)])
        return list(itertools.product(*ways))

    def values(self, key: str) -> list[str] | None:
        """What is given for ``key``, or None."""
        override = self.overrides.get(key)
        if override is None:
            return None
        return list(override.sweep_string_iterator()) if override.is_sweep_override() else [str(override.value())]


# ---- composing ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Composition:
    """A composed configuration.

    values    plain, with nothing left to resolve
    files     part -> the file it was chosen from, for messages: ``{"method": "configs/method/iba.yaml"}``
    assumed   the metrics that are there by default, because nobody named any
    given     field -> the override that set it, for messages: ``{"method.beta": "method.beta=20"}``
    """

    values: dict[str, Any]
    files: Mapping[str, str]
    assumed: tuple[str, ...] = ()
    given: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def blamed(self, error: UserError) -> UserError:
        """The error, which names the override instead of the file if it was an override that set the wrong field."""
        for part, file in self.files.items():
            before, said, rest = str(error).partition(f"{file}: ")
            for key, override in self.given.items() if said and not before else ():
                field = key.removeprefix(f"{part}.")
                at = rf"(?:\w+\.)*{': '.join(map(re.escape, field.split('.')))}\b|.* has no field '{re.escape(field)}'"
                if field != key and re.match(at, rest):
                    return UserError(f"{override}: {rest}")
        return error


def compose(name: str, overrides: Sequence[str] = (), folder: Path | None = None) -> Composition:
    """The configuration ``name`` (run, sanity, graph, train) with these overrides.

    folder   more configurations (``--config-dir``)

    Raises UserError that names the override or the missing value.

    >>> compose("run", ["method=random", "run.limit=2"]).values["run"]["limit"]
    2
    """
    found = plain(compose_node(name, overrides, folder), folder)
    given = {key.lstrip("+"): str(o.input_line) for key, o in parse_overrides(overrides).items() if "." in key}
    return dataclasses.replace(found, assumed=_assumed(name, overrides, found.values), given=given)


def _assumed(name: str, overrides: Sequence[str], values: Mapping[str, Any]) -> tuple[str, ...]:
    """The metrics that no override names, where they are those of the primary configuration."""
    default, given = _base(name).groups.get("metric") or (), parse_overrides(overrides)
    deleted = [metric for metric in default if f"metric.{metric}" in given and given[f"metric.{metric}"].is_delete()]
    left = [metric for metric in default if metric not in deleted]
    if "metric" in given or list(values.get("metric") or ()) != left:
        return ()
    named = {key.split(".")[1] for key in given if key.startswith("metric.")}
    return tuple(metric for metric in left if metric not in named)


def plain(config: DictConfig, folder: Path | None = None) -> Composition:
    """What ``compose_node`` gave, resolved. Raises UserError."""
    chosen = {str(group): str(choice) for group, choice in config.hydra.runtime.choices.items()}
    known = {group: presets(group, folder) for group in chosen}
    files = {group: shown(known[group][name]) for group, name in chosen.items() if name in known[group]}
    return Composition(resolved(OmegaConf.masked_copy(config, [str(k) for k in config if k != "hydra"])), files)


def compose_node(name: str, overrides: Sequence[str] = (), folder: Path | None = None) -> DictConfig:
    """As ``compose``: unresolved, and with the node ``hydra``."""
    given, base = parse_overrides(overrides), _base(name)
    for key, override in given.items():
        _check(key, override, base, folder)
    nothing = [k for k, o in given.items() if k in base.groups and not o.is_delete() and o.value() is None]
    lines = [_for_hydra(o, folder) for key, o in given.items() if key not in nothing]  # Hydra refuses paper=null
    config = _composed(name, lines, folder)
    for key in map(str, config):
        if key not in (*base.keys, "hydra"):
            hint = 'a file that sets what others read begins with the line "# @package _global_"'
            raise UserError(f"nothing reads {key!r}, which the configuration holds now; {hint}")
    return config


def preset(group: str, name: str, folder: Path | None = None) -> dict[str, Any]:
    """What ``group=name`` chooses for a run, unresolved. Raises UserError.

    One of attrib's own is composed alone, in half the time, or only read, if it builds on no other; one of ``folder``
    may override other groups.

    >>> preset("method", "grad_cam")["_target_"]
    'attrib.methods.cam.GradCAM'
    """
    listed = group == "metric"
    if name in (ours := presets(group)):
        chosen = _read_alone(ours[name]) or _composed(f"{group}/{name}", (), None)[group]
    else:
        chosen = compose_node("run", [f"{group}=[{name}]" if listed else f"{group}={name}"], folder)[group]
    node: Any = OmegaConf.to_container(chosen)
    node = node[name] if listed else node
    return {str(key): value for key, value in node.items()}


def _read_alone(path: Path) -> DictConfig | None:
    """A file that builds on no other and says nothing of where it belongs; None: Hydra must compose it."""
    text = path.read_text(encoding="utf-8")
    if text.startswith("# @package"):
        return None
    try:
        found = OmegaConf.create(text)
    except (OmegaConfBaseException, yaml.YAMLError):  # Hydra says where
        return None
    return found if isinstance(found, DictConfig) and "defaults" not in found else None


def resolved(config: DictConfig) -> dict[str, Any]:
    """The composed configuration as plain values. Raises UserError if a value is missing, or stands for one that is."""
    try:
        plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except InterpolationKeyError as error:
        if isinstance(config.get("model"), DictConfig) and "model.input" in str(error):
            name, image = (config[part].get("name", part) for part in ("model", "dataset"))
            raise UserError(
                f"dataset {image} holds images, and model {name} does not say how it wants them (model.input): "
                "is it for texts or sounds?"
            ) from error
        raise UserError(str(error).splitlines()[0]) from error
    except MissingMandatoryValue as error:
        raise UserError(f"{error.full_key} has no value: add {error.full_key}=...") from error
    except OmegaConfBaseException as error:
        raise UserError(str(error).splitlines()[0]) from error
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


class _Base(NamedTuple):
    """What a primary configuration holds by itself: its keys, its groups and their defaults, and fields of ``run``."""

    keys: tuple[str, ...]
    groups: Mapping[str, Any]
    fields: tuple[str, ...]


def _base(name: str) -> _Base:
    node = OmegaConf.to_container(OmegaConf.load(configs() / f"{name}.yaml"))
    assert isinstance(node, dict)
    items = node.pop("defaults")
    groups = {str(k): v for item in items if isinstance(item, Mapping) for k, v in item.items()}
    keys = dict.fromkeys([*groups, *map(str, node)])
    prefix, whole = name, node.get(name) or {}
    if "run" in groups:
        prefix, whole = "run", OmegaConf.to_container(OmegaConf.load(configs() / "run" / "default.yaml"))
    fields = [f"{prefix}.{field}" for field in whole]
    for other in (_base(item) for item in items if isinstance(item, str) and item != "_self_"):
        groups, keys, fields = {**other.groups, **groups}, dict.fromkeys([*other.keys, *keys]), [*other.fields, *fields]
    return _Base(tuple(k for k in keys if k != "hydra" and "/" not in k and " " not in k), groups, tuple(fields))


def _check(key: str, override: Override, base: _Base, folder: Path | None) -> None:
    """Raises UserError for an override that sets what nobody reads, or chooses what there is not."""
    text, group = override.input_line, key.split("@")[0]
    known = presets(group, folder)
    if known and "." not in group:
        value = None if override.is_delete() else override.value()
        if isinstance(value, list) and not isinstance(base.groups.get(group), list):
            each = ",".join(map(str, value))
            raise UserError(f"{text}: {group} takes one name; -m {group}={each} runs them one after the other")
        if value is None and not override.is_delete() and base.groups.get(group) is not None:
            raise UserError(f"{text}: {group} takes a name (there are: {', '.join(known)})")
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, str) and one not in known:
                hint = did_you_mean(one, known)
                raise UserError(f"there is no {group} {one!r}{hint} (there are: {', '.join(known)})")
        return
    top = re.split("[./@]", key)[0]
    if top in (*base.keys, "hydra"):
        return
    near = [field for field in base.fields if field.endswith(f".{key}")]
    hint = f"; did you mean {near[0]!r}?" if near else did_you_mean(key, [*base.keys, *base.fields])
    raise UserError(f"{text}: nothing reads {top!r}{hint} (there are: {', '.join(base.keys)})")


def _for_hydra(override: Override, folder: Path | None) -> str:
    """``+key=value`` sets a field whether or not it is there; Hydra would refuse one that is.

    So does ``key=value`` for what attrib reads of every preset (``OPTIONAL``), whether or not it has such a line.
    """
    line, key = str(override.input_line), str(override.key_or_group)
    if override.is_add() and not presets(key, folder):
        return f"+{line}"
    optional = any(key == field or key.startswith(f"{field}.") for field in OPTIONAL)
    signed = override.is_add() or override.is_force_add() or override.is_delete()
    return f"++{line}" if optional and not signed else line


_ONE = threading.RLock()


@contextmanager
def _alone() -> Iterator[None]:
    """Hydra is one for the whole process: other threads wait, and a program that uses it gets it back as it was."""
    with _ONE:
        theirs = GlobalHydra.instance().hydra
        GlobalHydra.instance().clear()
        try:
            yield
        finally:
            GlobalHydra.instance().hydra = theirs


def _composed(name: str, lines: Sequence[str], folder: Path | None) -> DictConfig:
    more = [f"hydra.searchpath=[file://{folder.resolve()}]"] if folder else []
    try:
        with _alone(), initialize_config_dir(str(configs()), version_base="1.3"):
            return hydra.compose(name, [*lines, *more], return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_explained(error, name, lines, folder)) from error


def _explained(error: Exception, name: str, lines: Sequence[str], folder: Path | None) -> str:
    """What Hydra refuses, in one sentence."""
    text = " ".join(str(error).split())
    if found := re.search(r"You must specify '([^']*)'", text):
        return f"no {found[1]} chosen: add {found[1]}=NAME (there are: {', '.join(presets(found[1], folder))})"
    if found := re.search(r"Could not (?:override|delete from config|append to config)[^']*'([\w.]+)\.(\w+)'", text):
        path, choices = f"{found[1]}.{found[2]}".split("."), [o for o in lines if "." not in o.split("=")[0]]
        node: Any = _composed(name, choices, folder)
        for depth, field in enumerate(path):
            if not isinstance(node, DictConfig) or field not in node:
                fields = [str(k) for k in node if k not in HIDDEN] if isinstance(node, DictConfig) else []
                known = f" (fields: {', '.join(fields)})" if fields else ""
                added = f"; +{'.'.join(path)}=... adds it" if path[:2] == ["model", "layers"] else ""  # to any preset
                return f"{'.'.join(path[:depth])} has no field {field!r}{did_you_mean(field, fields)}{known}{added}"
            node = node.get(field)
    return f"{shlex.join(lines)}: {text}"
