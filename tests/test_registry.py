"""MLflow's model registry, in a real local store: what a version holds, and every refusal."""

from pathlib import Path

import pytest

from ftexp import registry, track
from ftexp.config import Track
from ftexp.errors import ConfigError, MachineError


@pytest.fixture
def store(tmp_path):
    return Track(uri=f"sqlite:///{tmp_path}/ml.db", experiment="t")


@pytest.fixture
def tracked(tiny, store, tmp_path):
    """MLflow id of a run with an adapter."""
    run = tiny()
    run.track = store
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"weights")
    with track.start(run, tmp_path / "run", "x", None) as log:
        log.files(tmp_path / "adapter", "adapter")
    return log.run_id


def test_version_holds_adapter_run_and_tags(store, tracked, tmp_path):
    made = registry.register(store, tracked, "yoda", {"ftexp.sweep": "s", "ftexp.test/loss": "0.5"}, "about it")
    assert (made.name, made.version, made.fresh) == ("yoda", "1", True)
    client, _ = track.store(store)
    kept = client.get_model_version("yoda", "1")
    assert (kept.run_id, kept.description, kept.status) == (tracked, "about it", "READY")
    assert kept.tags == {"ftexp.sweep": "s", "ftexp.test/loss": "0.5"}
    import mlflow

    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(store.uri)
    try:
        got = mlflow.artifacts.download_artifacts("models:/yoda/1", dst_path=str(tmp_path / "got"))
    finally:
        mlflow.set_tracking_uri(before)
    assert (tmp_path / "got" / "adapter_config.json").exists(), got


def test_same_again_makes_no_second_version(store, tracked):
    first = registry.register(store, tracked, "yoda", {"a": "1"}, "")
    again = registry.register(store, tracked, "yoda", {"a": "1"}, "")
    assert (again.version, again.fresh) == (first.version, False)
    other = registry.register(store, tracked, "yoda", {"a": "2"}, "")  # another score: the rows were opened again
    assert (other.version, other.fresh) == ("2", True)


def test_what_is_not_in_the_store_is_refused(store, tracked, tiny, tmp_path):
    with pytest.raises(MachineError, match="--register yoda: MLflow at sqlite:.* refused: "):
        registry.register(store, "0" * 32, "yoda", {}, "")
    run = tiny()
    run.track = store
    with track.start(run, tmp_path / "bare", "x", None) as log:
        pass
    with pytest.raises(MachineError, match=f"holds no adapter of run {log.run_id}; bring it with"):
        registry.register(store, log.run_id, "yoda", {}, "")
    assert not track.store(store)[0].search_registered_models()  # nothing half made


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_adapter_that_came_by_half_is_refused(store, tracked, name):
    from urllib.parse import urlparse

    client, _ = track.store(store)
    (Path(urlparse(client.get_run(tracked).info.artifact_uri).path) / "adapter" / name).unlink()
    with pytest.raises(MachineError, match=f"holds no adapter of run {tracked}; bring it with"):
        registry.register(store, tracked, "yoda", {}, "")
    assert not client.search_registered_models()


@pytest.mark.parametrize("name", ["", " ", "a/b", "a:b", "it's", "a\nb", "x" * 65])
def test_name_is_checked(name):
    with pytest.raises(ConfigError, match="--register must be 1 to 64 letters"):
        registry.check_name(name)
    registry.check_name("yoda-2.small_1")
