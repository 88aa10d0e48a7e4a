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
    "%d": "26", "%-d": "26", "%e": "26", "%j": "208", "%a": "Fri", "%A": "Friday", "%b": "Jul", "%B": "July",
    "%m": "07", "%-m": "7", "%y": "24", "%Y": "2024", "%F": "2024-07-26", "%H": "12", "%I": "12", "%p": "PM",
    "%M": "00", "%S": "00",
}  # fmt: skip
"""The 26th of July 2024, the day that Llama 3's own template takes where it is told none."""


def dated(template: str) -> str:
    """Let a template that prints today's date print one day always, so that a row has the same tokens tomorrow.

    The function is transformers' `strftime_now`; those of Llama 3.2, SmolLM3 and gpt-oss call it. A macro of the same
    name takes its place.

    >>> dated("{{ messages }}")
    '{{ messages }}'
    """
    if "strftime_now" not in template:
        return template
    filters = "".join(f"|replace('{sign}', '{text}')" for sign, text in DAY.items())
    return f"{{%- macro strftime_now(form) -%}}{{{{ form{filters} }}}}{{%- endmacro -%}}{template}"


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
    made.globals |= {"raise_exception": _raise, "strftime_now": lambda form: form, "tools": None, "documents": None}
    try:
        made.from_string(template).render(messages=turns, add_generation_prompt=True, bos_token="", eos_token="")
    except MemoryError:
        return LARGE
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError, OverflowError, RecursionError):
        return 0  # told with the row
    return 0


LINUX = sys.platform == "linux"


def _raise(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)


if __name__ == "__main__":
    sys.exit(main())
