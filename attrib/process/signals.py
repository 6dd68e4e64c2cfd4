"""Stopping when told to: SIGTERM, SIGINT, SIGHUP, SIGUSR1 and SIGUSR2 end a run between two batches, all flushed.

``with watching(grace) as stop:`` watches; ``stop()`` is True once a signal came. What a signal may end is said by the
regions around the code:

* ``stop.finishing()`` (the default): the first signal only makes ``stop()`` true, so that work ends where its author
  looks; after ``grace`` seconds, or at a second signal, :class:`Interrupted` is raised wherever the code is;
* ``stop.immediately()``: nothing here is worth waiting for, the first signal raises;
* ``stop.deferred()``: nothing is raised before the region is left. Here results are written.

So the pattern of everything that computes is ``deferred`` around a ``try`` whose body is ``finishing`` and whose
``finally`` flushes. Python runs handlers in the main thread and between bytecodes only: one long call into C (a
convolution of a minute) delays both the flag and the exception by as much. A process that must be gone earlier is
killed, and loses what it had not flushed (``run.flush``).
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Literal, NoReturn

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
LEFT = 75  # EX_TEMPFAIL: exit status of a tool that was told to stop and has work left
GRACE = 20.0
AGAIN = 1.0  # seconds after which an exception that some code has swallowed is raised again
TWICE = 0.5  # seconds within which a second signal is the same one: schedulers tell a step and its processes

Handler = Callable[[int, FrameType | None], Any] | int | None


class Interrupted(BaseException):
    """Told to stop by this signal. No ``Exception``: what catches a sample's errors must let it pass."""

    def __str__(self) -> str:
        return f"stopped by {self.args[0]}"


class Stop:
    """Whether this process was told to stop. One that nobody watches (``Stop()``) never is.

    name        of the first signal, such as "SIGTERM"; None before
    work_left   set to False by who finished all the same: the handler that was there before is then not called
    """

    def __init__(self, grace: float = GRACE) -> None:
        self.grace = grace
        self.name: str | None = None
        self.work_left = True
        self._mode: Literal["finish", "drop", "defer"] = "finish"
        self._overdue = False
        self._first = 0.0
        self._process = os.getpid()
        self._previous: dict[signal.Signals, Handler] = {}
        self._alarm_before: tuple[Handler, tuple[float, float], float] | None = None

    def __call__(self) -> bool:
        return self.name is not None

    def check(self) -> None:
        """Raises Interrupted once a signal came: for code that can end here and keeps nothing more."""
        if self.name is not None:
            self.work_left = True
            raise Interrupted(self.name)

    # ---- regions ------------------------------------------------------------------------------

    def finishing(self) -> contextlib.AbstractContextManager[None]:
        return self._region("finish")

    def immediately(self) -> contextlib.AbstractContextManager[None]:
        return self._region("drop")

    def deferred(self) -> contextlib.AbstractContextManager[None]:
        return self._region("defer")

    def defer(self) -> None:
        """``deferred`` from here on, until ``watching`` is left: all is done, and it is only to be said."""
        self._mode = "defer"

    @contextmanager
    def _region(self, mode: Literal["finish", "drop", "defer"]) -> Iterator[None]:
        before, self._mode = self._mode, mode
        try:
            self._drop()
            yield
        finally:
            self._mode = before
        self._drop()  # what came while it was held

    def _drop(self) -> None:
        if self._mode == "drop" or (self._mode == "finish" and self._overdue):
            self.check()

    # ---- handlers -----------------------------------------------------------------------------

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        """The handler of all these signals."""
        if os.getpid() != self._process:  # a child that was forked meanwhile: none of its work is ours
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        if self.name is not None:
            if time.monotonic() - self._first < TWICE:
                return
            self._overdue = True
        else:
            self._first = time.monotonic()
            self.name = signal.Signals(number).name
            self._overdue = self.grace <= 0
            if self._mode != "drop":
                how = f"after the batch in work, in {self.grace:g} s at the latest; a second signal drops the batch"
                _say(f"{self.name}: stopping {how}")
        self._arm(AGAIN if self._overdue else self.grace)
        self._drop()

    def _alarm(self, *_: Any) -> None:
        self._overdue = True
        self._drop()

    def _arm(self, seconds: float) -> None:
        if self._alarm_before is None:
            handler = signal.signal(signal.SIGALRM, self._alarm)
            self._alarm_before = (handler, signal.setitimer(signal.ITIMER_REAL, 0), time.monotonic())
        signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN)

    def _install(self) -> None:
        for number in SIGNALS:
            handler = signal.getsignal(number)
            if handler != signal.SIG_IGN:  # what a shell or nohup has told a process to ignore stays so
                self._previous[number] = handler
                signal.signal(number, self._on_signal)

    def _restore(self) -> None:
        self._mode = "defer"
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if self._alarm_before is not None:
            handler, (left, interval), since = self._alarm_before
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, signal.SIG_DFL if handler is None else handler)
            if left:
                signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - since), 1e-3), interval)

    def _hand_on(self) -> None:
        """Call the handler that was there before, if it is somebody's own."""
        if self.name is None or not self.work_left:
            return
        number = signal.Signals[self.name]
        handler = self._previous[number]
        if handler is signal.default_int_handler or _is_start(handler):
            return
        if callable(handler) and _owner(handler) is None:
            handler(number, inspect.currentframe())


