"""Naming the process that holds up the others, by what each one spends on its own.

In a synchronous run every step takes all processes the same time, that of the slowest, so step times name nobody. What
is compared is time that no process spends waiting for another: what the loop measures of its data and its host, and a
small probe that the devices of each process compute without the others'.

Decides when a process is out of line, and measures the probe. It changes nothing about the run.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

MIN_SHARE = 0.05
"""Of the time since the last comparison: losing less is no reason to name anybody."""
_PROBE, _PROBE_FLOOR_S, _PRODUCTS = "computing a probe on its devices", 5e-4, 16
_HOST_BYTES = 256


class Outlier(NamedTuple):
    """A process that takes longer than the others; `usual` is the median of the others, in the unit of `value`."""

    process: int
    kind: int
    value: float
    usual: float


class Stragglers:
    """Compares the processes of a run. Collective: each process makes one, and compares at the same steps."""

    def __init__(self, *, ratio: float, record: Callable[..., Any]) -> None:
        """Exchanges the names of the hosts and compiles the probe.

        Args:
            ratio: So many times what the others take is too long (`Health.straggler_ratio`).
            record: `Journal.record` on process 0; elsewhere something that does nothing.
        """
        self._ratio, self._record = ratio, record
        name = socket.gethostname().encode()[:_HOST_BYTES]
        names = multihost_utils.process_allgather(np.frombuffer(name.ljust(_HOST_BYTES, b"\0"), np.uint8))
        self._hosts = [bytes(row).rstrip(b"\0").decode(errors="replace") for row in names]
        self._operands, self._probe = _make_probe()
        self._begin = time.monotonic()

    def compare(self, step: int, own_seconds: Mapping[str, float]) -> list[str]:
        """Compares what each process spent on its own, and puts who is out of line into the journal.

        To be called when the devices have nothing to do, as after reading the metrics of the last step: it waits for
        them, and the probe measures what they are busy with otherwise.

        Args:
            step: Updates done.
            own_seconds: What was done -> seconds since the last comparison, with the same keys on all processes:
                no time that depends on others. A key reads like 'waiting for data'.

        Returns:
            A sentence for each outlier.
        """
        kinds = [*sorted(own_seconds), _PROBE]
        own = [*(own_seconds[kind] for kind in kinds[:-1]), self._measure_probe()]
        times = multihost_utils.process_allgather(np.array(own, np.float32))
        floors = [MIN_SHARE * (time.monotonic() - self._begin)] * len(own_seconds) + [_PROBE_FLOOR_S]
        causes = []
        for process, kind, value, usual in find_outliers(times, self._ratio, np.array(floors)):
            host = self._hosts[process]
            cause = f"{kinds[kind]} took {value:.3g} s, and {usual:.3g} s on the other processes"
            self._record("straggler", step=step, late_process=process, late_host=host, cause=cause)
            causes.append(f"step {step}: process {process} on host {host} is slow: {cause}")
        self._begin = time.monotonic()
        return causes

    def _measure_probe(self) -> float:
        """Seconds of the slowest local device; the best of two, after one that waits for whatever is before it."""
        seconds = []
        for _ in range(3):
            begin = time.perf_counter()
            jax.block_until_ready(self._probe(self._operands))
            seconds.append(time.perf_counter() - begin)
        return min(seconds[1:])


def find_outliers(times: np.ndarray, ratio: float, floors: np.ndarray) -> list[Outlier]:
    """The processes that take longer than the others.

    A process is compared with the median of the others, which is robust, and of use from two processes on.

    Args:
        times: float [processes, kinds].
        ratio: How many times the median of the others is too long.
        floors: float [kinds]: what a process must take more than the others, besides.
    """
    found = []
    for process, own in enumerate(times):
        usual = np.median(np.delete(times, process, axis=0), axis=0)
        late = (own > ratio * usual) & (own > usual + floors)
        found += [Outlier(process, int(k), float(own[k]), float(usual[k])) for k in np.flatnonzero(late)]
    return found


def _make_probe() -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    """A chain of matrix products on each local device, milliseconds long: operands [devices, n, n], and the program."""
    devices = jax.local_devices()
    sharding = NamedSharding(Mesh(np.array(devices), ("device",)), PartitionSpec("device"))
    size, dtype = (4096, jnp.bfloat16) if devices[0].platform == "gpu" else (256, jnp.float32)
    shape = (len(devices), size, size)
    operands = jax.jit(lambda: jnp.full(shape, 1 / size, dtype), out_shardings=sharding)()

    @jax.jit
    def probe(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, _PRODUCTS, lambda _, y: x @ y, x)

    return operands, probe.lower(operands).compile()
