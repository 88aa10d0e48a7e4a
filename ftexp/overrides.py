"""The command line, read before Hydra composes it: unknown keys, unknown options, and the name of the run.

Hydra refuses an unknown key itself, but without the nearest right name, and `+key=value` slips past it.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar, NoReturn, cast

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, ValueType
from hydra.errors import HydraException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from yaml import YAMLError

from ftexp import config, defaults
from ftexp.errors import ConfigError

PACKAGE = Path(__file__).parent
OUTPUTS = Path("outputs")
ROOT = PACKAGE if (PACKAGE / "conf").is_dir() else PACKAGE.parent
CONF = ROOT / "conf"
SWEEPS = ROOT / "sweeps"
BASE: dict[str, Any] = {"version_base": "1.3"} if hydra.__version__.startswith("1.3.") else {}
"""Keywords for Hydra's entry points; 1.4 has one behaviour and warns of `version_base`."""
OPEN = ("lora.extra.", "trainer.extra.", "data.columns.")
"""Keys that exist only once given, so `++` is put before them."""
UNSET = ("experiment=null", "sweep=null")
"""What is so anyway, and what Hydra does not take."""
TEXTS = ("data.prompt", "data.completion", "eval.labels")
"""Keys whose values are format strings, or signs that mean something to Hydra."""
SWEEP_KEYS = (
    "sampler", "sampler_args", "n_trials", "pruner", "pruner_args", "seed", "replicates", "baselines", "params",
    "at_most", "plan_at_most", "over", "tokens_per_second", "usd_per_hour", "workers", "pack", "engine",
    "engine_args", "gpus_per_trial", "slots_per_gpu", "storage", "proxy", "join", "max_failures", "max_retries",
    "timeout_minutes",
)  # fmt: skip
"""Keys of `hydra.sweeper`, documented in `ftexp/sweep/options.py`; short `sweep.<key>`."""
KEPT_KEYS = ("sampler", "sampler_args", "seed", "replicates", "baselines", "params", "storage")
"""Those of them that stay as they are at the first launch of a sweep; the others may change from launch to launch."""
SILENT = ("hydra.", "hydra/", "track", "trainer.checkpoint_minutes=",
          *(f"sweep.{key}{sign}" for key in SWEEP_KEYS if key not in KEPT_KEYS for sign in "=."))  # fmt: skip
"""Begin overrides that are no part of a default name: a run or sweep goes on whatever they are."""
SILENT_BEFORE = ("hydra.", "hydra/", "track", *(f"sweep.{key}{sign}" for key in (
    "workers", "pack", "engine", "engine_args", "gpus_per_trial", "slots_per_gpu", "proxy", "join", "max_failures",
    "max_retries", "n_trials") for sign in "=."))  # fmt: skip
"""The same of an ftexp of before 2026-12."""
OPEN_SWEEP = tuple(
    f"hydra.sweeper.{key}." for key in ("sampler_args", "pruner_args", "engine_args", "at_most", "plan_at_most")
)


FOREIGN = ("config_path", "config_name", "experimental_rerun")
"""Flags of Hydra that put another config in the place of ours, or read a pickle."""
HYDRA = ("hydra.run.dir", "hydra.sweep.dir", "hydra.verbose")
"""Settings of Hydra that may be overridden; callbacks, logging and launchers of Hydra can name code to run."""


REPLACED = {"n_jobs": "sweep.workers", "direction": "objectives, whose directions are known", "study_name": "name",
            "sampler.seed": "sweep.seed"}  # fmt: skip
"""Keys below `hydra.sweeper` of Hydra's Optuna sweeper, and ours."""


class Own(SearchPathPlugin):
    """The folder of `--config-dir`, where Hydra looks for options after our own."""

    folder: ClassVar[Path | None] = None
    """None where the command line names none."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Add the folder; `hydra.main` reads the flag itself, and to look twice changes nothing."""
        if self.folder is not None:
            search_path.append("ftexp", f"file://{self.folder}")


