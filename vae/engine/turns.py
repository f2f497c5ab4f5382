"""Jobs that take turns in one process: each goes on by itself until it asks for what is done for several at once.

A job is a greenlet: an ordinary call, which is left where it asks and gone on with where it was left, in the one thread
that there is. Which job that is, and what it has cost, is known here; imports no torch.
"""

from __future__ import annotations

import contextvars
import time
from collections.abc import Callable
from typing import Any

from vae.errors import VAEError


class Seat:
    """A job that takes turns. `request` is what it asked for last, None once it has ended; `result` what it returned.

    swap: called with what was around the job when it was last left (None at first), which it puts in place of what is
    there now, and returns that: a process has one of some things that each job must find as it left them.
    """

    def __init__(self, job: Callable[[], Any], swap: Callable[[Any], Any] = lambda around: around) -> None:
        self._greenlet = require_greenlet()(self._run)
        self._greenlet.gr_context = contextvars.copy_context()
        self._job, self._swap, self._around = job, swap, None
        self._since = self.seconds = 0.0  # when its turn began; what its turns have cost before
        self.moment: float | None = None  # the time, for all that are to decide alike what is due
        self.request: Any = None
        self.result: Any = None

    def _run(self) -> None:
        self.result = self._job()

    def ask(self, request: Any) -> Any:
        """Of the job: wait, while others take their turns, for an answer."""
        self.request = request
        return self._greenlet.parent.switch()

    def resume(self, answer: Any = None) -> bool:
        """Let the job go on until it asks again, or has ended; whether it asks. What it raises is raised here."""
        return self._turn(self._greenlet.switch, *(() if self.request is None else (answer,)))

    def stop(self, error: BaseException) -> None:
        """Raise an error where the job waits, and let it end."""
        self._turn(self._greenlet.throw, error)

    def _turn(self, switch: Callable[..., Any], *arguments: Any) -> bool:
        global CURRENT
        self.request, before = None, CURRENT
        outside = self._swap(self._around)
        CURRENT, self._since = self, time.monotonic()
        try:
            switch(*arguments)
        finally:
            self.seconds += time.monotonic() - self._since
            CURRENT = before
            self._around = self._swap(outside)
        return self.request is not None


def require_greenlet() -> Any:
    """The class that jobs are made of. Raises VAEError where it is not installed."""
    try:
        from greenlet import greenlet  # type: ignore[import-untyped, unused-ignore]
    except ImportError as error:
        raise VAEError("hydra/launcher=packed needs greenlet: pip install greenlet.") from error
    return greenlet


#: The job whose turn it is; None where nothing takes turns.
CURRENT: Seat | None = None


def seconds() -> float:
    """A clock of what the job costs, which stands still while others take their turns."""
    return time.monotonic() if CURRENT is None else CURRENT.seconds + time.monotonic() - CURRENT._since


def moment() -> float:
    """A clock that is the same for all that were just given an answer together, so that they find the same things due."""
    return time.monotonic() if CURRENT is None or CURRENT.moment is None else CURRENT.moment
