"""Going on: what a run must be refused, what it must repeat, and that all processes find the same.

    config    against the checkpoint's         what changes the math or the data is agreed to, or refused
    stores    against the data ledger          the same content, or agreed to
    arrays    digests of what was restored     against those of what was saved
    step      the first one: batch, loss, norm against what the run had there before

Decides which checks there are and in which order; what a difference means is in `proof.py` and `checkpoints/drift.py`.

Invariant: where anything is refused, nothing has been written.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from mtx.checkpoints.drift import LENGTH, Drift
from mtx.checkpoints.run_directory import RunDirectory
from mtx.checkpoints.store import Checkpoints
from mtx.config.components import classes
from mtx.config.reader import Config
from mtx.config.schema import Optimizer, Schedule
from mtx.data import ledger
from mtx.data.course import in_force
from mtx.data.entry import Entry
from mtx.data.samples import Sources
from mtx.data.training import TrainingData, open_training_data
from mtx.errors import CheckpointError, DivergedError, UserError
from mtx.training import proof
from mtx.training.digest import Digester
from mtx.training.state import Setup, State


def all_follow_first(action: Callable[[], int | None]) -> int:
    """Has process 0 do something; where it refuses, all processes raise its error.

    Returns:
        What it returned, on all processes: a number; 0 for None.
    """
    error: UserError | None = None
    answer = 0
    if jax.process_index() == 0:
        try:
            answer = action() or 0
        except UserError as refused:
            error = refused
    if jax.process_count() > 1:
        told = np.array([0 if error is None else error.exit_code, answer], np.int32)
        code, answer = multihost_utils.broadcast_one_to_all(told).tolist()
        if code and error is None:
            kinds = {kind.exit_code: kind for kind in (UserError, DivergedError, CheckpointError)}
            raise kinds[code]("process 0 says what is wrong")
    if error is not None:
        raise error
    return int(answer)


@dataclass(frozen=True)
class Checked:
    """What a run goes on with.

    Attributes:
        data: Its stores, read as the ledger says.
        entries: The entries of the ledger that hold.
        new_entry: That of them which the ledger lacks.
        drift: How its config differs from the checkpoint's; what changes the math or the data is accepted.
        accept: Fields whose change is agreed to, changed or not.
    """

    data: TrainingData
    entries: Sequence[Entry]
    new_entry: Entry | None
    drift: Drift
    accept: frozenset[str]


def check(
    config: Config,
    directory: RunDirectory,
    sources: Sources,
    *,
    step: int | None,
    meta: Mapping[str, Any],
    accept: frozenset[str],
) -> Checked:
    """Opens the data and refuses what does not go together. Writes nothing: see `note`.

    Args:
        step: The checkpoint to go on from; None: the beginning.
        meta: Of that checkpoint.
        accept: Fields whose change is agreed to.

    Raises:
        UserError: The config or the data are others than those of the checkpoint, and that was not accepted.
    """
    run, start = config.run, step or 0
    entries = ledger.read_entries(directory.path)
    changed = {} if step is None else ledger.changed_stores(entries, run, sources, start)
    entry = ledger.next_entry(entries, run, sources, start)
    entries = in_force([*entries, entry] if entry else entries)
    data = open_training_data(run, entries, sources)
    drift = Drift()

    def decide() -> None:
        nonlocal drift
        drift = directory.check_resume(
            config, step=step, meta=meta, accepted=accept, tokenizer_files=data.tokenizer_files
        )
        if refused := {key: line for key, line in changed.items() if key not in accept}:
            lines = "".join(f"{key}: {line}\n" for key, line in refused.items())
            raise UserError(
                f"{lines}Put the stores back as they were; if the run is to go on with what they hold now, add "
                f"{' '.join(f'--accept {key}' for key in refused)}"
            )

    all_follow_first(decide)
    accepted = *drift.accepted, *(f"{key}: {line}" for key, line in changed.items())
    return Checked(data, entries, entry, replace(drift, accepted=accepted), accept)


def note(config: Config, directory: RunDirectory, checked: Checked, *, step: int) -> None:
    """Makes what was checked the run's own, from a step on. Collective.

    Raises:
        UserError: It cannot be written.
    """

    def write() -> None:
        directory.record(config, step)
        if checked.new_entry:
            ledger.append(directory.path, checked.new_entry)

    all_follow_first(write)


def restore(setup: Setup, checkpoints: Checkpoints, digester: Digester, step: int) -> tuple[State, dict[str, str]]:
    """The state of a checkpoint, and in which way it is proven to be what was saved.

    Raises:
        CheckpointError: An array differs, by name.
        UserError: It holds other arrays than this config describes.
    """
    abstract, meta = setup.canonical.abstract_state, checkpoints.meta(step)
    if checkpoints.parts(step) == {"params"}:  # imported weights
        restored = checkpoints.restore(step, {"params": abstract["params"]})
        return setup.initialize(restored["params"]), {}
    restored = checkpoints.restore(step, abstract)
    proven = {}
    if "digests" in meta:
        proven["arrays"] = proof.prove_arrays(meta["digests"], digester(restored).leaf_digests(), step=step)
    return setup.canonical.load(restored), proven


def prove_first_step(
    setup: Setup,
    checked: Checked,
    *,
    step: int,
    meta: Mapping[str, Any],
    now: Mapping[str, Any],
    values: Mapping[str, Any],
) -> dict[str, str]:
    """That the first step after a checkpoint is the one that the run did there before. Collective.

    Args:
        step: Updates done, the checkpoint's.
        meta: Of that checkpoint.
        now: The same about this program.
        values: Metrics of the first step.

    Returns:
        In which way batch and step are proven; nothing where the checkpoint does not know its next step.

    Raises:
        UserError: They are others.
    """
    saved = meta.get("probe")
    if saved is None:
        return {}
    data, entry = checked.data, checked.data.sizes.entry(step)
    accepted = [key for line in checked.drift.accepted if _bears_on_a_step(key := line.partition(":")[0])]
    reason = f"{', '.join(accepted)} accepted" if accepted else None
    if reason is None and not _draw_the_same(Entry.from_json(json.loads(meta["data"])), entry):
        reason = f"samples skipped at step {entry.step}" if entry.skipped_samples else "as the ledger says"
    excuse = "Data.train accepted" if "Data.train" in checked.accept else reason
    proven: dict[str, str] = {}

    def prove_batch() -> bool:
        digest = proof.batch_digest(data.train, step, data.sizes.size(step))
        proven["batch"] = proof.prove_batch(saved["batch"], digest, step=step, reason=excuse)
        return saved["batch"] != digest

    batch_differs = all_follow_first(prove_batch)
    kinds, platform = [meta["device_kind"], now["device_kind"]], setup.mesh.devices.flat[0].platform
    differences = proof.program_differences(meta, now)
    if not differences and not proof.is_deterministic(platform, os.environ.get("XLA_FLAGS", "")):
        differences = ["GPU kernels give other bits each time, without --xla_gpu_deterministic_ops=true"]
    proven["step"] = proof.prove_step(
        saved,
        {name: values[name] for name in ("loss", "grad_norm")},
        step=step,
        differences=differences,
        tolerance=proof.tolerance_of(setup.run.precision.compute, kinds),
        reason=excuse if batch_differs else reason,
    )
    return proven


def _draw_the_same(one: Entry, other: Entry) -> bool:
    """Whether both entries give the same batch at a step at which both hold."""
    return one.same_data(other) and (one.step, one.skipped_samples) == (other.step, other.skipped_samples)


def _bears_on_a_step(key: str) -> bool:
    """Whether loss and gradient of a step follow from a field. What is done with the gradient comes after them."""
    owner = classes()[key.partition(".")[0]]
    return key not in (*LENGTH, "Train.optimizer") and not issubclass(owner, Optimizer | Schedule)
