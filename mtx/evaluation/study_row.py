"""The row of a point in the table of a study: its shape, its plan, what was measured, and what that amounts to.

Decides the accounting. FLOPs and their conventions are `mtx.planning`'s own; measured figures are never mixed with
planned ones but for hardware FLOPs, whose count is the plan's and whose seconds are the measurement's.

Invariant: a figure that is missing is None.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mtx.config import schema
from mtx.config.axes import MESH_AXES
from mtx.planning.case import declare
from mtx.planning.plan import DAY_S, Plan

CONVENTIONS = {
    "flops": "Model FLOPs count the mathematics of a step once, attention to all positions ('causal': to half of "
    "them), recomputation never; hardware FLOPs count what the program multiplies, by the plan.",
    "peak": "The data sheet's dense rate in the format of the products. Devices without a data sheet: the fastest "
    "square matrix product measured on this machine while all devices multiply.",
    "memory": "Of the device that holds most. 'device': the peak of its allocator, against the whole plan; 'compiler': "
    "arguments and temporary arrays of the compiled step, against the plan without communication and overhead.",
    "plan": "Made before the point ran, with constants that were not fitted on it unless a calibration is named.",
    "time": "The median of the measured steps, full batches, between two readings of the loss; days are of nothing "
    "but such steps.",
}


def describe_run(run: schema.Run, plan: Plan | None, *, is_sound: bool) -> dict[str, Any]:
    """The shape of a run and how it lies on its devices.

    Args:
        run: With a mesh of counts where there is a plan.
        plan: None where it does not fit its devices.
        is_sound: Whether its fields do not contradict each other, so that its parameters can be counted.
    """
    model, train = run.model, run.train
    mesh = {axis: getattr(run.mesh, axis) for axis in MESH_AXES}
    return {
        "parameters": sum(math.prod(p.shape) for p in declare(run).parameters) if is_sound else None,
        "heads": model.num_heads,
        "hidden": model.d_model,
        "layers": model.num_layers,
        "vocab": model.vocab_size,
        "experts": model.num_experts,
        "seq_len": train.seq_len,
        "batch": train.global_batch_size,
        "microbatch": train.microbatch_size if plan is None else plan.case.microbatch_size,
        "num_microbatches": None if plan is None else plan.case.num_microbatches,
        "recompute": train.recompute,
        "precision": run.precision.compute,
        "devices": math.prod(max(1, size) for size in mesh.values()),
        "mesh": mesh,
        "virtual_stages": run.pipeline.virtual_stages,
        "zero": run.rules.zero,
    }


def describe_plan(plan: Plan) -> dict[str, Any]:
    """The key `plan` of a row."""
    return {
        "step_seconds": plan.step.seconds,
        "step_parts": dict(plan.step.parts),
        "memory_bytes": plan.memory.total,
        "memory_compiled_bytes": plan.memory.compiled,
        "memory_parts": dict(plan.memory.parts),
        "fits": plan.fits,
        "bubble_fraction": plan.step.bubble_fraction,
        "hardware_flops": plan.step.hardware_flops,
    }


def describe_achieved(plan: Plan, measured: Mapping[str, Any], tokens: Sequence[float]) -> dict[str, Any]:
    """The key `achieved` of a row.

    Args:
        plan: Of the point, for its FLOPs and its peak.
        measured: As in the document.
        tokens: For each number of tokens, how long training on them would take.
    """
    run, devices = plan.case.run, plan.num_gpus
    rate, peak = measured["tokens_per_second"], plan.peak_flops
    full, causal = (plan.flops_per_token[attention] * rate / devices for attention in ("full", "causal"))
    hardware = plan.step.hardware_flops / measured["step_seconds"]
    own = run.train.tokens or (run.train.steps or 0) * run.train.global_batch_size * run.train.seq_len

    def share(flops: float) -> float | None:
        return None if peak is None else flops / peak

    return {
        "model_tflops_per_device": full / 1e12,
        "model_tflops_per_device_causal": causal / 1e12,
        "hardware_tflops_per_device": hardware / 1e12,
        "aggregate_pflops": full * devices / 1e15,
        "peak_tflops": None if peak is None else peak / 1e12,
        "mfu_model_full": share(full),
        "mfu_model_causal": share(causal),
        "hfu": share(hardware),
        "train_days": [
            {"tokens": count, "days": count / rate / DAY_S} for count in dict.fromkeys([*tokens, float(own)]) if count
        ],
    }


def describe_error(plan: Mapping[str, Any], measured: Mapping[str, Any]) -> dict[str, float | None]:
    """The key `error` of a row: plan / measured - 1."""
    planned = {"device": plan["memory_bytes"], "compiler": plan["memory_compiled_bytes"]}.get(measured["memory_kind"])
    memory = measured["memory_bytes"]
    return {
        "step_seconds": plan["step_seconds"] / measured["step_seconds"] - 1,
        "memory_bytes": planned / memory - 1 if memory and planned is not None else None,
    }
