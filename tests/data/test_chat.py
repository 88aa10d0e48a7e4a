"""Limits of a stranger's template; what runs no code and ends is in tests/hostile."""

import pytest

from ftexp.data import chat, prompts
from ftexp.errors import ConfigError


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
