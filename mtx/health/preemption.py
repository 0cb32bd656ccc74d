"""Being told to stop: a signal becomes a flag that the loop polls between two steps.

Decides which signals ask for it and that all processes of a run stop at the same step. It neither saves nor exits.

Invariant: the handler only sets a flag, so no signal interrupts a step, a save or a line that is being written.
"""

from __future__ import annotations

import os
import signal
import types
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What schedulers send ahead of a kill, and what a user may send."""


class Preemption:
    """While open, SIGTERM and SIGUSR1 ask this run to stop. To be opened in the main thread.

    In a run of several processes JAX's coordination service watches for SIGTERM on all of them and agrees on the step:
    then SIGTERM is left to it, and SIGUSR1 is turned into SIGTERM.
    """

    def __init__(self, *, num_processes: int = 1) -> None:
        self._num_processes = num_processes
        self._cause: str | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Preemption:
        for number in SIGNALS if self._num_processes == 1 else (signal.SIGUSR1,):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _handle(self, number: int, frame: types.FrameType | None) -> None:
        self._cause = signal.Signals(number).name
        if self._num_processes > 1:
            os.kill(os.getpid(), signal.SIGTERM)

    @property
    def cause(self) -> str | None:
        """Name of the signal that this process got; None where there was none or another process got it."""
        return self._cause

    def requested_at(self, step: int) -> bool:
        """Whether to stop after `step`. Every process calls it once after every step; all get the same answer."""
        if self._num_processes == 1:
            return self._cause is not None
        from jax.experimental import multihost_utils

        return bool(multihost_utils.reached_preemption_sync_point(step))
