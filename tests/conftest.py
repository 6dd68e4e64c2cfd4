"""Signals as tests expect them; a work directory for labels, tables, formats, the report (``synthetic.build``)."""

import gc
import shutil
import signal
from fnmatch import fnmatch

import captures
import pytest
from older_torch import FAIL
from synthetic import build

from attrib.models.capture_older import OLDER


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Of a grid of tests, which ones ``make test`` runs; the others are slow.

    ``quick("vit-*", ...)`` names them by patterns of what stands in brackets behind a test's name, ``quick(but=[...])``
    the others; ``quick(every=3)`` takes the first of three.
    """
    grids = {}
    for item in items:
        if mark := item.get_closest_marker("quick"):
            grids.setdefault(item.nodeid.partition("[")[0], (mark, []))[1].append(item)
    for name, (mark, grid) in grids.items():
        patterns, every = mark.args or mark.kwargs.get("but", ()), mark.kwargs.get("every")
        matches = {pattern: {item for item in grid if fnmatch(item.callspec.id, pattern)} for pattern in patterns}
        named = set().union(*matches.values())
        slow = [
            item for i, item in enumerate(grid) if (i % every if every else (item in named) == ("but" in mark.kwargs))
        ]
        if not any("::" in given for given in config.args):  # else perhaps some are not there
            for pattern, found in matches.items():
                if not found:
                    raise pytest.UsageError(f"{name}: quick(...) says {pattern!r}, which matches nothing")
            if len(slow) in (0, len(grid)):
                raise pytest.UsageError(f"{name}: quick(...) names all of it, or nothing")
        for item in slow:
            item.add_marker("slow")
    for item in items if OLDER else ():
        for pattern, reason in FAIL.items():
            if fnmatch(item.name, pattern):
                item.add_marker(pytest.mark.xfail(reason=f"torch {reason}", strict=True))


@pytest.fixture(scope="session", autouse=True)
def _captures_are_direct():
    with pytest.MonkeyPatch.context() as patch:
        for name, function in captures.DIRECT.items():
            patch.setattr(captures.PLACE, name, function)
        yield


@pytest.fixture(scope="session", autouse=True)
def _signals_are_heard():
    """A shell tells what it runs in the background to ignore Ctrl-C, and a run keeps to that. Tests send signals."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


@pytest.fixture(scope="module", autouse=True)
def _what_is_old_is_not_looked_through_again():
    """Runs collect garbage, which takes half a second among the objects of some hundred imported modules of tests."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _what_is_old_goes_at_the_end():
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    return build(tmp_path_factory.mktemp("synthetic") / "work")


@pytest.fixture
def root(built, tmp_path):
    """A copy of its own for each test."""
    return shutil.copytree(built, tmp_path / "work")
