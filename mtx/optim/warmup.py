"""What the schedules share: a linear warm-up and then something, counted either in updates or in tokens.

Decides how time is counted; the files beside it decide the shape of what follows the warm-up. Everything is float64 on
the host: no schedule is ever traced, so a rate that follows the tokens needs no recompilation.

Convention: `step` counts updates from 1 and `tokens` includes the batch of the update, as on its line of
`metrics.jsonl`. So the first update already moves (peak / warmup_steps), update number `warmup_steps` is the first at
`peak`, and update number `decay_steps` the first at `final`.

Invariant: the rate is a function of (config, step, tokens) alone; a resumed run needs no state of the schedule.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from mtx.config.schema import Run, setting


@dataclass(frozen=True, kw_only=True)
class Warmup:
    """Fields of every schedule. Not a schedule itself: what comes after the warm-up is the subclass's."""

    peak: float = setting(low=0.0, doc="rate at the end of the warm-up")
    warmup_steps: int | None = setting(None, low=0, doc="updates over which the rate rises linearly to peak")
    warmup_tokens: int | None = setting(None, low=0, doc="tokens over which the rate rises linearly to peak")

    def value(self, run: Run, step: int, tokens: int) -> float:
        """Learning rate of an update.

        Args:
            run: The run, whose end is that of a schedule without an end of its own.
            step: Number of the update, from 1.
            tokens: Tokens trained on, those of this update included.
        """
        now, warmup = tokens if self.counts_tokens(run) else step, self.warmup()
        return self.peak * (now / warmup) if now < warmup else self.after_warmup(run, now)

    def after_warmup(self, run: Run, now: int) -> float:
        """Learning rate `now` updates (or tokens) into the run, when the warm-up is over."""
        raise NotImplementedError

    def warmup(self) -> int:
        """Length of the warm-up in the schedule's unit."""
        return self.warmup_steps or self.warmup_tokens or 0

    def counts_tokens(self, run: Run) -> bool:
        """Whether the unit is the token: as the fields that are set say, else as the run's own length does."""
        return bool(self._given("_tokens")) or (not self._given("_steps") and run.train.tokens is not None)

    def check(self, run: Run) -> Iterator[str]:
        """Mistakes in the fields taken together, each as a message that names both."""
        by_steps, by_tokens = self._given("_steps"), self._given("_tokens")
        if by_steps and by_tokens:
            yield f"{by_steps[0]} and {by_tokens[0]} are both set: count the schedule in steps or in tokens"

    def _given(self, suffix: str) -> list[str]:
        names = [f.name for f in dataclasses.fields(self) if f.name.endswith(suffix)]
        return [f"{type(self).__name__}.{name}" for name in names if getattr(self, name) is not None]


@dataclass(frozen=True, kw_only=True)
class WarmupDecay(Warmup):
    """Fields of the schedules that come down to a final rate. Which way they take is the subclass's."""

    final: float = setting(0.0, low=0.0, doc="rate at the end of the decay and from there on")
    decay_steps: int | None = setting(
        None, low=1, doc="number of the first update at final, counted from the start of the run; None: the run's last"
    )
    decay_tokens: int | None = setting(
        None, low=1, doc="tokens at which the rate reaches final, counted from the start of the run; None: the run's"
    )

    def after_warmup(self, run: Run, now: int) -> float:
        end, warmup = self.end(run), self.warmup()
        if end is None:
            raise ValueError(f"{type(self).__name__} has no end; check() says what to set")
        if now >= end:
            return self.final
        return self.final + (self.peak - self.final) * self.remains((now - warmup) / (end - warmup))

    def remains(self, done: float) -> float:
        """Share of the way from peak to final that is still to go, when a share `done` of the time has passed."""
        raise NotImplementedError

    def end(self, run: Run) -> int | None:
        """Where the decay ends, in the schedule's unit; None where neither the schedule nor the run says it."""
        if self.counts_tokens(run):
            return self.decay_tokens or run.train.tokens
        return self.decay_steps or run.train.steps

    def check(self, run: Run) -> Iterator[str]:
        if mixed := list(super().check(run)):
            yield from mixed
            return
        name, unit, other = type(self).__name__, "steps", "tokens"
        if self.counts_tokens(run):
            unit, other = other, unit
        end = self.end(run)
        if end is None and getattr(run.train, other) is not None:
            yield (
                f"{name}.decay_{unit} is not set and the run's length is in Train.{other}: set {name}.decay_{unit}, "
                f"or count the schedule in {other}"
            )
        if end is not None and self.warmup() >= end > 0:
            yield (
                f"{name}.warmup_{unit} = {self.warmup()} leaves nothing of the {end} {unit} that {name}.decay_{unit} "
                f"or Train.{unit} gives the schedule: shorten the warm-up"
            )
        if self.final > self.peak:
            yield f"{name}.final = {self.final} is above {name}.peak = {self.peak}: a decay comes down"
