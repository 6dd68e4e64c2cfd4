"""The two kinds of failure, and what makes a message fit to be printed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

UNREADABLE = ""  # the fingerprint of a sample whose file could not be read


class UserError(Exception):
    """Something that the person at the keyboard can put right.

    The tools print the message alone, without a traceback, so it must name the file, field or
    sample and say what to do.

    >>> raise UserError("beta must be above 0")
    Traceback (most recent call last):
    attrib.errors.UserError: beta must be above 0
    """


class GoneError(UserError):
    """The folder that a run writes to was deleted under it."""


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """The hint that a message about an unknown name ends with; "" where no known name is near.

    >>> did_you_mean("gradcam", ["iba", "grad_cam"])
    "; did you mean 'grad_cam'?"
    """
    near = difflib.get_close_matches(given, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


class SampleError(Exception):
    """One sample cannot be used (unreadable file, no region of interest, NaN map).

    It goes to the failure ledger and the run goes on; see ``attrib.running.run``.

    >>> raise SampleError("photos/7.jpg has no region of interest")
    Traceback (most recent call last):
    attrib.errors.SampleError: photos/7.jpg has no region of interest
    """


def printable(text: str) -> str:
    """Without the control characters by which a text could move the cursor or write to the terminal's title.

    For everything that comes from files: names, classes, reasons. Characters that no encoding can write (of a file name
    that is no UTF-8) go too.

    >>> printable("two\\tlines \\x1b[2J")
    'two lines \ufffd[2J'
    """
    if text.isprintable():  # a page's pictures are texts of megabytes
        return text
    return "".join(c if c.isprintable() else " " if c in "\t\n" else "\ufffd" for c in text)


def plain(value: Any) -> Any:
    """A text of several lines, each :func:`printable`; what is no plain text (HTML that a template made) as it is."""
    return "\n".join(map(printable, value.split("\n"))) if type(value) is str else value
