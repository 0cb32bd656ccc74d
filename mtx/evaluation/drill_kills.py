"""The long proof: one run that is killed again and again at random moments, and started again by the restart loop.

Decides when kills come: a part of them while a process starts, the others in or after a random step, so that the run
gets on. Steps are counted, not seconds: the drill is the same on a slow machine.

Invariant: every kill is a SIGKILL of a process that was running, and is counted once.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mtx.checkpoints import manifest
from mtx.evaluation.drill_copy import EVERY
from mtx.evaluation.drill_run import (
    BIT_EQUAL,
    DrillError,
    Launch,
    Launched,
    Place,
    check_resumes,
    compare,
    count_undone,
    last_step,
    last_words,
)

EARLY_SHARE = 0.3
"""Of the kills, those that come in the first seconds of a process."""

_EARLY_S, _LATE_S, _POLL_S = 6.0, 0.03, 0.002


@dataclass(frozen=True, kw_only=True)
class Kills:
    """What came of the kills.

    Attributes:
        kills: How many there were.
        early: How many of them before the run was beyond where the kill before had found it.
        steps: Of the run.
        steps_lost: That were done again, in all.
        most_lost: After one kill.
        losses: Against the undisturbed run.
        seconds: From start to end.
        ok: Whether the run ended bit-equal, and each attempt went on from the newest complete checkpoint.
        detail: What was wrong.
    """

    kills: int
    early: int
    steps: int
    steps_lost: int
    most_lost: int
    losses: str | None
    seconds: float
    ok: bool
    detail: str = ""


def count_steps(kills: int) -> int:
    """Updates of a run that so many kills leave unfinished; about a third of EVERY is got on with between two."""
    return EVERY * max(8, kills * 3 // 5)


def play_kills(
    place: Place, run_dir: Path, reference: Path, *, kills: int, seed: int, tell: Callable[[int], None]
) -> Kills:
    """Kills a run at random moments until there were enough kills, then lets it come to its end.

    Args:
        run_dir: Of the run that is killed.
        reference: Of an undisturbed one, at its end.
        seed: Of the moments.
        tell: Called with the number of kills after each.
    """
    chance, begin, done, early = random.Random(seed), time.monotonic(), 0, 0
    tops: list[int] = []  # steps that were logged when the kill came
    detail = ""
    launch = Launch(max_restarts=kills + 1, backoff_s=0.0)
    with Launched(place, run_dir, launch) as launched:

        def wait_for(event: str, number: int) -> None:
            code = launched.wait(lambda: len(launched.records(event)) >= number)
            if code is not None:
                raise DrillError(f"the run ended with {code} after {done} kills: {last_words(launched.output)}")

        try:
            for number in range(1, kills + 1):
                wait_for("started", number)
                before = last_step(run_dir)
                _wait_for_moment(run_dir, chance, before_step=place.copy.steps - EVERY)
                (pid,) = launched.pids()
                os.kill(pid, signal.SIGKILL)
                tops.append(last_step(run_dir))
                early += tops[-1] <= before
                done = number
                tell(done)
                wait_for("ended", number)
            launched.expect(0)
            check_resumes(launched)
        except (DrillError, ProcessLookupError) as error:
            detail = str(error)
    finished = not detail
    losses = compare(run_dir, reference) if finished else None
    if finished and losses != BIT_EQUAL:
        detail = f"not the numbers of an undisturbed run: {losses}"
    problems = manifest.verify(run_dir / "checkpoints" / str(place.copy.steps)) if finished else []
    return Kills(
        kills=done,
        early=early,
        steps=place.copy.steps,
        steps_lost=sum(count_undone(run_dir)),
        most_lost=max(count_undone(run_dir), default=0),
        losses=losses,
        seconds=time.monotonic() - begin,
        ok=not detail and not problems,
        detail=detail or "; ".join(problems),
    )


def _wait_for_moment(run_dir: Path, chance: random.Random, *, before_step: int) -> None:
    """Returns when the kill is due: some time after the start, or after some more steps, but not so late that the run
    could end before."""
    deadline = time.monotonic() + chance.uniform(0.0, _EARLY_S)
    first = last_step(run_dir)
    is_early, more = chance.random() < EARLY_SHARE, chance.randint(1, 2 * EVERY)
    if not is_early:
        deadline = time.monotonic() + 300.0
    # At a resume the lines of undone steps leave the file: the last step falls, then rises.
    lowest = first
    while time.monotonic() < deadline:
        step = last_step(run_dir)
        lowest = min(lowest, step)
        if step >= before_step:
            return
        if not is_early and step >= lowest + more:
            break
        time.sleep(_POLL_S)
    if not is_early:
        time.sleep(chance.uniform(0.0, _LATE_S))
