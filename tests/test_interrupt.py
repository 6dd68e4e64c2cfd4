"""Watching for signals: when they are only noted, when they raise, and what is as before afterwards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
from tiny import ROOT

from attrib.process import signals
from attrib.process.signals import SIGNALS, Interrupted, Stop, watching


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(signals, "TWICE", 0.02)
    monkeypatch.setattr(signals, "AGAIN", 0.05)
    before = [signal.getsignal(number) for number in (*SIGNALS, signal.SIGALRM)]
    yield
    assert [signal.getsignal(number) for number in (*SIGNALS, signal.SIGALRM)] == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def tell(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


def watched(body: Callable[[Stop], None], grace: float = 20.0) -> None:
    with watching(grace) as stop:
        body(stop)


# ---- watching -----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_only_says_so(number, capfd):
    with watching() as stop:
        assert not stop()
        assert stop.name is None
        tell(number)
        assert stop()
        assert stop.name == number.name
        with pytest.raises(Interrupted, match=f"stopped by {number.name}"):
            stop.check()
    assert f"{number.name}: stopping" in capfd.readouterr().err


def test_after_the_grace_it_raises_wherever_the_code_is():
    def body(_: Stop) -> None:
        tell()
        time.sleep(30)

    start = time.monotonic()
    with pytest.raises(Interrupted):
        watched(body, grace=0.1)
    assert 0.1 <= time.monotonic() - start < 5
    with pytest.raises(Interrupted):
        watched(body, grace=0)


def test_a_second_signal_raises_at_once():
    def body(_: Stop) -> None:
        tell()
        time.sleep(0.05)
        tell(signal.SIGINT)
        time.sleep(30)

    start = time.monotonic()
    with pytest.raises(Interrupted, match="SIGTERM"):
        watched(body, grace=100)
    assert time.monotonic() - start < 5


def test_a_signal_that_comes_twice_at_the_same_time_is_one(monkeypatch):
    """Slurm tells the step and, by srun, its processes."""
    monkeypatch.setattr(signals, "TWICE", 10)
    with watching() as stop:
        tell()
        tell()
        tell(signal.SIGINT)
        assert stop.name == "SIGTERM"


def test_what_is_held_waits():
    done = []

    def body(stop: Stop) -> None:
        with stop.deferred():
            tell()
            time.sleep(0.1)  # also the alarm waits
            done.append("written")
        done.append("never")

    with pytest.raises(Interrupted):
        watched(body, grace=0)
    assert done == ["written"]


@pytest.mark.parametrize("before", [True, False])
def test_at_once(before):
    done = []

    def body(stop: Stop) -> None:
        if before:
            tell()
            done.append("between")
        with stop.immediately():
            tell()
            done.append("never")

    with pytest.raises(Interrupted):
        watched(body)
    assert done == ["between"] * before


def test_what_is_computed_is_written_whenever_the_signal_comes():
    """The pattern of the loop, with a signal and then the alarm at many moments."""
    for delay in np.linspace(0.0005, 0.03, 25):
        added, written = [], []
        timer = threading.Timer(delay, tell)
        with watching(grace=0.004) as stop:
            timer.start()
            try:
                with stop.deferred():
                    try:
                        with stop.finishing():
                            while True:
                                added.append(len(added))
                                time.sleep(0.0002)
                    finally:
                        written += added
            except Interrupted:
                pass
        timer.join()
        assert written == added
        assert added


def test_an_exception_that_somebody_swallows_comes_again():
    def body(_: Stop) -> None:
        try:
            tell()
            time.sleep(30)
        except Interrupted:
            time.sleep(30)

    with pytest.raises(Interrupted):
        watched(body, grace=0)


def test_inside_another():
    with watching(grace=100) as outer:
        with watching(grace=0.05) as inner:
            assert inner is outer
            assert outer.grace == 0.05
        assert outer.grace == 100
        tell()
        with watching(grace=0.05) as inner:
            assert inner()
        assert outer()


def test_in_a_thread_nobody_can_be_told():
    found: list[bool] = []

    def work() -> None:
        with watching() as stop:
            found.append(stop())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False]
    assert not Stop()()


@pytest.fixture
def handler():
    """Somebody's own handler of SIGUSR2, as submitit installs one."""
    heard: list[tuple[int, bool]] = []
    before = signal.signal(signal.SIGUSR2, lambda number, frame: heard.append((number, frame is not None)))
    yield heard
    signal.signal(signal.SIGUSR2, before)


def test_a_handler_that_was_there_is_called_at_the_end(handler):
    with watching() as stop:
        with watching():
            tell(signal.SIGUSR2)
        assert stop()
        assert handler == []
    assert handler == [(signal.SIGUSR2, True)]


def test_a_handler_that_was_there_is_not_called_for_nothing(handler):
    def mistaken(_: Stop) -> None:
        tell(signal.SIGUSR2)
        raise ValueError("an error")

    with watching() as stop:
        tell(signal.SIGUSR2)
        stop.work_left = False
    with watching():
        tell(signal.SIGTERM)  # another signal's
    with watching():
        pass
    with pytest.raises(ValueError, match="an error"):
        watched(mistaken)
    assert handler == []


def test_what_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        with watching() as stop:
            tell(signal.SIGUSR1)
            assert not stop()
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_an_alarm_of_somebody_else_goes_on():
    rung: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda *_: rung.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with watching() as stop:
            tell()
            time.sleep(0.2)
            assert stop()
            assert not rung
        time.sleep(0.05)
        assert rung == [1]
    finally:
        signal.signal(signal.SIGALRM, before)


def test_a_forked_child_dies_as_it_would():
    with watching() as stop:
        child = os.fork()
        if child == 0:
            time.sleep(30)
            os._exit(0)
        time.sleep(0.05)
        os.kill(child, signal.SIGTERM)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGTERM
        assert not stop()


def test_a_signal_while_leaving_changes_nothing():
    code = (
        "import atexit, os, signal, time; from attrib.process.signals import exit_process;"
        "atexit.register(lambda: [os.kill(os.getpid(), signal.SIGTERM), time.sleep(0.1)]); exit_process(75)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 75


def test_leaving_does_not_wait_for_a_thread_that_hangs():
    code = (
        "import threading, sys; sys.stdout.write('bye'); threading.Thread(target=threading.Event().wait).start();"
        "from attrib.process.signals import exit_process; exit_process(75, 0.1)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert (done.returncode, done.stdout) == (75, "bye")


# ---- before anything watches --------------------------------------------------------------------


def ended(work: Callable[[], None]) -> int:
    """How a child ends that does this after ``polite_start``; 7 if it gets to its end."""
    child = os.fork()
    if child == 0:
        try:
            signals.polite_start()
            work()
        finally:
            os._exit(7)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_during_the_imports_is_a_polite_stop(number, capfd):
    assert ended(lambda: tell(number)) == signals.LEFT
    assert capfd.readouterr().err == f"stopped by {number.name}; the same command goes on\n"


def test_what_watches_later_is_not_cut_short_by_it():
    def work() -> None:
        with watching() as stop:
            tell()
            assert stop()
        # The handler of the start is there again, but was not called: there may be something to print.

    assert ended(work) == 7
