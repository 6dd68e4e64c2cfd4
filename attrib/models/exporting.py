"""What torch.export needs around it: nothing on the user's screen, and a ``len`` that does not fix a number of rows.

Both exchange something of the whole process for the time of an export, ``sys.stderr`` and ``len``. That is acceptable
because what another thread writes or asks for meanwhile goes where it always does (each looks at the thread first), and
because threads that export take turns, so that each finds what it has to put back.
"""

from __future__ import annotations

import builtins
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

TURN = threading.RLock()  # of whoever exchanges something of the whole process, as torch.fx does, too


class _Others:
    """A stream without what one thread writes."""

    def __init__(self, stream: Any, thread: int) -> None:
        self._stream, self._thread = stream, thread

    def write(self, text: str) -> int:
        return len(text) if threading.get_ident() == self._thread else self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def unprinted() -> Iterator[None]:
    """torch prints the graph so far when it meets what it cannot export; the error says enough."""
    with TURN:
        before = sys.stderr
        if before is None:  # a process without a console
            yield
            return
        sys.stderr = quiet = _Others(before, threading.get_ident())
        try:
            yield
        finally:
            if sys.stderr is quiet:  # else somebody has exchanged it since
                sys.stderr = before


@contextmanager
def symbolic_len() -> Iterator[None]:
    """``len(x)`` of a tensor is ``x.shape[0]``, which may be any number.

    Python makes a whole number of what ``Tensor.__len__`` gives, so there is no other place for it than the name
    ``len``. torch's own code, which may rely on the number, keeps the usual one.
    """
    thread = threading.get_ident()

    def length(of: Any, /) -> Any:
        if isinstance(of, Tensor) and threading.get_ident() == thread and of.ndim:
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if caller.partition(".")[0] != "torch":
                return of.shape[0]
        return usual(of)

    with TURN:
        usual = builtins.len
        builtins.len = length
        try:
            yield
        finally:
            builtins.len = usual
