"""Studies: several grids of runs and what is asked of them, described in ``configs/study``.

``configs/study/NAME.yaml`` lists parts; each part is a file beside it: commands of ``attrib train``, ``run`` and
``sanity``, and which findings its results are read for (:mod:`attrib.papers.findings`). So a study has no engine of its
own: its commands are what anybody could type, they compute what is missing, and each part has its work directory,
``run.root``/PART.
"""

from __future__ import annotations

import contextlib
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from attrib.config.compose import Override, QuotedString, parse_overrides, spelled
from attrib.config.places import presets, shown
from attrib.errors import did_you_mean
from attrib.papers.presets import FULL, TINY
from attrib.running.options import Options
from attrib.types import UserError

TOOLS = ("train", "run", "sanity")
# What can be found out from a part's results.
MEANS, SAMPLES, AGREEMENT, COST, WEIGHTS = "means", "samples", "agreement", "cost", "weights"
FINDINGS = (MEANS, SAMPLES, AGREEMENT, COST, WEIGHTS)
_STUDY = ("title", "note", "needs", "duration", "parts")
_PART = ("like", "title", "question", "note", "with", "commands", "tiny", "find", "columns", "pairs", "aside", "cost")


@dataclass(frozen=True)
class Command:
    """One command line: ``tool`` of TOOLS and its overrides."""

    tool: str
    words: tuple[str, ...]

    @property
    def arguments(self) -> list[str]:
        """What follows the tool's name."""
        return [*([] if self.tool == "train" else ["-m"]), *self.words]

    def __str__(self) -> str:
        return shlex.join(["attrib", self.tool, *self.arguments])


@dataclass(frozen=True)
class Part:
    """A question and the commands that answer it.

    find     which findings (FINDINGS) the results are read for
    columns  the scores that are looked at; none: all that the metrics have
    pairs    pairs of contenders of which it is asked how many samples tell them apart, beside the median pair
    aside    methods, such as oracles, that have means and tests but do not say whether metrics agree, nor what is cheap
    cost     the column that is set against the cost
    chosen   whether the command line asks to compute it; the document is about all parts
    """

    name: str
    title: str
    question: str
    note: str
    root: Path
    commands: tuple[Command, ...]
    find: tuple[str, ...]
    columns: tuple[str, ...] = ()
    pairs: tuple[tuple[str, str], ...] = ()
    aside: tuple[str, ...] = ()
    cost: str = ""
    chosen: bool = True


@dataclass(frozen=True)
class Study:
    """``root``: the folder of the parts' work directories; ``size``: full or tiny."""

    name: str
    title: str
    note: str
    root: Path
    parts: tuple[Part, ...]
    size: str = FULL
    needs: str = ""
    duration: str = ""


def is_study(name: str, folder: Path | None = None) -> bool:
    """Whether a file of this name lists parts. Raises UserError if it cannot be read."""
    path = presets("study", folder).get(name)
    return path is not None and "parts" in _read(path)


def names(folder: Path | None = None) -> list[str]:
    """The studies that there are; files that cannot be read are passed over."""
    found = []
    for name in presets("study", folder):
        with contextlib.suppress(UserError):
            if is_study(name, folder):
                found.append(name)
    return found


def hint(name: str, folder: Path | None = None) -> str:
    """Of a name that is a part's: how to compute the part; "" of others."""
    for one in names(folder):
        if name in (_read(presets("study", folder)[one]).get("parts") or []):
            return f", but a part of the study {one}: attrib paper {one} paper.parts={name}"
    return ""


