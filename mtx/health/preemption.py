"""Being told to stop: a signal or a wall-clock limit becomes a flag that the loop polls between two steps.

Decides which signals ask for it, when a limit is near, and that all processes of a run stop at the same step. It
neither saves nor exits.

Invariant: the handler only sets a flag, so no signal interrupts a step, a save or a line that is being written.
"""

from __future__ import annotations

import os
import signal
import types
from typing import Any

from mtx.health.deadline import Deadline
from mtx.jsonl import say

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""What schedulers send ahead of a kill, and what a user may send: Ctrl-C once."""
_AGREEMENT_S = 5.0
"""That processes need to agree on a step: JAX looks for the signal once a second."""


class Preemption:
    """While open, SIGTERM, SIGUSR1, the first Ctrl-C and a deadline ask this run to stop. For the main thread.

    In a run of several processes JAX's coordination service watches for SIGTERM on all of them and agrees on the step:
    then SIGTERM is left to it, and everything else is turned into SIGTERM. Process 0's clock counts for all.
    """

    def __init__(self, *, process: int = 0, num_processes: int = 1, deadline: Deadline | None = None) -> None:
        """Does nothing yet. `process` is the index of this process in the run."""
        self._num_processes = num_processes
        self._deadline = deadline if process == 0 else None
        self._cause: str | None = None
        self._polls = 0
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Preemption:
        for number in SIGNALS if self._num_processes == 1 else (signal.SIGUSR1, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _handle(self, number: int, frame: types.FrameType | None) -> None:
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, self._previous[signal.SIGINT])  # a second one does what it always did
            say("mtx: stops after this step, with everything saved; Ctrl-C again stops at once and loses it")
        self._ask(signal.Signals(number).name)

    def _ask(self, cause: str) -> None:
        """Asks to stop; the first cause counts."""
        if self._cause is None:
            self._cause = cause
            if self._num_processes > 1:
                os.kill(os.getpid(), signal.SIGTERM)

    @property
    def cause(self) -> str:
        """What asked this run to stop, as far as this process knows. Of use once `requested` is true."""
        return self._cause or "SIGTERM, or a signal to another process"

    def requested(self, *, reserve_seconds: float = 0.0) -> bool:
        """Whether to stop now. Every process calls it once after every step; all get the same answer.

        Args:
            reserve_seconds: That one more step and a save take: the deadline must be farther away than that.
        """
        if self._deadline is not None:
            reserve_seconds += _AGREEMENT_S if self._num_processes > 1 else 0.0
            if self._deadline.remaining_seconds() <= reserve_seconds:
                self._ask(self._deadline.cause)
        if self._num_processes == 1:
            return self._cause is not None
        from jax.experimental import multihost_utils

        # JAX stops at the number after the greatest that any process has reached. Steps would not do: a signal before
        # the first step would ask for step 1 of a run that is at 400, and a roll-back repeats steps.
        self._polls += 1
        return bool(multihost_utils.reached_preemption_sync_point(self._polls))
