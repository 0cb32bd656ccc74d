"""Saving a sharded state while training goes on, and restoring it onto any mesh. The only file that touches Orbax.

Decides what the main thread does: what all processes agree on before a save and after it, and which step is good. What
follows when the arrays are copied is in `saving`. It does not decide what is in the state or when to save.

    save     every process; returns when the arrays are copied, so that the caller may donate them to the next step
    amend    what is known of a step only later; then its manifest can be written
    thread   see `saving`
    restore  from an abstract state with shardings; the mesh it was saved on does not matter

Invariant: a save that fails for its files is told once and costs nothing else; any other error is raised, on all
processes.
"""

from __future__ import annotations

import functools
import importlib
import json
import logging
import types
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from mtx.checkpoints import disk, manifest, saving, steps
from mtx.checkpoints.exchange import exchange
from mtx.errors import CheckpointError, UserError

_LOG = logging.getLogger(__name__)

_MAX_PROBLEMS = 20  # told by each process of each bad checkpoint


class Checkpoints:
    """The checkpoints of one run, in `directory`. Used as a context manager, it waits for the last save at the end.

    A state is a dict of pytrees of `jax.Array` whose containers have string keys, such as `{"params": ..., "optimizer":
    ..., "step": ...}`. Each top-level key is stored apart and can be restored alone.

    `save`, `amend`, `wait`, `verify`, `latest_verified` and `restore` are collective: every process calls them in the
    same order, from its main thread.
    """

    def __init__(
        self,
        directory: Path,
        *,
        keep_last: int | None = None,
        keep_every: int | None = None,
        keep_best: str | None = None,
        read_only: bool = False,
        report: Callable[[str], None] = _LOG.warning,
        on_stored: Callable[[int, float, int], None] = lambda step, seconds, size_bytes: None,
        on_failed: Callable[[int, str], None] = lambda step, cause: None,
        reach: Callable[[str, int], None] = lambda phase, step: None,
        timeout_s: int = 1200,
    ) -> None:
        """Opens the checkpoints of a run; nothing is created before the first save.

        Args:
            directory: The run's `checkpoints/`, on a file system that all processes share.
            keep_last: Number of newest steps that the retention keeps; None: all steps.
            keep_every: Older steps that are multiples of this one are kept too; None: none of them.
            keep_best: Name of a validation set: the step with the least `meta["validation"][name]` is kept too.
            read_only: Whether nothing is ever renamed here, as for a command that only looks.
            report: Called with a line for a person, on process 0, when a checkpoint is found to be bad (main thread)
                or could not be saved (either thread).
            on_stored: Called with step, seconds since the call of `save` and size in bytes when a checkpoint is
                complete, on process 0, in the thread of the saves.
            on_failed: Called with step and cause when a save failed or did not begin for lack of room, on process 0,
                in the thread of the saves or, where it did not begin, in the main thread.
            reach: Called with "write" and the step when the files begin to be waited for, and with "manifest" when all
                of them are written and digested and the manifest is not there yet; on all processes, in the thread of
                the saves. An `OSError` that it raises fails the save.
            timeout_s: How long the processes wait for one another while they write and digest; then the save failed.
        """
        self.directory = directory.absolute()
        self._retention = steps.Retention(keep_last=keep_last, keep_every=keep_every, keep_best=keep_best)
        self._read_only = read_only
        self._report = report
        self._listeners = saving.Listeners(report=report, on_stored=on_stored, on_failed=on_failed, reach=reach)
        self._timeout_s = timeout_s
        self._is_primary = jax.process_index() == 0
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoints")
        self._pending: tuple[saving.Save, Future[bool]] | None = None
        self._is_complete = True

    @cached_property
    def _orbax(self) -> Any:
        """Orbax's checkpointer, opened when arrays are first saved or restored."""
        import orbax.checkpoint as ocp

        logging.getLogger("absl").addFilter(_is_news)
        # Trained floats hardly compress (8% for float32) and compressing them takes four times as long as writing.
        handler = ocp.PyTreeCheckpointHandler(use_compression=False)
        registry = ocp.DefaultCheckpointHandlerRegistry()
        registry.add(None, ocp.args.PyTreeSave, handler)
        registry.add(None, ocp.args.PyTreeRestore, handler)
        return ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(handler_registry=registry),
            async_options=ocp.AsyncOptions(timeout_secs=self._timeout_s, barrier_sync_fn=self._barriers.meet),
        )

    @cached_property
    def _barriers(self) -> saving.Barriers:
        return saving.Barriers(self._timeout_s)

    def warm_up(self) -> None:
        """Imports what saving needs, which takes seconds, in the thread that completes saves: while a step runs."""
        self._thread.submit(importlib.import_module, "orbax.checkpoint")

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        if error is not None and self._pending is not None:
            # Other processes may not come by here, so nothing is agreed on: the save ends as it can.
            (save, future), self._pending = self._pending, None
            save.amended.set()
            if (failure := future.exception()) is not None:
                self._report(f"checkpoint {save.step} failed: {failure!r}")
        self.close()

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, oldest first, verified or not."""
        return steps.list_steps(self.directory)

    def save(self, step: int, state: Mapping[str, Any], meta: Mapping[str, Any]) -> bool:
        """Starts to save a state and returns as soon as its arrays are copied. Waits for the previous save first.

        The step is not complete before `amend` was called, or what calls it: `wait`, the next `save`, `close`.

        Args:
            step: Updates done; the checkpoint's name.
            state: Dict of pytrees of `jax.Array`, sharded as they are.
            meta: JSON values that `meta` gives back. Those of process 0 are stored.

        Returns:
            Whether it began. Where not, there is no room or the directory cannot be written; it is told why.

        Raises:
            FileExistsError: The step has a checkpoint, which is never overwritten.
        """
        self.wait()
        leaves = _leaves(state)
        save = saving.Save(
            step=step,
            meta=json.loads(json.dumps(meta)),  # fails now where it cannot be stored; later changes do not matter
            arrays={name: manifest.ArrayEntry(shape=x.shape, dtype=str(x.dtype)) for name, x in leaves.items()},
            size_bytes=sum(x.nbytes for x in leaves.values()),
        )
        exists, obstacle = exchange(self._prepare(save) if self._is_primary else None)[0]
        if exists:
            raise FileExistsError(f"{self.directory / str(step)} exists; a checkpoint is never overwritten")
        if obstacle is not None:
            self._is_complete = False
            if self._is_primary:
                self._listeners.fail(step, obstacle)
            return False
        import orbax.checkpoint as ocp

        orbax = self._orbax
        self._barriers.begin()
        try:
            orbax.save(
                steps.saving_dir(self.directory, step),
                args=ocp.args.Composite(
                    **{name: ocp.args.PyTreeSave({name: jax.tree.map(_own, tree)}) for name, tree in state.items()}
                ),
            )
        except Exception as error:
            if not disk.is_disk_error(error):
                raise
            save.error = error  # other processes may have begun: the thread ends it on all
        future = self._thread.submit(
            saving.complete,
            save,
            directory=self.directory,
            orbax=orbax,
            barriers=self._barriers,
            retention=self._retention,
            listeners=self._listeners,
            timeout_s=self._timeout_s,
        )
        self._pending = save, future
        return True

    def _prepare(self, save: saving.Save) -> tuple[bool, str | None]:
        """Makes place for a save. Returns whether its step exists, and what else stands in its way."""
        try:
            if (self.directory / str(save.step)).exists():
                return True, None
            self.directory.mkdir(parents=True, exist_ok=True)
            steps.delete_dead_saves(self.directory)
            if not disk.has_room(self.directory, save.size_bytes):
                return False, disk.describe_full(self.directory, save.size_bytes)
            steps.digests_dir(self.directory, save.step).mkdir()
        except OSError as error:
            return False, disk.describe_error(error, self.directory, save.size_bytes)
        return False, None

    def amend(self, more_meta: Mapping[str, Any]) -> None:
        """Adds to the meta of the save under way what is known only now. Once per save; nothing where none began.

        Args:
            more_meta: JSON values; those of process 0 are stored.
        """
        if self._pending is not None:
            save, _ = self._pending
            if save.amended.is_set():
                raise ValueError(f"the checkpoint of step {save.step} was amended already")
            save.meta.update(json.loads(json.dumps(more_meta)))
            save.amended.set()

    def wait(self) -> bool:
        """Blocks until the last save is complete or given up.

        Returns:
            Whether it is complete; the same on all processes. True where nothing was ever saved.

        Raises:
            Exception: What went wrong in the save beside its files, on the process that had it; on others a
                `RuntimeError`.
        """
        if self._pending is None:
            return self._is_complete
        (save, future), self._pending = self._pending, None
        save.amended.set()
        error = future.exception()
        endings = exchange("bug" if error is not None else "complete" if future.result() else "failed")
        if error is not None:
            raise error
        if "bug" in endings:
            raise RuntimeError(f"process {endings.index('bug')} could not save step {save.step} and says why")
        self._is_complete = endings[0] == "complete"  # process 0 gives the step its name, nobody else
        return self._is_complete

    def close(self) -> None:
        """Waits for the last save and ends the thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            if "_orbax" in self.__dict__:
                self._orbax.close()

    def verify(self, step: int) -> list[str]:
        """Reads all files of a step, each process its share, and returns what is wrong, a line per problem."""
        problems = manifest.verify(
            self.directory / str(step), process=jax.process_index(), num_processes=jax.process_count()
        )
        # Each process reads the manifest, so what is wrong with that comes from all.
        return list(dict.fromkeys(line for lines in exchange(problems[:_MAX_PROBLEMS]) for line in lines))

    def latest_verified(self) -> int | None:
        """The newest step whose files are all as they were written; None where nothing was ever saved.

        Newer ones that are not are reported and, unless read-only, renamed to `STEP.bad-N`.

        Raises:
            CheckpointError: There are checkpoints, or traces of complete ones (`steps.list_traces`), and none verifies.
        """
        self.wait()
        found, traces = exchange((steps.list_steps(self.directory), steps.list_traces(self.directory)))[0]
        for step in reversed(found):
            problems = self.verify(step)
            if not problems:
                return int(step)
            if self._is_primary:
                for problem in problems:
                    self._report(f"checkpoint {step} does not verify: {problem}")
                if not self._read_only:
                    steps.set_bad_aside(self.directory, step, self._report)
        if not found and not traces:
            return None
        raise CheckpointError(
            f"{self.directory}: no checkpoint verifies, so there is nothing to go on from. Bad ones are kept "
            "(STEP.bad-N): put a good copy back as STEP, or start again in a new run directory"
        )

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
    return x if x.sharding.memory_kind in (None, "device") else _make_copy(x.sharding)(x)


@functools.cache
def _make_copy(sharding: jax.sharding.Sharding) -> Callable[[jax.Array], jax.Array]:
    """A copy on the host by way of the device; compiled once, not at every save."""
    return jax.jit(lambda x: jax.device_put(x, jax.memory.Space.Device), out_shardings=sharding)


def _is_news(record: logging.LogRecord) -> bool:
    """A filter of Orbax's log: errors with a traceback are raised as well, and told in one line (`saving`)."""
    return not (record.exc_info and "orbax" in record.pathname)


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
