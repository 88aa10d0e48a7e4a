"""Signals: the first one ends training after its step, a second one or one outside training ends at once."""

import os
import signal

import pytest

from ftexp.errors import Preempted
from ftexp.train import control


def test_signal_outside_training_ends_what_runs():
    with control.listening():
        with pytest.raises(Preempted, match="SIGTERM"):
            os.kill(os.getpid(), signal.SIGTERM)
        assert control.LEAVE.is_set()


def test_first_signal_in_training_waits_for_the_step_and_the_second_does_not(capfd):
    with control.listening(), control.at_work():
        assert not control.LEAVE.is_set()
        os.kill(os.getpid(), signal.SIGINT)
        assert control.LEAVE.is_set()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert "leaving after the step under way" in capfd.readouterr().err


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGINT)
    with control.listening():
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before


def test_no_library_swallows_a_request_to_leave():
    assert not issubclass(Preempted, Exception)
