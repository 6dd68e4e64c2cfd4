"""What mkdocs.yml adds to MkDocs: the notebooks as pages, with the outputs that they were committed with."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

WIDE = ("methods.md",)  # pages with tables that need the room of the contents
STYLE = re.compile(r"<style[^>]*>(.*?)</style>", re.S)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Beside each notebook a page, and once for all the style of the outputs."""
    styles: dict[str, None] = {}
    for notebook in [file for file in files if file.src_uri.endswith(".ipynb")]:
        cells = json.loads(Path(str(notebook.abs_src_path)).read_text())["cells"]
        pieces = [markdown(cell) for cell in cells]
        pieces.insert(1, f"[This page as a notebook]({Path(notebook.src_uri).name})")  # behind title and introduction
        for page in (text for cell in cells for one in cell.get("outputs", []) for text in [html_of(one)] if text):
            styles |= dict.fromkeys(style for style in STYLE.findall(page) if ".attrib" in style)
        files.append(File.generated(config, notebook.src_uri.replace(".ipynb", ".md"), content="\n\n".join(pieces)))
    files.append(File.generated(config, "assets/notebooks.css", content="\n".join(styles)))
    return files


def on_page_markdown(markdown: str, page: Page, **kwargs: Any) -> str:
    """On GitHub links lead to the notebooks, here to their pages."""
    if page.file.src_uri in WIDE:
        page.meta["hide"] = ["toc"]
    return re.sub(r"(\]\(\S*notebooks/\S+)\.ipynb\)", r"\1.md)", markdown)


def markdown(cell: dict[str, Any]) -> str:
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return source
    shell = all(line.startswith("!") for line in source.splitlines())
    source = re.sub("^!", "", source, flags=re.M) if shell else source
    return "\n\n".join([fenced(source, "bash" if shell else "python"), *map(output, cell["outputs"])])


def output(one: dict[str, Any]) -> str:
    if page := STYLE.sub("", html_of(one)):
        return "\n".join(line for line in ['<div class="output">', *page.splitlines(), "</div>"] if line.strip())
    data = one.get("data", {"text/plain": one.get("text", [])})
    if "image/png" in data:
        return f'<img class="output" alt="output" src="data:image/png;base64,{"".join(data["image/png"]).strip()}">'
    return f'<pre class="output">{html.escape("".join(data["text/plain"]))}</pre>'


def html_of(output: dict[str, Any]) -> str:
    return "".join(output.get("data", {}).get("text/html", []))


def fenced(text: str, language: str) -> str:
    return f"```{language}\n{text.strip()}\n```"
