"""Whether two runs have the same learning rates ahead of them.

Decides nothing about a schedule: it asks for rates, so that a schedule is compared by what it does and not by how it
is written.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from mtx.config.schema import Run
from mtx.optim.warmup import WarmupDecay

Updates = Iterable[tuple[int, int]]
"""Numbers of updates, from 1, each with the tokens trained on, its own included."""


def have_same_rates(one: Run, other: Run, updates: Updates) -> bool:
    """Whether two runs do each of these updates at the same learning rate, to the bit."""
    first: Any = one.train.optimizer
    second: Any = other.train.optimizer
    return all(
        first.learning_rate_at(one, step, tokens) == second.learning_rate_at(other, step, tokens)
        for step, tokens in updates
    )


def is_bent_by_length(old: Run, new: Run, updates: Updates) -> bool:
    """Whether the new run would do some of these updates at another rate if it were as long as the old one."""
    kept = replace(new, train=replace(new.train, steps=old.train.steps, tokens=old.train.tokens))
    optimizer: Any = kept.train.optimizer
    rate = optimizer.learning_rate
    is_refused = hasattr(rate, "check") and any(rate.check(kept))  # it may have no end at that length
    return is_refused or not have_same_rates(kept, new, updates)


def describe_end(run: Run) -> str | None:
    """`WarmupCosine.decay_steps = 800`: what a run's length says in place of its schedule; None if it says nothing."""
    optimizer: Any = run.train.optimizer
    schedule = optimizer.learning_rate
    if not isinstance(schedule, WarmupDecay) or schedule.decay_steps or schedule.decay_tokens:
        return None
    unit = "tokens" if schedule.counts_tokens(run) else "steps"
    return f"{type(schedule).__name__}.decay_{unit} = {schedule.end(run)}"
