"""Tables as people get them: rounding, CSV, Markdown, LaTeX, the terminal, and the mistakes of a command line."""

import csv
import io
import math
import re
import time

import numpy as np
import pandas as pd
import pytest
import rich.console
from synthetic import UIDS, add_entry, add_rows, cell, iba, metric_folder
from tiny import tool

from attrib.results import formats, significance, stats, tables, written


def test_rounding_follows_the_interval():
    assert formats.rounded(0.41234, 0.40, 0.4251) == "0.412"
    assert formats.rounded(0.41234, 0.2, 0.6) == "0.41"
    assert formats.rounded(1234.5678, 1100, 1400) == "1235"
    assert formats.rounded(0.00012345, 0.00012, 0.00013) == "0.0001234"
    assert formats.rounded(0.41234) == "0.4123"
    assert formats.rounded(math.nan) == "–"
    assert formats.with_half(0.41234, 0.40, 0.4251) == "0.412 ± 0.013"
    assert formats.with_half(0.5, 0.5, 0.5) == "0.5"
    assert formats.p_text(0.0001) == "< .001"
    assert formats.p_text(0.0421) == ".042"
    assert formats.p_text(1.0) == "1.000"


def run(root, *args):
    return tool("table").main([str(root), *args])


def test_csv_has_full_precision(root, tmp_path):
    assert run(root, "--out", str(tmp_path / "t.csv")) == 0
    back = pd.read_csv(tmp_path / "t.csv", keep_default_na=False, converters={"mean": float})
    table = tables.summary(tables.rows(root))
    assert list(back.columns) == list(table.columns)
    assert back["mean"].tolist() == table["mean"].tolist()
    assert run(root, "--rows", "--out", str(tmp_path / "rows.csv")) == 0
    assert len(pd.read_csv(tmp_path / "rows.csv")) == 180
    assert run(root, "--pairs", "ehr", "--out", str(tmp_path / "pairs.csv")) == 0
    assert pd.read_csv(tmp_path / "pairs.csv")["a"].tolist() == ["grad_cam", "grad_cam", "iba"]


def test_markdown(root, capsys):
    assert run(root, "--format", "md", "--wide") == 0
    text = capsys.readouterr().out
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert (
        lines[0]
        == r"| method | ehr ↑ (n=20) | insertion ↑ (n=20) | deletion ↓ (n=20) | s/sample | rows/sample | peak memory |"
    )
    assert lines[1] == "| :-- | --: | --: | --: | --: | --: | --: |"
    assert len(lines) == 5
    assert "**0." in next(line for line in lines if "| iba" in line)
    assert r"| grad\_cam |" in text
    assert run(root, "--format", "md", "--pairs") == 0
    text = capsys.readouterr().out
    assert "Paired tests" in text
    assert text.count("\n| ehr ") >= 3


def test_latex(root, capsys):
    assert run(root, "--format", "tex") == 0
    text = capsys.readouterr().out
    for part in (r"\toprule", r"\midrule", r"\bottomrule", r"grad\_cam", r"$\uparrow$", r"\textbf{0."):
        assert part in text
    widths = {line.count("&") for line in text.splitlines() if line.endswith(r"\\")}
    assert len(widths) == 1
    assert written._tex("50% of $x_1$ & {#2} ~^\\") == (
        r"50\% of \$x\_1\$ \& \{\#2\} \textasciitilde{}\textasciicircum{}\textbackslash{}"
    )


def test_terminal_is_the_default_with_paired_tests(root, capsys, tmp_path):
    assert run(root) == 0
    text = capsys.readouterr().out
    assert "photos, net" in text
    assert "Paired tests" in text
    assert "p (Holm)" in text
    assert run(root, "--wide", "--out", str(tmp_path / "t.txt")) == 0
    assert "±" in (tmp_path / "t.txt").read_text()


def test_names_are_not_markup(tmp_path, capsys):
    made = cell(tmp_path, "photos.net.odd.1", method="[red]a|b*")
    metric_folder(made, "ehr.11111111")
    add_rows(made, "ehr.11111111", [(u, "f", "map", "ehr", 0.5, 1.0) for u in UIDS])
    assert run(tmp_path) == 0
    assert "[red]a|b*" in capsys.readouterr().out
    assert run(tmp_path, "--format", "md") == 0
    assert r"\[red\]a\|b\*" in capsys.readouterr().out


def test_long_lists_of_pairs_say_what_they_hide(root):
    tests = tables.all_paired(tables.rows(root))
    table = formats.paired_table(tests, most=4)
    assert len(table.body) == 4
    assert any("5 more pairs" in note for note in table.notes)


