"""Garbage collection that waits."""

import gc

import pytest

from ftexp import garbage


def test_collection_waits_and_goes_on_whatever_happens():
    with pytest.raises(ImportError), garbage.postponed():
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled()
    gc.disable()
    try:
        with garbage.postponed():
            pass
        assert not gc.isenabled()  # of who has it off for a longer while
    finally:
        gc.enable()
