"""MLflow's model registry: a version for the adapter of a run, with what is known of it as tags.

Tracking may fail and a run goes on; who asks for a version is told when there is none.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ftexp import config, track
from ftexp.config import Track
from ftexp.errors import MachineError

ADAPTER = "adapter"
"""Where a run's adapter is among its artifacts."""


@dataclass(frozen=True)
class Version:
    """A version of a registered model."""

    name: str
    version: str
    fresh: bool
    """Whether it was made now; false where the run had one of this name with the same tags."""


def check_name(name: str) -> None:
    """Refuse a name that would need quotes in MLflow's addresses and searches.

    Raises:
        ConfigError: names the rule.
    """
    rule = "1 to 64 letters, digits or . _ -, beginning with a letter or digit"
    config.require(config.NAME.fullmatch(name) is not None, "--register", name, rule)


def register(where: Track, run_id: str, name: str, tags: Mapping[str, str], about: str) -> Version:
    """Make a version of a registered model from the adapter of a run, or return the one that says the same.

    Args:
        where: the tracking store; the registry is in it.
        run_id: MLflow id of the run.
        name: of the registered model, made where there is none.
        tags: of the version.
        about: description of the version.

    Raises:
        MachineError: the store cannot be opened or refuses, or does not hold run and adapter.
    """
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    client, _ = track.store(where)
    try:
        source = f"{client.get_run(run_id).info.artifact_uri}/{ADAPTER}"
        there = {Path(entry.path).name for entry in client.list_artifacts(run_id, ADAPTER)}
        if not {"adapter_model.safetensors", "adapter_config.json"} <= there:  # an upload may have broken off
            raise MachineError(
                f"track.uri={where.uri} holds no adapter of run {run_id}; bring it with: python -m ftexp.sync"
            )
        with suppress(MlflowException):  # there already; another fault shows in the next call
            client.create_registered_model(name)
        for known in client.search_model_versions(f"name='{name}'"):
            if known.run_id == run_id and tags.items() <= known.tags.items():
                return Version(name, str(known.version), False)
        made = client.create_model_version(name, source, run_id, dict(tags), description=about)
    except (MlflowException, SQLAlchemyError, OSError) as error:
        raise MachineError(
            f"--register {name}: MLflow at {where.uri} refused: {str(error).splitlines()[0][:300]}"
        ) from error
    return Version(name, str(made.version), True)