def load(name: str, words: Sequence[str] = (), folder: Path | None = None) -> Study:
    """A study as the overrides of a command line leave it.

    ``paper.size=tiny`` adds the overrides of ``tiny``, in the place of what is there, of which ~KEY takes away KEY and
    what is below it; ``paper.parts=[a,b]`` computes these parts alone; ``run.root`` is the folder of all; any other is
    added to every ``run`` and ``sanity`` in the same way.

    Raises UserError that names the file and the field.
    """
    known = presets("study", folder)
    if name not in known:
        raise UserError(f"no study is called {name!r}{did_you_mean(name, known)}")
    path = known[name]
    given = parse_overrides(words)
    own = {key: given.pop(key) for key in list(given) if key in ("paper.size", "paper.parts", "run.root")}
    if strange := sorted(key for key in given if key.split(".")[0] == "paper"):
        raise UserError(f"a study has no {strange[0]}, only paper.size and paper.parts")
    size = _text(own.get("paper.size"), FULL)
    if size not in (FULL, TINY):
        raise UserError(f"there is no paper.size={size}; {FULL} or {TINY}")
    node = _fields(path, _read(path), _STUDY)
    parts = _texts(path, "parts", node.get("parts"))
    if len(set(parts)) < len(parts):
        raise UserError(f"{shown(path)}: parts names one twice: {', '.join(parts)}")
    wanted = parts
    if "paper.parts" in own:
        wanted = _several(own["paper.parts"])
        if strange := [one for one in wanted if one not in parts]:
            raise UserError(f"{shown(path)} has no part {strange[0]!r}; its parts are {', '.join(parts)}")
        if not wanted:
            raise UserError(f"paper.parts names no part; {name} has {', '.join(parts)}")
    root = Path(_text(own.get("run.root"), Options.root))
    found = []
    for one in parts:
        if not re.fullmatch(r"[\w .-]+", one) or one == "studies":
            raise UserError(f"{shown(path)}: a part's work directory cannot be called {one!r}; take letters and digits")
        if one not in known:
            raise UserError(f"{shown(path)}: there is no part {one!r} beside it{did_you_mean(one, known)}")
        found.append(replace(_part(one, known, root / one, size == TINY, given), chosen=one in wanted))
    return Study(
        name=name,
        title=_line(node, "title") or name,
        note=_line(node, "note"),
        root=root,
        parts=tuple(found),
        size=size,
        needs=_line(node, "needs"),
        duration=_line(node, "duration"),
    )


def _part(name: str, known: Mapping[str, Path], root: Path, tiny: bool, given: Mapping[str, Override]) -> Part:
    path = known[name]
    at = shown(path)
    node, shared = _inherited(name, known)
    small = node.get("tiny") or {}
    if not isinstance(small, Mapping) or set(small) - set(TOOLS):
        raise UserError(f"{at}: tiny has overrides for {', '.join(TOOLS)}, not {small!r}")
    commands = []
    for line in _texts(path, "commands", node.get("commands")):
        tool, *rest = _split(f"{at}: commands", line) or [""]
        if tool not in TOOLS:
            raise UserError(f"{at}: a command begins with one of {', '.join(TOOLS)}, not {line!r}")
        mine = parse_overrides(rest, at)
        if "run.root" in mine:
            raise UserError(f"{at}: {line!r}: the work directory of a part is the study's run.root and the part's name")
        less = _words(at, "tiny", small.get(tool)) if tiny else {}
        full = _replaced({**({} if tool == "train" else shared), **mine}, less)
        if tool != "train":
            full = _replaced(full, {**given, **parse_overrides([f"run.root={_path(root)}"])})
        commands.append(Command(tool, _lines(full)))
    find = tuple(_texts(path, "find", node.get("find")))
    if strange := [one for one in find if one not in FINDINGS]:
        raise UserError(f"{at}: there is no finding {strange[0]!r}, only {', '.join(FINDINGS)}")
    pairs = node.get("pairs") or []
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise UserError(f"{at}: pairs is a list of pairs of methods, not {pairs!r}")
    if COST in find and not node.get("cost"):
        raise UserError(f"{at}: cost must name the column that is set against what a map costs")
    return Part(
        name=name,
        title=_line(node, "title") or name,
        question=_line(node, "question"),
        note=_line(node, "note"),
        root=root,
        commands=tuple(dict.fromkeys(commands)),
        find=tuple(dict.fromkeys(find)),
        columns=tuple(_texts(path, "columns", node["columns"])) if "columns" in node else (),
        pairs=tuple((str(one), str(other)) for one, other in pairs),
        aside=tuple(_texts(path, "aside", node["aside"])) if "aside" in node else (),
        cost=_line(node, "cost"),
    )


