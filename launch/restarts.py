"""Whether a run is started again, from the exit codes of its processes and from its progress. Pure.

    0 done | 2 user's mistake | 3 diverged | 5 no checkpoint verifies      ends with that code
    7 given up (said by host 0 where a scheduler does the restarts)      ends with that code
    4 preempted                                                          starts again at once
    6 hung or lost a process, or killed by a signal                      starts again at once, then with back-off
    1 bug, anything else                                                 starts again with back-off

Invariant: a run that makes no progress is given up after a bounded number of attempts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

DONE, PREEMPTED, STALLED, GIVEN_UP = 0, 4, 6, 7
FINAL = (2, 3, 5, GIVEN_UP)
"""Codes that a restart would only repeat."""

LONGEST_BACKOFF_S = 600.0

MEANING = {
    0: "done",
    1: "a bug",
    2: "the user's mistake or bad input",
    3: "the run diverged",
    4: "preempted, everything is saved",
    5: "no checkpoint verifies",
    6: "a process hung, was lost or computed wrongly",
    7: "given up: no progress in many attempts",
}


@dataclass(frozen=True)
class Decision:
    """What comes after an attempt: another one in `wait_s` seconds, or the end with exit code `code`."""

    restart: bool
    code: int
    wait_s: float
    reason: str


def decide(codes: Sequence[int], *, stopping: bool, failures: int, max_restarts: int, backoff_s: float) -> Decision:
    """Decides.

    Args:
        codes: Exit code of each process that ended by itself, negative for a signal.
        stopping: Whether the launcher was asked to stop.
        failures: Attempts in a row, this one included, since the one that made progress.
        max_restarts: Failures in a row that are put up with.
        backoff_s: Of the first restart that waits.
    """
    code = telling(codes)
    what = describe(code)
    if stopping:
        # A process that was told to stop before it listened has begun nothing.
        asked = all(c in (DONE, PREEMPTED, -2, -10, -15, 130) for c in codes) and code != DONE
        return Decision(False, PREEMPTED if asked else as_exit(code), 0.0, f"{what}; stopped as asked")
    if code == DONE or code in FINAL:
        return Decision(False, code, 0.0, what)
    if failures > max_restarts:
        why = f"{what}; given up: {failures} attempts in a row without a newer checkpoint"
        return Decision(False, as_exit(code), 0.0, why)
    wait_s = 0.0
    if code != PREEMPTED:
        wait_s = backoff(failures - (2 if code == STALLED or _is_signal(code) else 1), backoff_s)
    return Decision(True, as_exit(code), wait_s, what)


def backoff(doublings: int, backoff_s: float) -> float:
    """Seconds to wait; 0 for fewer than no doublings."""
    return min(LONGEST_BACKOFF_S, backoff_s * 2.0 ** min(doublings, 64)) if doublings >= 0 else 0.0


def telling(codes: Sequence[int]) -> int:
    """Of the exit codes of several processes, the one that says what happened: others only follow from it."""

    def rank(code: int) -> int:
        if code in FINAL:
            return FINAL.index(code)
        if code == STALLED:
            return 4
        if _is_signal(code):
            return 5
        return {PREEMPTED: 7, DONE: 8}.get(code, 6)

    return min(codes, key=rank)


def _is_signal(code: int) -> bool:
    return code < 0 or code > 128


def describe(code: int) -> str:
    """An exit code in words."""
    if code < 0:
        return f"killed by signal {-code}"
    if code > 128:
        return f"exit code {code} (signal {code - 128})"
    return f"exit code {code}" + (f" ({MEANING[code]})" if code in MEANING else "")


def as_exit(code: int) -> int:
    """An exit code that a process can end with."""
    return 128 - code if code < 0 else code


def newest_step(run_dir: str) -> int | None:
    """The newest step that has a complete checkpoint; None: there is none."""
    manifests = (Path(run_dir) / "checkpoints").glob("*/manifest.json")
    return max((int(path.parent.name) for path in manifests if path.parent.name.isdecimal()), default=None)


def failures_recorded(attempts: Path, newest: int | None) -> int:
    """How many attempts in a row have made no progress, by the record of those so far.

    An attempt whose end is not recorded, since its launcher was lost as well, counts. Lines that a crash has cut short
    do not.

    Args:
        attempts: The record; need not exist.
        newest: The newest step that has a checkpoint now.
    """
    failures, open_ended, recorded = 0, False, None
    lines = attempts.read_text(encoding="utf-8", errors="replace").splitlines() if attempts.exists() else []
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if event["event"] == "started":
            failures, open_ended = failures + open_ended, True
        elif event["event"] == "ended":
            failures, open_ended, recorded = event.get("failures", 0), False, event["newest_step"]
    progress = newest is not None and (recorded is None or newest > recorded)
    return 0 if progress else failures + open_ended
