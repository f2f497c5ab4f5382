"""The exception for user errors, whose message entry points print before they exit with 1; and the commonest checks."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any


class VAEError(Exception):
    """Something the user can act on, stated in one sentence."""


def typed(value: Any) -> str:
    """A value as it is typed on a command line: null, true, false, and others as they are."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def choose(setting: str, value: Any, known: Collection[Any]) -> Any:
    """`value`, if it is one of the known ones. Raises VAEError that names the setting as it is typed, and lists them."""
    if not any(value is one or (type(value) is type(one) and value == one) for one in known):
        raise VAEError(f"{setting}={typed(value)} is unknown: choose one of {', '.join(map(typed, known))}.")
    return value


def whole(setting: str, value: Any, least: int = 1, most: int | None = None, optional: bool = False) -> Any:
    """`value`, if it is a whole number in range, or None where that is an option. Raises VAEError that names the setting."""
    if value is None and optional:
        return None
    if type(value) is not int or value < least or (most is not None and value > most):
        within = f"of at least {least}" if most is None else f"from {least} to {most:,}"
        raise VAEError(f"{setting}={typed(value)} must be a whole number {within}{', or null' if optional else ''}.")
    return value
