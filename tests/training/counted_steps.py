"""Prints what training steps cost, in figures that no machine decides, as JSON.

    counted_steps.py CASE ...          with 4 devices

Everything is counted in the program that XLA made, per device and step: a loop's body as often as the loop turns.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
from tiny import GPT, LLAMA, make_setup

from mtx.planning.flops import model_flops_per_token
from mtx.planning.hlo import read_program
from mtx.planning.hlo_collectives import read_collectives
from mtx.planning.hlo_products import read_attention, read_products
from mtx.planning.hlo_traffic import call_target, list_operations, moved_bytes
from mtx.sharding import axis_sizes
from mtx.training.inputs import describe_train_batch
from mtx.training.state import Setup
from mtx.training.step import make_train_step

Figures = dict[str, float]

DENSE: dict[str, Any] = {**GPT, "vocab_size": 4096, "d_model": 64, "max_seq_len": 64}
MOE: dict[str, Any] = {**LLAMA, "d_model": 64, "max_seq_len": 64, "num_experts": 4, "experts_per_token": 2}
TRAIN: dict[str, Any] = {"seq_len": 64, "loss_chunk_tokens": 128, "global_batch_size": 8}
SCANNED: dict[str, Any] = {**TRAIN, "scan_layers": True}
IN_TURN: dict[str, Any] = {**TRAIN, "microbatch_size": 1}

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # name: model; what differs from a run on one device
    "dense": (DENSE, {"train": TRAIN}),
    "scanned, 4 layers": ({**DENSE, "num_layers": 4}, {"train": SCANNED}),
    "scanned, 16 layers": ({**DENSE, "num_layers": 16}, {"train": SCANNED}),
    "tensor 2, data 2": (DENSE, {"mesh": {"tensor": 2, "data": 2}, "train": IN_TURN}),
    "pipe 2": (DENSE, {"mesh": {"pipe": 2}, "train": IN_TURN}),
    "experts 2": (MOE, {"mesh": {"expert": 2}, "train": TRAIN}),
    # The first case spoiled: all logits in memory at a time. Has no budget of its own.
    "dense, whole logits": (DENSE, {"train": {**TRAIN, "loss_chunk_tokens": 8 * 64}}),
}


def count_program(text: str, mesh: Mapping[str, int], unknown_turns: Any = 1) -> Figures:
    """Figures of the text of an optimized program.

    Args:
        mesh: Devices along each mesh axis.
        unknown_turns: As `read_program` has it.
    """
    program = read_program(text, unknown_turns)
    counts: Counter[str] = Counter()
    for computation in program.computations.values():
        counts["instructions of the program"] += len(computation)
    for name, line in list_operations(program):
        times = program.executions[name]
        counts["bytes read and written"] += times * moved_bytes(program.computations[name], line)
        kind = line.opcode.removesuffix("-start")
        if kind in ("fusion", "copy", "transpose"):
            counts[f"count of {kind}"] += times
        if line.opcode == "custom-call":
            counts[f"count of {call_target(line)}"] += times
    products, attention = read_products(program), read_attention(program)
    counts["count of products"] = sum(product.executions for product in products)
    counts["FLOPs of products"] = sum(call.flops for call in (*products, *attention))
    for c in read_collectives(program, mesh):
        if c.axes:
            what = f"{c.kind} over {', '.join(c.axes)}"
            counts[f"count of {what}"] += c.executions
            counts[f"bytes of {what}"] += c.executions * c.size_bytes
    return dict(counts)


def count_step(setup: Setup) -> Figures:
    """Figures of the training step of a run, compiled here."""
    traced = make_train_step(setup).trace(setup.abstract_state, describe_train_batch(setup))
    compiled = traced.lower().compile()
    memory, run, whole = compiled.memory_analysis(), setup.run, setup.definition.whole
    found = count_program(compiled.as_text(), axis_sizes(setup.mesh))
    per_token = model_flops_per_token(run.model, whole.params, whole.axes, run.train.seq_len)
    model_flops = per_token * run.train.global_batch_size * run.train.seq_len / setup.mesh.size
    return {
        **found,
        "forward passes that the products make": round(3 * found["FLOPs of products"] / model_flops, 4),
        "bytes of arguments": memory.argument_size_in_bytes,
        "bytes of arguments kept for results": memory.alias_size_in_bytes,
        "bytes between": memory.temp_size_in_bytes,
        "equations": count_equations(traced.jaxpr.jaxpr),
    }


def count_equations(jaxpr: Any) -> int:
    """Of a traced program, those inside of others too."""
    total = 0
    for equation in jaxpr.eqns:
        total += 1
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                total += count_equations(inner) if hasattr(inner, "eqns") else 0
    return total


def main() -> None:
    found = {}
    for name in sys.argv[1:]:
        model, sections = CASES[name]
        found[name] = count_step(make_setup(model, **sections))
    print(json.dumps({"jax": jax.__version__, "figures": found}))


if __name__ == "__main__":
    main()
