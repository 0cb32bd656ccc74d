"""Faults on demand, so that a drill can have a process die, stop, sleep or misread its clock at a given moment.

Decides what `MTX_FAULT` may say: one or more, separated by `;`, of

    kill:PHASE:STEP[:PROCESS]             SIGKILL itself on reaching the phase at this step or a later one
    stop:PHASE:STEP[:PROCESS]             SIGSTOP itself
    sleep:PHASE:STEP:SECONDS[:PROCESS]    sleep there
    clock:SECONDS:STEP[:PROCESS]          from this step on `time.time()` is off by so many seconds

Without PROCESS it means every process. Each fault happens once: it is first noted in the file that `MTX_FAULT_FIRED`
names, and what is noted there does not happen again, so that a restarted process lives.

Invariant: without `MTX_FAULT` nothing here does anything.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import get_args

from mtx.errors import UserError
from mtx.health.heartbeat import Phase

FAULT, FIRED = "MTX_FAULT", "MTX_FAULT_FIRED"
_FORMS = {
    "kill": ("PHASE", "STEP"),
    "stop": ("PHASE", "STEP"),
    "sleep": ("PHASE", "STEP", "SECONDS"),
    "clock": ("SECONDS", "STEP"),
}


@dataclass(frozen=True)
class Fault:
    """One fault as it was asked for; `phase` is None where any will do, `process` where all are meant."""

    text: str
    kind: str
    step: int
    phase: str | None = None
    seconds: float = 0.0
    process: int | None = None


def reach(phase: Phase, step: int) -> None:
    """To be called where a process comes to a phase: the faults that are due there happen.

    Raises:
        UserError: `MTX_FAULT` is malformed.
    """
    for fault in [fault for fault in _planned() if fault.phase in (None, phase) and step >= fault.step]:
        _happen(fault)


def parse_faults(text: str) -> list[Fault]:
    """The faults that a text asks for.

    Raises:
        UserError: It has another form.
    """
    return [_parse(part.strip()) for part in text.split(";") if part.strip()]


def _parse(text: str) -> Fault:
    kind, *values = text.split(":")
    names = _FORMS.get(kind)
    if names is None or len(values) not in (len(names), len(names) + 1):
        forms = ", ".join(":".join([kind, *names]) + "[:PROCESS]" for kind, names in _FORMS.items())
        raise UserError(f"{FAULT}: {text!r} has none of the forms {forms}")
    given = dict(zip((*names, "PROCESS"), values))
    if "PHASE" in given and given["PHASE"] not in get_args(Phase):
        raise UserError(f"{FAULT}: {text!r}: the phase is none of {', '.join(get_args(Phase))}")
    try:
        return Fault(
            text=text,
            kind=kind,
            step=int(given["STEP"]),
            phase=given.get("PHASE"),
            seconds=float(given.get("SECONDS", 0)),
            process=int(given["PROCESS"]) if "PROCESS" in given else None,
        )
    except ValueError:
        raise UserError(f"{FAULT}: {text!r}: STEP and PROCESS are whole numbers, SECONDS is a number") from None


@cache
def _planned() -> list[Fault]:
    """The faults of this process that are still to happen."""
    process = int(os.environ.get("MTX_PROCESS_ID") or 0)
    faults = parse_faults(os.environ.get(FAULT, ""))
    noted = _noted().read_text().splitlines() if faults and _noted().exists() else []
    return [fault for fault in faults if fault.process in (None, process) and _note(fault) not in noted]


def _happen(fault: Fault) -> None:
    _planned().remove(fault)
    with _noted().open("a") as file:  # before it happens: afterwards there may be nobody to do it
        file.write(f"{_note(fault)}\n")
    match fault.kind:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "sleep":
            time.sleep(fault.seconds)
        case "clock":
            true_time, seconds = time.time, fault.seconds
            time.time = lambda: true_time() + seconds


def _noted() -> Path:
    return Path(os.environ.get(FIRED, os.devnull))


def _note(fault: Fault) -> str:
    """A line of the file of faults that happened."""
    return f"{fault.text} in process {os.environ.get('MTX_PROCESS_ID') or 0}"
