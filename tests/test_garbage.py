"""When Python's garbage collector rests."""

from __future__ import annotations

import gc

import pytest

from attrib.process.garbage import kept_for_good, uncollected


@pytest.mark.parametrize("resting", [uncollected, kept_for_good])
def test_the_collector_rests_and_goes_on(resting):
    try:
        with resting():
            assert not gc.isenabled()
            with uncollected():
                pass
            assert not gc.isenabled()  # as it was before the inner one
        assert gc.isenabled()
        with pytest.raises(ZeroDivisionError), resting():
            raise ZeroDivisionError
        assert gc.isenabled()
    finally:
        gc.unfreeze()


def test_only_imports_are_kept_for_good():
    before = gc.get_freeze_count()
    with uncollected():
        pass
    assert gc.get_freeze_count() == before
    try:
        with kept_for_good():
            pass
        assert gc.get_freeze_count() > before
    finally:
        gc.unfreeze()


def test_a_collector_that_was_switched_off_stays_so():
    gc.disable()
    try:
        with uncollected():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
