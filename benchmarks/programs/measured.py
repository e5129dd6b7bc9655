"""What examples share: a clock that other programs on the machine disturb little, and the line that is read back."""

from __future__ import annotations

import json
import time

MARK = "PROGRAM REPORT "


class Clock:
    """Processor time, of a process with one thread, of the block."""

    seconds = 0.0

    def __enter__(self) -> Clock:
        self._start = time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds += time.process_time() - self._start


def report(figures: dict[str, float], clock: Clock) -> None:
    """Print the example's figures and its time."""
    print(MARK + json.dumps({"figures": figures, "seconds": clock.seconds}), flush=True)
