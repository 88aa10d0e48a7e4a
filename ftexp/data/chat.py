"""A chat template of a stranger, rendered once in a process of its own before this one renders it.

transformers renders in Jinja's sandbox, so a template runs no code; but nothing bounds its loops or its memory. The
limits here do, for a conversation of three turns. Templates of our own are known and not tried.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from functools import cache

from ftexp.errors import ConfigError

SECONDS = 2
"""Processor time a template may take for three turns; those of real models take a few milliseconds."""
BYTES = 256 << 20
"""Memory it may take on top of the interpreter's."""
KNOWN = frozenset({
    "9fe579a2c222698c7ba22d46e26466362fbe951569a89096c366267f9b82ab92",
    "872be49dbb638044ad01b60388f48d469ff2980e5f0dccdc22ec907db54d0788",
})  # fmt: skip
"""sha256 of the templates of this package: ChatML, and that of the embedded model."""
TURNS = [("user", "hello"), ("assistant", "hello"), ("user", "good bye")]
SLOW, LARGE = 86, 87
"""Exit codes of the process."""
FAULTS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""What rendering raises beside Jinja's own errors where a template, or what it is given, is wrong."""


def digest(template: str) -> str:
    """Hash a template."""
    return hashlib.sha256(template.encode()).hexdigest()


@cache
def check(template: str) -> None:
    """Refuse a chat template that takes too long or too much memory; once in a process for each.

    What else is wrong with it is told with the row that it cannot render.

    Raises:
        ConfigError: it does not end within the limits.
    """
    if digest(template) in KNOWN:
        return
    asked = [sys.executable, "-m", __name__]
    try:
        code = subprocess.run(
            asked, input=template.encode(), env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=60, capture_output=True
        ).returncode
    except subprocess.TimeoutExpired:
        code = SLOW
    if code == LARGE:
        raise ConfigError(f"data.template=model: the model's chat template takes more than {BYTES >> 20} MiB; {OTHER}")
    if code < 0 or code == SLOW:  # killed by a limit
        raise ConfigError(f"data.template=model: the model's chat template takes more than {SECONDS} s; {OTHER}")


DAY = {
    "%a": "Fri", "%A": "Friday", "%u": "5", "%w": "5",
    "%d": "26", "%-d": "26", "%e": "26", "%j": "208", "%-j": "208", "%U": "29", "%V": "30", "%W": "30",
    "%b": "Jul", "%h": "Jul", "%B": "July", "%m": "07", "%-m": "7",
    "%y": "24", "%-y": "24", "%g": "24", "%Y": "2024", "%G": "2024", "%C": "20",
    "%H": "12", "%-H": "12", "%k": "12", "%I": "12", "%-I": "12", "%l": "12", "%p": "PM", "%P": "pm",
    "%M": "00", "%-M": "0", "%S": "00", "%-S": "0", "%f": "000000", "%z": "", "%Z": "",
    "%D": "07/26/24", "%x": "07/26/24", "%F": "2024-07-26", "%R": "12:00", "%T": "12:00:00", "%X": "12:00:00",
    "%r": "12:00:00 PM", "%c": "Fri Jul 26 12:00:00 2024", "%n": "\n", "%t": "\t",
}  # fmt: skip
"""The 26th of July 2024 at noon, the day that Llama 3's own template takes where it is told none: what C's strftime
makes of each code, `%%` beside them."""


def dated(template: str) -> str:
    """Let a template that prints today's date print one day always, so that a row has the same tokens tomorrow.

    The function is transformers' `strftime_now`; those of Llama 3.2, SmolLM3 and gpt-oss call it. A macro of the same
    name takes its place, in a line of its own, which transformers' environment takes away whole: the template's first
    line is read as before.

    >>> dated("{{ messages }}")
    '{{ messages }}'
    """
    if "strftime_now" not in template:
        return template
    codes = {"%%": "\0", **DAY, "\0": "%"}  # a doubled sign begins no code
    filters = "".join(f"|replace({code!r}, {text!r})" for code, text in codes.items())
    return f"{{% macro strftime_now(format) %}}{{{{ format{filters} }}}}{{% endmacro %}}\n{template}"


OTHER = "use data.template=chatml or plain, or a model you trust"


def main() -> int:
    """Render the template on stdin within the limits."""
    import resource

    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    template = sys.stdin.read()
    used = int(next(n for n in open("/proc/self/statm").read().split())) * resource.getpagesize() if LINUX else 0  # noqa: PTH123, SIM115
    if LINUX:
        resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, used + BYTES))
    spent = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    resource.setrlimit(resource.RLIMIT_CPU, (int(spent) + SECONDS + 1, int(spent) + SECONDS + 2))
    turns = [{"role": role, "content": text} for role, text in TURNS]
    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    made.globals |= {"raise_exception": _raise, "strftime_now": lambda format: format, "tools": None, "documents": None}
    try:
        made.from_string(template).render(messages=turns, add_generation_prompt=True, bos_token="", eos_token="")
    except MemoryError:
        return LARGE
    except (TemplateError, *FAULTS):
        return 0  # told with the row
    return 0


LINUX = sys.platform == "linux"


def _raise(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)


if __name__ == "__main__":
    sys.exit(main())
