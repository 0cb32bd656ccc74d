"""Saving a sharded state while training goes on, and restoring it onto any mesh. The only file that touches Orbax.

Decides when a checkpoint counts: Orbax writes `STEP.saving`, then a thread of process 0 adds the manifest and gives
the directory its name. It does not decide what is in the state, when to save, or which step to resume from.

    save     every process; returns when the arrays are copied, so that the caller may donate them to the next step
    thread   waits for Orbax on all processes --> process 0: manifest, rename to STEP, retention
    restore  from an abstract state with shardings; the mesh it was saved on does not matter

Invariant: an error in the thread is raised by the next `save` or `wait`, on the process that had it.
"""

from __future__ import annotations

import importlib
import json
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from mtx.checkpoints import manifest, steps
from mtx.errors import CheckpointError, UserError

_LOG = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run, in `directory`. Used as a context manager, it waits for the last save at the end.

    A state is a dict of pytrees of `jax.Array` whose containers have string keys, such as `{"params": ..., "optimizer":
    ..., "step": ...}`. Each top-level key is stored apart and can be restored alone.

    `save`, `wait`, `latest_verified` and `restore` are collective: every process calls them in the same order.
    """

    def __init__(
        self,
        directory: Path,
        *,
        keep_last: int | None = None,
        keep_every: int | None = None,
        read_only: bool = False,
        report: Callable[[str], None] = _LOG.warning,
    ) -> None:
        """Opens the checkpoints of a run; nothing is created before the first save.

        Args:
            directory: The run's `checkpoints/`, on a file system that all processes share.
            keep_last: Number of newest steps that the retention keeps; None: all steps.
            keep_every: Older steps that are multiples of this one are kept too; None: none of them.
            read_only: Whether nothing is ever renamed here, as for a command that only looks.
            report: Called with a line for a person, on process 0, when a checkpoint is found to be bad.
        """
        self.directory = directory.absolute()
        self._keep_last, self._keep_every = keep_last, keep_every
        self._read_only = read_only
        self._report = report
        self._is_primary = jax.process_index() == 0
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoints")
        self._pending: Future[None] | None = None

    @cached_property
    def _orbax(self) -> Any:
        """Orbax's checkpointer, opened when arrays are first saved or restored."""
        import orbax.checkpoint as ocp

        # Trained floats hardly compress (8% for float32) and compressing them takes four times as long as writing.
        handler = ocp.PyTreeCheckpointHandler(use_compression=False)
        registry = ocp.DefaultCheckpointHandlerRegistry()
        registry.add(None, ocp.args.PyTreeSave, handler)
        registry.add(None, ocp.args.PyTreeRestore, handler)
        return ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(handler_registry=registry))

    def warm_up(self) -> None:
        """Imports what saving needs, which takes seconds, in the thread that completes saves: while a step compiles."""
        self._thread.submit(importlib.import_module, "orbax.checkpoint")

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, oldest first, verified or not."""
        return steps.list_steps(self.directory)

    def save(self, step: int, state: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        """Starts to save a state and returns as soon as its arrays are copied. Waits for the previous save first.

        Args:
            step: Updates done; the checkpoint's name.
            state: Dict of pytrees of `jax.Array`, sharded as they are.
            meta: JSON values that `meta` gives back.

        Raises:
            FileExistsError: The step has a checkpoint, which is never overwritten.
            OSError: The previous save failed, or this one cannot begin.
        """
        self.wait()
        if (self.directory / str(step)).exists():
            raise FileExistsError(f"{self.directory / str(step)} exists; a checkpoint is never overwritten")
        kept_meta = json.loads(json.dumps(meta))  # fails now where it cannot be stored; later changes do not matter
        arrays = {name: manifest.ArrayEntry(shape=x.shape, dtype=str(x.dtype)) for name, x in _leaves(state).items()}
        if self._is_primary:
            steps.delete_dead_saves(self.directory)
        import orbax.checkpoint as ocp

        self._orbax.save(  # begins with a barrier, so the other processes see that done
            steps.saving_dir(self.directory, step),
            args=ocp.args.Composite(
                **{name: ocp.args.PyTreeSave({name: jax.tree.map(_own, tree)}) for name, tree in state.items()}
            ),
        )
        self._pending = self._thread.submit(self._complete, step, kept_meta, arrays)

    def _complete(self, step: int, meta: dict[str, Any], arrays: dict[str, manifest.ArrayEntry]) -> None:
        self._orbax.wait_until_finished()  # has a barrier: afterwards the files of all processes are there
        if self._is_primary:
            manifest.write(steps.saving_dir(self.directory, step), step=step, meta=meta, arrays=arrays)
            steps.publish(self.directory, step)
            steps.delete_old_steps(self.directory, keep_last=self._keep_last, keep_every=self._keep_every)

    def wait(self) -> None:
        """Blocks until everything saved can be verified.

        Raises:
            Exception: What went wrong in the save, once.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        error = pending.exception()
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("mtx.checkpoints.wait")
        if error is not None:
            raise error

    def close(self) -> None:
        """Waits for the last save and ends the thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            if "_orbax" in self.__dict__:
                self._orbax.close()

    def verify(self, step: int) -> list[str]:
        """Reads all files of a step and returns what is wrong with them, a line per problem."""
        return manifest.verify(self.directory / str(step))

    def latest_verified(self) -> int | None:
        """The newest step whose files are all as they were written; None where nothing was ever saved.

        Newer ones that are not are reported and, unless read-only, renamed to `STEP.bad-N`.

        Raises:
            CheckpointError: There are checkpoints and none verifies.
        """
        self.wait()
        none, failed = -1, -2
        answer, message = none, ""
        if self._is_primary:
            try:
                step = steps.find_newest_verified(
                    self.directory, report=self._report, set_bad_aside=not self._read_only
                )
                answer = none if step is None else step
            except CheckpointError as error:
                answer, message = failed, str(error)
        if jax.process_count() > 1:
            answer = int(multihost_utils.broadcast_one_to_all(np.int32(answer)))
        if answer == failed:
            raise CheckpointError(message or f"{self.directory}: no checkpoint verifies; process 0 says why")
        return None if answer == none else answer

    def set_aside_after(self, step: int) -> list[int]:
        """Renames the steps newer than `step` to `STEP.superseded-N`, for a run that goes on from an older one."""
        newer = [later for later in self.steps() if later > step]
        if self._is_primary:
            for later in newer:
                self._report(f"kept as {steps.set_aside(self.directory, later, reason='superseded')}")
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("mtx.checkpoints.set_aside_after")
        return newer

    def parts(self, step: int) -> set[str]:
        """Top-level keys of the state that a step holds.

        Raises:
            CheckpointError: The step has no readable manifest.
        """
        return {name.split("/", 1)[0] for name in manifest.read(self.directory / str(step)).arrays}

    def meta(self, step: int) -> dict[str, Any]:
        """What was given to `save` beside the state.

        Raises:
            CheckpointError: The step has no readable manifest.
        """
        return manifest.read(self.directory / str(step)).meta

    def restore(self, step: int, abstract_state: Mapping[str, Any]) -> dict[str, Any]:
        """Reads a state, or the top-level keys of it that are asked for. Does not verify: see `latest_verified`.

        Args:
            step: A step of `steps()`.
            abstract_state: Dict of pytrees of `jax.ShapeDtypeStruct` with the shardings wanted, on any mesh.

        Returns:
            The same tree with `jax.Array` leaves.

        Raises:
            CheckpointError: The step has no readable manifest.
            UserError: It holds other arrays than those asked for.
        """
        self.wait()
        step_dir = self.directory / str(step)
        _check_arrays(step_dir, abstract_state)
        import orbax.checkpoint as ocp

        restored = self._orbax.restore(
            step_dir,
            args=ocp.args.Composite(
                **{
                    name: ocp.args.PyTreeRestore(
                        {name: tree}, restore_args=ocp.checkpoint_utils.construct_restore_args({name: tree})
                    )
                    for name, tree in abstract_state.items()
                }
            ),
        )
        return {name: restored[name][name] for name in abstract_state}


def _leaves(state: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves by their path: `optimizer/0/mu/embed/w`."""
    leaves = jax.tree_util.tree_leaves_with_path(dict(state))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _own(x: jax.Array) -> jax.Array:
    """`x`, or a copy if it lives on the host: Orbax copies from devices only, and so would read what the next step
    overwrites."""
    if x.sharding.memory_kind in (None, "device"):
        return x
    return jax.jit(lambda a: jax.device_put(a, jax.memory.Space.Device), out_shardings=x.sharding)(x)


def _check_arrays(step_dir: Path, abstract_state: Mapping[str, Any]) -> None:
    """Refuses what Orbax would take: it pads, cuts and casts arrays that do not fit."""
    saved = {
        name: entry for name, entry in manifest.read(step_dir).arrays.items() if name.split("/", 1)[0] in abstract_state
    }
    wanted = {
        name: manifest.ArrayEntry(shape=x.shape, dtype=str(x.dtype)) for name, x in _leaves(abstract_state).items()
    }
    differing = sorted(name for name in saved.keys() | wanted.keys() if saved.get(name) != wanted.get(name))
    if differing:
        first = differing[0]
        raise UserError(
            f"{step_dir} holds another state than this config describes: {len(differing)} arrays differ, first "
            f"{first}: saved {_describe(saved.get(first))}, wanted {_describe(wanted.get(first))}. Use the config that "
            "the run was started with"
        )


def _describe(entry: manifest.ArrayEntry | None) -> str:
    return "nothing" if entry is None else f"{entry.dtype}{list(entry.shape)}"
