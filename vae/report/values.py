"""Values of settings and metrics: when two are equal, in which order they stand, how a person would write them."""

from __future__ import annotations

import json
import re
import sys
from typing import Any


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def canonical(value: Any) -> str:
    """Equal for equal values: 1 and 1.0 are, "1" and 1 are not."""
    return json.dumps(float(value) if is_number(value) else value, sort_keys=True, default=str)


def sort_key(value: Any) -> tuple[bool, float, str]:
    return (False, float(value), "") if is_number(value) else (True, 0.0, format_value(value))


def format_value(value: Any) -> str:
    """As a person would write it: 0.25, true, [400, 200]; a class's path by its last name."""
    if is_number(value):
        return f"{value:.6g}"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "none"}[value]
    if isinstance(value, list | tuple):
        return "[" + ", ".join(format_value(item) for item in value) + "]"
    text = printable(str(value))
    return text.rsplit(".", 1)[-1] if re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", text) else text


def printable(text: str) -> str:
    """Control characters, which could drive a terminal, as their escapes; the rest as it is."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
