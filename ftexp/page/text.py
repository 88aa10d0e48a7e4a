"""Text of data made safe to stand in a page: it can neither be markup nor turn around the text beside it."""

from __future__ import annotations

import html
from typing import Any

_TURNING = [*range(0x202A, 0x202F), *range(0x2066, 0x206A)]
_CONTROL = [n for n in range(0x20) if chr(n) not in "\n\t"] + list(range(0x7F, 0xA0))
_HALVES = range(0xD800, 0xE000)
_VISIBLE = {n: f"\\u{n:04x}" for n in (*_CONTROL, *_TURNING, *_HALVES)}


def escape(value: Any) -> str:
    r"""Escape a text for an element or a quoted attribute.

    >>> escape('<b a="1">') + escape(chr(0x202E))
    '&lt;b a=&quot;1&quot;&gt;\\u202e'
    """
    return html.escape(visible(str(value)))


def visible(text: str) -> str:
    """Write out control characters, halves of surrogates, and signs that change the direction of what follows.

    One row's text would otherwise turn around the numbers after it, or could not be written to a file.
    """
    return text.translate(_VISIBLE)
