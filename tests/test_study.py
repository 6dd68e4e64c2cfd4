"""Studies: what a file says, the commands it stands for, what is found, and each of ours in its tiny size (slow)."""

from __future__ import annotations

import shlex

import pandas as pd
import pytest
from test_paper import configs, images  # noqa: F401 (fixtures)
from tiny import called, tool

from attrib.config.compose import CommandLine, compose
from attrib.papers import findings, study, study_figures
from attrib.results.tables import rows
from attrib.types import UserError

MINE = """\
title: A study
note: Of nothing.
parts: [maps, copies]
"""
MAPS = """\
title: Maps
question: Which is best?
with: dataset=tiny model=small_cnn metric=[ehr,localisation] metric.ehr.steps=3 run.progress=false
commands:
  - run method=random,gradient
  - run method=iba method.steps=2
tiny:
  run: dataset.select.count=2 ~metric.ehr ~method.steps
columns: [ehr, energy]
find: [means, samples, agreement, cost]
pairs: [[random, gradient]]
cost: ehr
"""
COPIES = """\
like: maps
title: Copies
question:
with: metric=[] ~metric.ehr
commands:
  - sanity method=gradient sanity.layers=[all] sanity.measures=[spearman,spearman_abs]
find: [weights]
"""


@pytest.fixture
def folder(configs):  # noqa: F811
    (configs / "study").mkdir()
    (configs / "paper" / "mine.yaml").rename(configs / "paper" / "table.yaml")
    for name, text in (("mine", MINE), ("maps", MAPS), ("copies", COPIES)):
        (configs / "study" / f"{name}.yaml").write_text(text)
    return configs


def words(part):
    return [set(command.words) for command in part.commands]


def test_commands(folder):
    made = study.load("mine", ["run.root=/w"], folder)
    maps, copies = made.parts
    assert (made.title, made.note, maps.question) == ("A study", "Of nothing.", "Which is best?")
    common = {"dataset=tiny", "model=small_cnn", "run.progress=false"}
    shared = {*common, "metric.ehr.steps=3"}
    assert words(maps) == [
        {*shared, "metric=[ehr,localisation]", "method=random,gradient", "run.root=/w/maps"},
        {*shared, "metric=[ehr,localisation]", "method=iba", "method.steps=2", "run.root=/w/maps"},
    ]
    (copy,) = words(copies)  # what it does not say itself is that of the part that it is like
    assert {*common, "metric=[]", "method=gradient", "run.root=/w/copies"} < copy
    assert "metric.ehr.steps=3" not in copy
    assert (copies.title, copies.question, copies.find) == ("Copies", "", ("weights",))
    assert shlex.split(str(maps.commands[0]))[:3] == ["attrib", "run", "-m"]
    assert study.names(folder)[-1] == "mine"


def test_the_command_line_adds_replaces_and_chooses(folder):
    small, _ = study.load("mine", ["paper.size=tiny"], folder).parts
    assert "dataset.select.count=2" in words(small)[0]
    assert not any(word.startswith(("metric.ehr", "method.steps")) for one in words(small) for word in one)
    _, only = study.load("mine", ["paper.parts=[copies]", "metric=[ehr]", "run.rows=3"], folder).parts
    assert {"metric=[ehr]", "run.rows=3"} < words(only)[0]
    for given, expected in {
        "maps": ["maps"],
        "copies,maps": ["maps", "copies"],
        "[maps,copies]": ["maps", "copies"],
    }.items():
        made = study.load("mine", [f"paper.parts={given}"], folder)
        assert [part.name for part in made.parts if part.chosen] == expected


def test_what_is_like_another_that_is_like_a_third(folder):
    (folder / "study" / "more.yaml").write_text("like: copies\ntitle: More\nwith: model=other\n")
    (folder / "study" / "mine.yaml").write_text("title: A study\nparts: [more]\n")
    (more,) = study.load("mine", ["run.root=/w"], folder).parts
    assert {"model=other", "dataset=tiny", "metric=[]", "run.root=/w/more"} < words(more)[0]
    assert (more.title, more.find) == ("More", ("weights",))


