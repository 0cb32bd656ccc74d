"""What the devices of this machine are and can do, measured in a process of its own.

    python -m mtx.evaluation.study_probe FILE

Decides how rates are measured: all devices multiply, and copy, at the same time, as they do in a step, since simulated
ones share the cores of one machine. A rate is the best of several tries, per device.

Invariant: the process that asks never starts JAX, which would take the devices from those that train.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mtx.errors import UserError
from mtx.mesh import ENVIRONMENT, start_process
from mtx.planning.hardware import Gpu, find_gpu

TIMEOUT_S = 300
DTYPES = ("float32", "bfloat16")
_TRIES, _TARGET_S, _ROUNDS = 3, 0.05, 4


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The devices of this machine.

    Attributes:
        device_kind: As JAX says it.
        num_devices: How many.
        simulated: Whether they are simulated CPU devices.
        host: Its name.
        cores: Of its CPU.
        memory_bytes: Of one device; of simulated ones, their share of the host's.
        matmul_flops: Format of the factors -> FLOP/s of one device while all multiply.
        memory_bandwidth: Bytes/s of one device while all copy.
        jax: Version.
        time: When, seconds since 1970.
    """

    device_kind: str
    num_devices: int
    simulated: bool
    host: str
    cores: int
    memory_bytes: int
    matmul_flops: Mapping[str, float]
    memory_bandwidth: float
    jax: str
    time: float

    @property
    def in_table(self) -> bool:
        return find_gpu(self.device_kind) is not None

    @property
    def gpu(self) -> Gpu:
        """The row of the table; for devices that have none, what was measured takes its place.

        Devices of one host without a link of their own exchange through its memory.
        """
        if (known := find_gpu(self.device_kind)) is not None:
            return known
        label = f"{self.num_devices} simulated devices" if self.simulated else "measured"
        return Gpu(
            name=f"{self.device_kind} ({label})",
            device_kind=re.escape(self.device_kind),
            dense_flops=dict(self.matmul_flops),
            measured_flops=dict(self.matmul_flops),
            memory_bytes=self.memory_bytes,
            memory_bandwidth=self.memory_bandwidth,
            nvlink_bandwidth=self.memory_bandwidth,
            nvlink_domain=self.num_devices,
            nic_bandwidth=self.memory_bandwidth,
            multiprocessors=max(1, self.cores // self.num_devices),
            float32_flops=self.matmul_flops["float32"],
            watts=None,
            generation=self.device_kind,
        )


def probe(environment: Mapping[str, str], *, simulated: bool) -> Machine:
    """Measures this machine in a process of its own.

    Args:
        environment: Of the process, which decides its devices.
        simulated: Whether these are simulated.

    Raises:
        UserError: The process fails.
    """
    alone = {name: value for name, value in environment.items() if name not in ENVIRONMENT}
    with tempfile.TemporaryDirectory(prefix="mtx-study-") as folder:
        answer, log = Path(folder) / "probe.json", Path(folder) / "probe.log"
        with log.open("wb") as output:
            try:
                words = [sys.executable, "-m", "mtx.evaluation.study_probe", str(answer)]
                code = subprocess.run(
                    [sys.executable, "-m", "mtx.evaluation.bound", str(os.getpid()), *words],
                    env=alone, stdin=subprocess.DEVNULL, stdout=output, stderr=output, timeout=TIMEOUT_S, check=False,
                ).returncode  # fmt: skip
            except subprocess.TimeoutExpired:
                raise UserError(f"the devices did not answer in {TIMEOUT_S} s: `mtx doctor` may say why") from None
        if code or not answer.exists():
            said = (log.read_text(errors="replace").strip().splitlines() or ["nothing was said"])[-1][:300]
            raise UserError(f"the devices could not be measured (exit code {code}): {said}; `mtx doctor` may say why")
        return replace(Machine(**json.loads(answer.read_text())), simulated=simulated)


def measure() -> Machine:
    """Measures the devices of this process."""
    import jax

    devices = jax.local_devices()
    host_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    stats = devices[0].memory_stats() or {}
    return Machine(
        device_kind=devices[0].device_kind,
        num_devices=len(devices),
        simulated=False,
        host=socket.gethostname(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_bytes=int(stats.get("bytes_limit", host_bytes // len(devices))),
        matmul_flops={dtype: _matmul_flops(devices, dtype) for dtype in DTYPES},
        memory_bandwidth=_memory_bandwidth(devices),
        jax=jax.__version__,
        time=time.time(),
    )


def _best_seconds(compute: Callable[[Any], Any], arrays: list[Any]) -> float:
    """Seconds of one round of all devices, the best of some; the first round compiles."""
    import jax

    best, begin = float("inf"), 0.0
    for _ in range(1 + _TRIES):
        begin = time.perf_counter()
        jax.block_until_ready([compute(array) for array in arrays])
        best = min(best, time.perf_counter() - begin)
    return best


def _matmul_flops(devices: list[Any], dtype: str) -> float:
    """Products of square matrices, as large as take about `_TARGET_S` each."""
    import jax
    import jax.numpy as jnp

    program, size, rate = jax.jit(lambda x: x @ x), 512, 0.0
    while True:
        arrays = [jax.device_put(jnp.full((size, size), 1e-3, dtype), device) for device in devices]
        seconds = _best_seconds(program, arrays)
        rate = max(rate, 2.0 * size**3 / seconds)
        if seconds > _TARGET_S or size >= 16384:
            return rate
        size *= 2


def _memory_bandwidth(devices: list[Any]) -> float:
    """Reading and writing an array that no cache holds."""
    import jax
    import jax.numpy as jnp

    size_bytes = 2**28 // (1 if devices[0].platform != "cpu" else len(devices))
    arrays = [jax.device_put(jnp.zeros(size_bytes // 4, jnp.float32), device) for device in devices]
    program = jax.jit(lambda x: jax.lax.fori_loop(0, _ROUNDS, lambda _, y: y + 1.0, x))  # fresh memory would be slow
    return 2.0 * _ROUNDS * size_bytes / _best_seconds(program, arrays)


def main(answer: Path) -> None:
    """What the process does."""
    start_process()
    answer.write_text(json.dumps(asdict(measure()), allow_nan=False))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
