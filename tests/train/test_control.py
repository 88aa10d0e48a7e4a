"""Signals: the first one ends training after its step, a second one or one outside training ends at once."""

import os
import signal
import sys

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


def test_a_closed_terminal_asks_to_leave_and_is_not_written_to(tmp_path):
    """It sends the signal twice, and whatever is written to it afterwards fails."""
    import pty

    code = (
        "import signal, time\nfrom ftexp.progress import say\nfrom ftexp.train import control\n"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"  # whoever runs the tests may do so under nohup
        "with control.listening(), control.at_work():\n"
        "    say('ready')\n"
        "    while not control.LEAVE.wait(0.1): pass\n"
        "    time.sleep(0.5)\n"
        "    say('told to nobody'), print('neither', flush=True)\n"
        f"open({str(tmp_path / 'kept')!r}, 'w').write('a checkpoint')\n"
    )
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "-c", code])
    seen = b""
    while b"ready" not in seen:
        seen += os.read(terminal, 1024)
    os.close(terminal)
    os.kill(pid, signal.SIGHUP)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert (tmp_path / "kept").read_text() == "a checkpoint"


def test_under_nohup_a_closed_terminal_is_not_heard():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with control.listening():
            os.kill(os.getpid(), signal.SIGHUP)
            assert not control.LEAVE.is_set()
    finally:
        signal.signal(signal.SIGHUP, before)
