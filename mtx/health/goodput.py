"""Where the wall time of a run went, and how each of its attempts went, from its journal and metrics alone.

Decides what counts as productive: the steps that are in the history of the final parameters. Steps that a crash or a
rollback undid are lost work. The journal is cut into stretches, each from a `start` or a `rollback` to the next; a step
of a stretch is lost where a later stretch began before it.

Invariant: the parts add up to the wall time. That is the time between the first and the last event, and the steps that
a killed attempt logged after its last one; where clocks were set back, seconds that were measured count all the same.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Record = Mapping[str, Any]

Ending = Literal["finished", "preempted", "hang", "corruption", "diverged", "killed", "running"]
"""How an attempt ended. `killed`: it recorded no end and another one began. `running`: so far none did."""

_ENDINGS: tuple[Ending, ...] = ("finished", "preempted", "hang", "corruption")
_FAILURES: tuple[Ending, ...] = ("hang", "corruption", "diverged", "killed")
# Events that happen when the loop stands at their step; others come from threads that lag behind it.
_IN_LOOP = (
    "start",
    "rollback",
    "resumed",
    "compiled",
    "evaluated",
    "saved",
    "skipped",
    "spike",
    "preempted",
    "finished",
)
_BEFORE_STEPS = (
    "start", "rollback", "accepted", "resumed", "compiled", "started", "corruption", "stored", "save_failed",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """From one `start` to the next. Times are Unix seconds."""

    start: float
    end: float
    """Of a killed attempt: when its last logged step ended."""
    ended: Ending
    first_step: int | None
    """Step that it went on from; None where it came to no step."""
    last_step: int | None
    lost_steps: int
    """Of its steps, those that it or a later attempt undid."""
    recovery_seconds: float | None
    """From the end of the attempt before until its first step; None for the first attempt and where it came to none."""


@dataclass(frozen=True, kw_only=True)
class Goodput:
    """Seconds of wall time by what they were spent on, and what happened meanwhile."""

    wall_seconds: float = 0.0
    productive_seconds: float = 0.0
    lost_seconds: float = 0.0
    """Steps that were undone."""
    compile_seconds: float = 0.0
    data_wait_seconds: float = 0.0
    """Productive steps waiting for their batch."""
    save_seconds: float = 0.0
    """The loop stood still for checkpoints."""
    evaluate_seconds: float = 0.0
    restart_seconds: float = 0.0
    """From the start of an attempt, or a rollback, to its first step, without compiling."""
    down_seconds: float = 0.0
    """Between attempts."""
    stalled_seconds: float = 0.0
    """From the last sign of a step to the finding that the run hangs."""
    other_seconds: float = 0.0
    """What nothing recorded."""
    num_failures: int = 0
    """Attempts that ended by themselves and were neither finished nor preempted."""
    num_rollbacks: int = 0
    attempts: tuple[Attempt, ...] = ()

    @property
    def fraction(self) -> float | None:
        """Productive share of the wall time; None before any of it has passed."""
        return self.productive_seconds / self.wall_seconds if self.wall_seconds > 0 else None

    @property
    def up_seconds(self) -> float:
        """Wall time during which a process ran."""
        return self.wall_seconds - self.down_seconds

    @property
    def mtbf_seconds(self) -> float | None:
        """Mean time between failures while a process ran; None without one."""
        return self.up_seconds / self.num_failures if self.num_failures else None


@dataclass(kw_only=True)
class _Stretch:
    """What ran from a `start` or a `rollback` on."""

    events: list[Record]
    first: int | None
    until: Record | None
    """The event that began the next stretch."""
    lines: list[Record] = field(default_factory=list)
    """Metrics that it logged."""
    kept: float = math.inf
    """Its last step that no later stretch undid."""

    @property
    def begin(self) -> float:
        return float(self.events[0]["time"])

    @property
    def reached(self) -> int | None:
        """Its last known step."""
        if self.first is None:
            return None
        steps = [event.get("step") for event in self.events] + [line["step"] for line in self.lines]
        if self.until is not None and self.until["event"] == "rollback":
            steps.append(self.until.get("from_step"))
        return max([self.first, *(step for step in steps if step is not None)])

    @property
    def lost_steps(self) -> int:
        first, reached = self.first, self.reached
        return 0 if first is None or reached is None else int(max(0, reached - max(self.kept, first)))

    @property
    def run_up_seconds(self) -> float:
        """From its begin to its first step."""
        early = itertools.takewhile(lambda event: event["event"] in _BEFORE_STEPS, self.events)
        ready = [event["time"] for event in early if event["event"] in ("resumed", "compiled")]
        if not ready and self.reached == self.first:  # it came to no step
            ready = [event["time"] for event in self.events]
        return max(0.0, ready[-1] - self.begin) if ready else 0.0

    def total(self, name: str) -> float:
        """Seconds of the events of a name."""
        return sum(event.get("seconds") or 0.0 for event in self.events if event["event"] == name)


def measure_goodput(
    journal: Sequence[Record], history: Sequence[Record], undone: Sequence[Sequence[Record]]
) -> Goodput:
    """Accounts for the time of a run.

    Args:
        journal: Events of all attempts. `compiled`, `evaluated` and `saved` carry `seconds`: what the loop stood still
            for.
        history: Training lines of `metrics.jsonl`, with `step`, `step_seconds` (mean since the line before) and
            `data_wait_seconds` (per step, part of `step_seconds`).
        undone: The same of each resume or rollback that left lines behind, oldest first.
    """
    stretches = _cut(journal)
    _share_out(stretches, history, undone)
    parts: dict[str, float] = {}
    attempts: list[Attempt] = []
    end = 0.0  # of the stretch before
    for stretch in stretches:
        begins_attempt = stretch.events[0]["event"] != "rollback" or not attempts
        down = max(0.0, stretch.begin - end) if attempts else 0.0
        known = _account(stretch)
        last_end, known["stalled"] = _find_end(stretch)
        duration = max(last_end - stretch.begin, sum(known.values()))
        known |= {"other": duration - sum(known.values()), "down": down}
        for name, seconds in known.items():
            parts[name] = parts.get(name, 0.0) + seconds
        end = stretch.begin + duration
        if begins_attempt:
            recovery = down + stretch.run_up_seconds if attempts and stretch.first is not None else None
            attempts.append(_describe(stretch, end, recovery))
        else:
            attempts[-1] = _extend(attempts[-1], stretch, end)
    return Goodput(
        wall_seconds=sum(parts.values()),
        **{f"{name}_seconds": seconds for name, seconds in parts.items()},
        num_failures=sum(attempt.ended in _FAILURES for attempt in attempts),
        num_rollbacks=sum(event["event"] == "rollback" for event in journal),
        attempts=tuple(attempts),
    )


def _cut(journal: Sequence[Record]) -> list[_Stretch]:
    """The stretches of a journal, with the step that each went on from."""
    begins = [index for index, event in enumerate(journal) if event["event"] in ("start", "rollback")]
    begins = sorted({0, *begins}) if journal else []
    stretches = []
    for begin, after in itertools.zip_longest(begins, begins[1:]):
        events = list(journal[begin:after])
        told = (event.get("step") for event in events if event["event"] in ("start", "rollback", "resumed"))
        first = next((step for step in told if step is not None), None)
        is_fresh = not any(event["event"] == "stored" for event in journal[:begin])
        if first is None and (begin == 0 or (is_fresh and any(event["event"] == "compiled" for event in events))):
            first = 0
        stretches.append(_Stretch(events=events, first=first, until=None if after is None else journal[after]))
    return stretches


def _share_out(stretches: list[_Stretch], history: Sequence[Record], undone: Sequence[Sequence[Record]]) -> None:
    """Gives each stretch the lines that it logged and the last of its steps that was kept.

    Backwards, the file is what each stretch found: without the lines of later steps, which are its own, and with those
    that it undid.
    """
    file, batches = list(history), [list(batch) for batch in undone if batch]
    kept = math.inf
    steppers = [stretch for stretch in stretches if stretch.first is not None]
    for stretch, before in itertools.zip_longest(reversed(steppers), reversed(steppers[:-1])):
        first = stretch.first or 0
        stretch.kept, kept = kept, min(kept, first)
        stretch.lines = [line for line in file if line["step"] > first]
        file = [line for line in file if line["step"] <= first]
        if before is not None and batches and min(line["step"] for line in batches[-1]) > first:
            # Unless the stretch before had no time for them: then it was that one which undid them.
            start = before.first or 0
            seconds = _seconds_of([line for line in file + batches[-1] if line["step"] > start], start)
            if before is steppers[0] or seconds <= 1.001 * (stretch.begin - before.begin - before.run_up_seconds):
                file += batches.pop()
    if steppers:
        steppers[0].lines += [line for batch in batches for line in batch]
        steppers[0].lines.sort(key=lambda line: line["step"])


def _seconds_of(lines: Sequence[Record], before: int) -> float:
    """Step time of all steps after `before` up to the last line."""
    steps = [before, *(line["step"] for line in lines)]
    return sum((b - a) * (line.get("step_seconds") or 0.0) for (a, b), line in zip(itertools.pairwise(steps), lines))


def _account(stretch: _Stretch) -> dict[str, float]:
    """Seconds of a stretch that are known, by part."""
    parts = {name: stretch.total(event) for name, event in (("save", "saved"), ("evaluate", "evaluated"))}
    parts["compile"] = stretch.total("compiled")
    parts["restart"] = max(0.0, stretch.run_up_seconds - parts["compile"])
    parts |= {"productive": 0.0, "data_wait": 0.0, "lost": 0.0}

    def add(before: int, step: int, seconds: float, waiting: float) -> None:
        kept = max(0.0, min(step, stretch.kept) - before)
        parts["productive"] += kept * (seconds - waiting)
        parts["data_wait"] += kept * waiting
        parts["lost"] += (step - before - kept) * seconds

    before, seconds, waiting = stretch.first or 0, 0.0, 0.0
    for line in stretch.lines:
        seconds = line.get("step_seconds") or 0.0
        waiting = min(seconds, line.get("data_wait_seconds") or 0.0)
        add(before, line["step"], seconds, waiting)
        before = line["step"]
    steps = (stretch.reached or before) - before
    if steps > 0 and seconds > 0:  # done and never logged: as fast as those before, if there was time
        left = stretch.events[-1]["time"] - stretch.begin - sum(parts.values())
        share = min(1.0, max(0.0, left) / (steps * seconds))
        add(before, before + steps, seconds * share, waiting * share)
    return parts


def _find_end(stretch: _Stretch) -> tuple[float, float]:
    """When a stretch ended: at a rollback, at its last event, or with the steps that it logged after that.

    And for how many seconds it had hung before that was found.
    """
    if stretch.until is not None and stretch.until["event"] == "rollback":
        return float(stretch.until["time"]), 0.0
    marks = [event for event in stretch.events if event["event"] in _IN_LOOP]
    mark = marks[-1] if marks else stretch.events[0]
    step = max((event["step"] for event in marks if event.get("step") is not None), default=stretch.first or 0)
    sign = mark["time"] + _seconds_of([line for line in stretch.lines if line["step"] > step], step)
    found = next((event["time"] for event in stretch.events if event["event"] == "hang"), sign)
    last = stretch.events[-1]["time"]
    end = max(last, sign)
    if stretch.until is not None:
        end = min(end, max(stretch.until["time"], last))
    return float(end), float(max(0.0, found - sign))


def _describe(stretch: _Stretch, end: float, recovery: float | None) -> Attempt:
    return Attempt(
        start=stretch.begin,
        end=end,
        ended=_how_it_ended(stretch),
        first_step=stretch.first,
        last_step=stretch.reached,
        lost_steps=stretch.lost_steps,
        recovery_seconds=recovery,
    )


def _extend(attempt: Attempt, stretch: _Stretch, end: float) -> Attempt:
    """An attempt that went on after a rollback."""
    return dataclasses.replace(
        attempt,
        end=end,
        ended=_how_it_ended(stretch),
        last_step=stretch.reached,
        lost_steps=attempt.lost_steps + stretch.lost_steps,
    )


def _how_it_ended(stretch: _Stretch) -> Ending:
    names = {event["event"] for event in stretch.events}
    for ending in _ENDINGS:
        if ending in names:
            return ending
    if "spike" in names:
        return "diverged"
    return "running" if stretch.until is None else "killed"
