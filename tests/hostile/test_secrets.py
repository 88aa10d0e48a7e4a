"""Twelve secrets, planted where people have them: none is in a byte that is written."""

import json
import subprocess
from pathlib import Path

import pytest
from conftest import TINY, UNWRITTEN

from ftexp import config

ENVIRONMENT = {
    "HF_TOKEN": "hf_" + "Canary1" * 5,
    "HUGGING_FACE_HUB_TOKEN": "hf_" + "Canary2" * 5,
    "MLFLOW_TRACKING_PASSWORD": "canary3-swordfish",
    "MLFLOW_TRACKING_TOKEN": "canary4-swordfish",
    "PGPASSWORD": "canary5-swordfish",
    "AWS_SECRET_ACCESS_KEY": "canary6-swordfish",
    "WANDB_API_KEY": "canary7-swordfish",
}
GIVEN = {  # an override that holds one; all are refused
    "track.uri=http://me:canary8-swordfish@127.0.0.1:9": "canary8",
    "sweep.storage=postgresql://me:canary9-swordfish@127.0.0.1/x": "canary9",
    "model.path=https://hub.example.org/m?token=canary10-swordfish": "canary10",
    "trainer.extra.hub_token=canary11-swordfish": "canary11",
}
REMOTE = "https://me:canary12-swordfish@git.example.org/x.git"


def written(folder):
    """All bytes below a folder, names included."""
    found = [str(p.relative_to(folder)).encode() for p in folder.rglob("*")]
    return b"\n".join([*found, *(p.read_bytes() for p in folder.rglob("*") if p.is_file())])


def test_no_secret_of_the_environment_or_the_checkout_is_written(cli, tmp_path, monkeypatch):
    from ftexp import facts

    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    code = tmp_path.parent / f"{tmp_path.name}-code"
    code.mkdir()
    for words in (["init", "-q"], ["remote", "add", "origin", REMOTE],
                  ["-c", "user.name=n", "-c", "user.email=e@example.org", "commit", "-q", "--allow-empty", "-m", "x"]):  # fmt: skip
        subprocess.run(["git", "-C", code, *words], check=True)
    real = facts.git
    monkeypatch.setattr(facts, "git", lambda _: real(code))
    given = [*UNWRITTEN, "lora.r=2,4", "eval=loss", "trainer.checkpoint_minutes=0", "name=k", "-m"]
    got, _, err = cli(*given)
    assert got == 0, err
    bytes_ = written(tmp_path)
    assert b"mlflow.db" in bytes_
    assert b"commit" in bytes_
    planted = [*ENVIRONMENT.values(), REMOTE, "canary12-swordfish"]
    assert not [secret for secret in planted if secret.encode() in bytes_]


@pytest.mark.parametrize("override", GIVEN)
def test_secret_on_the_command_line_is_refused_and_not_repeated(cli, tmp_path, override):
    more = ["model=hub"] if override.startswith("model") else []
    code, out, err = cli(*TINY[1:], *more, override, "lora.r=2,4", "-m")
    assert code == 2
    assert "swordfish" not in out + err
    assert "give secrets in the environment" in err
    assert not list(tmp_path.iterdir())


def test_sabotage_config_that_takes_a_password_writes_it(cli, tmp_path, monkeypatch):
    monkeypatch.setattr(config, "refuse_secret", lambda *_: None)
    cli(
        *UNWRITTEN,
        "eval=loss",
        "trainer.steps=1",
        "name=k",
        "track.experiment=x",
        "track.uri=http://me:canary8-swordfish@127.0.0.1:9",
    )
    assert b"canary8-swordfish" in written(tmp_path)


@pytest.mark.parametrize(
    "text", ["see https://example.org/a@b", "sqlite:///outputs/mlflow.db", "postgresql://host/name", "./my@folder", "org/model",
             "http://127.0.0.1:5000", "a prompt: {x}@{y}", json.dumps({"a": "b"}), str(Path("C:/x"))],
)  # fmt: skip
def test_ordinary_values_pass(text):
    config.refuse_secret("key", text)
