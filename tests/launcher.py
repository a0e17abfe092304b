"""lightrun from the source tree, for tests that need a `kill -9` at a known place.

Takes lightrun's own command line. `LIGHTRUN_TRAP="Store.add before 1"` has the process kill itself before the first call
of that method, or `after` its return; a function of the module is named alone. `LIGHTRUN_DELAYS="0.2 0.4"` stands for
CALLBACK_DELAYS, so that a test of retries is quick, and `LIGHTRUN_MAX_RETRY_AFTER="3"` for MAX_RETRY_AFTER_SECONDS.
"""

from __future__ import annotations

import functools
import itertools
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import lightrun


def set_trap(name: str, when: str, number: int) -> None:
    """Wrap `Class.method` or `function`."""
    owner, _, method = name.rpartition(".")
    target: Any = getattr(lightrun, owner) if owner else lightrun
    original, calls = getattr(target, method), itertools.count(1)

    @functools.wraps(original)
    def wrapped(*arguments: Any, **options: Any) -> Any:
        last = next(calls) == number
        if last and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            return original(*arguments, **options)
        finally:
            if last:
                os.kill(os.getpid(), signal.SIGKILL)

    setattr(target, method, wrapped)


if __name__ == "__main__":
    if trap := os.environ.get("LIGHTRUN_TRAP"):
        name, when, number = trap.split()
        set_trap(name, when, int(number))
    if delays := os.environ.get("LIGHTRUN_DELAYS"):
        lightrun.CALLBACK_DELAYS = tuple(map(float, delays.split()))  # type: ignore[assignment]
    if "FAKETIME_TIMESTAMP_FILE" in os.environ:  # libfaketime 0.9.10 fails in the clock_nanosleep of time.sleep
        time.sleep = threading.Event().wait  # type: ignore[assignment]
    if seconds := os.environ.get("LIGHTRUN_MAX_RETRY_AFTER"):
        lightrun.MAX_RETRY_AFTER_SECONDS = int(seconds)
    sys.exit(lightrun.main())
