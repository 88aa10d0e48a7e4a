import socket
import sys

import pytest

from ftexp import ui
from ftexp.errors import MachineError


def test_store_that_is_not_there_is_named(tmp_path):
    with pytest.raises(MachineError, match=r"no\.db: there are no runs to show yet"):
        ui.command(f"sqlite:///{tmp_path}/no.db", 5000)


def test_serves_on_this_machine_only(tmp_path):
    (tmp_path / "a.db").touch()
    serve = ui.command(f"sqlite:///{tmp_path}/a.db", 5001)
    assert serve[serve.index("--host") + 1] == "127.0.0.1"
    assert serve[serve.index("--port") + 1] == "5001"


def test_port_that_another_program_has_is_told_before_a_server_starts(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.db").touch()
    monkeypatch.setattr(ui.os, "execv", lambda *_: pytest.fail("a server was started"))
    with socket.socket() as other:
        other.bind((ui.HOST, 0))
        other.listen()
        port = other.getsockname()[1]
        monkeypatch.setattr(sys, "argv", ["ui", "--uri", f"sqlite:///{tmp_path}/a.db", "--port", str(port)])
        assert ui.main() == MachineError.exit_code
    out, err = capsys.readouterr()
    assert out == ""
    assert f"--port {port}: Address already in use; choose another, such as {port + 1}" in err
    ui.check_port(port)  # free now


@pytest.mark.parametrize("port", ["0", "65536", "-1"])
def test_port_that_does_not_exist_is_refused(tmp_path, monkeypatch, capsys, port):
    (tmp_path / "a.db").touch()
    monkeypatch.setattr(sys, "argv", ["ui", "--uri", f"sqlite:///{tmp_path}/a.db", "--port", port])
    assert ui.main() == 2
    assert f"--port must be from 1 to 65535, got {port}" in capsys.readouterr().err
