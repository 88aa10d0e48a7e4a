"""Limits of a stranger's template; what runs no code and ends is in tests/hostile."""

from datetime import datetime
from pathlib import Path

import pytest

from ftexp.data import chat, prompts
from ftexp.errors import ConfigError
from ftexp.model import tiny


def test_own_template_is_known_and_starts_no_process(monkeypatch):
    monkeypatch.setattr(chat.subprocess, "run", lambda *_, **__: pytest.fail("a process was started"))
    chat.check.cache_clear()
    chat.check(prompts.CHATML)


def test_embedded_template_is_known(composed):
    from ftexp import model

    assert chat.digest(model.tokenizer(composed().model).chat_template) in chat.KNOWN


@pytest.mark.parametrize(
    "template", ["{{ messages[0].content }}", "{{ raise_exception('no') }}", "{% if", "{{ 1 / 0 }}"]
)
def test_template_that_ends_passes_here_whatever_it_says(template):
    chat.check(template)


def test_memory_and_time_are_bounded():
    with pytest.raises(ConfigError, match="takes more than 256 MiB"):
        chat.check("{{ 'a' * 999999999 }}")


NOON = datetime(2024, 7, 26, 12)


def rendered(template, messages=({"role": "user", "content": "hello"},)):
    return tiny.tokenizer().apply_chat_template(
        list(messages), chat_template=chat.dated(template), tokenize=False, add_generation_prompt=True
    )


@pytest.mark.parametrize("code", [*chat.DAY, "%%"])
def test_every_code_of_the_date_is_that_of_strftime(code):
    given = f"{code} {code}, %d{code}%%d{code}%"
    assert rendered(f"{{{{ strftime_now({given!r}) }}}}|") == f"{NOON.strftime(given)}|"


@pytest.mark.parametrize("call", ["strftime_now('%d %b %Y')", "strftime_now(format='%d %b %Y')"])
def test_date_is_asked_for_by_position_or_by_name(call):
    assert rendered(f"{{{{ {call} }}}}|") == "26 Jul 2024|"
    inner = f"{{% macro told() %}}{{{{ {call} ~ '!' }}}}{{% endmacro %}}{{{{ told() }}}}"  # as in gpt-oss
    assert rendered(inner) == "26 Jul 2024!"


@pytest.mark.parametrize(
    "start", ["  \n", "\n", "\n\n ", " {{ 'a' }}", "  {% if true %}b{% endif %}", "\n{% if true %}\nb{% endif %}"]
)
def test_start_of_a_dated_template_is_read_as_without_a_date(start):
    end = "{{ messages[0].content }}|"
    assert rendered(start + "{{ strftime_now('%Y') }}" + end) == rendered(start + "2024" + end)


def test_dated_templates_of_models_give_the_day():
    import trl

    folder = Path(trl.__file__).parent / "chat_templates"
    for name, told in (("llama3_2", "Today Date: 26 Jul 2024"), ("gptoss", "Current date: 2024-07-26")):
        assert told in rendered((folder / f"{name}.jinja").read_text())
