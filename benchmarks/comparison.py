"""What follows from measurements of several systems on the same work: shares, ratios, and what is wrong with them.

Arithmetic alone: nothing is run or read here.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

OWN = "mtx"
LOSS_TOLERANCE = 0.3
"""Nats between the first losses of two systems, whose random weights and tokens differ."""

BUSY = 2.0
"""Load per core, in the minute before a measurement, above which others were there too; what was measured before, with
its compilers, makes less. PyTorch's threads wait for each other after every operation, so that a busy machine slows it
far more than XLA, and any ratio can come of it."""

Record = dict[str, Any]


def derive(measured: Mapping[str, Any], case: Mapping[str, Any], peak: float | None) -> Record:
    """One measurement, put in the terms of the comparison.

    Args:
        measured: What `train_step.py` or `peers/train.py` printed.
        case: What `shapes.py` says of the work; FLOPs are the same for all systems.
        peak: FLOP/s that the GPU's data sheet states for the format of the case; None: unknown.

    Raises:
        ValueError: The system counts other parameters than mtx does, so that its work is not the same.
    """
    for name in ("parameters", "matmul_parameters"):
        if name in measured and measured[name] != case[name]:
            raise ValueError(f"unequal work: {name} is {measured[name]:,} here, {case[name]:,} in mtx")
    seconds = measured["step_seconds"]["median"]
    flops = case["flops_per_step"]
    ceiling = measured["matmul_tflops_per_device"]["max"]
    on_device = measured["peak_device_bytes"]
    return {
        "tokens_per_second": case["batch"] * case["seq_len"] / seconds,
        "step_seconds": measured["step_seconds"],
        "model_tflops": {name: value / seconds / 1e12 for name, value in flops.items()},
        "mfu": {name: value / seconds / peak for name, value in flops.items()} if peak else None,
        "matmul_tflops": ceiling,
        "share_of_own_ceiling": flops["full"] / seconds / 1e12 / ceiling,
        "peak_memory_bytes": measured["peak_resident_bytes"] if on_device is None else on_device,
        "peak_memory_kind": "resident" if on_device is None else "device",
        "compile_seconds": measured["compile_seconds"],
        "seconds_to_first_loss": measured["seconds_to_first_step"],
        "first_loss": measured["first_loss"],
        "last_loss": measured["last_loss"],
        "steps": measured["steps"],
        "group": measured["group"],
    }


def share_ceilings(measurements: Sequence[Record]) -> None:
    """Adds `share_of_best_ceiling` to each: of the fastest matrix product that any system showed in its round.

    A share of one's own ceiling rewards a slow product, so that systems are compared by this one.
    """
    good = [m for m in measurements if "error" not in m]
    for m in good:
        best = max(other["matmul_tflops"] for other in good if other["round"] == m["round"])
        m["share_of_best_ceiling"] = m["model_tflops"]["full"] / best


def summarize(measurements: Sequence[Record], systems: Sequence[str]) -> Record:
    """Medians of each system over its rounds, and ratios of tokens/s of mtx to each peer's.

    Args:
        measurements: Records with `system` and `round`; those with `error` count for nothing.
        systems: Names, mtx's first.

    Returns:
        `systems` (name -> tokens/s and shares, median over rounds), `ratios` (peer -> `median` of the pairs of each
        round, `low`, `high`, `pairs`), `best_peer` (by tokens/s; None without one), `faults`.
    """
    good = {name: [m for m in measurements if m["system"] == name and "error" not in m] for name in systems}
    keys = ("tokens_per_second", "share_of_own_ceiling", "share_of_best_ceiling")
    medians = {
        name: {key: statistics.median(m[key] for m in found) for key in keys} for name, found in good.items() if found
    }
    ratios = {}
    for name in systems[1:]:
        pairs = _pair(good[systems[0]], good[name])
        if pairs:
            ratios[name] = {
                "median": statistics.median(pairs), "low": min(pairs), "high": max(pairs), "pairs": len(pairs)
            }  # fmt: skip
    peers = [name for name in systems[1:] if name in medians]
    best = max(peers, key=lambda name: medians[name]["tokens_per_second"], default=None)
    return {"systems": medians, "ratios": ratios, "best_peer": best, "faults": list(find_faults(measurements))}


def _pair(own: Sequence[Record], other: Sequence[Record]) -> list[float]:
    """Ratios of tokens/s, of measurements of the same round."""
    of_round = {m["round"]: m["tokens_per_second"] for m in other}
    return [m["tokens_per_second"] / of_round[m["round"]] for m in own if m["round"] in of_round]


def find_faults(measurements: Sequence[Record]) -> Iterator[str]:
    """Why the measurements of a case are no comparison, or not a whole one."""
    good = [m for m in measurements if "error" not in m]
    for m in measurements:
        if "error" in m:
            yield f"{m['system']}, round {m['round']}: {m['error'].splitlines()[-1]}"
    middle = statistics.median(m["first_loss"] for m in good) if good else 0.0
    for m in good:
        at = f"{m['system']}, round {m['round']}"
        if m["load_per_core"] > BUSY:
            yield f"{at}: the machine was busy, with a load of {m['load_per_core']:.1f} per core"
        if not abs(m["first_loss"] - middle) < LOSS_TOLERANCE:
            yield f"{at}: the first loss is {m['first_loss']:.3f}, that of the others about {middle:.3f}"
        if not m["last_loss"] < m["first_loss"]:
            yield f"{at}: the loss went from {m['first_loss']:.3f} to {m['last_loss']:.3f} on a batch that repeats"
