"""Studies: several grids of runs and what is asked of them, described in ``configs/study``.

``configs/study/NAME.yaml`` lists parts; each part is a file beside it: commands of ``attrib train``, ``run`` and
``sanity``, and which findings its results are read for (:mod:`attrib.papers.findings`). So a study has no engine of its
own: its commands are what anybody could type, they compute what is missing, and each part has its work directory,
``run.root``/PART.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from attrib.config.compose import Override, parse_overrides
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

    def __str__(self) -> str:
        many = ["-m"] if self.tool != "train" else []
        return shlex.join(["attrib", self.tool, *many, *self.words])


@dataclass(frozen=True)
class Part:
    """A question and the commands that answer it.

    find     which findings (FINDINGS) the results are read for
    columns  the scores that are looked at; none: all that the metrics have
    pairs    pairs of contenders of which it is asked how many samples tell them apart, beside the median pair
    aside    methods, such as oracles, that have means and tests but do not say whether metrics agree, nor what is cheap
    cost     the column that is set against the cost
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


def names(folder: Path | None = None) -> list[str]:
    """The studies that there are: files that list parts."""
    return [name for name, path in presets("study", folder).items() if "parts" in _read(path)]


def load(name: str, words: Sequence[str] = (), folder: Path | None = None) -> Study:
    """A study as the overrides of a command line leave it.

    ``paper.size=tiny`` adds the overrides of ``tiny``, in the place of what is there, of which ~KEY takes away KEY and
    what is below it; ``paper.parts=[a,b]`` takes these parts alone; ``run.root`` is the folder of all; any other is
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
    if "paper.parts" in own:
        wanted = own["paper.parts"].value()
        wanted = [str(one) for one in (wanted if isinstance(wanted, list) else [wanted])]
        if strange := [one for one in wanted if one not in parts]:
            raise UserError(f"{shown(path)} has no part {strange[0]!r}; its parts are {', '.join(parts)}")
        parts = [one for one in parts if one in wanted]
    root = Path(_text(own.get("run.root"), Options.root))
    found = []
    for one in parts:
        if one not in known:
            raise UserError(f"{shown(path)}: there is no part {one!r} beside it{did_you_mean(one, known)}")
        found.append(_part(one, known, root / one, size == TINY, given))
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
    node, at, shared = _fields(path, _read(path), _PART), shown(path), {}
    if like := node.get("like"):
        if like not in known:
            raise UserError(f"{at}: like: there is no part {like!r} beside it{did_you_mean(str(like), known)}")
        other = _fields(known[like], _read(known[like]), _PART)
        node, shared = {**other, **node}, _words(shown(known[like]), "with", other.get("with"))
    shared = _replaced(shared, _words(at, "with", node.get("with")))
    small = node.get("tiny") or {}
    if not isinstance(small, Mapping) or set(small) - set(TOOLS):
        raise UserError(f"{at}: tiny has overrides for {', '.join(TOOLS)}, not {small!r}")
    commands = []
    for line in _texts(path, "commands", node.get("commands")):
        tool, *rest = shlex.split(line)
        if tool not in TOOLS:
            raise UserError(f"{at}: a command is one of {', '.join(TOOLS)} and its overrides, not {line!r}")
        mine = parse_overrides(rest, at)
        less = _words(at, "tiny", small.get(tool)) if tiny else {}
        full = _replaced({**({} if tool == "train" else shared), **mine}, less)
        if tool != "train":
            full = _replaced(full, {**given, **parse_overrides([f"run.root={root}"])})
        commands.append(Command(tool, _lines(full)))
    find = tuple(_texts(path, "find", node.get("find")))
    if strange := [one for one in find if one not in FINDINGS]:
        raise UserError(f"{at}: nothing is known to find as {strange[0]!r}, only {', '.join(FINDINGS)}")
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
        find=find,
        columns=tuple(_texts(path, "columns", node["columns"])) if "columns" in node else (),
        pairs=tuple((str(one), str(other)) for one, other in pairs),
        aside=tuple(_texts(path, "aside", node["aside"])) if "aside" in node else (),
        cost=_line(node, "cost"),
    )


def _line(node: Mapping[str, Any], field: str) -> str:
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
    return parse_overrides(shlex.split(str(value or "")), f"{at}: {field}")


def _replaced(full: Mapping[str, Override], less: Mapping[str, Override]) -> dict[str, Override]:
    """``full`` with the overrides of ``less``; a ~KEY there takes away KEY and what is below it."""
    gone = [key for key, o in less.items() if o.is_delete()]
    kept = {key: o for key, o in full.items() if not any(key == g or key.startswith(f"{g}.") for g in gone)}
    return kept | {key: o for key, o in less.items() if key not in gone}


def _text(override: Override | None, default: str) -> str:
    return default if override is None else str(override.get_value_element_as_str()).strip("'\"")


def _lines(pairs: Mapping[str, Override]) -> tuple[str, ...]:
    """In the order in which people write them: parts (model=vgg16) before their fields."""
    return tuple(str(o.input_line) for o in sorted(pairs.values(), key=lambda o: "." in o.key_or_group))
