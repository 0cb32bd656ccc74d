"""A save after its arrays are copied: what the thread of each process does until the step is complete, or given up.

Decides when a checkpoint counts, and that a disk that fails costs a checkpoint and not the run.

    all processes    wait for Orbax --> digest their share of the files (`parts`)
    process 0        waits for all digests and for `amend` --> manifest, rename to STEP, retention
    where it fails   every process passes Orbax's barriers all the same, process 0 removes what was half-written

No device works here: collectives of this thread would race with those of the training step.

Invariant: `STEP` appears whole or not at all, and earlier steps are touched only after it did.
"""

from __future__ import annotations

import contextlib
import itertools
import shutil
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from mtx.checkpoints import disk, manifest, parts, steps

_ORBAX_BARRIERS = 2  # at the end of each save: all processes have written; process 0 has renamed
_REMOVALS, _REMOVAL_SECONDS = 20, 0.25
_NUMBERS = itertools.count()  # of the saves of this process: the same on all, and never twice in their barriers' names


@dataclass(frozen=True, kw_only=True)
class Listeners:
    """Who is told what, all on process 0 but `reach`, which every process calls."""

    report: Callable[[str], None]
    on_stored: Callable[[int, float, int], None]
    on_failed: Callable[[int, str], None]
    reach: Callable[[str, int], None]

    def fail(self, step: int, cause: str) -> None:
        """Tells that a step is not saved."""
        self.report(f"checkpoint {step} could not be saved: {cause}; the run goes on, earlier checkpoints are kept")
        self.on_failed(step, cause)


@dataclass(kw_only=True)
class Save:
    """One save under way."""

    step: int
    meta: dict[str, Any]
    arrays: Mapping[str, manifest.ArrayEntry]
    size_bytes: int
    error: Exception | None = None
    begin: float = field(default_factory=time.perf_counter)
    amended: threading.Event = field(default_factory=threading.Event)


class Barriers:
    """Orbax's barriers between processes, which also a process that failed passes: nobody waits for it in vain."""

    def __init__(self, timeout_s: int) -> None:
        import orbax.checkpoint as ocp

        self._sync = ocp.multihost.get_barrier_sync_fn()
        self._timeout_s = timeout_s
        self._number, self._left = 0, 0

    def begin(self) -> None:
        """Before each save, on all processes."""
        self._number, self._left = next(_NUMBERS), _ORBAX_BARRIERS

    def meet(self, *, key: str, timeout_ms: int) -> None:
        """Orbax's `barrier_sync_fn`. Barriers are counted, since a step may be saved again under Orbax's `key`."""
        self._left -= 1
        self._sync(key=f"mtx.checkpoints.{self._number}.{self._left}", timeout_ms=timeout_ms)

    def pass_rest(self) -> None:
        """Goes through those that Orbax did not come to.

        Raises:
            TimeoutError: Another process did not come.
        """
        while self._left > 0:
            try:
                self.meet(key="", timeout_ms=self._timeout_s * 1000)
            except jax.errors.JaxRuntimeError as error:
                raise TimeoutError(f"another process did not finish writing within {self._timeout_s} s") from error


def complete(
    save: Save,
    *,
    directory: Path,
    orbax: Any,
    barriers: Barriers,
    retention: steps.Retention,
    listeners: Listeners,
    timeout_s: int,
) -> bool:
    """Completes a save, in the thread of each process.

    Returns:
        Whether all went well here; where not, process 0 has told why.

    Raises:
        Exception: A bug, which is no matter of files.
    """
    process, is_primary = jax.process_index(), jax.process_index() == 0
    step_dir, folder = steps.saving_dir(directory, save.step), steps.digests_dir(directory, save.step)
    try:
        try:
            if save.error is not None:
                raise save.error
            listeners.reach("write", save.step)
        finally:
            _finish_writing(orbax, barriers)
        files = parts.digest_together(
            step_dir, folder, process=process, num_processes=jax.process_count(), timeout_s=timeout_s
        )
        if is_primary:
            save.amended.wait()
        listeners.reach("manifest", save.step)
        if is_primary:
            written = manifest.write(step_dir, step=save.step, meta=save.meta, arrays=save.arrays, files=files)
            steps.publish(directory, save.step)
    except Exception as error:
        if is_primary:
            _remove(directory)
        cause = disk.describe_error(error, directory, save.size_bytes)
        if not is_primary:
            parts.tell_failure(folder, process, f"process {process} on {socket.gethostname()}: {cause}")
        if not disk.is_disk_error(error):
            raise
        if is_primary:
            listeners.fail(save.step, cause)
        return False
    if is_primary:
        seconds = time.perf_counter() - save.begin
        _retain(directory, retention, folder, listeners.report)
        listeners.on_stored(save.step, seconds, written.size_bytes)
    return True


def _finish_writing(orbax: Any, barriers: Barriers) -> None:
    """Waits until no process writes any more.

    Raises:
        Exception: The first error of Orbax's threads, which it logs as well.
    """
    first: Exception | None = None
    while True:
        try:
            orbax.wait_until_finished()  # raises the errors of its threads one by one, the last ones in the next save
            break
        except Exception as error:
            first = first or error
    barriers.pass_rest()
    if first is not None:
        raise first


def _remove(directory: Path) -> None:
    """Removes what was half-written, until nothing of it comes back: where one array cannot be written, threads of
    TensorStore still write others, of which nobody can tell when they end. The next save removes what is left then."""
    for _ in range(_REMOVALS):
        with contextlib.suppress(OSError):  # a file that comes or goes meanwhile
            steps.delete_dead_saves(directory)
        time.sleep(_REMOVAL_SECONDS)
        if not steps.list_dead_saves(directory):
            return


def _retain(directory: Path, retention: steps.Retention, folder: Path, report: Callable[[str], None]) -> None:
    """Deletes what is not kept. The step is complete whether that works or not, and the next save tries again."""
    try:
        if folder.exists():
            shutil.rmtree(folder)
        steps.delete_old_steps(directory, retention)
    except OSError as error:
        report(f"old checkpoints cannot be deleted: {error}")