def choose(folder: str | None) -> None:
    """Take the options of a folder of the user's own beside ours, from here on in this process.

    Args:
        folder: with a folder for each group, as `experiment/mine.yaml`, and one for sweeps, as `sweeps/mine.yaml`;
            None for ours alone.

    Raises:
        ConfigError: the folder is not there or has no options, or one that Hydra would not read or that is ours.
    """
    Own.folder = None
    if folder is None:
        return
    place, ours = Path(folder).resolve(), {("sweeps" if g == "sweep" else g): f[0] for g, f in _folders().items()}
    if not place.is_dir():
        raise ConfigError(f"--config-dir {folder}: there is no such folder")
    if (place / "config.yaml").exists():
        raise ConfigError(f"{place / 'config.yaml'} is not read: defaults are ftexp's; write experiment/<name>.yaml")
    files = []
    for inside in sorted(p for p in place.iterdir() if p.is_dir()):
        if inside.name in ours:
            files += sorted(p for p in inside.rglob("*") if p.suffix in (".yaml", ".yml"))
        elif any(inside.glob("*.yaml")) and (near := difflib.get_close_matches(inside.name, ours, n=1, cutoff=0.75)):
            raise ConfigError(f"{inside}: there is no group of this name; did you mean {near[0]}/?")
    for path in files:
        if path.suffix == ".yml":
            raise ConfigError(f"{path}: must end in .yaml, as Hydra reads no other file")
        try:
            path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path}: must be text in UTF-8, byte {error.start} is not") from error
        group, *rest = path.relative_to(place).parts
        if not ours[group].joinpath(*rest[:-1]).is_dir():
            raise ConfigError(f"{path}: an option must lie in {group}/ itself, not in a folder below it")
        if (there := ours[group].joinpath(*rest)).exists():
            raise ConfigError(f"{path}: ftexp has an option of this name, {there}; give yours another")
    if not files:
        raise ConfigError(
            f"--config-dir {folder}: no option is in it; folders it may have are {', '.join(sorted(ours))}"
        )
    Own.folder = place
    for path in files:
        if path.parent.name == "sweeps":
            config.store_sweep(path)


def prepare(argv: list[str], several: str = "add -m for a sweep over them") -> list[str]:
    """Check the overrides of a command line and put its flags in front, where Hydra 1.3 wants them.

    Options of `--config-dir` are known from here on. A `name=` is added where none is given: the other overrides in
    letters a folder may have, so that the same command finds its folder again. `several` is the advice for a key that
    has several values where no sweep is asked for.

    Returns:
        The arguments for Hydra: flags, then overrides.

    Raises:
        ConfigError: an override does not parse, or names a key or option that does not exist; or a flag is wrong.
    """
    args = _parsed(argv)
    _check_flags(args)
    if args.help or args.hydra_help or args.shell_completion or args.info is not None:
        return argv
    for flag in FOREIGN:
        if getattr(args, flag, None):
            raise ConfigError(
                f"--{flag.replace('_', '-')} is not taken: configs are closed and checked; a file of values of yours "
                "goes into the folder of its group, as mine/experiment/my.yaml, and is found by --config-dir mine"
            )
    if sum(text in ("--config-dir", "-cd") or text.startswith(("--config-dir=", "-cd=")) for text in argv) > 1:
        raise ConfigError("--config-dir takes one folder, got several")
    choose(args.config_dir)
    check(args.overrides)
    overrides = [_spelled_out(text) for text in args.overrides if text not in UNSET]
    if not any(text.lstrip("+").startswith("name=") for text in overrides):
        overrides.append(f"name={_known(args.overrides)}")
    flags = list(argv)
    for text in args.overrides:
        flags.remove(text)
    searches = any(text.lstrip("+").startswith(("sweep=", "hydra.sweeper.")) for text in overrides)
    if searches and not (args.multirun or args.cfg):
        flags.append("-m")
    elif not args.multirun and (swept := next((text for text in overrides if is_sweep(text)), None)) is not None:
        advice = f"--cfg {args.cfg} shows the config of one run, give one" if args.cfg else several
        key, _, value = swept.partition("=")
        if config.is_list(key) and re.fullmatch(r"[^\[(]+", value):
            advice += f", or write {key}=[{value}] for a list"
        raise ConfigError(f"{swept} has several values: {advice}")
    return flags + overrides


