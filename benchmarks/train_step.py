"""Measures the training step of a config on this machine: tokens/s, model FLOP/s, share of the matmul ceiling, memory.

    python benchmarks/train_step.py benchmarks/configs/gpt_4x256.gin [--set ...] [--steps N] [--out FILE.json]

The step is the one that `mtx train` runs, on random tokens. The ceiling is the best of a few square matrix products in
the same number format, measured between the steps, since a shared machine's speed drifts. FLOPs count attention in full
and no recomputation (mtx.planning.flops); "causal" counts half of the attention. On a GPU steps are timed in groups of
`--group`, since a training run does not wait for each.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import measuring


def main() -> None:
    """Measures and prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="STATEMENT")
    parser.add_argument("--steps", type=int, default=8, help="groups of steps that count")
    parser.add_argument("--warmup", type=int, default=1, help="steps before those that count")
    parser.add_argument("--group", type=int, help="steps timed together; default: 1 on a CPU, 4 on a GPU")
    parser.add_argument("--cpu-devices", type=int, default=1)
    parser.add_argument("--profile", action="store_true", help="also the share of time by kind of operation")
    parser.add_argument("--out", type=Path, help="a file that does not exist yet")
    args = parser.parse_args()
    if args.cpu_devices > 1:
        flags = f"--xla_force_host_platform_device_count={args.cpu_devices}"
        os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_enable_concurrency_optimized_scheduler=false"
    result = measure(args.config, args.overrides, args.steps, args.warmup, args.group, profiles=args.profile)
    text = json.dumps(result, indent=1)
    print(text)
    if args.out:
        with args.out.open("x") as file:
            file.write(text + "\n")


def measure(
    path: str, overrides: list[str], steps: int, warmup: int, group: int | None, *, profiles: bool
) -> dict[str, object]:
    """Compiles and times the step of a config."""
    from mtx.config.layout import check_layout, resolve_mesh
    from mtx.config.reader import load
    from mtx.mesh import make_mesh, start_process

    start_process()
    import jax
    import numpy as np
    from jax.sharding import NamedSharding

    from mtx.models import count_parameters
    from mtx.planning.flops import model_flops_per_token
    from mtx.planning.hardware import find_gpu
    from mtx.sharding import batch_spec
    from mtx.training.state import Setup
    from mtx.training.step import make_train_step

    config = load(path, overrides).run
    counts = resolve_mesh(config.mesh, jax.device_count())
    check_layout(config, counts)
    setup = Setup(config, make_mesh(counts))
    rows, seq_len = config.train.global_batch_size, config.train.seq_len
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, (rows, seq_len + 1)).astype(np.int32)
    batch = {"tokens": jax.device_put(tokens, NamedSharding(setup.mesh, batch_spec({**setup.rules, "seq": ()}, 2)))}
    batch["learning_rate"] = np.float32(measuring.LEARNING_RATE)
    state = setup.initialize()
    begin = time.perf_counter()
    step = make_train_step(setup).lower(state, batch).compile()
    compile_seconds = time.perf_counter() - begin
    jax.block_until_ready(state)
    seconds_to_ready = measuring.seconds_since_start()
    state, metrics = step(state, batch)
    first_loss = float(metrics["loss"])
    seconds_to_first_step = measuring.seconds_since_start()

    platform_ = setup.context.platform
    shape = (measuring.SQUARE[platform_],) * 2
    square = jax.random.normal(jax.random.key(0), shape, setup.context.dtype)  # of ones a GPU draws less power
    product = jax.jit(lambda a: a @ a)

    def run(count: int) -> None:
        nonlocal state, metrics
        for _ in range(count):
            state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))

    def multiply(count: int) -> None:
        jax.block_until_ready([product(square) for _ in range(count)])

    run(max(warmup - 1, 0))
    group = group or {"cpu": 1, "gpu": 4}[platform_]
    timed = measuring.measure_steps(run, multiply, steps=steps, group=group, platform=platform_)
    times: Any = timed["step_seconds"]
    ceilings: Any = timed["matmul_tflops_per_device"]
    last_loss = float(metrics["loss"])

    shares = None
    if profiles:
        from breakdown import profile

        shares = profile(lambda: jax.block_until_ready(step(state, batch)), step.as_text())
    whole = setup.definition.whole
    median = times["median"]
    flops, causal_flops = (
        model_flops_per_token(config.model, whole.params, whole.axes, seq_len, attention)
        * rows
        * seq_len
        / setup.mesh.size
        for attention in ("full", "causal")
    )
    if platform_ == "cpu":  # simulated devices share the cores
        ceilings = {name: value / setup.mesh.size for name, value in ceilings.items()}
    device = setup.mesh.devices.flat[0]
    gpu = find_gpu(device.device_kind)
    peak = gpu.peak_flops(config.precision.compute) if gpu else None
    statistics_of_device = device.memory_stats() or {}
    memory = step.memory_analysis()
    return {
        **describe_measurement(device.device_kind),
        "parameters": count_parameters(config.model),
        "devices": setup.mesh.size,
        "tokens_per_second": rows * seq_len / median,
        **timed,
        "model_tflops_per_device": flops / median / 1e12,
        "model_tflops_per_device_causal": causal_flops / median / 1e12,
        "mfu": flops / median / peak if peak else None,
        "mfu_causal": causal_flops / median / peak if peak else None,
        "matmul_tflops_per_device": ceilings,
        "share_of_matmul_ceiling": flops / median / ceilings["max"] / 1e12,
        "compile_seconds": compile_seconds,
        "seconds_to_ready": seconds_to_ready,
        "seconds_to_first_step": seconds_to_first_step,
        "state_bytes": memory.argument_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "peak_device_bytes": statistics_of_device.get("peak_bytes_in_use"),
        "peak_resident_bytes": measuring.peak_resident_bytes(),
        "first_loss": first_loss,
        "last_loss": last_loss,
        "share_of_operations": shares,
    }


def describe_measurement(device_kind: str) -> dict[str, object]:
    """What a figure is worth nothing without: command, environment, revision, date, machine, versions."""
    from mtx.health.revision import find_git_revision

    return {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "environment": measuring.read_environment(),
        "git_revision": find_git_revision(Path(__file__).parent),
        "date": datetime.date.today().isoformat(),
        "machine": {"processor": measuring.describe_processor(), "cores": os.cpu_count(), "device": device_kind},
        "versions": {name: version(name) for name in ("jax", "jaxlib", "flax", "optax")}
        | {"python": platform.python_version()},
    }


if __name__ == "__main__":
    main()
