"""How long a thread keeps Python's lock while others wait for it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

SHORT = 0.0005  # seconds; Python's own are 0.005


@contextmanager
def short_turns() -> Iterator[None]:
    """Meanwhile a thread gets Python's lock within half a millisecond of asking for it.

    The thread that computes lets go of the lock at each call into torch, and asks for it again for the next one. Those
    that read and write samples beside it would keep it for 5 ms each time: 1 to 2 % of a method of 10 ms a sample.
    """
    before = sys.getswitchinterval()
    sys.setswitchinterval(min(before, SHORT))
    try:
        yield
    finally:
        sys.setswitchinterval(before)