def _parsed(argv: list[str]) -> argparse.Namespace:
    """Read a command line as Hydra does, which tells a wrong flag in lines of usage.

    Raises:
        ConfigError: there is no such flag, or it has not this value.
    """
    parser = get_args_parser()
    setattr(parser, "error", _refused)  # noqa: B010
    return parser.parse_intermixed_args(argv)


def _refused(message: str) -> NoReturn:
    """Raise what `argparse` says of a flag as an error of ours."""
    if told := re.fullmatch(r"argument (-[\w-]+)\S*: invalid choice: (.+) \(choose from (.+)\)", message):
        raise ConfigError(f"{told[1]} must be one of {told[3].replace(chr(39), '')}, got {told[2]}")
    if told := re.fullmatch(r"unrecognized arguments: (\S+).*", message):
        raise ConfigError(f"unknown option {told[1]}; --help tells those there are")
    raise ConfigError(message.removeprefix("argument "))


def _check_flags(args: argparse.Namespace) -> None:
    """Refuse flags of Hydra that ask for two things at once."""
    if args.help or args.hydra_help:
        return
    asked = {
        "--run": args.run, "--multirun": args.multirun, "--cfg": args.cfg, "--info": args.info,
        "--shell-completion": args.shell_completion,
    }  # fmt: skip
    flags = [flag for flag, value in asked.items() if value]
    if len(flags) > 1:
        raise ConfigError(f"{' and '.join(flags)} must not be given together: each asks for another thing")
    if args.resolve and not args.cfg:
        raise ConfigError("--resolve needs --cfg: it tells what a config that is shown refers to")


def is_sweep(text: str) -> bool:
    """Tell whether an override has several values."""
    return OverridesParser.create().parse_override(text).is_sweep_override()


def _spelled_out(text: str) -> str:
    """Write the short forms of overrides as Hydra takes them."""
    text = _quoted(text)
    if text.startswith("sweep."):
        text = f"hydra.sweeper.{text.removeprefix('sweep.')}"
    if text.lstrip("+").startswith((*OPEN, *OPEN_SWEEP, *(f"{key[:-1]}=" for key in (*OPEN, *OPEN_SWEEP)))):
        return f"++{text.lstrip('+')}"
    return text


def _quoted(text: str) -> str:
    """Put quotes around a format string, whose braces Hydra would read as a mapping.

    >>> _quoted("data.prompt=About {topic}:")
    'data.prompt="About {topic}:"'
    """
    key, _, value = text.partition("=")
    if key not in TEXTS or value[:1] in ("'", '"', "") or value == "null":
        return text
    escaped = value.replace('"', '\\"')
    return f'{key}="{escaped}"'


def given(argv: list[str]) -> list[str]:
    """Return the overrides of a command line, without its flags and their values."""
    return list(_parsed(argv).overrides)


def asks_help(argv: list[str]) -> bool:
    """Tell whether the command line asks what it may hold."""
    return bool(_parsed(argv).help)


def runs(argv: list[str]) -> str | None:
    """Tell what the command line asks for: `single`, `sweep`, or None where nothing is to run (`--help`, `--cfg`)."""
    args = _parsed(argv)
    if args.help or args.hydra_help or args.shell_completion or args.info is not None or args.cfg:
        return None
    return "sweep" if args.multirun else "single"


def slug(overrides: list[str]) -> str:
    """Name a run after its overrides, in letters that are safe in a path and in an override.

    >>> slug(["lora.r=8,16,64"])
    'lora.r-8-16-64'
    >>> slug(["trainer.lr=1e-3", "data.prompt='{a} {b}'"])
    'trainer.lr-1e-3-data.prompt-a-b-38b70a89'
    >>> slug([])
    'default'
    """
    return _letters([text for text in overrides if not text.startswith(SILENT)])


def _letters(told: list[str]) -> str:
    name = re.sub(r"[^A-Za-z0-9._]+", "-", "-".join(told)).strip("-._")
    if name != "-".join(told).strip("-._").replace("=", "-").replace(",", "-") or len(name) > 64:
        # letters were lost: two different commands must not share a folder
        name = f"{name[:55].rstrip('-._')}-{hashlib.sha256(repr(told).encode()).hexdigest()[:8]}".lstrip("-")
    return name if told else "default"