@pytest.mark.slow
def test_a_broken_file_stops_nothing_but_its_study(folder, capfd):
    (folder / "study" / "broken.yaml").write_text("parts: [")
    assert "broken" not in study.names(folder)
    assert study.load("mine", [], folder).parts
    listed = called(capfd, lambda: tool("list").main(["papers", "--config-dir", str(folder)]))
    assert (listed.status, "A study" in listed.out) == (0, True)
    (folder / "study" / "maps.yaml").write_text("title: [")
    listed = called(capfd, lambda: tool("list").main(["papers", "--config-dir", str(folder)]))
    assert "mine" in listed.out
    assert "cannot be read" in listed.out


def test_a_name_that_is_no_study(folder, capfd):
    def said(name, command="paper"):
        return called(capfd, lambda: tool(command).main([name, "--config-dir", str(folder)])).err

    assert "there is no paper 'minr'" in said("minr")
    assert "mine" in said("minr")  # among those that there are
    assert "a part of the study mine: attrib paper mine paper.parts=maps" in said("maps")
    assert "mine is a study; attrib paper mine computes it" in said("paper=mine", "table")
    (folder / "paper" / "twice.yaml").write_text((folder / "paper" / "table.yaml").read_text())
    (folder / "study" / "twice.yaml").write_text(MINE)
    assert "the name of a study and of a table" in said("twice")


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("maps", "columns:", "colums:", r"maps\.yaml has no field 'colums'"),
        ("maps", "- run method=iba", "- walk method=iba", "a command begins with one of train, run, sanity"),
        ("maps", "find: [means", "find: [meaning", "there is no finding 'meaning'"),
        ("maps", "cost: ehr", "cost:", "cost must name the column"),
        ("maps", "pairs: [[random, gradient]]", "pairs: [random]", "pairs is a list of pairs"),
        ("maps", "tiny:\n  run:", "tiny:\n  stroll:", "tiny has overrides for train, run, sanity"),
        ("maps", "columns: [ehr, energy]", "columns: ehr", "columns must be a list of texts"),
        ("copies", "like: maps", "like: map", "no part 'map' beside it.*maps"),
        ("copies", "like: maps", "like: copies", "copies is like copies, which says nothing"),
        ("copies", "like: maps", "like: [maps]", "no part .*beside it"),
        ("maps", "- run method=iba method.steps=2", '- ""', "a command begins with one of train, run, sanity, not ''"),
        (
            "maps",
            "- run method=iba method.steps=2",
            "- run method='iba",
            "maps.yaml: commands: .* is not understood: No clos",
        ),
        ("maps", "metric.ehr.steps=3", "'", "maps.yaml: with: .* is not understood: No clos"),
        ("mine", "parts: [maps, copies]", "parts: [maps, maps]", "names one twice"),
        ("mine", "parts: [maps, copies]", "parts: [mops]", "no part 'mops' beside it"),
        ("maps", "title: Maps", "title: [", "cannot be read"),
    ],
)
def test_mistakes_in_a_file_are_named(folder, file, old, new, message):
    path = folder / "study" / f"{file}.yaml"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(UserError, match=message):
        study.load("mine", [], folder)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("paper.size=small", r"no paper\.size=small"),
        ("paper.parts=[graphs]", "no part 'graphs'; its parts are maps, copies"),
        ("paper.rows=3", r"a study has no paper\.rows"),
        ("paper.parts=[]", r"paper\.parts names no part; mine has maps, copies"),
        ("~paper.parts", r"paper\.parts names parts, or is left out"),
    ],
)
def test_mistakes_on_the_command_line_are_named(folder, word, message):
    with pytest.raises(UserError, match=message):
        study.load("mine", [word], folder)
    with pytest.raises(UserError, match="no study is called 'mne'"):
        study.load("mne", [], folder)


