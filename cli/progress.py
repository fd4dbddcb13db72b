"""How far a call is: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from typing import Any

from data.console import print_error

BAR_FROM = 4  # faces; fewer are done before a progress bar helps
EVERY = 30.0  # seconds between two lines of a log


class Progress:
    """Shows how many faces are done, how many a second, and how long the rest takes.

    Args:
        total: How many there are.
        shown: Whether anything is shown.
    """

    def __init__(self, total: int, shown: bool = True) -> None:
        self.total, self.done, self.shown = total, 0, shown
        self._last = (time.monotonic(), 0)
        self._bar: Any = None
        if shown and total >= BAR_FROM and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, unit="face")

    def advance(self, count: int = 1) -> None:
        """Notes that faces are done, whatever became of them."""
        self.done += count
        if self._bar is not None:
            self._bar.update(count)
        elif self.shown and time.monotonic() - self._last[0] >= EVERY:
            now, (then, before) = time.monotonic(), self._last
            rate = (self.done - before) / (now - then)  # of late: what was there already is not what the rest takes
            rest = (self.total - self.done) / rate / 60
            print_error(f"{self.done:,} of {self.total:,} faces, {rate:.1f} a second, {rest:,.0f} min left")
            self._last = now, self.done

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            self._bar.close()
