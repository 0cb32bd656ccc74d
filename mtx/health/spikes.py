"""Loss spikes and gradients that are not finite: when a run must go back.

Decides from the numbers of the steps alone, so every process of a run comes to the same answer without asking the
others. What is done about it is the run's matter: to go back to a checkpoint before the spike and to skip the batches
around it is the recipe of PaLM (arXiv 2204.02311, section 5.1); the robust z-score that finds the spike is ours.

Invariant: a detector that was restored from a state decides from there on like the one the state was taken of.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Of a normal distribution, the standard deviation over the median absolute deviation.
_STD_OF_MAD = 1.4826
# A loss that hardly moves, as on data learned by heart, has next to no deviation, and rounding alone would be many of
# them. Half a percent of the loss counts as one at least: with a score of 8 a spike is then at least 4 % above.
_LEAST_RELATIVE_STD = 0.005
_LEAST_STD = 1e-6  # nats; what float32 resolves of a loss of 10


@dataclass(frozen=True)
class Skipped:
    """The update of a step was skipped, because its gradient is not finite; the run goes on."""

    cause: str


@dataclass(frozen=True)
class Spike:
    """The run must go back to before `first_step`, and the detector with it, by `restore`."""

    first_step: int
    cause: str


Verdict = Skipped | Spike | None


class SpikeDetector:
    """Looks at every step of a run, in their order."""

    def __init__(self, *, score: float | None, window: int, patience: int, max_nonfinite: int) -> None:
        """A detector that has seen nothing.

        Args:
            score: Robust standard deviations above the median from which on a loss is high; None: no loss is.
            window: Losses that the median is taken of; half of them must be there before any is judged.
            patience: High losses in a row that are a spike; fewer are a blip.
            max_nonfinite: Skipped updates in a row that are borne.
        """
        self._score, self._patience, self._max_nonfinite = score, patience, max_nonfinite
        self._losses: deque[float] = deque(maxlen=window)
        self._high: list[tuple[int, float]] = []  # steps not judged yet: spike or blip
        self._skipped: list[int] = []  # steps in a row, up to now

    def observe(self, step: int, loss: float, grad_norm: float, *, skipped: bool) -> Verdict:
        """Judges a step.

        Args:
            step: Its number, 1 for the first update.
            loss: Of its batch, before the update, nats per token.
            grad_norm: Of its gradient, before clipping.
            skipped: Whether the step left the parameters as they were, since its numbers are not finite.
        """
        numbers = f"loss {loss:.4g}, gradient norm {grad_norm:.4g}"
        if skipped:
            self._skipped.append(step)
            if len(self._skipped) <= self._max_nonfinite:
                return Skipped(numbers)
            many = f" {len(self._skipped)} times in a row" if self._max_nonfinite else ""
            return Spike(self._skipped[0], f"{numbers}: not finite{many}")
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return Spike(step, f"{numbers}: not finite, and the parameters were updated")
        self._skipped.clear()
        if self._score is None:
            return None
        excess, deviation = self._measure(loss)
        if excess > self._score * deviation:
            self._high.append((step, loss))
            if len(self._high) < self._patience:
                return None
            many = f", {len(self._high)} steps in a row" if self._patience > 1 else ""
            return Spike(
                self._high[0][0],
                f"loss {loss:.4f} is {excess:.4f} above the median of {len(self._losses)} steps, "
                f"{excess / deviation:.3g} robust standard deviations ({self._score:g} are allowed){many}",
            )
        self._losses.extend(high for _, high in self._high)
        self._high.clear()
        self._losses.append(loss)
        return None

    def _measure(self, loss: float) -> tuple[float, float]:
        """How far a loss is above the median, and the robust standard deviation; (0, 1) while too few are known.

        A loss that falls is no noise: deviations are those from a line through the medians of both halves. The median
        stays that of the whole, above a curve that falls, so the fall itself raises no alarm.
        """
        known = list(self._losses)
        if 2 * len(known) < (self._losses.maxlen or 0):
            return 0.0, 1.0
        half = len(known) // 2
        fall = min(0.0, statistics.median(known[-half:]) - statistics.median(known[:half])) / (len(known) - half)
        level = [value - fall * index for index, value in enumerate(known)]
        center = statistics.median(level)
        spread = _STD_OF_MAD * statistics.median(abs(value - center) for value in level)
        median = statistics.median(known)
        return loss - median, max(spread, _LEAST_RELATIVE_STD * abs(median), _LEAST_STD)

    def forget(self) -> None:
        """Begins anew, as where other data begin."""
        self._losses.clear()
        self._high.clear()

    def state(self) -> dict[str, Any]:
        """All that the detector remembers, as JSON values."""
        return {"losses": list(self._losses), "high": [list(pair) for pair in self._high], "skipped": self._skipped[:]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state; where the window is smaller now, from the latest losses of it."""
        self._losses = deque(state["losses"], maxlen=self._losses.maxlen)
        self._high = [(step, loss) for step, loss in state["high"]]
        self._skipped = list(state["skipped"])
