"""Measures the training step of a config on this machine: tokens/s, model FLOP/s, share of the matmul ceiling, memory.

    python benchmarks/train_step.py benchmarks/configs/gpt_4x256.gin [--set ...] [--steps N] [--out FILE.json]

The step is the one that `mtx train` runs, on random tokens. The ceiling is the best of a few square matrix products in
the same number format, measured between the steps, since a shared machine's speed drifts. FLOPs count attention in full
and no recomputation (mtx.planning.flops).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path

BEGIN = time.perf_counter()


def main() -> None:
    """Measures and prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="STATEMENT")
    parser.add_argument("--steps", type=int, default=8, help="steps that count, after one that does not")
    parser.add_argument("--cpu-devices", type=int, default=1)
    parser.add_argument("--profile", action="store_true", help="also the share of time by kind of operation")
    parser.add_argument("--out", type=Path, help="a file that does not exist yet")
    args = parser.parse_args()
    if args.cpu_devices > 1:
        flags = f"--xla_force_host_platform_device_count={args.cpu_devices}"
        os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_enable_concurrency_optimized_scheduler=false"
    result = measure(args.config, args.overrides, args.steps, profiles=args.profile)
    text = json.dumps(result, indent=1)
    print(text)
    if args.out:
        with args.out.open("x") as file:
            file.write(text + "\n")


def measure(path: str, overrides: list[str], steps: int, *, profiles: bool) -> dict[str, object]:
    """Compiles and times the step of a config."""
    from mtx.config.layout import check_layout, resolve_mesh
    from mtx.config.reader import load
    from mtx.mesh import make_mesh, start_process

    start_process()
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import NamedSharding

    from mtx.models import count_parameters
    from mtx.planning.flops import model_flops_per_token
    from mtx.planning.hardware import find_gpu
    from mtx.sharding import batch_spec
    from mtx.training.state import Setup
    from mtx.training.step import make_train_step

    run = load(path, overrides).run
    counts = resolve_mesh(run.mesh, jax.device_count())
    check_layout(run, counts)
    setup = Setup(run, make_mesh(counts))
    rows, seq_len = run.train.global_batch_size, run.train.seq_len
    tokens = np.random.default_rng(0).integers(0, run.model.vocab_size, (rows, seq_len + 1)).astype(np.int32)
    batch = {"tokens": jax.device_put(tokens, NamedSharding(setup.mesh, batch_spec({**setup.rules, "seq": ()}, 2)))}
    batch["learning_rate"] = np.float32(1e-4)
    state = setup.initialize()
    begin = time.perf_counter()
    step = make_train_step(setup).lower(state, batch).compile()
    compile_seconds = time.perf_counter() - begin
    jax.block_until_ready(state)
    seconds_to_ready = time.perf_counter() - BEGIN
    state, metrics = step(state, batch)
    first_loss = float(metrics["loss"])
    seconds_to_first_step = time.perf_counter() - BEGIN

    size = 8192 if setup.context.platform == "gpu" else 2048
    square = jnp.ones((size, size), setup.context.dtype)
    multiply = jax.jit(lambda a: a @ a)
    multiply(square).block_until_ready()

    def measure_ceiling() -> float:
        begin = time.perf_counter()
        for _ in range(3):
            square_ = multiply(square)
        square_.block_until_ready()
        return 3 * 2 * size**3 / (time.perf_counter() - begin)

    times, ceilings = [], []
    for _ in range(steps):
        ceilings.append(measure_ceiling())
        begin = time.perf_counter()
        state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))
        times.append(time.perf_counter() - begin)

    shares = None
    if profiles:
        from breakdown import profile

        shares = profile(lambda: jax.block_until_ready(step(state, batch)), step.as_text())
    whole = setup.definition.whole
    median = statistics.median(times)
    flops = model_flops_per_token(run.model, whole.params, whole.axes, seq_len) * rows * seq_len / setup.mesh.size
    ceiling = max(ceilings) / (setup.mesh.size if setup.context.platform == "cpu" else 1)
    device = setup.mesh.devices.flat[0]
    gpu = find_gpu(device.device_kind)
    peak = gpu.peak_flops(run.precision.compute) if gpu else None
    statistics_of_device = device.memory_stats() or {}
    memory = step.memory_analysis()
    return {
        **describe_measurement(device.device_kind),
        "parameters": count_parameters(run.model),
        "devices": setup.mesh.size,
        "tokens_per_second": rows * seq_len / median,
        "step_seconds": {"median": median, "min": min(times), "max": max(times)},
        "model_tflops_per_device": flops / median / 1e12,
        "mfu": flops / median / peak if peak else None,
        "matmul_tflops_per_device": {"median": statistics.median(ceilings) / 1e12, "max": ceiling / 1e12},
        "share_of_matmul_ceiling": flops / median / ceiling,
        "compile_seconds": compile_seconds,
        "seconds_to_ready": seconds_to_ready,
        "seconds_to_first_step": seconds_to_first_step,
        "state_bytes": memory.argument_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "peak_device_bytes": statistics_of_device.get("peak_bytes_in_use"),
        "first_loss": first_loss,
        "share_of_operations": shares,
    }


def describe_measurement(device_kind: str) -> dict[str, object]:
    """What a figure is worth nothing without: command, environment, revision, date, machine, versions."""
    from mtx.health.revision import find_git_revision

    return {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "environment": {name: os.environ[name] for name in ("GLIBC_TUNABLES", "XLA_FLAGS") if name in os.environ},
        "git_revision": find_git_revision(Path(__file__).parent),
        "date": datetime.date.today().isoformat(),
        "machine": {"processor": _processor(), "cores": os.cpu_count(), "device": device_kind},
        "versions": {name: version(name) for name in ("jax", "jaxlib", "flax", "optax")}
        | {"python": platform.python_version()},
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