def test_a_study_in_one_command_which_goes_on(folder, images, tmp_path, capfd):  # noqa: F811
    root = tmp_path / "work"

    def attrib(*more):
        line = ["mine", f"run.root={root}", f"dataset.root={images}", *more, "--config-dir", str(folder)]
        return called(capfd, lambda: tool("paper").main(line))

    first = attrib()
    assert first.status == 0, first.err
    assert first.out.count("maps_computed=4") == 5
    text = (root / "studies" / "mine.md").read_text()
    for part in ("# A study", "## Maps", "Which is best?", "## Copies", "attrib sanity -m"):
        assert part in text
    numbers = root / "studies" / "mine"
    means = pd.read_csv(numbers / "maps_means.csv")
    assert set(means["column"]) == {"ehr", "energy"}  # of the many that localisation has
    assert len(pd.read_csv(numbers / "maps_pairs.csv")) == 2 * 3
    assert len(pd.read_csv(numbers / "maps_samples.csv")) == 2
    assert list(pd.read_csv(numbers / "maps_agreement.csv")["methods"].unique()) == [3]
    assert pd.read_csv(numbers / "maps_cost.csv")["front"].any()
    assert pd.read_csv(numbers / "copies_weights.csv")["column"].tolist() == ["spearman", "spearman_abs"]
    for picture in ("maps_agreement", "maps_cost", "copies_weights"):
        assert (numbers / f"{picture}.png").read_bytes().startswith(b"\x89PNG")
        assert f"mine/{picture}.png" in text
    assert pd.read_csv(numbers / "maps_cost.csv")["contender"].tolist() == ["gradient", "iba", "random"]
    assert "| random − gradient |" in text.replace("\\", "")
    again = attrib()
    assert again.out.count("maps_computed=0 maps_present=4") == 5
    assert (root / "studies" / "mine.md").read_text() == text


def test_what_stands_aside_has_means_and_no_say(folder, images, tmp_path, capfd):  # noqa: F811
    path, root = folder / "study" / "maps.yaml", tmp_path / "work"
    path.write_text(path.read_text() + "aside: [random]\n")
    line = ["mine", f"run.root={root}", f"dataset.root={images}", "paper.parts=maps", "--config-dir", str(folder)]
    assert called(capfd, lambda: tool("paper").main(line)).status == 0
    numbers = root / "studies" / "mine"
    assert "Not computed yet." in numbers.with_suffix(".md").read_text()  # of the copies
    assert "random" in set(pd.read_csv(numbers / "maps_means.csv")["contender"])
    assert "random" not in set(pd.read_csv(numbers / "maps_cost.csv")["contender"])
    assert pd.read_csv(
        numbers / "maps_agreement.csv"
    ).empty  # of two methods there is no rank correlation worth the name


def test_a_part_that_was_not_run_is_named(folder, tmp_path):
    place, problems, _ = findings.write(study.load("mine", [f"run.root={tmp_path / 'none'}"], folder))
    assert place.read_text().count("no results yet in") == len(problems) == 2


def test_what_cannot_be_found_out_is_said_and_the_rest_is_written(folder, images, tmp_path, capfd):  # noqa: F811
    root = tmp_path / "work"
    line = ["mine", f"run.root={root}", f"dataset.root={images}", "paper.parts=maps", "--config-dir", str(folder)]
    assert called(capfd, lambda: tool("paper").main(line)).status == 0
    path, text = folder / "study" / "maps.yaml", (folder / "study" / "maps.yaml").read_text()

    def found(old, new):
        assert old in text
        path.write_text(text.replace(old, new))
        place, problems, _ = findings.write(study.load("mine", [f"run.root={root}", "paper.parts=maps"], folder))
        return place.read_text(), problems

    said, problems = found("columns: [ehr, energy]", "columns: [ehrr]")
    assert problems == [f"maps: no scores yet in {root / 'maps'}"]
    said, problems = found("columns: [ehr, energy]", "columns: [ehrr, localisation.energy]")
    assert "ehrr: no score is called so yet" in said
    assert ", ".join(known(root)) in said.replace("\\", "")
    assert not problems
    said, _ = found("columns: [ehr, energy]", "columns: [ehrr, energie, energy]")
    assert "ehrr, energie: no score is called so yet" in said
    assert said.count("there are ehr") == 1
    assert "speed: no score is called so yet" in found("cost: ehr", "cost: speed")[0]
    said, problems = found("[[random, gradient]]", "[[random, nobody], [random, gradient]]")
    assert not problems
    assert "No results of both: random and nobody." in said
    said, problems = found("find: [means", "find: [weights, means")
    assert "no maps of randomised networks" in problems[0]


