"""Something long, counted step by step: it shows how far it is, and is refused where it would not end."""

from __future__ import annotations

import time

from tqdm.auto import tqdm

from vae.errors import VAEError

LONGEST = 7 * 24 * 3600.0  # seconds: what would take longer is refused
SOON = 2.0  # seconds after which a bar is drawn and what is left is estimated


def no_tick() -> None:
    """What is called at each step where nobody counts."""


class Work:
    """To be called once for each step of what was said to `expect`; a context, at whose end the bar is removed.

    what: its name, for the bar and the sentence. show: draw a bar with the time left, if it takes longer than SOON.
    Raises VAEError, SOON after the start, if at the pace so far it would take longer than `longest` seconds.
    """

    def __init__(self, what: str, show: bool = False, longest: float = LONGEST) -> None:
        self.what, self.show, self.longest = what, show, longest
        self.expect(0)

    def expect(self, steps: int) -> None:
        """So many equal steps begin now."""
        self.total, self.done, self.started = steps, 0, time.monotonic()
        self.bar = tqdm(
            total=steps, desc=self.what, delay=SOON, leave=False, dynamic_ncols=True, disable=not (self.show and steps)
        )

    def __call__(self) -> None:
        self.done += 1
        self.bar.update()
        passed = time.monotonic() - self.started
        if passed > SOON and (needed := passed / self.done * self.total) > self.longest:
            raise VAEError(
                f"{self.what} would take about {needed / 86400:,.0f} days here, and more than {self.longest / 86400:.0f} are "
                "refused: ask for less."
            )

    def close(self) -> None:
        self.bar.close()

    def __enter__(self) -> Work:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
