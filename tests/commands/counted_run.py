"""Trains as `mtx train` does, and prints what the loop compiles and waits for, as JSON.

    counted_run.py [--spoiled] train ARGUMENT ...

--spoiled: after each step it compiles a program of another shape, and waits for what the step gives: a bad loop.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import jax
import numpy as np

from mtx import cli
from mtx.training import loop

COMPILED = "/jax/core/compile/backend_compile_duration"


class Counts:
    """What happens in a run, by the number of steps that were dispatched before it."""

    def __init__(self) -> None:
        self.dispatched = 0
        self.compiled: list[int] = []
        self.copied: list[int] = []
        self.waits: list[tuple[int, int]] = []

    def watch(self) -> None:
        jax.monitoring.register_event_duration_secs_listener(self._on_event)
        for name in ("asarray", "array"):
            setattr(np, name, self._counting(getattr(np, name)))
        jax.block_until_ready = self._counting(jax.block_until_ready)
        jax.device_get = self._counting(jax.device_get)

    def _on_event(self, event: str, seconds: float, **_: Any) -> None:
        if event == COMPILED:
            self.compiled.append(self.dispatched)

    def _counting(self, function: Any) -> Any:
        def call(value: Any, *arguments: Any, **more: Any) -> Any:
            if any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(value)):
                self.copied.append(self.dispatched)
            return function(value, *arguments, **more)

        return call


class Metric:
    """A metric that tells when it is waited for."""

    def __init__(self, value: Any, step: int, counts: Counts) -> None:
        self.value, self.step, self.counts = value, step, counts

    def __array__(self, *arguments: Any, **more: Any) -> Any:
        self.counts.waits.append((self.step, self.counts.dispatched))
        return np.asarray(self.value, *arguments)

    def __float__(self) -> float:
        return float(np.asarray(self))


class Step:
    """The compiled step, with counting metrics; all else is its own."""

    def __init__(self, inner: Any, counts: Counts, spoiled: bool) -> None:
        self.inner, self.counts, self.spoiled = inner, counts, spoiled

    def trace(self, *arguments: Any) -> Step:
        return Step(self.inner.trace(*arguments), self.counts, self.spoiled)

    def lower(self) -> Step:
        return Step(self.inner.lower(), self.counts, self.spoiled)

    def compile(self) -> Step:
        return Step(self.inner.compile(), self.counts, self.spoiled)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __call__(self, state: Any, batch: Any) -> Any:
        state, metrics = self.inner(state, batch)
        self.counts.dispatched += 1
        number = self.counts.dispatched
        metrics = {name: Metric(value, number, self.counts) for name, value in metrics.items()}
        if self.spoiled:
            jax.jit(lambda: jax.numpy.zeros(number))()
            float(metrics["loss"])
        return state, metrics


def main() -> None:
    spoiled = sys.argv[1] == "--spoiled"
    counts, make = Counts(), loop.make_train_step
    loop.make_train_step = lambda setup: Step(make(setup), counts, spoiled)
    counts.watch()
    assert cli.main(sys.argv[1 + spoiled :]) == 0
    figures = {"compiled": counts.compiled, "copied": counts.copied, "waits": counts.waits}
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