def _known(overrides: list[str]) -> str:
    """Name a run after its overrides, or as it is named that an ftexp of before 2026-12 began, with more of them."""
    name = slug(overrides)
    before = _letters([text for text in overrides if not text.startswith(SILENT_BEFORE)])
    there = [text for text in (name, before) if any((OUTPUTS / kind / text).exists() for kind in ("sweeps", "runs"))]
    return (there or [name])[0]


def groups() -> dict[str, list[str]]:
    """List the options of every group: ours, and those of `--config-dir`."""
    return {name: sorted(f.stem for p in places for f in p.glob("*.yaml")) for name, places in _folders().items()}


def _folders() -> dict[str, list[Path]]:
    """List where each group has its options; files of sweeps have a place of their own, as they are of all groups."""
    found = {p.name: [p] for p in CONF.iterdir() if p.is_dir()} | {"sweep": [SWEEPS]}
    if Own.folder is not None:
        for name, places in found.items():
            places += [p for p in (Own.folder / ("sweeps" if name == "sweep" else name),) if p.is_dir()]
    return found


def check(overrides: list[str]) -> None:
    """Refuse overrides of keys or group options that do not exist, naming the nearest one that does."""
    parser = OverridesParser.create()
    overrides = [_quoted(text) for text in overrides]
    _check_scale(overrides)
    _check_idle(overrides)
    known, options = set(config.keys()) | {f"sweep.{key}" for key in SWEEP_KEYS}, groups()
    for text in overrides:
        name, _, value = text.lstrip("+~").partition("=")
        config.refuse_secret(name, value)
        if name.startswith(OPEN) and config.SECRET.search(name):
            raise ConfigError(f"{name} must not be set: {config.INSTEAD}")
        try:
            override = parser.parse_override(text)
        except HydraException as error:
            if text.lstrip("+").startswith("sweep.at_most."):
                name = name.removeprefix("sweep.at_most.")
                raise ConfigError(
                    f"{text}: write 'sweep.at_most={{{name}: {value}}}', names of metrics have a slash"
                ) from error
            raise ConfigError(f"{text}: not a Hydra override ({str(error).splitlines()[0]})") from error
        key = override.key_or_group.split("@")[0]
        if key in ("hydra/sweeper", "hydra/launcher"):
            raise ConfigError(f"{text}: ftexp brings its own sweeper and workers; see sweep.workers and sweep.sampler")
        if key == "sweep" and override.is_sweep_override():
            raise ConfigError(f"{text}: a launch takes one sweep; start each of them by its own command")
        if override.value_type is ValueType.GLOB_CHOICE_SWEEP:
            raise ConfigError(f"{text}: write the options out, separated by commas{_options(key, options)}")
        if key.startswith(("hydra.", "hydra/")):
            _check_hydra(key, text)
            continue
        if override.is_delete():
            raise ConfigError(f"{text}: keys cannot be deleted, every key of the schema has a value")
        if key in options and not _is_mapping(override):
            _check_options(key, override, options[key])
            _check_sweepers(key, override)
            if text.startswith("+"):
                raise ConfigError(f"{text}: {key} exists already, write {text.lstrip('+')}")
        elif key not in known and not _spelled_out(key).startswith("++"):
            raise ConfigError(f"unknown key {key} in {text}{hint(key, known | set(options))}")
        elif override.is_add() and key in known and f"{key}." not in OPEN:
            raise ConfigError(f"{text}: {key} exists already, write {text.lstrip('+')}")


def _options(key: str, options: dict[str, list[str]]) -> str:
    return f": {key}={','.join(options[key])}" if key in options else ""


def _check_hydra(key: str, text: str) -> None:
    """Refuse settings of Hydra that run code, change folders under way, or write the environment to disk."""
    own = tuple(f"hydra.sweeper.{name}" for name in SWEEP_KEYS)
    if key.startswith("hydra.sweeper.params."):
        searched = text.lstrip("+").removeprefix("hydra.sweeper.params.")
        raise ConfigError(f"{text}: write {searched} -m, or a file in sweeps/")
    if (name := REPLACED.get(key.removeprefix("hydra.sweeper."))) is not None:
        raise ConfigError(f"{text}: ftexp brings its own sweeper and calls it {name}")
    if key not in HYDRA and not key.startswith(own):
        raise ConfigError(f"{text}: of Hydra's own settings only {', '.join(HYDRA)} may be set")


