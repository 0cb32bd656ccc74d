"""Whether a resumed run is the run that was saved: the same arrays, the same next batch, the same next step.

    arrays   digests of what was restored, against those of what was saved            always the same bits
    batch    digest of the next batch, against that of the batch the run went on with  always the same bits
    step     its loss and gradient norm, against those of the run                      the same bits from the same
             program on the same kind of device; within a tolerance from another one

Compares plain values that others have found, and says what a difference means. Raises nothing for what a user has
accepted, and calls nothing equal that was not compared.

Invariant: where arrays and batch are proven, a step that differs can only be computed otherwise.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mtx.errors import CheckpointError, UserError
from mtx.training.inputs import Reader

BLOCK_ROWS = 256
"""Sequences of a batch that are in memory at a time."""


@dataclass(frozen=True)
class Tolerance:
    """Largest relative differences of a step's figures between two programs that compute the same."""

    loss: float
    grad_norm: float


TOLERANCES = {
    "float32": Tolerance(loss=1e-5, grad_norm=1e-4),
    "bfloat16": Tolerance(loss=1e-2, grad_norm=1e-1),
    "float8": Tolerance(loss=2e-2, grad_norm=3e-1),
}
"""By `Precision.compute`. The step after 0 and 5 others, of models of 4 layers, with and without experts, was measured
on 16 layouts and cuts of the batch, the loss and the backward pass against one device and one cut. Worst:

    float32    loss 1.9e-7, gradient norm 3.3e-7
    bfloat16   loss 1.9e-4, gradient norm 1.2e-3; with experts 1.4e-3 and 8.3e-3, since some tokens change theirs

    float8     loss 1.5e-3, gradient norm 2.8e-2: three layers, the first step, 6 layouts and ways to compute it

Ten times the worst is allowed in 8 and 16 bits, whose error is that of a rounding, more in float32, whose error grows
with the length of sums: real models have rows a hundred times as long. A wrong collective is off by a half or by two.
"""

PROGRAM = ("program", "mesh", "processes", "device_kind", "cores", "xla_flags", "versions")
"""What a checkpoint's meta says of the program that computed the probe; `program` digests all that was compiled."""


def batch_digest(reader: Reader, step: int, num_rows: int) -> str:
    """16 hexadecimal digits of the names, types, shapes and bytes of the global batch of a step (0-based).

    Reads it all in one process, a block of rows at a time.
    """
    hashes: dict[str, Any] = {}
    for first in range(0, num_rows, BLOCK_ROWS):
        rows = np.arange(first, min(first + BLOCK_ROWS, num_rows))
        for name, values in reader.read(step, rows).items():
            header = f"{name} {values.dtype.str} {(num_rows, *values.shape[1:])}\n"
            if name not in hashes:
                hashes[name] = hashlib.blake2b(header.encode())
            hashes[name].update(np.ascontiguousarray(values))
    whole = hashlib.blake2b(digest_size=8)
    for name in sorted(hashes):
        whole.update(hashes[name].digest())
    return whole.hexdigest()


def prove_arrays(saved: Mapping[str, str], restored: Mapping[str, str], *, step: int) -> str:
    """Compares the digests of the arrays of a checkpoint (path -> digest) with those of what was restored from it.

    Returns:
        `equal`, for the journal.

    Raises:
        CheckpointError: They differ, though all files are as they were written.
    """
    differing = [name for name in sorted(saved.keys() | restored.keys()) if saved.get(name) != restored.get(name)]
    if not differing:
        return "equal"
    shown = [
        f"  {name} differs from what was saved: digest {restored.get(name, 'none')}, saved {saved.get(name, 'none')}"
        for name in differing[:5]
    ]
    more = [f"  and {len(differing) - 5} more"] if len(differing) > 5 else []
    raise CheckpointError(
        "\n".join([f"checkpoint {step}: {len(differing)} of {len(saved)} arrays", *shown, *more]) + "\n"
        "Its files are as they were written, so what was saved was not what lay on the devices, or what was read is "
        "not what lies there now: a device, its memory or a link to it fails. Try again on other hosts; if the same "
        "arrays differ there, --resume STEP goes on from an older checkpoint"
    )