def known(root):
    found = rows(root / "maps").query("metric in ('ehr', 'localisation')").astype({"metric": str, "column": str})
    return [*found["column"].unique(), *(found["metric"] + "." + found["column"]).unique()]


def test_metrics_that_a_later_run_adds_are_found(folder, images, tmp_path, capfd):  # noqa: F811
    """spec.json keeps the first command's configuration."""
    path = folder / "study" / "maps.yaml"
    text = (
        path.read_text().replace("columns: [ehr, energy]\n", "").replace("[means, samples, agreement, cost]", "[means]")
    )
    line = [
        "mine",
        f"run.root={tmp_path / 'work'}",
        f"dataset.root={images}",
        "paper.parts=maps",
        "--config-dir",
        str(folder),
    ]
    for metrics in ("[ehr]", "[ehr,localisation]"):
        path.write_text(text.replace("[ehr,localisation]", metrics))
        assert called(capfd, lambda: tool("paper").main(line)).status == 0
    means = pd.read_csv(tmp_path / "work" / "studies" / "mine" / "maps_means.csv")
    assert {"ehr", "energy"} <= set(means["column"])


def test_a_cell_that_fails_is_the_status_and_the_document_is_written(folder, images, tmp_path, capfd):  # noqa: F811
    path = folder / "study" / "maps.yaml"
    path.write_text(path.read_text().replace("method=iba method.steps=2", "method=iba method.steps=0"))
    line = ["mine", f"run.root={tmp_path / 'work'}", f"dataset.root={images}", "paper.parts=maps"]
    found = called(capfd, lambda: tool("paper").main([*line, "--config-dir", str(folder)]))
    assert found.status != 0
    assert "steps" in found.err
    assert set(rows(tmp_path / "work" / "maps")["method"]) == {"random", "gradient"}
    assert (tmp_path / "work" / "studies" / "mine.md").is_file()


def test_the_front_is_what_nothing_beats():
    summary = pd.DataFrame({
        "contender": ["cheap", "dear", "wasted", "twin", "unknown"],
        "mean": [1.0, 2.0, 1.5, 2.0, 3.0],
        "seconds": [0.1, 1.0, 2.0, 1.0, float("nan")],
        "direction": "↑",
    })  # fmt: skip
    assert study_figures.front(summary)["front"].tolist() == [True, True, False, True, False]
    lower = study_figures.front(summary.assign(direction="↓"))["front"].tolist()
    assert lower == [True, False, False, False, False]


def test_ours_are_listed(capfd):
    assert "study_2026" in study.names()
    found = called(capfd, lambda: tool("list").main(["papers"]))
    assert "study_2026" in found.out
    for part in study.load("study_2026").parts:
        assert part.commands
        assert part.question


@pytest.mark.slow  # a minute: Hydra composes each
def test_every_command_of_ours_composes():
    """The first of what a line sweeps over; `make study-tiny` computes all of it in the small size."""
    for part in study.load("study_2026").parts:
        for command in part.commands:
            first = CommandLine.of(list(command.words), None, command.tool != "train").cells()[0]
            assert compose(command.tool, first, None).values["dataset"], command
