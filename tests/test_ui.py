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
