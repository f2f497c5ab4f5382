"""Options of a config held to the types that constructors declare, before anything is called."""

from __future__ import annotations

import collections.abc
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

import hydra.utils

from vae.errors import VAEError, typed

WORDS = {int: "a whole number", float: "a finite number", bool: "true or false", str: "a word", type(None): "null"}


def check_types(config: Any, key: str) -> None:
    """Raises VAEError for an option of one of this package's classes or functions, at any depth, whose value is not of the
    type that its constructor declares. key: the config's own place, as it is typed."""
    if not isinstance(config, Mapping):
        return
    target = str(config.get("_target_", ""))
    hints = _hints(hydra.utils.get_object(target)) if target.startswith("vae.") else {}
    for name, value in config.items():
        place = f"{key}.{name}"
        if name in hints and value != "???" and not fits(value, hints[name]):
            raise VAEError(f"{place}={typed(value)} must be {in_words(hints[name])}.")
        check_types(value, place)


def fits(value: Any, hint: Any) -> bool:
    """Whether a plain value may be passed where `hint` is declared; what is not plain (a module, a callable) always may."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, one) for one in typing.get_args(hint))
    if origin in (collections.abc.Sequence, list, tuple):
        return isinstance(value, list) and all(fits(one, typing.get_args(hint)[0]) for one in value)
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is hint if hint in WORDS else True


def in_words(hint: Any) -> str:
    """`int | None` -> "a whole number or null"."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(in_words(one) for one in arguments)
    if origin in (collections.abc.Sequence, list, tuple):
        return f"a list, each {in_words(arguments[0])}"
    return WORDS.get(hint, getattr(hint, "__name__", str(hint)))


def _hints(made: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(type.__getattribute__(made, "__init__") if isinstance(made, type) else made)
    except Exception:  # names that are imported for type checkers alone
        return {name: hint for name, hint in _one_by_one(made).items() if hint is not None}


def _one_by_one(made: Any) -> dict[str, Any]:
    function = type.__getattribute__(made, "__init__") if isinstance(made, type) else made
    found = {}
    for name, text in getattr(function, "__annotations__", {}).items():
        try:
            found[name] = eval(text, {**function.__globals__}) if isinstance(text, str) else text
        except NameError:
            found[name] = None
    return found
