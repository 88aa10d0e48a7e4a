"""`python -m ftexp.run`: a single run, or a sweep with `-m`."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from ftexp import config, experiment, overrides, report, verb
from ftexp.errors import ConfigError, FtexpError, MachineError
from ftexp.files import check_folder
from ftexp.progress import quiet_libraries, warn
from ftexp.sweep import plugin
from ftexp.train import control


def single(cfg: DictConfig) -> dict[str, float] | FtexpError:
    """Run what Hydra composed, in the folder Hydra made; an error of ours is returned, to be told in one line."""
    try:
        run, folder = config.build(cfg), Path(HydraConfig.get().runtime.output_dir)
        with plugin.only(folder, run.name):
            return experiment.execute(run, folder, run.name)
    except FtexpError as error:
        return error


def main() -> int:
    """Run the command line; return the exit code."""
    config.register()
    plugin.register()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # hands errors to us, to be told in one line
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    quiet_libraries()
    with control.listening():
        return verb.ended(_main)


def _main() -> int:
    try:
        return _launch()
    except config.COMPOSING as error:
        raise ConfigError(overrides.told(error)) from error


def _launch() -> int:
    """Hand the command line to Hydra, and show what came of it."""
    sys.argv[1:] = argv = overrides.prepare(sys.argv[1:])
    if overrides.asks_help(argv):
        print(usage())
        return 0
    wanted = overrides.runs(argv)
    composed = check_composed(argv) if wanted is not None else None
    if composed is not None and wanted == "single" and (searched := composed.hydra.sweeper.params):
        warn(f"hydra.sweeper.params holds {', '.join(searched)}, and this is one run; add -m for a sweep over them")
    folder = _check_single(composed, overrides.given(argv)) if composed is not None and wanted == "single" else Path()
    ran: list[Any] = []

    def task(cfg: DictConfig) -> Any:
        ran.append(single(cfg))
        return ran[-1]

    started: list[Path] = []
    plugin.Sweeper.started = started.append
    try:
        hydra.main(**overrides.BASE, config_path=str(overrides.CONF), config_name="config")(task)()
    except BaseException:
        if started:
            with suppress(OSError, MachineError):  # on a full disk the page is the least of it
                _show(started[0])
        raise
    if started:
        _show(started[0])
    if ran:
        if isinstance(ran[0], FtexpError):
            raise ran[0]
        _show(folder)
    return 0


def usage() -> str:
    """Return the text of `--help`: groups with their options, and the config as it comes.

    Hydra's own copies every config it knows for each group that it lists, which takes a second.
    """
    with hydra.initialize_config_dir(str(overrides.CONF), **overrides.BASE):
        cfg = hydra.compose("config")
    lines = [f"{group}: {', '.join(options)}" for group, options in sorted(overrides.groups().items())]
    return f"""usage: python -m ftexp.run [group=option ...] [key=value ...] [-m] [--cfg job]

  -m         a sweep over keys with several values: lora.r=8,16,64
  --cfg job  print the composed config; nothing runs
  --config-dir DIR  options of your own beside these: DIR/experiment/mine.yaml, DIR/sweeps/mine.yaml

groups and their options (group=option)
{chr(10).join(lines)}

keys and what they are without overrides (key=value)
{OmegaConf.to_yaml(cfg)}
keys of a sweep (sweep.key=value)
{", ".join(overrides.SWEEP_KEYS)}
"""


def check_composed(argv: list[str]) -> DictConfig:
    """Compose a run, or what all trials of a sweep share, and look at Hydra's own part before Hydra acts on it.

    Callbacks and the like can be any code.

    Returns:
        The config, Hydra's part included.
    """
    given = [text for text in overrides.given(argv) if not overrides.is_sweep(text)]
    with hydra.initialize_config_dir(str(overrides.CONF), **overrides.BASE):
        cfg = hydra.compose("config", given, return_hydra_config=True)
    overrides.check_composed(OmegaConf.to_container(cfg.hydra, resolve=False))
    return cfg


def _check_single(cfg: DictConfig, given: list[str]) -> Path:
    """Check a single run, composed from what was given, before Hydra writes its folder, and return it."""
    folder = Path(cfg.hydra.run.dir)
    with read_write(cfg), open_dict(cfg):
        del cfg["hydra"]
    run = config.build(cfg)
    overrides.check_effect(given, [run])
    check_folder(folder)
    experiment.check(run, folder)
    if experiment.complete(run, folder) is None:
        experiment.prepare(run)
    return folder


def _show(folder: Path) -> None:
    shown = Path(os.path.relpath(folder))
    report.show(shown)
    print(f"files: {shown}    again: python -m ftexp.report {shown}")


if __name__ == "__main__":
    sys.exit(main())
