"""Docstrings as Markdown, for the reference of the site: a griffe extension that mkdocs.yml names.

Ours have no fields of Sphinx or numpy: arguments stand in columns, name and text two blanks apart; examples are
doctests; ``:func:`` and its like name things.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

FIELD = re.compile(r"(\S.{0,39}?) {2,}(\S.*)")
ROLE = re.compile(r":(?:func|class|meth|mod|attr):(`[^`]+`)")


class Docstrings(Extension):
    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)


def markdown(docstring: str) -> str:
    """
    >>> print(markdown("Says :func:`how`.\\n\\na     one\\nb, c  two,\\n      or more\\n\\n>>> 1\\n1"))
    Says `how`.
    <BLANKLINE>
    - `a`: one
    - `b, c`: two, or more
    <BLANKLINE>
    ```pycon
    >>> 1
    1
    ```
    """
    text = ROLE.sub(r"\1", docstring.replace("  # doctest: +SKIP", ""))
    return "\n\n".join(_paragraph(part.split("\n")) for part in re.split(r"\n\s*\n", text.strip("\n")))


def _paragraph(lines: list[str]) -> str:
    if lines[0].startswith(">>>"):
        return "\n".join(["```pycon", *lines, "```"])
    for start, line in enumerate(lines):
        if FIELD.fullmatch(line) and all(FIELD.fullmatch(one) or one.startswith(" ") for one in lines[start:]):
            head = [" ".join(lines[:start]), ""] if start else []
            return "\n".join([*head, *_fields(lines[start:])])
    return "\n".join(lines)


def _fields(lines: list[str]) -> list[str]:
    found: list[str] = []
    for line in lines:
        field = FIELD.fullmatch(line)
        if field and not line.startswith(" "):
            found.append(f"- `{field[1]}`: {field[2]}")
        else:
            found[-1] += f" {line.strip()}"
    return found