def _check_scale(overrides: list[str]) -> None:
    """Refuse an option that a file of `conf/scale/` would override without a word."""
    given = {key: value for key, _, value in (text.partition("=") for text in overrides)}
    if given.get("scale", "none") != "none" and "data" in given:
        raise ConfigError(
            f"data={given['data']} cannot be chosen with scale={given['scale']}, which brings rows of its own; "
            "keys such as data.rows can"
        )


def _check_idle(overrides: list[str]) -> None:
    """Refuse a key that another override of the same command leaves without effect: one of them is a mistake.

    What files bring is not looked at, since it is there for other choices too.
    """
    given = {key: value for key, _, value in (text.lstrip("+").partition("=") for text in overrides)}
    rules = (  # of which keys, but which, and what is given then
        ("lora.", ("lora.variant", "lora.train"), given.get("lora.variant", given.get("lora")) == "none",
         "lora=none: there is no adapter"),
        ("track.", ("track.kind",), given.get("track.kind", given.get("track")) == "none",
         "track=none: runs are not tracked"),
        ("trainer.epochs", (), re.fullmatch(r"[\d,]+", given.get("trainer.steps", "")) is not None,
         f"trainer.steps={given.get('trainer.steps')}, which decides how long is trained"),
    )  # fmt: skip
    for key, value in given.items():
        for start, free, holds, why in rules:
            if holds and key.startswith(start) and key not in free:
                raise ConfigError(f"{key} must be left out with {why}, got {value}")


def check_effect(overrides: list[str], runs: Sequence[config.Run]) -> None:
    """Refuse a key with one value that has no effect on any of the runs, as files of groups may leave it without.

    Raises:
        ConfigError: names the key, what leaves it without effect, and the way out.
    """
    for override in OverridesParser.create().parse_overrides(overrides):
        if override.is_sweep_override():
            continue
        key = override.key_or_group
        given: dict[str, Any] = {key: override.get_value_element_as_str()}
        if f"{key}." == config.COLUMN and _is_mapping(override):
            given = {f"{config.COLUMN}{ours}": theirs for ours, theirs in cast(dict, override.value()).items()}
        for one, value in given.items():
            if all(why := config.idle(run, one) for run in runs):
                raise ConfigError(f"{one} would change nothing, got {value}: {why}")


def _is_mapping(override: Override) -> bool:
    return isinstance(override.value(), dict)


def _check_options(group: str, override: Override, options: list[str]) -> None:
    chosen = [str(v) for v in override.sweep_string_iterator()] if override.is_sweep_override() else [override.value()]
    for name in chosen:
        names = name if isinstance(name, list) else [name]
        for one in names:
            if one in (None, "null") and group in ("experiment", "sweep"):
                continue
            if str(one) not in options:
                raise ConfigError(_no_option(group, one, options))
            _check_own(group, str(one))
        if isinstance(name, list):  # Hydra would merge them into one
            each = f"{group}={','.join(map(str, names))}"
            way = "start each by its own command" if group == "sweep" else f"write {each} -m for a run of each"
            raise ConfigError(f"{group} takes one option, got [{','.join(map(str, names))}]: {way}")


def _check_own(group: str, name: str) -> None:
    """Check what an option of the user's own builds on; ours are as they should be."""
    folders = _folders()
    for place in folders[group] if Own.folder is not None else ():
        if place.is_relative_to(Own.folder or place) and (path := place / f"{name}.yaml").exists():
            defaults.check(path, group, folders)


def _check_sweepers(group: str, override: Override) -> None:
    """Refuse to search a group of which a file says how to sweep: Hydra reads that of a file that has been chosen."""
    if not override.is_sweep_override() or group == "sweep":
        return
    for name in override.sweep_string_iterator():
        for place in _folders()[group]:
            if (path := place / f"{name}.yaml").exists() and (keys := config.sweeper(path)):
                raise ConfigError(
                    f"{override.input_line}: {path} sets hydra.sweeper ({', '.join(keys)}), which is of a whole launch "
                    f"and would not be read; start each by its own command, {group}={name} -m"
                )


