"""The directories below `checkpoints/`: how a step gets its name, how long it keeps it, how it is put aside.

Decides names and retention, without JAX or Orbax. It never judges content: that is the manifest's.

    STEP.saving*   being written; of a killed process where no save is under way
    STEP           complete: its manifest was on the disk before it got this name
    STEP.bad-N     did not verify; kept for whoever wants to look or repair, never read again
    STEP.deleting  beyond the retention

Invariant: only complete steps are ever named `STEP`, and a complete one is only deleted when a newer one is complete.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from mtx.checkpoints import manifest
from mtx.errors import CheckpointError

NAME = "checkpoints"
"""The folder of a run directory that holds them."""

_SAVING = ".saving"
_DELETING = ".deleting"


def saving_dir(directory: Path, step: int) -> Path:
    """Where a step is written before it is complete."""
    return directory / f"{step}{_SAVING}"


def publish(directory: Path, step: int) -> None:
    """Gives a complete step its name, through to the disk."""
    saving_dir(directory, step).rename(directory / str(step))
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def list_steps(directory: Path) -> list[int]:
    """Steps that have a directory, oldest first."""
    if not directory.is_dir():
        return []
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdecimal() and path.is_dir())


def set_aside(directory: Path, step: int, *, reason: str) -> Path:
    """Renames a step to `STEP.REASON-N` with the first free N: its name becomes free and its bytes are kept."""
    number = 1
    while (target := directory / f"{step}.{reason}-{number}").exists():
        number += 1
    (directory / str(step)).rename(target)
    return target


def find_newest_verified(directory: Path, *, report: Callable[[str], None], set_bad_aside: bool) -> int | None:
    """The newest step that verifies, or None where nothing was ever saved.

    Args:
        directory: The run's `checkpoints/`.
        report: Called with a line for each problem of a step that is passed over, and for what became of it.
        set_bad_aside: Whether a step that does not verify is renamed to `STEP.bad-N`.

    Raises:
        CheckpointError: Steps exist, or were set aside as bad, and none verifies.
    """
    found = list_steps(directory)
    for step in reversed(found):
        problems = manifest.verify(directory / str(step))
        if not problems:
            return step
        for problem in problems:
            report(f"checkpoint {step} does not verify: {problem}")
        if set_bad_aside:
            try:
                report(f"checkpoint {step} is set aside as {set_aside(directory, step, reason='bad')}")
            except OSError as error:
                report(f"checkpoint {step} cannot be set aside: {error}")
    if not found and not any(directory.glob("*.bad-*")):
        return None
    raise CheckpointError(
        f"{directory}: no checkpoint verifies, so there is nothing to go on from. Bad ones are kept (STEP.bad-N): put "
        "a good copy back as STEP, or start again in a new run directory"
    )


def delete_old_steps(directory: Path, *, keep_last: int | None, keep_every: int | None) -> list[int]:
    """Deletes the steps that are neither among the newest `keep_last` nor multiples of `keep_every`.

    To be called when a step was just published. Returns the steps deleted.
    """
    complete = [step for step in list_steps(directory) if (directory / str(step) / manifest.NAME).exists()]
    old = [] if keep_last is None else complete[:-keep_last]
    deleted = [step for step in old if keep_every is None or step % keep_every]
    for step in deleted:
        # Renamed first: a kill in the middle leaves nothing that could be taken for a step.
        (directory / str(step)).rename(directory / f"{step}{_DELETING}")
    for path in directory.glob(f"*{_DELETING}"):
        shutil.rmtree(path)
    return deleted


def delete_dead_saves(directory: Path) -> None:
    """Deletes what killed processes left of saves that were never complete. Not while a save is under way."""
    for path in directory.glob(f"*{_SAVING}*"):
        shutil.rmtree(path)
