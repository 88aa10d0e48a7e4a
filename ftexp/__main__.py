"""`ftexp <verb>` is `python -m ftexp.<verb>`."""

from __future__ import annotations

import difflib
import os
import sys
from importlib import import_module
from importlib.metadata import version

from ftexp.progress import QUIET

VERBS = {
    "run": "train and score one run, or a sweep with -m",
    "plan": "tell parameters, memory, operations, hours and money of a run or sweep before it starts",
    "doctor": "probe machine, libraries and recipe before a run or sweep",
    "sweep": "list, look at, stop, resume and export sweeps",
    "show": "show data: print rows as the model will see them, and their lengths",
    "report": "print the leaderboard of a sweep or a run, and write it as a page",
    "confirm": "train a sweep's winner again and score it once on the sealed rows",
    "diff": "tell what differs between two runs, and whether it is chance",
    "reproduce": "train a run again and compare it step by step",
    "generate": "print what a trained run writes, beside its base model",
    "export": "write a run to a folder that others can load, merged or as an adapter, and push it",
    "sync": "bring to MLflow what its store missed",
    "power": "tell the rows and seeds a comparison needs",
    "notebooks": "run the notebooks of analysis/ on a sweep",
    "ui": "show runs and sweeps in the MLflow UI",
}


def module(verb: str) -> str:
    """Return the module of a verb; `sweep` is a folder, whose command is its `__main__`."""
    return "ftexp.sweep.__main__" if verb == "sweep" else f"ftexp.{verb}"


def main() -> int:
    """Hand the command line to the module of its verb."""
    if sys.argv[1:2] in (["--completion"], ["--complete"]):
        from ftexp import completion
        from ftexp import verb as verbs

        return verbs.ended(lambda: completion.main(sys.argv[1:]))
    if sys.argv[1:2] == ["-q"]:
        os.environ[QUIET] = "1"
        del sys.argv[1]
    if len(sys.argv) < 2 or sys.argv[1] not in VERBS:
        lines = [f"  {verb:10}{what}" for verb, what in VERBS.items()]
        head = ["usage: ftexp [-q] VERB ...    (-q, or FTEXP_QUIET=1: warnings and errors alone on stderr)",
                "       ftexp --completion bash|zsh|fish"]  # fmt: skip
        if sys.argv[1:] == ["--version"]:
            print(f"ftexp {version('ftexp')}")
            return 0
        asked = sys.argv[1:] in (["-h"], ["--help"])
        if sys.argv[1:] and not asked:
            near = difflib.get_close_matches(sys.argv[1], VERBS, n=1)
            head = [f"ftexp: {sys.argv[1]} is no verb{f', did you mean {near[0]}?' if near else ''}", *head]
        print("\n".join([*head, "", *lines]), file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    verb = sys.argv.pop(1)
    sys.argv[0] = f"ftexp {verb}"
    return import_module(module(verb)).main()


if __name__ == "__main__":
    sys.exit(main())
