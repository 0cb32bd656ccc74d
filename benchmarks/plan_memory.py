"""The planned memory of random runs against what XLA's compiler for GPUs says of the same steps.

    python benchmarks/plan_memory.py --seed 1 --count 20

Needs the compiler that `mtx rehearse` needs; no GPU. One line per run: what it is, GiB by plan and by the compiler
(arguments and the peak of temporaries), and the plan's error. Runs that do not fit their GPU by either are drawn again:
of such a program XLA computes parts twice, to make it smaller.
"""

from __future__ import annotations

import argparse
import random
import statistics
from typing import Any

from mtx.config import schema
from mtx.config.layout import check_layout
from mtx.errors import UserError
from mtx.objectives.causal import Causal
from mtx.optim.adamw import AdamW
from mtx.planning.case import Case, Cluster
from mtx.planning.hardware import GPUS
from mtx.planning.memory import estimate_memory
from mtx.planning.rehearsal import compile_apart

GIB = 2**30
SHAPES = (
    (12, 768, 12), (24, 1024, 16), (24, 1536, 16), (24, 2048, 32), (32, 2560, 32), (32, 4096, 32), (40, 5120, 40),
    (60, 6656, 52), (80, 8192, 64), (96, 12288, 96), (105, 20480, 128), (126, 16384, 128),
)  # fmt: skip
"""Layers, width and heads, from 100 million parameters to 530 billion."""
MOST_IN_LINE = 8
"""Layers of a device that run in line: with more the compiler takes minutes."""


def draw(rng: random.Random) -> Case:
    """A run that fits its mesh."""
    while True:
        case = _try(rng)
        if case is not None:
            return case