CALLED = {
    "model.name": "model.path", "model.id": "model.path", "model_name": "model.path", "model_id": "model.path",
    "model_name_or_path": "model.path", "base_model": "model.path", "dataset": "data.path",
    "dataset_name": "data.path", "train_file": "data.path", "batch_size": "trainer.batch",
    "train_batch_size": "trainer.batch", "micro_batch_size": "trainer.batch", "eval_batch_size": "eval.batch",
    "num_epochs": "trainer.epochs", "lr_scheduler": "trainer.scheduler", "lora_rank": "lora.r",
    "lora_target": "lora.targets", "lora_target_modules": "lora.targets", "sequence_len": "data.max_length",
    "cutoff_len": "data.max_length", "precision": "model.dtype",
}  # fmt: skip
"""Names in scripts and other tools, and what they are here; those of peft, transformers and TRL are in `config`."""


ADVICE = {
    "save_steps": "ftexp calls it trainer.checkpoint_minutes, which counts minutes",
    "resume_from_checkpoint": "the same command again goes on from the last checkpoint",
    "load_best_model_at_end": "the weights of the last step are kept; trainer.steps says which step that is",
    "push_to_hub": "ftexp export RUN --push OWNER/NAME uploads what a run learned",
    "auto_find_batch_size": "a batch is halved by itself where memory runs out, and the effective batch stays",
    "gradient_checkpointing_kwargs": "ftexp takes it as trainer.extra.gradient_checkpointing_kwargs",
    "lora.bias": "ftexp trains no biases, which are of the base that a run is compared with",
    "eval.do_sample": "completions are scored greedily; ftexp generate --temperature draws them",
    "eval.temperature": "completions are scored greedily; ftexp generate --temperature draws them",
}
"""Names in other tools, of a group where a dot says so, that no key of ours stands for alone, and what does instead."""


def hint(key: str, known: set[str]) -> str:
    """Name the keys that were most likely meant: by what other tools call them, by their last part, then by spelling.

    What is far from all of them has no hint: a wrong one is worse than none.
    """
    group, _, leaf = key.rpartition(".")
    names = CALLED | config.RETIRED
    if key in ADVICE or leaf in ADVICE:
        return f"; {ADVICE.get(key) or ADVICE[leaf]}"
    if key in names or leaf in names:
        return f"; ftexp calls it {names.get(key) or names[leaf]}"
    same = sorted(name for name in known if name.rsplit(".", 1)[-1] == leaf and not name.startswith("hydra."))
    if 1 <= len(same) <= 3:
        return f"; did you mean {' or '.join(same)}?"
    if same or leaf.startswith("_"):  # of every group, such as kind; or a word of Hydra's, such as _target_
        return ""
    if misspelt := difflib.get_close_matches(leaf, names, n=1, cutoff=0.9):
        return f"; did you mean {names[misspelt[0]]}?"
    leaves = {name.rsplit(".", 1)[-1]: name for name in sorted(known)}
    inside = {name.removeprefix(f"{group}."): name for name in known if group and name.startswith(f"{group}.")}
    for text, among, cutoff in ((leaf, inside, 0.6), (key, {name: name for name in known}, 0.85), (leaf, leaves, 0.75)):
        if near := difflib.get_close_matches(text, among, n=1, cutoff=cutoff):
            return f"; did you mean {among[near[0]]}?"
    return ""


def check_composed(hydra: Any) -> None:
    """Refuse what a file of `conf/` or `sweeps/` makes Hydra run or write beside our sweeper.

    Args:
        hydra: Hydra's own part of a composed config, as plain dicts.

    Raises:
        ConfigError: names the key.
    """
    allowed = {
        "sweeper": "ftexp.sweep.plugin.Sweeper",
        "launcher": "hydra._internal.core_plugins.basic_launcher.BasicLauncher",
    }
    for path, value in _walk(hydra, []):
        ours = (
            len(path) == 2
            and path[1] == "_target_"
            and str(value).removeprefix("hydra_plugins.") == allowed.get(path[0])
        )
        if path[-1] in ("_target_", "()", "_args_", "_partial_") and not ours:
            raise ConfigError(f"hydra.{'.'.join(path)} must not be set: configs run no code, got {value!r}")
        if path[:2] in (["job", "env_set"], ["job", "env_copy"]):
            raise ConfigError(f"hydra.{'.'.join(path)} must not be set: Hydra would write the environment to disk")


