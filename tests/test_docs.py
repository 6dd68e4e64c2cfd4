"""The pages of the site: nothing that exists is left out. ``make docs`` sees to their links."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from attrib.config.places import configs

DOCS = Path(__file__).parent.parent / "docs"
WITHOUT = {"captum", "input_iba_stages", "iba_readout", "oracle"}  # of the gallery, without a picture
GROUPS = ("dataset", "model", "method", "metric", "paper", "train")


@pytest.mark.parametrize("group", ["method", "metric"])
def test_every_class_of_a_preset_is_in_the_reference(group: str) -> None:
    page = (DOCS / "reference" / f"{group}s.md").read_text()
    for path in sorted((configs() / group).glob("*.yaml")):
        for target in re.findall(rf"_target_: (attrib\.{group}s\.\S+)", path.read_text()):
            if "parts" not in target:
                assert f"::: {target}\n" in page, f"{path.name}: {target}"


def test_every_method_is_in_the_gallery_and_on_the_page_of_the_command_line() -> None:
    gallery, command_line = (DOCS / "methods.md").read_text(), (DOCS / "use.md").read_text()
    for path in sorted((configs() / "method").glob("*.yaml")):
        assert f"`{path.stem}`" in gallery, path.stem
        if path.stem != "input_iba_stages":  # of `attrib sanity` alone
            assert f"`{path.stem}`" in command_line, path.stem


def test_the_gallery_leaves_nothing_out() -> None:
    """Each method in one row: name and picture, formula, use, limits, cost, paper."""
    lines = (DOCS / "methods.md").read_text().splitlines()
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines if line.startswith("| `")]
    names = [name for row in rows for name in re.findall(r"`(\w+)`", row[0])]
    assert sorted(names) == sorted(path.stem for path in (configs() / "method").glob("*.yaml"))
    for row in rows:
        assert len(row) == 6, row
        assert all(cell.strip(" –") for cell in row), row
        shown = [DOCS / source for source in re.findall(r'src="(\S+?)"', row[0])]
        assert shown or re.findall(r"`(\w+)`", row[0])[0] in WITHOUT, row[0]
        assert all(picture.is_file() and picture.stat().st_size > 500 for picture in shown), row[0]
    assert sum(path.stat().st_size for path in (DOCS / "pictures" / "methods").iterdir()) < 600_000


def test_every_page_is_in_the_sites_contents() -> None:
    contents = yaml.safe_load(re.sub(r"!!\S+", "", (DOCS.parent / "mkdocs.yml").read_text()))["nav"]
    listed = set(re.findall(r"[\w/-]+\.md", str(contents)))
    pages = [*DOCS.rglob("*.md"), *(path.with_suffix(".md") for path in DOCS.rglob("*.ipynb"))]
    assert {str(page.relative_to(DOCS)) for page in pages} == listed


OWN = {"mine", "scans", "positive_cam", "pointing", "my_lstm"}  # what the pages tell how to add


def test_commands_name_what_there_is() -> None:
    """In blocks of commands, between backticks and in notebooks. NAME is the reader's own, too."""
    known = {group: {path.stem for path in (configs() / group).glob("*.yaml")} for group in GROUPS}
    pages = [DOCS.parent / "README.md", *DOCS.rglob("*.md"), *DOCS.rglob("*.ipynb")]
    found = 0
    for page in pages:
        text = page.read_text()
        commands = re.findall(r"```(?:bash|sh)?\n(.*?)```", text, re.DOTALL) + re.findall(r"`(attrib [^`]+)`", text)
        commands += re.findall(r"attrib [a-z]+ [^\n`]*(?:\\\n[^\n]*)*", text)
        for command in commands:
            for group, names in re.findall(rf"(?<![\w.+])({'|'.join(GROUPS)})=\[?([\w,]+)", command):
                for name in filter(None, names.split(",")):
                    assert name in known[group] | OWN or name.isupper(), f"{page.name}: {group}={name}"
                    found += 1
    assert found > 100
