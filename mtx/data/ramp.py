"""How many sequences each step has, and so which samples and tokens come before it.

Decides the batch-size ramp. Does not read anything.

Invariant: all answers follow from the stages, of which there are as many as increments, never from a loop over steps.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from mtx.config.schema import BatchRamp
from mtx.errors import UserError


class Sizes(Protocol):
    """How many sequences each step has, for whoever needs no more: `BatchSizes`, and the course of a whole run."""

    @property
    def max(self) -> int: ...
    def size(self, step: int) -> int: ...
    def first_sample(self, step: int) -> int: ...
    def tokens(self, step: int) -> int: ...
    def step_at_tokens(self, tokens: int) -> int: ...


@dataclass(frozen=True, kw_only=True)
class _Stage:
    """Steps of one size. `first_step` and `first_sample` are where it begins."""

    first_step: int
    first_sample: int
    size: int


class BatchSizes:
    """Batch sizes of a run, from a first step on. Steps count from 0.

    A ramp adds `increment` sequences each time that another 1/n of `ramp.tokens` is done, n being the number of
    increments; a step takes the size that holds when it begins. Source: arXiv 2201.11990, section 3.2, for the ramp of
    MT-NLG: 32 to 1920 by 32 over 12e9 tokens.
    """

    def __init__(
        self,
        *,
        global_batch_size: int,
        seq_len: int,
        ramp: BatchRamp | None = None,
        first_step: int = 0,
        first_sample: int = 0,
        first_token: int = 0,
    ):
        """A run with other settings may come before `first_step`; the ramp counts its tokens, too.

        Args:
            global_batch_size: Sequences per step, after the ramp.
            seq_len: Tokens per sequence.
            ramp: Of the batch size, if there is one.
            first_step: The first step of these sizes.
            first_sample: Sequences before it.
            first_token: Tokens before it.

        Raises:
            UserError: The ramp does not end at `global_batch_size`.
        """
        self.max = global_batch_size
        self._seq_len, self._first_token = seq_len, first_token
        size = ramp.start if ramp else global_batch_size
        self._stages = [_Stage(first_step=first_step, first_sample=first_sample, size=size)]
        self._origin = self._stages[0]
        if ramp is None:
            return
        num_increments, rest = divmod(global_batch_size - ramp.start, ramp.increment)
        if num_increments < 0 or rest:
            raise UserError(
                f"BatchRamp.start = {ramp.start}, BatchRamp.increment = {ramp.increment}: such steps do not lead to "
                f"Train.global_batch_size = {global_batch_size}; their difference must be a multiple of the increment"
            )
        for i in range(1, num_increments + 1):
            last = self._stages[-1]
            # Stage i begins with the first step that has ramp.tokens * i / num_increments or more behind it.
            missing = ramp.tokens * i - num_increments * first_token
            samples = first_sample - (-missing // (num_increments * seq_len))
            steps = max(0, -(-(samples - last.first_sample) // last.size))
            stage = _Stage(
                first_step=last.first_step + steps,
                first_sample=last.first_sample + steps * last.size,
                size=ramp.start + i * ramp.increment,
            )
            if not steps:  # passed over by a step that was longer than the stage
                self._stages.pop()
            self._stages.append(stage)

    def size(self, step: int) -> int:
        """Sequences in a step."""
        return self._stage(step).size

    def first_sample(self, step: int) -> int:
        """Sequences in all steps before it."""
        stage = self._stage(step)
        return stage.first_sample + (step - stage.first_step) * stage.size

    def tokens(self, step: int) -> int:
        """Tokens in all steps before it."""
        return self._first_token + (self.first_sample(step) - self._origin.first_sample) * self._seq_len

    def step_at_tokens(self, tokens: int) -> int:
        """The number of steps that it takes to train on so many tokens or more."""
        samples = self._origin.first_sample - (-(tokens - self._first_token) // self._seq_len)
        # The last stage that begins before so many samples are done.
        index = bisect_right(self._stages, samples - 1, key=lambda stage: stage.first_sample) - 1
        stage = self._stages[max(0, index)]
        return stage.first_step - (stage.first_sample - samples) // stage.size

    def spans(self, steps: int) -> Iterator[tuple[int, int]]:
        """Sequences of a step and number of such steps, in order, up to the end of step `steps` - 1."""
        ends = [*(stage.first_step for stage in self._stages[1:]), steps]
        for stage, end in zip(self._stages, ends):
            if min(end, steps) > stage.first_step:
                yield stage.size, min(end, steps) - stage.first_step

    def steps_of(self, samples: np.ndarray) -> np.ndarray:
        """The step that each sample (int64[n], none before the first) is in: int64[n]."""
        first_steps, first_samples, sizes = np.array(
            [(stage.first_step, stage.first_sample, stage.size) for stage in self._stages]
        ).T
        stages = np.searchsorted(first_samples, samples, side="right") - 1
        return first_steps[stages] + (samples - first_samples[stages]) // sizes[stages]

    def _stage(self, step: int) -> _Stage:
        if step < self._origin.first_step:
            raise ValueError(f"steps count from {self._origin.first_step}, not {step}")
        return self._stages[bisect_right(self._stages, step, key=lambda stage: stage.first_step) - 1]
