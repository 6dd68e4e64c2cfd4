"""What a reader does with a report, done in a browser: sort, filter, find, compare, enlarge. See ``browser_check``."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator

from playwright.sync_api import Locator, Page


def problems(page: Page, address: str) -> Iterator[str]:
    """What does not work in the report at ``address``; texts for people."""
    page.goto(address)
    seconds = page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd") / 1000
    print(f"{address.rsplit('/', 1)[-1]}: open after {seconds:.2f} s")
    yield from _prints(page)
    for block in page.locator("section.block").all():
        for check in (_sorts, _filters, _finds, _shows_the_wrong, _orders, _compares, _enlarges):
            try:
                yield from (f"{check.__name__[1:]}: {problem}" for problem in check(block))
            except Exception as error:  # of playwright: what should be there is not
                yield f"{check.__name__[1:]}: {type(error).__name__}: {error}"
            page.keyboard.press("Escape")


def _prints(page: Page) -> Iterator[str]:
    """Whether the paper, A4 on its side, has all columns of the scores and all maps."""
    before = page.viewport_size
    page.set_viewport_size({"width": 1047, "height": 740})
    page.emulate_media(media="print")
    edges = page.locator("table.head, .gallery, .sentences").evaluate_all(
        "all => all.map(one => one.getBoundingClientRect().left + one.scrollWidth - window.innerWidth)"
    )
    if any(edge > 1 for edge in edges):
        yield f"prints: {max(edges):.0f} pixels do not fit on the paper"
    page.emulate_media(media="screen")
    page.set_viewport_size(before)


def _attributes(found: Locator, name: str) -> list[str]:
    return found.evaluate_all("(all, name) => all.map(one => one.getAttribute(name) || '')", name)


def _seen(block: Locator, what: str) -> Locator:
    return block.locator(f"{what}:not([hidden])")


def _sorts(block: Locator) -> Iterator[str]:
    table = block.locator("table.head")
    if not table.count():
        return
    for place in range(1, table.locator("thead th").count()):
        button = table.locator("thead th").nth(place).locator("button")
        for _ in range(2):
            button.click()
            falling = table.locator("thead th").nth(place).get_attribute("aria-sort") == "descending"
            said = _attributes(table.locator(f"tbody tr td:nth-child({place + 1})"), "data-v")
            values = [float(text) for text in said if text]
            if values != sorted(values, reverse=falling):
                yield f"column {place} is not in order"
    table.locator("thead th button").first.click()


def _filters(block: Locator) -> Iterator[str]:
    box = block.locator(".tools.filter")
    if not box.count() or box.is_hidden():
        return
    box.locator("summary").click()
    every = box.locator("input")
    box.get_by_role("button", name="none").click()
    if left := _seen(block, "table.head tbody tr").count():
        yield f"none: {left} methods are left"
    every.first.check()
    if (left := _seen(block, "table.head tbody tr").count()) != 1:
        yield f"one method: {left} are shown"
    columns = block.locator(".sample [data-m='0']")
    if columns.count() and columns.first.is_hidden():
        yield "one method: its maps are not shown"
    box.get_by_role("button", name="all").click()
    if (left := _seen(block, "table.head tbody tr").count()) != every.count():
        yield f"all: {left} of {every.count()} methods are shown"
    box.locator("summary").click()


def _finds(block: Locator) -> Iterator[str]:
    box = block.locator(".tools.find")
    if not box.count() or box.is_hidden():
        return
    samples, field = block.locator(".sample"), box.locator("input[type=search]")
    uid = samples.last.get_attribute("data-uid") or ""
    field.fill(uid)
    found = _attributes(_seen(block, ".sample"), "data-uid")
    if uid not in found or not all(uid.lower() in one.lower() for one in found):
        yield f"{uid!r} is not what is found, but {found}"
    field.fill("no sample is called this")
    if _seen(block, ".sample").count() or not box.locator("output").inner_text().startswith("0 of"):
        yield "finds what is not there"
    field.fill("")
    if _seen(block, ".sample").count() != samples.count():
        yield "an emptied field hides samples"


def _shows_the_wrong(block: Locator) -> Iterator[str]:
    if not block.locator(".sample").count() or block.locator(".tools.find").is_hidden():
        return
    tick = block.locator(".tools.find input[type=checkbox]")
    wrong = block.locator(".sample[data-right='0']").count()
    if bool(tick.count()) != bool(wrong):
        yield f"{wrong} samples are wrong, {tick.count()} boxes ask for them"
    if not tick.count():
        return
    tick.check()
    if _seen(block, ".sample").count() != wrong or _seen(block, ".sample[data-right='0']").count() != wrong:
        yield f"{_seen(block, '.sample').count()} shown, {wrong} are wrong"
    tick.uncheck()
    if _seen(block, ".sample").count() != block.locator(".sample").count():
        yield "not all come back"


def _orders(block: Locator) -> Iterator[str]:
    select = block.locator(".tools.find select")
    if not select.count() or block.locator(".tools.find").is_hidden():
        return
    names = select.locator("option").all_inner_texts()
    for name, key, reverse in (("by class", "data-class", False), ("net surest first", "data-sure", True)):
        if name in names:
            select.select_option(label=name)
            said = _attributes(block.locator(".sample"), key)
            values: list[float] = [float(text) for text in said if text] if key == "data-sure" else []
            if values != sorted(values, reverse=reverse):
                yield f"{name}: not in this order"
    before = set(_attributes(block.locator(".sample"), "data-uid"))
    for name in names:
        select.select_option(label=name)
    if set(_attributes(block.locator(".sample"), "data-uid")) != before:
        yield "samples are lost"
    select.select_option(index=0)


def _compares(block: Locator) -> Iterator[str]:
    box = block.locator(".tools.versus")
    if not box.count() or box.is_hidden():
        return
    first, second, column = box.locator("select").all()
    scores = json.loads(block.get_attribute("data-scores") or "")
    numbers = [[{i for i, v in enumerate(own) if v is not None} for own in one["values"]] for one in scores["columns"]]
    meet = any(a & b for own in numbers for a, b in itertools.combinations(own, 2))
    if meet and not box.locator("circle").count():
        yield "begins with two methods without common samples"
    if meet and not any(a & b for a, b in itertools.combinations(numbers[int(column.input_value())], 2)):
        yield "begins under a column where no two methods meet"
    first.select_option(index=0)
    second.select_option(index=1)
    points, rows = box.locator("circle").count(), box.locator("tbody tr").count()
    if points != rows or (not rows and "No sample" not in box.locator(".sum").inner_text()):
        yield f"{points} points and {rows} rows"
    for i in range(column.locator("option").count()):
        column.select_option(index=i)
        said = list(map(float, box.locator("tbody td:nth-child(4)").all_inner_texts()))
        if said != sorted(said, reverse=True):
            yield "differences are not in order"
    second.select_option(index=0)
    if any(map(float, box.locator("tbody td:nth-child(4)").all_inner_texts())):
        yield "a method differs from itself"
    second.select_option(index=1)
    shown = set(_attributes(block.locator(".sample"), "data-uid"))
    names = box.locator("tbody td button")
    place = next((i for i, uid in enumerate(names.all_inner_texts()) if uid in shown), None)
    if place is not None and block.locator(".gallery .sample img").count():
        uid = names.nth(place).inner_text()
        names.nth(place).click()
        if uid not in block.page.locator("dialog p").first.inner_text():
            yield f"{uid} does not open"


def _enlarges(block: Locator) -> Iterator[str]:
    pictures = block.locator(".sample:not([hidden]) td:not([hidden]) img")
    if not all(pictures.evaluate_all("all => all.map(one => one.getBoundingClientRect().height)")):
        yield "pictures take no room until they are loaded"
    if not pictures.count():
        return
    dialog, samples = block.page.locator("dialog.viewer"), block.locator(".sample")
    pictures.first.click()
    if not dialog.is_visible():
        yield "a click opens nothing"
        return
    if dialog.locator("img").count() == 2:
        dialog.get_by_label("one over the other").check()
        slider = dialog.locator("input[type=range]")
        clips = []
        for value in ("20", "80"):
            slider.fill(value)
            clips.append(dialog.locator("figure").last.evaluate("one => one.style.clipPath"))
        if clips[0] == clips[1] or not all("%" in one for one in clips):
            yield f"the slider moves nothing: {clips}"
        dialog.get_by_label("one over the other").uncheck()
    heading = dialog.locator("p").first
    before = heading.inner_text()
    if samples.count() > 1:
        dialog.get_by_role("button", name="next").click()
        if heading.inner_text() == before:
            yield "next stays where it is"
        if not block.page.evaluate("document.activeElement.matches('dialog button')"):
            yield "next takes the keyboard away"
        dialog.get_by_role("button", name="previous").click()
        if heading.inner_text() != before:
            yield "previous does not lead back"
    dialog.get_by_role("button", name="close").click()
    if dialog.is_visible():
        yield "close does not close"
    pictures.first.focus()
    block.page.keyboard.press("Enter")
    if not dialog.is_visible():
        yield "the keyboard opens nothing"
