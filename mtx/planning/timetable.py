"""How long a whole run takes: the steps of each size of its batch, by what one of them takes.

Decides nothing about a step. A ramp's small batches have relatively longer bubbles and exchanges, so that each size is
estimated by itself.

Invariant: seconds and tokens follow from the same spans, so that each gives the other back.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass

from mtx.data.ramp import BatchSizes
from mtx.planning.case import Case


@dataclass(frozen=True)
class Span:
    """Steps of one size.

    Attributes:
        size: Sequences of a step.
        steps: How many there are; of the last span, without end.
        step_seconds: Of one.
    """

    size: int
    steps: int
    step_seconds: float


@dataclass(frozen=True)
class Timetable:
    """A run, span by span.

    Attributes:
        sizes: Of the run's batches.
        seq_len: Tokens of a sequence.
        spans: In order.
    """

    sizes: BatchSizes
    seq_len: int
    spans: tuple[Span, ...]

    def steps_to(self, tokens: int) -> int:
        """Steps that it takes to train on so many tokens or more."""
        return self.sizes.step_at_tokens(tokens)

    def tokens_of(self, steps: int) -> int:
        """Tokens of the first steps."""
        return self.sizes.tokens(steps)

    def seconds(self, steps: int) -> float:
        """Of the first steps, without compilation, evaluations, checkpoints and restarts."""
        total = 0.0
        for span in self.spans:
            total += min(steps, span.steps) * span.step_seconds
            steps = max(0, steps - span.steps)
        return total

    def steps_within(self, seconds: float) -> int:
        """Whole steps that are done after so many seconds."""
        done = 0
        for span in self.spans:
            steps = min(span.steps, int(seconds / span.step_seconds))
            done, seconds = done + steps, seconds - steps * span.step_seconds
            if steps < span.steps:
                break
        return done


def make_timetable(case: Case, step_seconds: Callable[[Case], float]) -> Timetable:
    """Estimates a step of each size that the batch takes."""
    train = case.run.train
    sizes = BatchSizes(global_batch_size=train.global_batch_size, seq_len=train.seq_len, ramp=train.batch_ramp)

    def estimate(size: int) -> float:
        resized = dataclasses.replace(train, global_batch_size=size, batch_ramp=None)
        return step_seconds(dataclasses.replace(case, run=dataclasses.replace(case.run, train=resized)))

    spans = tuple(Span(size, steps, estimate(size)) for size, steps in sizes.spans(sys.maxsize))
    return Timetable(sizes, train.seq_len, spans)
