"""A sweep of three points under a peer's sweeper or ours, with one mishap: what `test_peers` compares.

    python toy.py SWEEPER MISHAP FOLDER

SWEEPER is `basic` or `optuna` (Hydra's own) or `ftexp`; MISHAP is none, kill, fail, nan or edit. Each point that is
run leaves a line in FOLDER/ran.txt: its rank and the alpha it saw.
"""

import os
import sys
from pathlib import Path

sweeper, mishap, folder = "", "", Path()
POINTS = (2, 4, 8)


def trial(r, alpha, edit):
    """Run a point: note it, suffer the mishap at the second one."""
    with (folder / "ran.txt").open("a") as out:
        out.write(f"{r} {alpha}\n")
    if r == POINTS[1]:
        if mishap == "kill" and not (folder / "killed").exists():
            (folder / "killed").touch()
            os.kill(os.getpid(), 9)
        if mishap == "fail":
            raise RuntimeError("a bug in one trial")
        if mishap == "nan":
            return float("nan")
        if mishap == "edit":
            edit()
    return 1.0 / r


def peer():
    """Run the toy under a sweeper of Hydra."""
    import hydra

    conf = folder / "conf"
    conf.mkdir(exist_ok=True)
    if not (conf / "config.yaml").exists():
        (conf / "config.yaml").write_text("r: 1\nalpha: 16\n")
    given = [f"r={','.join(map(str, POINTS))}", f"hydra.sweep.dir={folder}/sweep"]
    if sweeper == "optuna":
        given += ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", f"hydra.sweeper.storage=sqlite:///{folder}/o.db",
                  "hydra.sweeper.study_name=toy", "hydra/sweeper/sampler=grid", "hydra.sweeper.n_jobs=1"]  # fmt: skip
    sys.argv[1:] = ["-m", *given]
    base = {"version_base": "1.3"} if hydra.__version__.startswith("1.3.") else {}

    def edit():
        (conf / "config.yaml").write_text("r: 1\nalpha: 999\n")

    hydra.main(**base, config_path=str(conf), config_name="config")(lambda cfg: trial(cfg.r, cfg.alpha, edit))()


def ours():
    """Run the toy under ftexp, with the training replaced by the same function."""
    import shutil

    from ftexp import experiment, overrides, run
    from ftexp.errors import Diverged

    conf = folder / "conf"
    if not conf.exists():
        shutil.copytree(overrides.CONF, conf)
        (conf / "lora" / "default.yaml").write_text("alpha: 16\n")
    overrides.CONF = conf

    def edit():
        (conf / "lora" / "default.yaml").write_text("alpha: 999\n")

    def toy(made, at, *_):
        yield from ()  # as `_execute`, which hands trials of the packed engine out to be trained
        value = trial(made.lora.r, made.lora.alpha, edit)
        if value != value:
            raise Diverged("diverged at step 1: train/loss is nan")
        (at / "adapter").mkdir()  # what a complete trial leaves; without it the trial runs again
        for name in ("adapter/adapter_model.safetensors", "examples.parquet"):
            (at / name).touch()
        return {
            "valid/loss": value,
            "base/loss": 9.0,
            "cost/trainable": 1.0,
            "cost/seconds": 1.0,
            "cost/memory_gib": 1.0,
        }

    experiment._execute = toy
    os.chdir(folder)
    sys.argv[1:] = [f"lora.r={','.join(map(str, POINTS))}", "model=tiny", "data.rows=40", "data.valid=8",
                    "data.max_length=256", "eval=loss",
                    "track=none", "name=toy", "-m"]  # fmt: skip
    sys.exit(run.main())


if __name__ == "__main__":
    sweeper, mishap, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    ours() if sweeper == "ftexp" else peer()
