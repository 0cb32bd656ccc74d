"""Batches made ahead of the step that needs them.

Decides how far ahead. Does not know what a batch is.

Invariant: batches come in the order of steps, each made once, and an error in making one is raised where it is asked
for.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """Makes batches in a thread, from `first_step` on. A context manager: leaving it ends the thread."""

    def __init__(self, make_batch: Callable[[int], T], *, first_step: int, depth: int):
        """Args: make_batch: step -> batch; first_step: the first to make; depth: batches kept ready."""
        self._make_batch = make_batch
        self._next = first_step
        self._ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(depth)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(first_step,), name="prefetch", daemon=True)
        self.wait_seconds = 0.0
        self._thread.start()

    def get(self, step: int) -> T:
        """The batch of the next step. Its wait, if any, adds to `wait_seconds`.

        Raises:
            ValueError: `step` is not the next one.
            Exception: Whatever making it raised, with its traceback.
        """
        if step != self._next:
            raise ValueError(f"step {self._next} is next, not {step}")
        if self._stopped.is_set():
            raise ValueError("the prefetcher is closed")
        begin = time.perf_counter()
        batch, error = self._ready.get()
        self.wait_seconds += time.perf_counter() - begin
        if error is not None:
            self._ready.put((None, error))  # and again for whoever asks again: the thread has ended
            raise error
        self._next += 1
        return batch  # type: ignore[return-value]

    def close(self) -> None:
        """Ends the thread, after the batch that it is making."""
        self._stopped.set()
        while self._thread.is_alive():
            try:
                self._ready.get_nowait()  # it may wait for room
            except queue.Empty:
                self._thread.join(0.01)

    def __enter__(self) -> Prefetcher[T]:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _run(self, step: int) -> None:
        while not self._stopped.is_set():
            try:
                batch = self._make_batch(step)
            except BaseException as error:  # raised again by `get`
                self._ready.put((None, error))
                return
            self._ready.put((batch, None))
            step += 1
