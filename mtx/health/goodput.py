"""Where the wall time of a run went, from its journal and metrics alone.

Decides what counts as productive: the steps that are in the history of the final parameters. Steps that a crash or a
roll-back undid are lost work.

Invariant: the parts add up to the wall time between the first and the last event of the journal.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Goodput:
    """Seconds of wall time by what they were spent on."""

    wall_seconds: float
    productive_seconds: float
    lost_seconds: float
    compile_seconds: float
    save_seconds: float

    @property
    def other_seconds(self) -> float:
        """Start-up, evaluation, restarts and waiting between attempts: what nothing recorded."""
        known = self.productive_seconds + self.lost_seconds + self.compile_seconds + self.save_seconds
        return max(0.0, self.wall_seconds - known)

    @property
    def fraction(self) -> float | None:
        """Productive share of the wall time; None before any of it has passed."""
        return self.productive_seconds / self.wall_seconds if self.wall_seconds > 0 else None


def measure_goodput(
    journal: Sequence[Mapping[str, Any]],
    history: Sequence[Mapping[str, Any]],
    undone: Sequence[Sequence[Mapping[str, Any]]],
) -> Goodput:
    """Accounts for the time of a run.

    Args:
        journal: Events of all attempts. `compiled` and `saved` carry `seconds`: what the loop stood still for.
        history: Training lines of `metrics.jsonl`, with `step` and `step_seconds` (mean since the line before).
        undone: The same of each resume that left lines behind.
    """

    def total(event: str) -> float:
        return sum(entry.get("seconds") or 0.0 for entry in journal if entry["event"] == event)

    times = [entry["time"] for entry in journal]
    productive = _seconds_of_steps(history, 0)
    lost = 0.0
    for lines in undone:
        first = min((line["step"] for line in lines), default=0)
        lost += _seconds_of_steps(lines, max((line["step"] for line in history if line["step"] < first), default=0))
    compiling, saving = total("compiled"), total("saved")
    # A killed attempt leaves metrics that are younger than its last event.
    wall = max((max(times) - min(times)) if times else 0.0, productive + lost + compiling + saving)
    return Goodput(
        wall_seconds=wall,
        productive_seconds=productive,
        lost_seconds=lost,
        compile_seconds=compiling,
        save_seconds=saving,
    )


def _seconds_of_steps(lines: Iterable[Mapping[str, Any]], before: int) -> float:
    """Step time of all steps after `before` up to the last line."""
    seconds = 0.0
    for line in lines:
        seconds += (line["step"] - before) * (line.get("step_seconds") or 0.0)
        before = line["step"]
    return seconds
