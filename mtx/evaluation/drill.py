"""The fire drill: what is done to a run, and what must come of it, as plain data.

    fault                   in the run itself (`MTX_FAULT`), which the restart loop then sees to
    fault, then damage      the run is killed, something of it is damaged, and it is started again
    fault, then refusal     the same, but it must be refused, changing nothing, until the damage is mended
    fault, then hand        the run stops itself, and the drill does something to it before it goes on

Decides the scenarios; `drill_play` plays them. Steps are chosen so that a complete checkpoint is there for certain:
a save waits for the one before it.

Invariant: a scenario is passed only if its run came to its end with the numbers of an undisturbed one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mtx.evaluation.drill_copy import EVERY, PEER_TIMEOUT_S

STEPS = 16
LATE = 3 * EVERY + 1
"""A step at which the checkpoint of step 2 * EVERY is complete."""

Act = Literal["flip", "delete", "truncate", "corrupt data", "read-only", "full disk", "filling disk", "SIGTERM"]
Outcome = Literal["passed", "failed", "not possible here"]


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One thing that goes wrong.

    Attributes:
        name: By which `--only` knows it.
        what: In words.
        fault: Of the first launch (`mtx.health.faults`).
        act: What the drill does then.
        processes: Of the run.
        devices: Of each process.
        then: Processes and devices of each after the fault; None: as before.
        first_codes: Exit codes that the first attempt may end with; None: any.
        ends_within_s: Seconds after the fault in which the first attempt must be at its end.
        may_lose: Steps that may have to be done again: a save takes the time of a few steps.
        events: Events that the journal must have.
        grace_s: Seconds that the launcher leaves processes to end by themselves.
    """

    name: str
    what: str
    fault: str
    act: Act | None = None
    processes: int = 1
    devices: int = 1
    then: tuple[int, int] | None = None
    first_codes: tuple[int, ...] | None = None
    ends_within_s: float | None = None
    may_lose: int = 2 * EVERY
    events: tuple[str, ...] = ()
    grace_s: float = 20.0

    @property
    def on_private_disk(self) -> bool:
        """Whether the run directory needs a file system of its own."""
        return self.act in ("full disk", "filling disk", "read-only")


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came of a scenario.

    Attributes:
        name: Of the scenario.
        what: In words.
        outcome: Whether it passed.
        detail: What was found instead of what was expected, or why it is not possible; empty where it passed.
        exit_codes: Of the processes of each attempt; negative for a signal.
        losses: Against the undisturbed run: `bit-equal`, or the largest relative difference; None: not compared.
        steps_lost: Steps that had to be done again.
        seconds_to_end: From the fault to the end of the attempt, of all its processes.
        seconds_to_recover: From the fault (or from the restart, where the drill itself kept the run down) to the first
            step beyond it.
        seconds: That the scenario took.
        run_dir: Where the run is kept; None: it is not.
    """

    name: str
    what: str
    outcome: Outcome
    detail: str = ""
    exit_codes: list[list[int]] = dataclasses.field(default_factory=list)
    losses: str | None = None
    steps_lost: int | None = None
    seconds_to_end: float | None = None
    seconds_to_recover: float | None = None
    seconds: float = 0.0
    run_dir: str | None = None


def _damaged(name: str, what: str, act: Act, **more: Any) -> Scenario:
    return Scenario(name=name, what=what, fault=f"kill:step:{LATE}", act=act, first_codes=(-9,), **more)


def _killed(name: str, what: str, phase: str, step: int) -> Scenario:
    return Scenario(name=name, what=what, fault=f"kill:{phase}:{step}", first_codes=(-9,))


def list_scenarios(processes: int) -> list[Scenario]:
    """All scenarios, for runs of so many processes where they have several."""
    several: dict[str, Any] = {"processes": processes}
    last = processes - 1
    return [
        _killed("kill-compile", "SIGKILL while the step is compiled", "compile", 0),
        _killed("kill-step", "SIGKILL in a step", "step", 2 * EVERY + 2),
        _killed("kill-save", "SIGKILL when a save begins", "save", 3 * EVERY),
        _killed("kill-write", "SIGKILL while a checkpoint is written", "write", 3 * EVERY),
        _killed("kill-manifest", "SIGKILL between a save and its manifest", "manifest", 3 * EVERY),
        Scenario(
            name="sigterm", what="SIGTERM to the process alone: saved, exit code 4, started again",
            fault=f"stop:step:{2 * EVERY + 2}", act="SIGTERM", first_codes=(4,), may_lose=0, events=("preempted",),
        ),
        Scenario(
            name="kill-one", what=f"SIGKILL of one of {processes} processes",
            fault=f"kill:step:{2 * EVERY + 2}:{last}", first_codes=(6, -6, -9), ends_within_s=30.0, **several,
        ),
        Scenario(
            name="stop-one", what=f"SIGSTOP of one of {processes} processes", fault=f"stop:step:{2 * EVERY + 2}:{last}",
            first_codes=(6, -6, -9), ends_within_s=PEER_TIMEOUT_S + 10.0, grace_s=2.0, **several,
        ),
        _damaged("flip-checkpoint", "a flipped byte in the newest checkpoint", "flip", may_lose=3 * EVERY),
        _damaged("delete-checkpoint", "a deleted file in the newest checkpoint", "delete", may_lose=3 * EVERY),
        _damaged("truncate-checkpoint", "a truncated file in the newest checkpoint", "truncate", may_lose=3 * EVERY),
        _damaged("corrupt-data", "a flipped byte in a token store: refused until it is mended", "corrupt data"),
        Scenario(
            name="full-disk", what="a disk that is full at a save and has room again at the next", act="full disk",
            fault=f"stop:save:{2 * EVERY};sleep:step:{3 * EVERY - 1}:4;stop:save:{3 * EVERY}",
            first_codes=(0,), may_lose=0, events=("save_failed",),
        ),
        Scenario(
            name="filling-disk", what="a disk that fills up while a checkpoint is written, to the last byte",
            act="filling disk", fault=f"stop:write:{2 * EVERY};sleep:step:{3 * EVERY - 1}:4;stop:save:{3 * EVERY}",
            first_codes=(0,), may_lose=0, events=("save_failed",),
        ),
        _damaged("read-only", "a run directory that cannot be written: refused until it can", "read-only"),
        Scenario(
            name="other-devices", what="started again on two devices instead of one", fault=f"kill:step:{LATE}",
            first_codes=(-9,), then=(1, 2),
        ),
        Scenario(
            name="other-processes", what=f"started again as one process instead of {processes}", then=(1, 1),
            fault=f"kill:step:{LATE}", **several,
        ),
        Scenario(
            name="clock-jump", what="the clock goes back by a day", fault=f"clock:-86400:{EVERY + 2}", first_codes=(0,),
            may_lose=0,
        ),
    ]  # fmt: skip


def as_json(results: Sequence[Result]) -> dict[str, Any]:
    """The drill as a program reads it."""
    ok = all(result.outcome != "failed" for result in results)
    return {"ok": ok, "scenarios": [dataclasses.asdict(result) for result in results]}