def prove_batch(saved: str, now: str, *, step: int, reason: str | None = None) -> str:
    """Compares the digest of the batch after a checkpoint with that of the one that the run saw then.

    Args:
        step: Updates done, the checkpoint's.
        reason: Why the data may be others, such as `Data.train accepted`; None: they may not.

    Returns:
        `equal`, or why it differs, for the journal.

    Raises:
        UserError: It differs and may not.
    """
    if saved == now:
        return "equal"
    if reason is not None:
        return f"changed ({reason})"
    raise UserError(
        f"step {step + 1} would train on another batch than the run did after checkpoint {step}: digest {now}, then "
        f"{saved}. The config asks for the same data, so a store under Data.train has other content now. Put the "
        "stores back as they were (`mtx data verify STORE` reads one), or go on with what they hold now: "
        "--accept Data.train"
    )


def program_differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Why the step may round otherwise than the one that was saved, a line each; empty: it is the same program.

    Args:
        saved: Meta of the checkpoint, with the keys of `PROGRAM`.
        now: The same of this run.
    """
    return [f"{key} {saved.get(key)} -> {now.get(key)}" for key in PROGRAM if saved.get(key) != now.get(key)]


def is_deterministic(platform: str, xla_flags: str) -> bool:
    """Whether one program gives the same bits in every process.

    On GPUs XLA picks kernels by timing them and adds with atomics, unless told not to.
    """
    flag = "--xla_gpu_deterministic_ops"
    return platform == "cpu" or bool({flag, f"{flag}=true", f"{flag}=1"} & set(xla_flags.split()))


def tolerance_of(compute: str, device_kinds: Iterable[str]) -> Tolerance:
    """The tolerance of `Precision.compute` between devices of these kinds.

    GPUs shorten the operands of float32 products to 10 bits (TF32): that is closer to bfloat16 than to float32.
    """
    return TOLERANCES[compute if set(device_kinds) == {"cpu"} or compute == "float8" else "bfloat16"]


def prove_step(
    saved: Mapping[str, float],
    now: Mapping[str, float],
    *,
    step: int,
    differences: Sequence[str],
    tolerance: Tolerance,
    reason: str | None = None,
) -> str:
    """Compares loss and gradient norm of the first step after a checkpoint with those that the run had there.

    Args:
        saved: `loss` and `grad_norm` as the run that saved the checkpoint computed them.
        now: Those of this run.
        step: Updates done, the checkpoint's.
        differences: Why they may round otherwise; empty: the same bits are demanded.
        tolerance: How far apart they may be then.
        reason: Why math or data are others, such as `Precision.compute accepted`: nothing follows from a difference.

    Returns:
        `bit-equal`, `within 3e-07 of 1e-05` or `not comparable: REASON`, for the journal. Where a tolerance is
        meant, it is the figure that comes nearest to its own.

    Raises:
        UserError: They differ by more than may be.
    """
    if reason is not None:
        return f"not comparable: {reason}"
    allowed = {"loss": tolerance.loss, "grad_norm": tolerance.grad_norm} if differences else {}
    apart = {name: _relative_difference(saved[name], now[name]) for name in ("loss", "grad_norm")}
    if not any(apart.values()):
        return "bit-equal"
    wrong = [name for name in apart if not apart[name] <= allowed.get(name, 0.0)]
    if not wrong:
        name = max(apart, key=lambda name: apart[name] / allowed[name])
        return f"within {apart[name]:.0e} of {allowed[name]:.0e}"
    figures = "; ".join(
        f"{name} {now[name]!r}, saved {saved[name]!r} (relative difference {apart[name]:.1e}, allowed "
        f"{allowed.get(name, 0.0):.0e})"
        for name in wrong
    )
    program = f"The program is another one: {'; '.join(differences)}" if differences else "The program is the same"
    raise UserError(
        f"step {step + 1} does not repeat what the run computed after checkpoint {step}: {figures}. {program}; "
        "parameters and batch are proven equal, so this step is computed wrongly, or the saved one was: by a device "
        "that fails, or by a fault in a layout or a library. Try other hosts, then the layout and the versions of "
        "before (`mtx checkpoint show`); `mtx certify RUN.gin` holds layouts against one device. Nothing was changed"
    )


def _relative_difference(saved: float, now: float) -> float:
    """0 for the same value, also where both are not a number."""
    if saved == now or (math.isnan(saved) and math.isnan(now)):
        return 0.0
    return abs(now - saved) / abs(saved) if math.isfinite(saved) and math.isfinite(now) and saved else math.inf
