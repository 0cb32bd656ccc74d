"""The directories below `checkpoints/`: how a step gets its name, how long it keeps it, how it is put aside.

Decides names and retention, without JAX or Orbax. It never judges content: that is the manifest's.

    STEP.saving*       being written; of a killed process where no save is under way
    STEP               complete: its manifest was on the disk before it got this name
    STEP.bad-N         did not verify; kept for whoever wants to look or repair, never read again
    STEP.superseded-N  newer than a step that the run went back to; kept
    STEP.deleting      beyond the retention

Invariant: only complete steps are ever named `STEP`, and a complete one is only deleted when a newer one is complete.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mtx.checkpoints import manifest
from mtx.errors import CheckpointError

NAME = "checkpoints"
"""The folder of a run directory that holds them."""

_SAVING = ".saving"
_DELETING = ".deleting"
_TRACE = re.compile(r"\d+\.(deleting|(bad|superseded)-\d+)")


@dataclass(frozen=True, kw_only=True)
class Retention:
    """Which complete steps stay; what was set aside always does."""

    keep_last: int | None = None
    """Number of the newest; None: all."""
    keep_every: int | None = None
    """Multiples of this one; None: none of them."""
    keep_best: str | None = None
    """Name of a validation set: the best step on it (`find_best`)."""


def saving_dir(directory: Path, step: int) -> Path:
    """Where a step is written before it is complete."""
    return directory / f"{step}{_SAVING}"


def digests_dir(directory: Path, step: int) -> Path:
    """Where the processes put the digests of a step until they are all there (`mtx.checkpoints.parts`)."""
    return directory / f"{step}{_SAVING}.digests"


def publish(directory: Path, step: int) -> None:
    """Gives a complete step its name, through to the disk."""
    saving_dir(directory, step).rename(directory / str(step))
    manifest.flush_directory(directory)


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


def list_traces(directory: Path) -> list[str]:
    """What is left of steps that were complete once and have no name any more: set aside, or being deleted.

    A save that was killed leaves `STEP.saving*` and is no such trace: where there is nothing else, nothing was lost.
    """
    if not directory.is_dir():
        return []
    names = (path.name for path in directory.iterdir() if path.is_dir())
    return sorted(name for name in names if _TRACE.fullmatch(name))


def set_bad_aside(directory: Path, step: int, report: Callable[[str], None]) -> None:
    """Renames a step that does not verify to `STEP.bad-N`, or says why it cannot be."""
    try:
        report(f"checkpoint {step} is set aside as {set_aside(directory, step, reason='bad')}")
    except OSError as error:
        report(f"checkpoint {step} cannot be set aside: {error}")


def find_best(directory: Path, name: str) -> int | None:
    """The complete step with the least loss on a validation set, the older of equals; None where none was measured."""
    losses = {}
    for step in list_steps(directory):
        try:
            loss = manifest.read(directory / str(step)).meta.get("validation", {}).get(name)
        except CheckpointError:
            continue  # it can be restored by nobody, so it is not the best
        if loss is not None and math.isfinite(loss):
            losses[step] = loss
    return min(losses, key=lambda step: (losses[step], step), default=None)


def delete_old_steps(directory: Path, retention: Retention) -> list[int]:
    """Deletes the steps that the retention does not keep, and returns them. For when a step was just published."""
    complete = [step for step in list_steps(directory) if (directory / str(step) / manifest.NAME).exists()]
    old = [] if retention.keep_last is None else complete[: -retention.keep_last]
    best = find_best(directory, retention.keep_best) if retention.keep_best is not None and old else None
    every = retention.keep_every
    deleted = [step for step in old if step != best and (every is None or step % every)]
    for step in deleted:
        # Renamed first: a kill in the middle leaves nothing that could be taken for a step.
        (directory / str(step)).rename(directory / f"{step}{_DELETING}")
    for path in directory.glob(f"*{_DELETING}"):
        shutil.rmtree(path)
    return deleted


def list_dead_saves(directory: Path) -> list[Path]:
    """What killed and failed saves left, where no save is under way."""
    return sorted(directory.glob(f"*{_SAVING}*"))


def delete_dead_saves(directory: Path) -> None:
    """Deletes what killed and failed saves left. Not while a save is under way."""
    for path in list_dead_saves(directory):
        shutil.rmtree(path)