def _try(rng: random.Random) -> Case | None:
    layers, width, heads = rng.choice(SHAPES)
    seq_len = rng.choice((1024, 2048, 4096, 8192))
    model: dict[str, Any] = {
        "d_model": width, "num_heads": heads, "max_seq_len": seq_len, "tie_embeddings": rng.random() < 0.5,
        "vocab_size": rng.choice((32000, 50257, 50304, 51200, 128256)),
    }  # fmt: skip
    if rng.random() < 0.5:
        d_ff = rng.choice((width * 8 // 3 // 256 * 256, width * 7 // 2 // 256 * 256, width * 4))
        model |= {"activation": "swiglu", "norm": "rmsnorm", "position": "rotary", "use_bias": False, "d_ff": d_ff}
        model["num_kv_heads"] = rng.choice([heads, *(k for k in (4, 8, 16) if heads % k == 0)])
    routed = rng.random() < 0.2
    if routed:
        model |= {"num_experts": rng.choice((8, 16, 64)), "experts_per_token": rng.choice((1, 2))}
        model |= {"expert_capacity_factor": rng.choice((None, 1.0, 1.25)), "expert_every": rng.choice((1, 1, 2))}
    pipe = rng.choice((1, 1, 2, 4, 8, 16, 35))
    mesh = {
        "pipe": pipe,
        "data": rng.choice((1, 2, 4, 8, 16)),
        "fsdp": rng.choice((1, 1, 8, 16, 64)) if pipe == 1 else 1,
        "expert": rng.choice((1, 2, 4, 8)) if routed else 1,
        "context": rng.choice((1, 1, 1, 2)),
        "tensor": rng.choice((1, 2, 4, 8)),
    }
    num_gpus = 1
    for size in mesh.values():
        num_gpus *= size
    chunks = rng.choice((1, 1, 1, 2, 3)) if pipe > 1 else 1
    scanned = None
    if pipe > 1:
        chunk = rng.choice((1, 2, 3) if chunks == 1 else (1, 2))
        model["num_layers"] = min(layers, pipe * chunks * chunk - (chunks == 1 and rng.random() < 0.3))
    elif model.get("expert_every", 1) == 1 and rng.random() < 0.5:
        model["num_layers"], scanned = layers, True
    else:
        model["num_layers"] = rng.randint(2, MOST_IN_LINE)
    microbatch, share = rng.choice((1, 1, 2, 4)), mesh["data"] * mesh["fsdp"] * mesh["expert"]
    microbatches = pipe * rng.choice((1, 2, 4)) if pipe > 1 else rng.choice((1, 2, 4, 8))
    if num_gpus > 2304 or model["num_layers"] < pipe * chunks:
        return None
    train = {
        "seq_len": seq_len, "global_batch_size": share * microbatch * microbatches, "microbatch_size": microbatch,
        "recompute": rng.choice(("none", "selective", "full")), "scan_layers": scanned, "steps": 1,
    }  # fmt: skip
    rules = {"zero": rng.choice((0, 1, 2, 2)), "sequence_parallel": rng.random() < 0.85}
    pipeline = {"virtual_stages": chunks, "head": rng.choice(("sharded", "sharded", "last"))} if pipe > 1 else {}
    run = schema.Run(
        model=schema.Model(**model),
        mesh=schema.Mesh(**mesh),
        pipeline=schema.Pipeline(**pipeline),
        rules=schema.Rules(**rules),
        precision=schema.Precision(compute="bfloat16"),
        train=schema.Train(**train, objective=Causal(), optimizer=AdamW()),
        data=schema.Data(),
        tokenizer=schema.Tokenizer(),
        checkpoint=schema.Checkpoint(),
        health=schema.Health(),
        cluster=schema.Cluster(),
    )
    try:
        check_layout(run, run.mesh)
    except UserError:
        return None
    return Case.of(run, Cluster.of(GPUS[rng.choice(("A100-80", "H100", "H200", "B200"))], num_gpus))


def describe(case: Case) -> str:
    """A run in one line."""
    model, train = case.run.model, case.run.train
    mesh = " ".join(f"{axis}{size}" for axis, size in case.sizes.items() if size > 1) or "one GPU"
    layers = f"{model.num_layers} x {model.d_model}, {model.num_heads}/{model.kv_heads} heads, {model.activation}"
    experts = f", {model.num_experts} experts {model.expert_capacity_factor or 'dropless'}" if model.num_experts else ""
    chunks = f" v{case.run.pipeline.virtual_stages}" if case.stages else " scanned" if train.scan_layers else ""
    return (
        f"{case.cluster.gpu.name}: {layers}{experts}, V {model.vocab_size}, S {train.seq_len}, {mesh}{chunks}, "
        f"zero {case.run.rules.zero}, b {case.microbatch_size} x {case.num_microbatches}, {train.recompute}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=20, help="runs that are compared")
    args = parser.parse_args()
    rng, errors = random.Random(args.seed), []
    while len(errors) < args.count:
        case = draw(rng)
        room, planned = case.cluster.gpu.memory_bytes, estimate_memory(case)
        if planned.compiled > room:
            continue
        try:
            compiled = compile_apart(case, gpus_per_host=8 if case.cluster.num_gpus % 8 == 0 else case.cluster.num_gpus)
        except UserError as error:
            print(f"{describe(case)}: not compiled: {str(error).splitlines()[-1]}", flush=True)
            continue
        found = compiled.argument_bytes + compiled.temp_bytes
        if found > room:
            print(f"{describe(case)}: does not fit, {found / GIB:.1f} GiB", flush=True)
            continue
        errors.append(planned.compiled / found - 1)
        print(f"{errors[-1]:+7.1%}  {planned.compiled / GIB:7.2f} {found / GIB:7.2f} GiB  {describe(case)}", flush=True)
    sizes = sorted(abs(error) for error in errors)
    within = sum(size <= 0.1 for size in sizes)
    print(
        f"{len(sizes)} runs: error {statistics.median(sizes):.1%} in the median, {sizes[-1]:.1%} at most; "
        f"{within} within 10 %"
    )


if __name__ == "__main__":
    main()