def _walk(node: Any, path: list[str]) -> Iterator[tuple[list[str], Any]]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _walk(value, [*path, str(key)])
    elif isinstance(node, list):
        for number, value in enumerate(node):
            yield from _walk(value, [*path, str(number)])
    else:
        yield path, node


def told(error: Exception) -> str:
    """Tell a library's error in one line: Hydra says which override or file, the error that caused it says why."""
    if isinstance(error, YAMLError):
        return config.unreadable(error)
    texts = [str(e).strip() for e in (error, error.__cause__) if e is not None and str(e).strip()]
    whole, lines = "\n".join(texts), [re.sub(r"\+*hydra\.sweeper\.", "sweep.", text.splitlines()[0]) for text in texts]
    if option := re.search(r"Could not find '(\w+)/([^']+)'", whole):
        return _no_option(option[1], option[2], groups().get(option[1], []))
    key = re.search(r"full_key: (\S+)", whole)
    if lost := re.search(r"In '((experiment|scale)/[^']+)': Could not override '[\w/]+@\2\.", whole):
        return f"{_file(*lost[1].split('/', 1))}: {_unknown(lost[2])}"
    if blind := re.match(r"In '(\w+)/([^']+)': (Could not .+)", lines[0]):
        lines[0] = f"{_file(blind[1], blind[2])}: {blind[3]}"
    if inside := re.match(r"In '(\w+)/([^']+)': \w+ raised while composing config:\n(.+)", whole):
        lines = [str(_file(inside[1], inside[2])), *([key[1]] if key else []), inside[3]]
    if "is not a ListConfig" in whole:
        typed = re.search(r"override \+*(\S+?)=(.+)", lines[0])
        lines[-1] = f"a list is wanted, such as [{typed[2]}] for {typed[1]}" if typed else "a list is wanted, in [ ]"
    if unknown := re.search(r"Key '.+' not in '.+'\n\s+full_key: (\S+)", whole):
        lines = [lines[0].rstrip(":."), _unknown(unknown[1])]
    if plain := re.search(r"Merge error: \w+ is not a subclass of (\w+)\. value: (.*)", whole):
        names = [f.name for f in fields(config.Run) if getattr(f.default_factory, "__name__", "") == plain[1]]
        lines = [lines[0].removesuffix(":"), *names, f"must hold keys and their values, got {plain[2]}"]
    return ": ".join(dict.fromkeys(lines))


def _file(group: str, name: str) -> Path:
    """Return the file of an option, as far as it is there."""
    files = [place / f"{name}.yaml" for place in _folders().get(group, [])]
    return next((file for file in files if file.exists()), Path(group) / f"{name}.yaml")


def _no_option(group: str, name: Any, options: list[str]) -> str:
    """Say that a group has no such option, and which it has."""
    plain = group == "lora" and name == "lora"  # the variant of the option `default`
    near = ["default"] if plain else difflib.get_close_matches(str(name), options, n=1, cutoff=0.5)
    hint = f"; did you mean {group}={near[0]}?" if near else ""
    return f"{group} must be one of {', '.join(options)}, got {name!r}{hint}"


def _unknown(key: str) -> str:
    """Say that a file has a key that the config has not, and what was most likely meant."""
    if key in ("experiment", "scale", "global", "_global"):
        return f"unknown key {key}, for its file does not begin with the line # @package _global_"
    if key in set(config.keys()):
        first, _, rest = key.partition(".")
        return (
            f"{key} must be written as {first}: {{{rest}: ...}} in a file; in one of sweeps/ several values of a key "
            f"go below hydra: sweeper: params:"
        )
    return f"unknown key {key}{hint(key, {*config.keys(), *groups(), *(f'hydra.sweeper.{one}' for one in SWEEP_KEYS)})}"
