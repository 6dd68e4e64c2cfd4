"""The page is whole, escaped and self-contained; pictures show what they should."""

import base64
import hashlib
import io
import json
import re
import shutil
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from synthetic import METHODS, UIDS, add_entry, add_rows, build, cell, iba, metric_folder, spec, values_of
from tiny import tool

from attrib import report
from attrib.drawing import pictures
from attrib.report import curves, gallery, terminal
from attrib.results import formats, labels, tables
from attrib.store import cell as store
from attrib.types import UserError

EVIL = "<script>alert(1)</script>"
VOID = {"meta", "img", "br", "hr", "input", "link"}


class Page(HTMLParser):
    """Tags balanced; collects what a browser would run or load, and the visible text."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.links, self.text, self.script = [], [], [], "", ""
        self.feed(text)
        self.close()
        assert self.open == []
        self.check_what_runs()

    def check_what_runs(self):
        """One script, our own, which the policy names by its digest; nothing else that a browser would run or load."""
        assert [attrs for tag, attrs in self.tags if tag == "script"] == [{}]
        assert self.script == (Path(report.__file__).parent / "page.js").read_text()
        digest = base64.b64encode(hashlib.sha256(self.script.encode()).digest()).decode()
        (policy,) = [attrs["content"] for _, attrs in self.tags if "http-equiv" in attrs]
        assert policy == (
            f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
            "base-uri 'none'; form-action 'none'"
        )
        assert not [name for _, attrs in self.tags for name in attrs if name.startswith("on")]
        assert not {tag for tag, _ in self.tags} & {"link", "iframe", "object", "embed", "base", "form"}
        ids = [attrs["id"] for _, attrs in self.tags if "id" in attrs]
        assert len(ids) == len(set(ids))
        assert {link for link in self.links if link.startswith("#")} <= {f"#{name}" for name in ids}
        assert all(link.startswith(("data:image/", "#")) for link in self.links)
        assert all(attrs.get("alt") is not None for tag, attrs in self.tags if tag == "img")

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.links += [v for k, v in attrs if k in ("src", "href", "action", "srcset", "data", "poster")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ["script"]:
            self.script += data
        elif "style" not in self.open:
            self.text += data + "\n"

    def count(self, tag):
        return sum(name == tag for name, _ in self.tags)


def test_the_page_is_whole_and_loads_nothing(root, capsys):
    assert tool("report").main([str(root), "--samples", "4"]) == 0
    assert "wrote" in capsys.readouterr().out
    text = (root / "report.html").read_text()
    page = Page(text)
    for method in METHODS:
        assert method in page.text
    assert page.links
    assert not re.search(r"https?://|url\(|@import|\son\w+=", text)
    assert len(text) < 15e6
    for part in ("Failures", "Costs", "Optimisation losses", "Paired tests", "attrib report", "torch 2.15.0"):
        assert part in page.text
    for part in ("run.py method=iba", "node7", "abab", "class 3 (3)", "n=20", "threshold"):
        assert part in page.text or part in text
    assert "prefers-color-scheme: dark" in text
    pictured = [attrs for tag, attrs in page.tags if tag == "img" and attrs.get("loading")]
    assert len(pictured) == 4 * (1 + len(METHODS))


def test_the_winner_is_seen(root):
    text = report.page(root, samples=0)
    page = Page(text)
    verdicts = re.findall(r'<span class="what">(.*?)</span>\s*<span class="who">(.*?)</span>', text)
    assert verdicts == [
        ("ehr ↑", "iba"),
        ("insertion ↑ · insertion_deletion", "iba"),
        ("deletion ↓ · insertion_deletion", "iba"),
    ]
    assert sum(attrs.get("class") == "best" for tag, attrs in page.tags if tag == "td") == 3
    table = tables.summary(tables.rows(root))
    for row in table.to_dict("records"):
        assert formats.rounded(row["mean"], row["lo"], row["hi"]) in page.text
    assert "ahead of grad_cam" in page.text
    assert "Maps" not in page.text.split()


@pytest.mark.parametrize("count", [1, 5, 6, 14])
def test_more_than_five_others_are_unfolded(count):
    others = [(f"m<{i}>", "p = .5") for i in range(count)]
    text = str(report.environment().get_template("others.html.jinja").module.few(others))
    seen, _, folded = text.partition("<details>")
    assert [f"m&lt;{i}&gt;" in seen for i in range(count)] == [i < 5 for i in range(count)]
    assert [f"m&lt;{i}&gt;" in folded for i in range(count)] == [i >= 5 for i in range(count)]
    assert ("<summary>and" in folded) == (count > 5)
    assert text.count(", ") == max(0, min(count, 5) - 1) + max(0, count - 6)


def test_everything_from_data_is_escaped(tmp_path):
    uids = (EVIL, "a&b", '"><img src=x onerror=alert(1)>', *UIDS[3:])
    root = build(tmp_path / "work", uids=uids)
    made = store.Cell(root / "photos.net.iba.iba0000")
    add_entry(made, EVIL + "2", "f", EVIL, EVIL, time.time())
    cell(root, "x.y.z.1", dataset=EVIL, model=EVIL, method=EVIL, field=EVIL)
    odd = cell(root, "x.y.z.2", dataset=EVIL, model=EVIL, method=EVIL, field="$\\frac{")
    metric_folder(odd, "odd.44444444", {EVIL: "higher"}, {EVIL + "_curve": f"x: {EVIL}; y: $x"}, {"class": EVIL})
    odd.scores("odd.44444444").add(EVIL, "f", {(EVIL, EVIL): 1.0})
    writer = odd.scores("odd.44444444")
    curves = odd.curves("odd.44444444")
    for uid in uids:
        writer.add(uid, "f", {("map", EVIL): 1.0})
        curves.add(uid, "f", {f"map/{EVIL}_curve": np.arange(5.0)})
    writer.flush()
    curves.flush()
    inputs = store.Arrays(root / "state" / "pictures.cafecafe", "x-evil")
    inputs.add(EVIL, "f", {"image": np.zeros((8, 8, 3), np.uint8)}, name=EVIL, target=EVIL)
    inputs.flush()
    text = report.page(root)
    page = Page(text)
    assert all(attrs.get("src", "").startswith("data:image/") for tag, attrs in page.tags if tag == "img")
    assert EVIL in page.text
    assert "onerror" not in {name for _, attrs in page.tags for name in attrs}
    assert EVIL not in text


def test_the_script_writes_no_html():
    """Texts come from data: they are set as text and as values, never as HTML or as code."""
    script = (Path(report.__file__).parent / "page.js").read_text()
    unsafe = r"innerHTML|outerHTML|insertAdjacent|document\.write|eval|Function|setTimeout|fetch|XMLHttp"
    assert not re.search(unsafe, script)
    assert set(re.findall(r"setAttribute\(\"?([\w-]+)", script)) <= {
        "aria-sort", "aria-label", "x", "y", "text-anchor", "cx", "cy", "role"
    }  # fmt: skip
    assert "</script" not in script


def test_the_script_gets_the_scores_of_every_sample(root):
    (given,) = [attrs["data-scores"] for _, attrs in Page(report.page(root)).tags if "data-scores" in attrs]
    scores = json.loads(given)
    assert (scores["methods"], scores["uids"]) == (list(METHODS), list(UIDS))
    names = [(column["name"], column["direction"]) for column in scores["columns"]]
    assert names == [("ehr", "higher"), ("insertion", "higher"), ("deletion", "lower")]
    for j, column in enumerate(scores["columns"]):
        for method, values in zip(METHODS, column["values"]):
            np.testing.assert_allclose(values, values_of(method)[:, j], rtol=1e-3)


def test_what_the_net_says_is_shown_where_it_is_known(root):
    inputs = store.Arrays(root / "state" / "pictures.cafecafe", "w1")
    picture = np.zeros((8, 8, 3), np.uint8)
    sure = {"predicted": 3, "predicted_name": "zebra", "probability": 0.934, "right": False}
    for uid, said in ((UIDS[6], sure), (UIDS[7], {"predicted": 7}), (UIDS[8], {})):
        inputs.add(uid, "f", {"image": picture}, name="", target=7, **said)
    inputs.flush()
    page = Page(report.page(root, samples=9))
    said = [line for line in page.text.splitlines() if line.startswith("net: ") and "abab" not in line]
    assert said == ["net: zebra (3), 93.4 %, wrong", "net: class 7"]
    rights = [attrs["data-right"] for _, attrs in page.tags if "data-right" in attrs]
    assert rights == [*[""] * 6, "0", "", ""]


def test_a_page_for_one_sample(root, capsys):
    assert tool("report").main([str(root), "--sample", UIDS[2]]) == 0
    text = (root / "sample.html").read_text()
    page = Page(text)
    assert f"sample {UIDS[2]}" in page.text
    assert text.count('loading="lazy"') == 4
    assert UIDS[1] not in text
    assert f"{values_of('iba')[2, 0]:.3g}" in page.text
    assert tool("report").main([str(root), "--sample", EVIL]) == 2
    assert "holds no map" in capsys.readouterr().err
    assert tool("report").main([str(root), "--sample", "val/02"]) == 2
    assert "; did you mean 'val/0" in capsys.readouterr().err


def test_metrics_are_explained(root):
    path = iba(root).folder / "scores" / "ehr.11111111" / "metric.json"
    store.write_json(path, {**json.loads(path.read_text()), "about": {"ehr": f"heat in {EVIL}"}})
    page = Page(report.page(root, samples=0))
    assert f"heat in {EVIL}" in page.text


def test_bands_stay_inside_the_bounds_of_the_metric(monkeypatch):
    drawn = []
    monkeypatch.setattr(pictures, "plot", lambda lines, **_: drawn.append(lines[0]) or "")
    values = np.zeros((20, 2))
    values[0, 0], values[:, 1] = 1, 1
    styles = {"iba": curves.style(0)}
    for bounds in (None, (0.0, 1.0)):
        curves._mean_plot([("iba", values)], "", styles, bounds)
    free, kept = drawn
    assert free.lo[0] < 0
    assert (kept.lo[0], kept.hi[0]) == (0, free.hi[0])
    assert (kept.lo[1], kept.hi[1]) == (1, 1)


def test_means_of_different_samples_are_said_to_be(root):
    said = "Where n differs, means are of different samples"
    assert said not in report.page(root, samples=0)
    iba(root).write_samples(UIDS[:8], {})
    assert said in report.page(root, samples=0)


def test_without_metrics_nothing_is_said_of_intervals(root):
    for made in store.cells(root):
        shutil.rmtree(made.folder / "scores")
    assert "bootstrap interval" not in report.page(root, samples=0)


def test_too_few_samples_for_a_test_are_said(root):
    assert "can be significant" not in report.page(root, samples=0)
    for made in store.cells(root):
        made.write_samples(UIDS[:6], {})
    assert "With 6 common samples no difference can be significant at 95 %" in report.page(root, samples=0)


@pytest.mark.parametrize(
    ("about", "signed"),
    [("logit units, signed", True), ("units, signed unless relu=true, upsampled", False), ("bits, >= 0", False)],
)
def test_maps_that_say_they_are_signed_are_drawn_signed(about, signed):
    assert gallery.says_signed(about) is signed


def test_failures_are_grouped_and_answered_ones_left_out(root):
    now = time.time() + 9
    for i in range(60):
        add_entry(iba(root), f"new/{i}", "f", "maps", "out of memory", now)
    add_entry(iba(root), UIDS[0], "f", "maps", "a passing hiccup", 1.0)
    add_entry(iba(root), UIDS[1], "changed", "ehr.11111111", "no region of interest", now)
    page = Page(report.page(root, samples=2))
    assert page.text.count("out of memory") == 1
    assert "and 10 more" in page.text
    assert "a passing hiccup" not in page.text
    assert "ehr: no region of interest" in page.text  # below the picture of that sample
    assert "n=19, 61 failed" in page.text


def test_failures_show_the_metrics_label(root):
    now = time.time() + 9
    add_entry(iba(root), UIDS[1], "changed", "ehr.11111111", "no region of interest", now)
    add_entry(iba(root), UIDS[2], "changed", "lost.0123abcd", "crashed", now)
    text = report.page(root)
    assert "ehr.11111111" not in text
    assert "lost.0123abcd" not in text
    assert "ehr: no region of interest" in Page(text).text
    assert re.search(r'<td class="l">ehr</td>\s*<td class="l wrap">no region of interest', text)
    assert re.search(r'<td class="l">lost</td>\s*<td class="l wrap">crashed', text)


def test_samples_that_went_are_shown_nowhere(root):
    for made in store.cells(root):
        add_entry(made, UIDS[0], "changed", "maps", "out of memory", time.time() + 9)
        made.write_samples(UIDS[5:] if "iba" in made.folder.name else UIDS[1:], {})
    text = report.page(root)
    page = Page(text)
    assert UIDS[0] not in text
    assert "out of memory" not in text
    assert re.findall(r"(\w+) \(n=(\d+)\)", text)[:3] == [("grad_cam", "19"), ("iba", "15"), ("ig", "19")]
    assert text.count('loading="lazy"') == 5 * 4 - 4  # iba is about one of the five with a picture
    assert page.text.count("no longer one of its samples") == 4
    assert "5 of 19 samples with maps" in text
    assert "15 samples; thick: their mean" in text


def test_a_half_finished_cell_does_not_look_complete(root):
    iba(root).write_samples([*UIDS, *(f"later/{i}" for i in range(280))], {})
    page = Page(report.page(root, samples=2))
    assert "n=20, 280 pending" in page.text
    assert re.search(r"280\s+pending", page.text)


def test_only_maps_of_the_recorded_content_are_drawn(root):
    made = iba(root)
    late = store.Arrays(made.folder / "maps", "w1")
    for uid in UIDS:
        late.add(uid, "other", {"map": np.full((8, 8), 7.25, np.float32)}, seconds=1.0)
    late.flush()
    made.write_samples(UIDS, dict.fromkeys(UIDS, "f"))
    text = report.page(root, samples=4)
    assert "7.25" not in text
    assert text.count('loading="lazy"') == 4 * 4
    made.write_samples(UIDS, dict.fromkeys(UIDS, "other"))
    text = report.page(root, samples=4)
    assert text.count("7.25") == 4
    assert text.count('loading="lazy"') == 4 * 4
    assert "20 pending" in Page(text).text  # its scores are of the other content


def test_a_column_that_two_metrics_have_is_told_by_the_metric(root):
    made = iba(root)
    assert "ehr · " not in report.page(root, samples=2)
    metric_folder(made, "ehr_unweighted.55555555", {"ehr": "higher"})
    add_rows(made, "ehr_unweighted.55555555", [(UIDS[0], "f", "map", "ehr", 0.25, 1.0)])
    (tile,) = [line for line in report.page(root, samples=1).split("<td ") if f"Map of iba for {UIDS[0]}" in line]
    assert "0.25&#9;ehr · ehr_unweighted&#10;" in tile
    assert re.search(r"&#9;ehr · ehr(_\w+)?&#10;", tile.replace("ehr · ehr_unweighted", ""))


def test_a_map_is_drawn_on_the_picture_of_its_own_content(root):
    inputs = [store.Arrays(root / "state" / "pictures.cafecafe")]
    made = iba(root)
    made.maps.add(UIDS[0], "other", {"map": np.ones((8, 8), np.float32)})
    made.maps.flush()
    (item,) = [item for item in labels.labelled(root) if item.method == "iba"]
    frame = tables.rows(root)
    columns = [(item, {UIDS[0]: (UIDS[0], f)}, "map", "iba", "", True) for f in ("other", "f")]
    sample = gallery._sample(UIDS[0], inputs, columns, gallery._rows(frame, UIDS[:1]))
    alone, drawn = sample.tiles
    assert (decoded(alone.image) == pictures.heat(np.ones((8, 8)), True)).all()
    assert decoded(drawn.image).shape == (8, 8, 3)
    assert sample.image  # the picture that there is
    assert sample.name == "class 0 (0)"


def test_the_command_of_a_run_can_be_copied(root):
    command = ["tools/run.py", "method=iba", "run.hooks=[{_target_: a.B}]"]
    path = iba(root).folder / "runs" / "20261101-7-0" / "environment.json"
    store.write_json(path, {"command": command, "machine": "node8, x86_64, 4 cores", "Python": "3.12"})
    page = Page(report.page(root, samples=0))
    assert "tools/run.py method=iba 'run.hooks=[{_target_: a.B}]'" in page.text
    assert "node8, x86_64, 4 cores" in page.text.splitlines()


def test_without_pictures_maps_are_drawn_alone(root):
    shutil.rmtree(root / "state")
    page = Page(report.page(root, samples=3))
    assert "no pictures of the inputs" in page.text
    assert sum(bool(attrs.get("loading")) for tag, attrs in page.tags if tag == "img") == 3 * len(METHODS)


def test_without_maps_or_curves_or_runs(root):
    for made in store.cells(root):
        shutil.rmtree(made.folder / "maps")
        shutil.rmtree(made.folder / "runs")
        for path in made.folder.glob("scores/*/*.safetensors"):
            path.unlink()
    page = Page(report.page(root))
    assert "No run left a record" in page.text
    assert "Curves" not in page.text.split()
    assert "0.5" in page.text


def test_damaged_curves_are_said_and_left_out(root):
    path = next((iba(root).folder / "scores" / "ehr.11111111").glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-2] ^= 0xFF  # inside the last curve
    path.write_bytes(bytes(data))
    page = Page(report.page(root, samples=0))
    assert "iba: 1 curves are damaged on disk and left out." in page.text
    assert "iba (n=19)" in page.text


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_galleries_stop_where_the_page_would_become_too_large(root, monkeypatch, share):
    whole, bare = (len(report.page(root, samples=n).encode()) for n in (6, 0))
    monkeypatch.setattr(report, "PAGE_BYTES", int(bare + share * (whole - bare)))
    cut = report.page(root, samples=6)
    assert len(cut.encode()) <= report.PAGE_BYTES
    assert 4 <= cut.count('loading="lazy"') < 6 * 4
    assert "of 20 samples with maps" in cut


def test_smaller_pictures_come_before_fewer_samples(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (300, 300, 3), np.uint8)
    root = build(tmp_path / "work", pictures=lambda i: noise)
    frame, (cell, *_) = tables.rows(root), labels.labelled(root)
    sizes = []
    for budget in (10**7, 4 * 10**5, 5 * 10**4):
        found = gallery.gallery(root, [cell], frame, 6, budget)
        sizes.append((len(found.samples), max(decoded(found.samples[0].image).shape)))
    assert sizes[0] == (6, gallery.SIZES[0])
    assert sizes[1][0] == 6
    assert gallery.SIZES[0] > sizes[1][1] > gallery.SIZES[-1]
    assert 1 <= sizes[2][0] < 6
    assert sizes[2][1] == gallery.SIZES[-1]


def test_text_samples_are_coloured_tokens(tmp_path):
    made = cell(tmp_path, "films.lstm.cd.1", dataset="films", model="lstm", method="cd")
    made.maps.add("s/1", "f", {"map": np.array([0.0, 2.0, -2.0], np.float32)}, seconds=0.1, rows=3)
    made.maps.add("s/2", "f", {"map": np.array([1.0, 1.0], np.float32)}, seconds=0.1, rows=3)
    made.maps.flush()
    inputs = store.Arrays(tmp_path / "state" / "pictures.cafecafe", "w")
    numbers = np.array([0, 1, 2])
    inputs.add("s/1", "f", {"words": numbers}, name="positive", target=1, tokens=["<b>", "great", "bad"])
    inputs.add("s/2", "f", {"words": np.array([-1, 0])}, name="", target=0, tokens=["[CLS]", "fine"])
    inputs.flush()
    text = report.page(tmp_path)
    page = Page(text)
    assert "<b>" in page.text
    coloured = re.findall(r'background:#([0-9a-f]{6});color:#[0-9a-f]{6}">([^<]+)<', text)
    by_word = {word: [int(colour[i : i + 2], 16) for i in (0, 2, 4)] for colour, word in coloured}
    assert min(by_word["&lt;b&gt;"]) > 240  # 0 is white
    assert by_word["great"][0] > 100 + by_word["great"][2]  # red
    assert by_word["bad"][2] > 100 + by_word["bad"][0]  # blue
    assert '<span class="special">[CLS]</span>' in text
    assert "pending" in page.text


def test_texts_on_the_terminal(tmp_path, capsys):
    made = cell(tmp_path, "films.lstm.cd.1", dataset="films", model="lstm", method="cd")
    made.maps.add("s/1", "f", {"map": np.array([9.0, 2.0, -2.0], np.float32)}, seconds=0.1, rows=3)
    made.maps.flush()
    inputs = store.Arrays(tmp_path / "state" / "pictures.cafecafe", "w")
    inputs.add("s/1", "f", {"words": np.array([-1, 0, 1])}, name="[bold]", target=1, tokens=["[CLS]", "[red]", "bad"])
    inputs.flush()
    assert tool("show").main([str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "[CLS] [red] bad" in out  # no markup of rich's is taken from data
    assert "[bold] (1)" in out
    words = pictures.words(["[CLS]", "[red]", "bad"], np.array([9.0, 2.0, -2.0]), None, np.array([-1, 0, 1]))
    styles = [span.style for span in terminal.coloured(words).spans]
    assert styles[0].dim
    red, blue = (style.bgcolor.get_truecolor() for style in styles[1:])
    assert red.red > red.blue + 100  # the special token does not set the scale
    assert blue.blue > blue.red + 100
    assert tool("show").main([str(tmp_path / "absent")]) == 2


def test_a_text_cannot_steer_the_terminal(tmp_path, capsys):
    made = cell(tmp_path, "films.lstm.cd.1", dataset="films [/b]", model="lstm", method="cd [/i]")
    made.maps.add("s/1", "f", {"map": np.array([1.0, 2.0], np.float32)}, seconds=0.1, rows=2)
    made.maps.flush()
    inputs = store.Arrays(tmp_path / "state" / "pictures.cafecafe", "w")
    inputs.add("s/1", "f", {"words": np.array([0, 1])}, name="\x1b[2J", target=1, tokens=["\x1b]0;title\x07", "日本"])
    inputs.flush()
    assert tool("show").main([str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert not {"\x1b", "\x07"} & set(out)
    assert "]0;title" in out
    assert "日本" in out
    assert "films [/b]" in out  # names are not markup either
    assert "cd [/i]" in out


def test_several_datasets_are_sections(root):
    other = build(root.parent / "other")
    for made in list(store.cells(other)):
        described = made.spec
        described["names"]["dataset"] = "cats"
        described["pictures"] = "absent"
        store.write_json(made.folder / "spec.json", described)
        shutil.move(made.folder, root / made.folder.name.replace("photos", "cats"))
    text = report.page(root, samples=1)
    assert re.findall(r"<h2>(\w+)<small>(\w+)", text)[:2] == [("cats", "net"), ("photos", "net")]


def test_mistakes_are_named(tmp_path, capsys, root):
    assert tool("report").main([str(tmp_path / "absent")]) == 2
    assert "holds no results" in capsys.readouterr().err
    assert tool("report").main([str(root), "--confidence", "95"]) == 2
    assert "0.95" in capsys.readouterr().err
    with pytest.raises(UserError):
        report.write(tmp_path, tmp_path / "x.html")


def test_more_than_one_commit_is_seen(root):
    made = cell(root, "photos.net.late.1", method="late")
    store.write_json(made.folder / "spec.json", spec(method="late") | {"git": "0123456789ab"})
    made.maps.add("u", "f", {"map": np.zeros((4, 4), np.float32)})
    made.maps.flush()
    text = Page(report.page(root, samples=0)).text
    assert "0123456789ab" in text
    assert "not a git checkout" in text


# pictures -------------------------------------------------------------------


def decoded(uri):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).convert("RGB"))


def test_signed_maps_are_red_and_blue_around_white():
    map = np.array([[-2.0, 0.0, 2.0]])
    red_white_blue = pictures.heat(map)
    assert red_white_blue.dtype == np.uint8
    negative, zero, positive = red_white_blue[0].astype(int)
    assert negative[2] > negative[0] + 50
    assert positive[0] > positive[2] + 50
    assert zero.min() > 240
    # Symmetric limits: doubling one side does not move the middle.
    assert (pictures.heat(np.array([[-4.0, 0.0, 2.0]]))[0, 1] == zero).all()


def test_maps_without_negative_values_run_from_dark_to_bright():
    ramp = pictures.heat(np.linspace(0, 1, 9)[None])[0].sum(1)
    assert (np.diff(ramp.astype(int)) > 0).all()
    assert ramp[0] < 20
    assert pictures.heat(np.array([[-1e-12, 1.0]]), None)[0, 0].sum() < 20  # rounding is no sign
    forced = pictures.heat(np.array([[0.0, 1.0]]), signed=True)
    assert forced[0, 0].min() > 240


def test_the_scale_is_a_percentile():
    map = np.full((100, 100), 0.5)
    map[0, 0] = 1000.0
    assert pictures.scale(map).limit == pytest.approx(0.5)
    lonely = np.zeros((100, 100))
    lonely[3, 4] = -3.0
    assert pictures.scale(lonely) == pictures.ColourScale(True, 3.0)


@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, np.nan, np.inf, -np.inf])
def test_degenerate_maps_are_drawn(value):
    map = np.full((6, 6), value, np.float32)
    assert pictures.heat(map).shape == (6, 6, 3)
    assert pictures.overlay(np.zeros((6, 6, 3), np.uint8), map).shape == (6, 6, 3)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("shape", [(6, 6), (6,)])
def test_maps_without_a_finite_value_are_no_maps_of_zeros(value, shape):
    for sound in (False, True):
        nothing = gallery.tile(np.full(shape, value, np.float32), None, None, {}, False, (), "", sound)
        assert (nothing.image, nothing.words, nothing.limit) == ("", (), "")
        assert nothing.problem == "its map has no finite value"
        map = np.full(shape, value, np.float32)
        map.flat[0] = 0.0
        zero = gallery.tile(map, None, None, {}, False, (), "", sound)
        assert zero.image or zero.words
        assert not zero.problem


@pytest.mark.parametrize("size", [8, 28, 224])
def test_overlay(size):
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 255, (size, size, 3), dtype=np.uint8)
    before = picture.copy()
    map = np.zeros((size, size), np.float32)
    map[: size // 2], map[size // 2 :, : size // 2] = 1.0, -1.0
    drawn = pictures.overlay(picture, map)
    assert drawn.shape == picture.shape
    assert drawn.dtype == np.uint8
    assert (picture == before).all()
    top, left, right = drawn[: size // 2], drawn[size // 2 :, : size // 2], drawn[size // 2 :, size // 2 :]
    assert (top[..., 0].astype(int) > top[..., 2]).all()
    assert (left[..., 2].astype(int) > left[..., 0]).all()
    assert (right.max(-1).astype(int) - right.min(-1) <= 1).all()  # 0: the grey picture
    assert np.corrcoef(right.mean(-1).ravel(), picture[size // 2 :, size // 2 :].mean(-1).ravel())[0, 1] > 0.8


def test_overlay_stretches_maps_and_refuses_other_shapes():
    picture = np.full((20, 30, 3), 128, np.uint8)
    assert pictures.overlay(picture, np.ones((2, 3))).shape == (20, 30, 3)
    with pytest.raises(ValueError, match=r"\(5,\)"):
        pictures.overlay(picture, np.ones(5))
    with pytest.raises(ValueError, match=r"\(20, 30\)"):
        pictures.overlay(picture[..., 0], np.ones((20, 30)))


def test_the_region_is_outlined_and_its_inside_left_alone():
    picture = np.zeros((32, 32, 3), np.uint8)
    roi = np.zeros((32, 32), bool)
    roi[8:24, 4:20] = True
    drawn = pictures.outlined(picture, roi)
    edge = drawn.any(-1)
    assert edge[8, 4:20].all()
    assert edge[8:24, 4].all()
    assert edge.sum() == 2 * 16 + 2 * 14
    assert not pictures.outlined(picture, np.zeros((32, 32), bool)).any()
    assert not pictures.outlined(picture, None).any()


def test_data_uris():
    picture = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    uri = pictures.data_uri(picture)
    assert uri.startswith("data:image/png;base64,")
    assert (decoded(uri) == picture).all()
    small = pictures.data_uri(picture, photo=True, longest=30)
    assert small.startswith("data:image/jpeg;base64,")
    assert decoded(small).shape == (20, 30, 3)


def test_plots_survive_any_text():
    uri = pictures.plot([pictures.PlotLine(np.arange(3.0), "#123456")], x="$\\frac{ \n", y="日本語 <b>")
    svg = base64.b64decode(uri.split(",")[1]).decode()
    assert svg.lstrip().startswith("<?xml")
    assert "<b>" not in svg


@pytest.mark.parametrize("length", [1, 30, 31, 80, 500])
def test_long_names_of_steps_leave_room_for_the_plot(length, recwarn):
    names = [f"{i}" + "x" * (length - 2) + "y" for i in range(5)]
    assert pictures.plot([pictures.PlotLine(np.arange(5.0), "#000000")], unit_x=False, ticks=names)
    assert not recwarn.list  # of a layout that collapses


def test_no_state_of_matplotlib_is_touched():
    import sys

    import matplotlib

    before = dict(matplotlib.rcParams)
    pictures.plot([pictures.PlotLine(np.arange(3.0), "#123456", np.zeros(3), np.ones(3), dashed=True)])
    assert dict(matplotlib.rcParams) == before
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()
