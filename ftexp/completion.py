"""Tab completion of the `ftexp` command: `ftexp --completion bash` prints what a shell is to read at its start.

The shell asks `ftexp --complete WORD ...` for each tab, the last word being the one under the cursor. Nothing heavy is
imported, and a folder that cannot be read has no names.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import fields, is_dataclass
from enum import Enum
from itertools import pairwise
from pathlib import Path
from typing import Any, get_type_hints

from ftexp import config, overrides, power, runs
from ftexp.errors import ConfigError, MachineError
from ftexp.metrics import METRICS, SCORES

OPTIONS = {
    "run": ("--cfg", "--config-dir", "--help", "--multirun"),
    "doctor": ("--config-dir", "--help", "--json", "--multirun"),
    "plan": ("--budget-usd", "--config-dir", "--help", "--json", "--labels", "--memory-gib", "--multirun", "--probe",
             "--rows", "--tokens", "--tokens-per-second", "--usd-per-hour"),
    "show": ("--config-dir", "--help", "--json", "--png", "--rows", "--split"),
    "report": ("--by", "--format", "--help", "--html", "--json", "--no-html"),
    "confirm": ("--again", "--by", "--help", "--json", "--register", "--seeds"),
    "diff": ("--help", "--json"),
    "reproduce": ("--help", "--json", "--tolerance"),
    "generate": ("--file", "--help", "--json", "--max-new-tokens", "--no-base", "--samples", "--seed",
                 "--temperature", "--top-p"),
    "export": ("--dtype", "--form", "--help", "--json", "--public", "--push", "--to"),
    "sync": ("--help", "--json", "--uri"),
    "power": ("--from", "--help", "--json"),
    "notebooks": ("--help", "--json"),
    "ui": ("--help", "--port", "--uri"),
    "sweep": ("--help",),
    "sweep ls": ("--help", "--json"),
    "sweep show": ("--help", "--json", "--watch"),
    "sweep stop": ("--help", "--json"),
    "sweep resume": ("--help", "--json", "--workers"),
    "sweep export": ("--format", "--help", "--json"),
}  # fmt: skip
"""Verb -> its options; each verb's own `--help` is what they are checked against."""
CHOICES = {
    ("report", "--format"): ("csv", "json", "md"), ("sweep export", "--format"): ("csv", "json"),
    ("export", "--form"): ("adapter", "merged", "gguf", "merged4bit"),
    ("show", "--split"): ("train", "valid"), ("run", "--cfg"): ("job", "hydra", "all"),
}  # fmt: skip
"""Verb and option -> what may follow it."""
SCRIPTS = {
    "bash": """\
_ftexp() {
    local line="${COMP_LINE:0:COMP_POINT}" words word cut
    read -ra words <<< "$line"
    [[ "$line" == *[[:space:]] ]] && words+=("")
    word="${words[-1]}"
    mapfile -t COMPREPLY < <("${words[0]}" --complete "${words[@]:1}" 2>/dev/null)
    [[ ${#COMPREPLY[@]} == 1 && "${COMPREPLY[0]}" == *[=./] ]] && compopt -o nospace 2>/dev/null
    if [[ "$word" == *=* && "$COMP_WORDBREAKS" == *=* ]]; then  # the shell takes what follows "=" for a word
        cut="${word%"${word##*=}"}"
        COMPREPLY=("${COMPREPLY[@]#"$cut"}")
    fi
}
complete -F _ftexp ftexp
""",
    "zsh": """\
_ftexp() {
    local -a found
    found=("${(@f)$(${words[1]} --complete "${(@)words[2,CURRENT]}" 2>/dev/null)}")
    compadd -Q -S '' -- ${found:#}
}
compdef _ftexp ftexp
""",
    "fish": """\
function _ftexp
    set -l words (commandline -opc)
    $words[1] --complete $words[2..] (commandline -ct) 2>/dev/null
end
complete -c ftexp -f -a '(_ftexp)'
""",
}


def script(shell: str) -> str:
    """Return what a shell reads to complete `ftexp`.

    Raises:
        ConfigError: the shell is not one of these.
    """
    if shell not in SCRIPTS:
        raise ConfigError(f"--completion must be one of {', '.join(SCRIPTS)}, got {shell!r}")
    return SCRIPTS[shell]


