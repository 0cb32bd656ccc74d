"""How fast the devices and the links of a job are, measured in seconds, before a run.

Decides what is measured: matrix products and memory of every device, all at once as in a run; the sum over the devices
of each host; the sum over the devices of each pair of neighbouring hosts, in rounds in which no host has two. So one
slow host makes two slow pairs, and one slow link makes one.

Invariant: the processes of a group make the same collectives in the same order, and no others take part.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

_RUNS = 4


class _Load(NamedTuple):
    """What a device does per measurement; sizes in elements."""

    dtype: Any
    width: int
    products: int
    copied: int
    copies: int
    summed: int


_GPU = _Load(dtype=jnp.bfloat16, width=8192, products=24, copied=1 << 28, copies=8, summed=1 << 25)
"""26 TFLOP; 1 GiB read and written 8 times; 128 MiB: some 40 ms, 5 ms and 0.5 ms on an H100."""
_CPU = _Load(dtype=jnp.float32, width=512, products=8, copied=1 << 22, copies=4, summed=1 << 20)


def measure_devices() -> list[dict[str, float]]:
    """Rates of each local device, while all of them work: `matmul_tflops` (dense, bf16 on GPUs and float32 on CPU
    devices) and `memory_gbs` (10^9 bytes read and written a second)."""
    devices = jax.local_devices()
    load, count = _load(devices), len(devices)
    mesh = Mesh(np.array(devices), ("device",))
    split = NamedSharding(mesh, PartitionSpec("device"))

    def multiply(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, load.products, lambda _, y: x @ y, x)

    def copy(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, load.copies, lambda _, y: y + 1, x)

    shape = (count, load.width, load.width)
    operands = jax.jit(lambda: jnp.full(shape, 1 / load.width, load.dtype), out_shardings=split)()
    matmul_s = _time_each(jax.jit(multiply, out_shardings=split), operands)
    del operands
    operands = jax.jit(lambda: jnp.zeros((count, load.copied), jnp.float32), out_shardings=split)()
    memory_s = _time_each(jax.jit(copy, out_shardings=split), operands)
    flops = 2 * load.width**3 * load.products
    moved = 2 * 4 * load.copied * load.copies
    return [
        {"matmul_tflops": flops / first / 1e12, "memory_gbs": moved / second / 1e9}
        for first, second in zip(matmul_s, memory_s)
    ]


def measure_sum(processes: Sequence[int]) -> float | None:
    """Bus bandwidth in 10^9 bytes a second of an all-reduce over all devices of some processes, this one among them:
    2 (n - 1) / n times the bytes per device and second, which does not depend on n where each link is used fully
    (NCCL tests, PERFORMANCE.md). None: there is one device only. Collective among these processes."""
    devices = [device for device in jax.devices() if device.process_index in processes]
    count = len(devices)
    if count < 2:
        return None
    load, mesh = _load(devices), Mesh(np.array(devices), ("device",))
    rows, whole = NamedSharding(mesh, PartitionSpec("device")), NamedSharding(mesh, PartitionSpec())
    operands = jax.jit(lambda: jnp.ones((count, load.summed), jnp.float32), out_shardings=rows)()
    add = jax.jit(lambda x: jnp.sum(x, axis=0), out_shardings=whole)
    seconds = []
    for _ in range(_RUNS + 1):  # the first compiles and connects
        begin = time.perf_counter()
        jax.block_until_ready(add(operands))
        seconds.append(time.perf_counter() - begin)
    return 2 * (count - 1) / count * 4 * load.summed / min(seconds[1:]) / 1e9


def plan_pairs(count: int) -> list[list[tuple[int, int]]]:
    """Rounds of pairs of neighbours in a ring of `count` hosts, in which each host has one pair at most. Two rounds;
    three where the count is odd."""
    if count < 2:
        return []
    pairs = [(host, (host + 1) % count) for host in range(count if count > 2 else 1)]
    rounds = [pairs[:-1:2], pairs[1::2], pairs[-1:]] if count % 2 else [pairs[::2], pairs[1::2]]
    return [pairs for pairs in rounds if pairs]


def _load(devices: Sequence[jax.Device]) -> _Load:
    return _GPU if devices[0].platform == "gpu" else _CPU


def _time_each(program: Callable[[jax.Array], jax.Array], operands: jax.Array) -> list[float]:
    """Seconds until each device is done, at its best; in the order of `jax.local_devices`."""
    jax.block_until_ready(program(operands))
    best = np.full(len(operands.sharding.device_set), np.inf)
    with ThreadPoolExecutor(len(best)) as pool:
        for _ in range(_RUNS):
            begin = time.perf_counter()
            pieces = sorted(program(operands).addressable_shards, key=lambda shard: shard.index[0].start or 0)
            ends = pool.map(lambda shard: (jax.block_until_ready(shard.data), time.perf_counter())[1], pieces)
            best = np.minimum(best, [end - begin for end in ends])
    return [float(seconds) for seconds in best]