def _inherited(name: str, known: Mapping[str, Path], seen: tuple[str, ...] = ()) -> tuple[dict[str, Any], Any]:
    """The fields of a part with those of what it is ``like``, and the words of its ``with``."""
    path = known[name]
    node, at = _fields(path, _read(path), _PART), shown(path)
    own, like = _words(at, "with", node.get("with")), node.get("like")
    if like is None:
        return dict(node), own
    if not isinstance(like, str) or like not in known:
        raise UserError(f"{at}: like: there is no part {like!r} beside it{did_you_mean(str(like), known)}")
    if like in (name, *seen):
        raise UserError(f"{at}: like: {' is like '.join((*seen, name, like))}, which says nothing")
    other, words = _inherited(like, known, (*seen, name))
    return {**other, **node}, _replaced(words, own)


def _path(path: Path) -> str:
    """As people write it, with quotes only around what means something to Hydra."""
    return str(path) if re.fullmatch(r"[\w./~ -]+", str(path)) else spelled(str(path))


def _line(node: Mapping[str, Any], field: str) -> str:
    if isinstance(node.get(field), list | dict):
        raise UserError(f"{field} must be a text, not {node[field]!r}")
    return " ".join(str(node.get(field) or "").split())


def _read(path: Path) -> dict[str, Any]:
    try:
        node = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:  # of the YAML library, or of OmegaConf
        raise UserError(f"{shown(path)} cannot be read: {error}") from error
    return {str(key): value for key, value in node.items()} if isinstance(node, dict) else {}


def _fields(path: Path, node: Mapping[str, Any], known: Sequence[str]) -> Mapping[str, Any]:
    if unknown := [key for key in node if key not in known]:
        raise UserError(f"{shown(path)} has no field {unknown[0]!r} (fields: {', '.join(known)})")
    return node


def _texts(path: Path, field: str, value: Any) -> list[str]:
    if not isinstance(value, list) or not value or not all(isinstance(one, str) for one in value):
        raise UserError(f"{shown(path)}: {field} must be a list of texts, not {value!r}")
    return value


def _words(at: str, field: str, value: Any) -> dict[str, Override]:
    if value is not None and not isinstance(value, str):
        raise UserError(f"{at}: {field} must be a text of overrides, not {value!r}")
    return parse_overrides(_split(f"{at}: {field}", value or ""), f"{at}: {field}")


def _split(where: str, line: str) -> list[str]:
    try:
        return shlex.split(line)
    except ValueError as error:  # a quote that is never closed
        raise UserError(f"{where}: {line!r} is not understood: {error}") from error


def _several(override: Override) -> list[str]:
    """a,b or [a,b]. Raises UserError for ~KEY."""
    if override.is_delete():
        raise UserError(f"{override.input_line}: paper.parts names parts, or is left out")
    value = list(override.sweep_string_iterator()) if override.is_sweep_override() else override.value()
    return [str(one) for one in (value if isinstance(value, list) else [value])]


def _replaced(full: Mapping[str, Override], less: Mapping[str, Override]) -> dict[str, Override]:
    """``full`` with the overrides of ``less``; a ~KEY there takes away KEY and what is below it."""
    gone = [key for key, o in less.items() if o.is_delete()]
    kept = {key: o for key, o in full.items() if not any(key == g or key.startswith(f"{g}.") for g in gone)}
    return kept | {key: o for key, o in less.items() if key not in gone}


def _text(override: Override | None, default: str) -> str:
    """The one value of an override, with what it takes from the environment. Raises UserError for none or several."""
    if override is None:
        return default
    value = None if override.is_delete() or override.is_sweep_override() else override.value()
    text = value.text if isinstance(value, QuotedString) else value
    if not isinstance(text, str) or not text:
        raise UserError(f"{override.input_line}: a study has one {override.key_or_group}")
    return str(OmegaConf.create({"it": text}).it)


def _lines(pairs: Mapping[str, Override]) -> tuple[str, ...]:
    """In the order in which people write them: parts (model=vgg16) before their fields."""
    return tuple(str(o.input_line) for o in sorted(pairs.values(), key=lambda o: "." in o.key_or_group))