def candidates(words: list[str]) -> list[str]:
    """List what the last word can become, given those before it; the command itself is left out.

    >>> candidates(["re"]), candidates(["run", "lora=r"]), candidates(["report", "--fo"])
    (['report', 'reproduce'], ['lora=rslora'], ['--format'])
    """
    *before, word = words or [""]
    if before[:1] == ["-q"]:
        before = before[1:]
    return sorted(name for name in _all(before, word) if name.startswith(word))


def _all(before: list[str], word: str) -> list[str]:
    if not before:
        return [*(verb for verb in OPTIONS if " " not in verb), "--completion", "--help", "-q"]
    if before == ["--completion"]:
        return list(SCRIPTS)
    verb = " ".join(before[:2]) if before[0] == "sweep" else before[0]
    if (verb, before[-1]) in CHOICES:
        return list(CHOICES[verb, before[-1]])
    own = [word.partition("=")[2] for word in before if word.startswith("--config-dir=")]
    own += [folder for flag, folder in pairwise(before) if flag == "--config-dir"]
    with suppress(ConfigError):
        overrides.choose(own[-1] if own else None)
    if word.startswith("-"):
        return list(OPTIONS.get(verb, ()))
    match verb:
        case "run" | "plan" | "doctor":
            return _overrides(word)
        case "show":
            return _overrides(word) if "data" in before else ["data"]
        case "sweep":
            return ["ls", "show", "stop", "resume", "export"]
        case "confirm" if before[-1] == "--by":
            return [f"valid/{name}" for name in SCORES]
        case "sweep show" | "sweep stop" | "sweep resume" | "sweep export" | "confirm":
            return [*_names("outputs/sweeps"), *_elsewhere()]
        case "report" if before[-1] == "--by":
            return [name for name, metric in METRICS.items() if not metric.sealed and not metric.afterwards]
        case "report" | "notebooks" | "sync":
            return [f"{folder}/{name}" for folder in ("outputs/sweeps", "outputs/runs") for name in _names(folder)]
        case "diff" | "reproduce" | "generate" | "export":
            return _runs()
        case "power" if before[-1] == "--from":
            return [f"outputs/sweeps/{name}" for name in _names("outputs/sweeps")]
        case "power":
            return [f"{key}=" for key in (*power.KEYS, "seeds")]
    return []


def _names(folder: str) -> list[str]:
    return [path.name for path in Path(folder).glob("*") if path.is_dir()]


def _elsewhere() -> list[str]:
    with suppress(MachineError):
        return [*runs.elsewhere().values()]
    return []


def _runs() -> list[str]:
    found = [*Path("outputs/runs").glob("*/trial.json"), *Path("outputs/sweeps").glob("*/*/trial.json")]
    return [path.parent.as_posix() for path in found]


def _overrides(word: str) -> list[str]:
    """List overrides: keys a level at a time, and behind `=` the options of a group or the values of a key."""
    groups, keys = overrides.groups(), config.keys()
    key, given, value = word.partition("=")
    if given:
        done = value.rpartition(",")[0]
        return [f"{key}={done}{',' if done else ''}{name}" for name in groups.get(key) or _values(key)]
    known = [name for name in keys if name not in groups]
    known += [*groups, *(f"sweep.{name}" for name in overrides.SWEEP_KEYS)]
    level = word.count(".") + 1
    return [".".join(parts[:level]) + ("=" if len(parts) <= level else ".") for parts in (n.split(".") for n in known)]


def _values(key: str) -> list[str]:
    """List the values of a key that has few."""
    node: Any = config.Run
    for part in key.split("."):
        found = {f.name for f in fields(node)} if is_dataclass(node) else set()
        node = get_type_hints(node)[part] if part in found else None
    if isinstance(node, type) and issubclass(node, Enum):
        return [member.value for member in node]
    return ["true", "false"] if node is bool else []


def main(argv: list[str]) -> int:
    """Answer `--completion SHELL` and `--complete WORD ...`; return the exit code."""
    if argv[0] == "--complete":
        print("\n".join(dict.fromkeys(candidates(argv[1:]))))
    else:
        sys.stdout.write(script(argv[1] if len(argv) > 1 else ""))
    return 0