def polite_start() -> None:
    """Until something watches, a signal ends the process with LEFT: nothing was begun, so nothing is lost."""
    for number in SIGNALS:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, functools.partial(_not_begun, os.getpid()))


def _not_begun(process: int, number: int, _: FrameType | None) -> None:
    if os.getpid() != process:  # a child
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        return
    _say(f"stopped by {signal.Signals(number).name}; the same command goes on")
    os._exit(LEFT)


def _is_start(handler: Handler) -> bool:
    return isinstance(handler, functools.partial) and handler.func is _not_begun


def _say(line: str) -> None:
    """Not by ``print`` or ``logging``: the code that a handler interrupts may be in the middle of one."""
    with contextlib.suppress(OSError):
        os.write(2, f"{line}\n".encode())


@contextmanager
def watching(grace: float = GRACE) -> Iterator[Stop]:
    """Watch for the signals; at the end the handlers are those from before.

    Inside another ``watching`` it is that one's ``Stop``, with this ``grace`` and ``finishing`` again. Outside the main
    thread, where Python lets nobody install handlers, it is one that is never told.

    A handler of somebody's own (submitit's of SIGUSR2, which requeues the job and exits) is called at the end,
    after everything is flushed, unless the work was done or an error ended it. A signal that was ignored stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield Stop(grace)
        return
    outer = _watching_now()
    if outer is not None:
        before = outer.grace, outer._mode
        outer.grace, outer._mode = grace, "finish"
        try:
            yield outer
        finally:
            outer.grace, outer._mode = before
        return
    stop, failed = Stop(grace), False
    stop._install()
    try:
        yield stop
    except Exception:
        failed = True
        raise
    finally:
        stop._restore()
        if not failed:
            stop._hand_on()


def _watching_now() -> Stop | None:
    for stop in map(_owner, map(signal.getsignal, SIGNALS)):
        if stop is not None and stop._process == os.getpid():  # else our parent's, from before a fork
            return stop
    return None


def _owner(handler: Handler) -> Stop | None:
    return handler.__self__ if inspect.ismethod(handler) and isinstance(handler.__self__, Stop) else None


def exit_process(status: int, patience: float = 2.0) -> NoReturn:
    """End the process, also if a thread hangs in a read that will not come back (Python would wait for it for ever).

    A signal that comes now changes nothing: the process is ending, and its status says how.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    end = time.monotonic() + patience
    others = [t for t in threading.enumerate() if t is not threading.main_thread() and not t.daemon]
    for thread in others:
        thread.join(max(0.0, end - time.monotonic()))
    if not any(thread.is_alive() for thread in others):
        sys.exit(status)
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)