def test_too_few_samples_for_any_test_are_said(root):
    frame = tables.rows(root)
    assert not any("can be significant" in note for note in formats.paired_table(tables.all_paired(frame)).notes)
    few = frame[frame["uid"].isin(UIDS[:6])]
    tests = tables.all_paired(few)
    assert not (tests["better"] != "").any()
    (said,) = [note for note in formats.paired_table(tests).notes if "can be significant" in note]
    assert said == (
        "With 6 common samples no difference can be significant at 95 %: the smallest possible p is .031, times 3 "
        "pairs (Holm) .094; it takes 7 samples at least."
    )
    assert significance.hopeless(tests, 0.9) == []  # .094 is below .1
    least = np.arange(1.0, 8.0)  # the promise is kept: all differences of one sign
    assert stats.paired_test(least, 0 * least).p == stats.smallest_p(7) == 2 / 2**7


def test_unequal_n_is_said(root):
    add_entry(iba(root), UIDS[1], "changed", "ehr.11111111", "gone", time.time() + 9)
    table = tables.summary(tables.rows(root))
    assert any("n differs" in note and "ehr" in note for note in formats.long_table(table).notes)
    text = formats.to_markdown(formats.wide_table(formats.wide(table)[0]))
    assert "(n=19, 1 failed)" in text
    assert "| ehr ↑ |" in text  # the header no longer states a common n


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--wide", "--format", "csv"], "--wide"),
        (["--rows"], "--rows"),
        (["--out", "t.docx"], "suffix"),
        (["--confidence", "95"], "0.95"),
        (["--where", "method"], "FIELD=VALUE"),
        (["--where", "method=nope"], "there are"),
        (["--pairs", "nope"], "nope"),
    ],
)
def test_mistakes_are_named(root, capsys, args, message):
    assert run(root, *args) == 2
    assert message in capsys.readouterr().err


def test_empty_root_exits_2(tmp_path, capsys):
    assert run(tmp_path) == 2
    assert "holds no results" in capsys.readouterr().err


def test_tiny_numbers_have_exponents():
    assert formats.rounded(2.2412e-7, 1.9e-7, 2.56e-7) == "2.24e-07"
    assert formats.with_half(2.2412e-7, 1.92e-7, 2.56e-7) == "2.24e-07 ± 3.2e-08"
    assert formats.rounded(0.0, -1e-9, 1e-9) == "0e+00"
    assert formats.rounded(0.0224, 0.0192, 0.0256) == "0.0224"


@pytest.mark.parametrize("words", [(), ("--wide",), ("--ranks",)])
def test_ehr_is_spelt_out_where_it_is_first_met(root, capsys, words):
    assert run(root, "--format", "md", *words) == 0
    assert capsys.readouterr().out.count("effective heat ratio") == 1
    assert formats.spelt_out(["ehr ↑", "ehr · old"]) == formats.spelt_out(["EHR"]) != ()
    assert formats.spelt_out(["insertion ↑", "heather"]) == ()


# ---- texts that come from files ---------------------------------------------------------------------

EVIL = "=HYPERLINK(1)\x1b]0;title\x07\u202e\x85\u2028\r\nnext | & $x$ % #"


def test_names_steer_no_terminal_and_end_no_line():
    table = formats.TextTable(EVIL, ["method", EVIL], [[EVIL, "1"]], notes=[EVIL])
    for write in (formats.to_markdown, formats.to_latex):
        text = write(table)
        assert all(c.isprintable() or c == "\n" for c in text)
    for line in formats.to_latex(table).splitlines():
        assert line.startswith(("%", "  ")) or "next" not in line
    assert sum(line.startswith("%") for line in formats.to_latex(table).splitlines()) == 2
    console = rich.console.Console(file=io.StringIO(), force_terminal=True, width=300, color_system=None)
    console.print(formats.to_terminal(table))
    assert not {"\x07", "\u202e", "\x1b]"} & set(re.findall(r"\x1b\]|.", console.file.getvalue()))


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@x", " =1", "\t=1"])
def test_no_cell_of_a_csv_is_a_formula(text):
    frame = pd.DataFrame({"uid": [text, "plain"], "value": [-1.5, 2.0], "kind": pd.Categorical([text, "a-b"])})
    (_, first, second) = csv.reader(io.StringIO(formats.to_csv(frame)))
    assert not re.match(r"\W*[=+\-@]", first[0].replace("'", "x"))
    assert (first[1], second) == ("-1.5", ["plain", "2.0", "a-b"])


def test_a_csv_without_such_texts_is_as_it_was():
    frame = pd.DataFrame({"uid": ["val/1", "a,b"], "value": [0.1, float("nan")], "n": [1, 2]})
    assert formats.to_csv(frame) == frame.to_csv(index=False)
