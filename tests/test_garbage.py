"""Garbage collection that waits."""

import gc
import subprocess
import sys

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


def test_nothing_is_looked_through_at_the_end_of_a_command_and_what_is_registered_is_done():
    code = (
        "import atexit\nfrom ftexp import verb\n"
        "class Left:\n    def __init__(self): self.itself = self\n    def __del__(self): print('looked through')\n"
        "atexit.register(print, 'at exit')\n"
        "{}\nleft = Left()\ndel left\n"
    )
    run = lambda how: subprocess.run([sys.executable, "-c", code.format(how)], capture_output=True, text=True).stdout  # noqa: E731
    assert run("verb.ended(lambda: 0)").split("\n")[0] == "at exit"
    assert "looked through" not in run("verb.ended(lambda: 0)")
    assert "looked through" in run("")
