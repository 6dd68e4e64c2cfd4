"""``make browser``: the site, and a report if there is one, in headless Chromium, on a desk and on a phone.

    python tests/browser_check.py site [REPORT ...] [--out FOLDER]

Pages are opened as files. Each must load nothing from elsewhere, say no error, show all its pictures, and be no wider
than the window, also when all that can be unfolded is; the search must find something; reports must do what
their script promises (``report_clicks``, which also says how soon they are open). ``--out`` keeps screenshots.
Needs playwright and Debian's chromium (apt-get install chromium).
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator
from pathlib import Path

import report_clicks
from playwright.sync_api import Page, sync_playwright

WIDTHS = (1280, 390)
LOCAL = ("file:", "data:", "blob:")
UNFOLD = "document.querySelectorAll('details').forEach(one => one.open = true)"
LAZY = "document.querySelectorAll('img').forEach(one => one.loading = 'eager')"
WIDER = "document.documentElement.scrollWidth - window.innerWidth"
BROKEN = "[...document.images].filter(one => one.complete && !one.naturalWidth).map(one => one.src.slice(0, 80))"


def problems(page: Page, path: Path, said: list[str]) -> Iterator[str]:
    said.clear()
    page.goto(path.resolve().as_uri())
    page.evaluate(UNFOLD)
    page.evaluate(LAZY)
    page.wait_for_timeout(150)
    yield from said
    if (wider := page.evaluate(WIDER)) > 0:
        yield f"{wider} pixels wider than the window"
    yield from (f"a picture that cannot be shown: {source}" for source in page.evaluate(BROKEN))


def search(page: Page, site: Path) -> Iterator[str]:
    page.goto((site / "index.html").resolve().as_uri())
    page.locator("label[for=__search]").first.click() if page.viewport_size["width"] < 960 else None
    page.locator(".md-search__input").fill("bottleneck")
    try:
        page.locator(".md-search-result__item").first.wait_for(timeout=60_000)
    except Exception as error:
        yield f"search: finds nothing ({type(error).__name__})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("site", type=Path)
    parser.add_argument("reports", type=Path, nargs="*")
    parser.add_argument("--out", type=Path, help="folder for screenshots")
    arguments = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        raise SystemExit("no chromium here: apt-get install chromium")
    # 404.html is for servers, and names its files from their root.
    pages = [path for path in sorted(arguments.site.rglob("*.html")) if path.name != "404.html"]
    if not pages:
        raise SystemExit(f"{arguments.site} has no pages; make docs builds them")
    pages += arguments.reports
    found = 0
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for width in WIDTHS:
            page, said = browser.new_page(viewport={"width": width, "height": 900}), list[str]()
            page.on("console", lambda m, said=said: said.append(m.text) if m.type == "error" else None)
            page.on("pageerror", lambda error, said=said: said.append(str(error)))
            page.on("request", lambda r, said=said: r.url.startswith(LOCAL) or said.append(f"asks for {r.url}"))
            page.on("requestfailed", lambda r, said=said: said.append(f"does not get {r.url[:100]}"))
            for path in pages:
                for problem in problems(page, path, said):
                    print(f"{path} at {width}: {problem}")
                    found += 1
                if arguments.out is not None:
                    name = "-".join(path.with_suffix("").parts[-2:])
                    page.screenshot(path=arguments.out / f"{name}-{width}.png", full_page=True)
            for path in arguments.reports:
                for problem in report_clicks.problems(page, path.resolve().as_uri()):
                    print(f"{path} at {width}: {problem}")
                    found += 1
            for problem in search(page, arguments.site):
                print(f"at {width}: {problem}")
                found += 1
        browser.close()
    print(f"{len(pages)} pages at {WIDTHS[0]} and {WIDTHS[1]} pixels: {found} problems")
    raise SystemExit(found > 0)


if __name__ == "__main__":
    main()
