"""A work directory with a defect: no tool ends in a traceback or hangs, the good part is shown, the bad part named."""

from __future__ import annotations

import json
import random
import shutil
import warnings
from pathlib import Path
from typing import Any

import defects
import pytest
from defects import CELL, DEFECTS, METRIC, healthy, outcomes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import tool

from attrib.process.exit_status import DAMAGED
from attrib.process.signals import LEFT
from attrib.upkeep.status import WORKED_ON

# Of these a tool takes no notice, and need not: it draws nothing, or reads again what a cache does not say.
UNNOTICED = ("cache", "a picture", "a map", "an empty file as failures", "whose value is infinite", "odd parts", ".log")
FAIR = {0, DAMAGED, 1, LEFT, WORKED_ON}  # 1: of verify, and of an export that left a map out


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A work directory without a defect, and the tools imported."""
    root = healthy(tmp_path_factory.mktemp("whole") / "work")
    found = outcomes(root)
    assert {name: one.status for name, one in found.items()} == dict.fromkeys(found, 0), found
    for name in ("table", "report", "status", "cache"):
        tool(name)
    return root


@pytest.fixture
def root(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "work", symlinks=True))


def judge(root: Path, name: str, tools: tuple[str, ...] = defects.TOOLS) -> None:
    found = outcomes(root, tools)
    for said in found.values():
        assert said.status in FAIR, said.text[-3000:]
    if "table" in found:
        assert "grad_cam" in found["table"].text
    if "cache export" in found:
        assert len(list((root.parent / "exported").rglob("photos.net.ig*/**/*.png"))) == len(defects.UIDS)
    if not any(word in name for word in UNNOTICED):
        assert found["cache verify"].status == 1, found["cache verify"].text


# The quick tools are asked of an eighth of what is written, all tools of a twenty-fourth; `make test` takes a third.
SOME = [name for i, name in enumerate(DEFECTS) if (i < defects.WRITTEN and i % 8 == 1) or i % 24 == 0]


@pytest.mark.parametrize("name", SOME)
@pytest.mark.quick(every=3)
def test_no_defect_brings_a_tool_down(name, root):
    DEFECTS[name](root / CELL)
    often = list(DEFECTS).index(name) % 24 == 0 or "map" in name or "picture" in name
    judge(root, name, defects.TOOLS if often else ("table", "status", "cache verify"))


@pytest.mark.slow
@pytest.mark.parametrize("name", DEFECTS)
def test_no_defect_brings_any_tool_down(name, root):
    DEFECTS[name](root / CELL)
    judge(root, name)


def test_the_bad_part_is_named_once_and_the_exit_status_says_so(root, capsys):
    DEFECTS["a ledger line that is a number"](root / CELL)
    DEFECTS["a row whose value is null"](root / CELL)
    assert tool("table").main([str(root), "--format", "csv"]) == DAMAGED
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 1 + 3 * 3  # all cells, all columns
    assert said.err.count("failures.jsonl") == said.err.count("z.parquet") == 1
    assert "left out: 2 files" in said.err


# ---- any JSON, any byte ---------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(10**400),
    lambda below: st.lists(below, max_size=3) | st.dictionaries(st.text(max_size=8), below, max_size=3),
    max_leaves=8,
)
DOCUMENTS = (
    "spec.json",
    "samples.json",
    f"scores/{METRIC}/metric.json",
    "runs/20260101-000000-4242-0-aaaa/progress.json",
    "runs/20260101-000000-4242-0-aaaa/summary.json",
    "runs/20260101-000000-4242-0-aaaa/config.json",
)


def replaced(value: Any, choice: random.Random, new: Any) -> Any:
    """``value`` with ``new`` somewhere in it."""
    if isinstance(value, dict) and value and choice.random() < 0.8:
        key = choice.choice(sorted(value))
        return {**value, key: replaced(value[key], choice, new)}
    if isinstance(value, list) and value and choice.random() < 0.8:
        place = choice.randrange(len(value))
        return [*value[:place], replaced(value[place], choice, new), *value[place + 1 :]]
    return new


def survive(root: Path, capsys, tools: tuple[str, ...]) -> None:
    for name in tools:
        module, arguments = defects.commands(root)[name]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert tool(module).main(arguments) in FAIR
        said = capsys.readouterr()
        assert "grad_cam" in said.out or name != "table"


QUICK = settings(
    max_examples=6, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@QUICK
@given(st.sampled_from(DOCUMENTS), JSON, st.randoms(use_true_random=False))
def test_any_json_at_any_place(whole, tmp_path_factory, capsys, name, new, choice):
    root = Path(shutil.copytree(whole, tmp_path_factory.mktemp("odd") / "work"))
    path = root / CELL / name
    path.write_text(json.dumps(replaced(json.loads(path.read_text()), choice, new)))
    survive(root, capsys, choice.choice([("table", "status"), ("report",), ("cache verify", "cache export")]))
    shutil.rmtree(root)


@QUICK
@given(st.randoms(use_true_random=False))
def test_any_byte_flipped(whole, tmp_path_factory, capsys, choice):
    root = Path(shutil.copytree(whole, tmp_path_factory.mktemp("flipped") / "work"))
    paths = [path for place in (CELL, "state") for path in sorted((root / place).rglob("*")) if path.is_file()]
    path = choice.choice([path for path in paths if path.stat().st_size])
    data = bytearray(path.read_bytes())
    data[choice.randrange(len(data))] ^= 1 << choice.randrange(8)
    path.write_bytes(data)
    survive(root, capsys, choice.choice([("table", "status"), ("report",), ("cache verify", "cache export")]))
    shutil.rmtree(root)
