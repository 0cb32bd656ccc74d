"""The process and its devices: how JAX is started, and how devices become a named mesh.

Invariant: everything after this file takes its mesh as an argument and never asks for the devices of the process.
"""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from mtx.config import schema
from mtx.config.axes import MESH_AXES
from mtx.errors import UserError

ENVIRONMENT = ("MTX_COORDINATOR", "MTX_NUM_PROCESSES", "MTX_PROCESS_ID")
"""Set together by the launcher: HOST:PORT of process 0, number of processes, index of this one."""
POOL_SHARE = 0.96
"""Of a GPU's memory: what JAX's allocator takes at the start, for arrays. Its own default leaves a quarter of the card
unused. The rest is for what lives outside: CUDA's context and NCCL's buffers."""
_POOL_SETTINGS = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")  # the older name is refused beside
_PEER_TIMEOUT_S = schema.Health().peer_timeout_s
_BACKSTOP_S = 15
"""Later than a run's own watch JAX aborts (signal 6, nothing said) where a process gives it no sign of life."""
_START_TIMEOUT_S = 300
_GPU_DRIVER = Path("/dev/nvidiactl")
_ALLOCATOR_SETTINGS = {-8: 1, -4: 0, -1: -1}
"""For glibc's `mallopt`: one arena (M_ARENA_MAX), nothing outside of it (M_MMAP_MAX), nothing given back
(M_TRIM_THRESHOLD)."""
_SCHEDULER = "xla_cpu_enable_concurrency_optimized_scheduler"


def _prepare_cpu() -> None:
    """Settles how XLA runs on a CPU, where there is no GPU to run on (docs/performance.md has what each is worth).

    A step takes and frees gigabytes. Given back to the kernel, they would be zeroed page by page when they are taken
    again. And operations are not reordered so that more of them can run at a time, which takes half as much memory
    again, and makes the step of a model of some size no faster.
    """
    if _GPU_DRIVER.exists():
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        for name, value in _ALLOCATOR_SETTINGS.items():
            libc.mallopt(name, value)
    flags = os.environ.get("XLA_FLAGS", "")
    if _SCHEDULER not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --{_SCHEDULER}=false".strip()


def start_process(*, peer_timeout_s: float = _PEER_TIMEOUT_S) -> None:
    """Configures JAX for this process; joins the other processes of the run where the launcher says there are some.

    Nothing is guessed from a scheduler's environment: the launcher passes what it knows, explicitly.

    Args:
        peer_timeout_s: `Health.peer_timeout_s`; matters to a run of several processes only.

    Raises:
        UserError: Only some of the launcher's variables are set.
    """
    _prepare_cpu()
    if not any(name in os.environ for name in _POOL_SETTINGS):
        os.environ[_POOL_SETTINGS[0]] = str(POOL_SHARE)  # read when the devices are first asked for
    cache = os.environ.get("MTX_COMPILATION_CACHE", str(Path.home() / ".cache" / "mtx" / "xla"))
    if cache:
        jax.config.update("jax_compilation_cache_dir", cache)
        # Drawing weights is several programs of a few tenths of a second; JAX's own default leaves out all below one.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.02)
    values = [os.environ.get(name) for name in ENVIRONMENT]
    if not any(values):
        return
    if not all(values):
        raise UserError(f"{', '.join(ENVIRONMENT)} are set together or not at all; got {values}")
    address, count, index = values
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # of effect on CPU devices only
    jax.distributed.initialize(
        coordinator_address=address,
        num_processes=int(count or 0),
        process_id=int(index or 0),
        cluster_detection_method="deactivate",
        heartbeat_timeout_seconds=math.ceil(peer_timeout_s) + _BACKSTOP_S,
        initialization_timeout=_START_TIMEOUT_S,
    )


def make_mesh(counts: schema.Mesh, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh (pipe, data, fsdp, expert, context, tensor) over all given devices.

    Devices are taken in the order of their process and local index, so that the innermost axis, `tensor`, stays
    within a host wherever it can.

    Args:
        counts: Positive device counts, whose product is the number of devices (`mtx.config.layout.resolve_mesh`).
        devices: Those of all processes by default.
    """
    devices = jax.devices() if devices is None else devices
    ordered = sorted(devices, key=lambda d: (d.process_index, d.id))
    shape = tuple(getattr(counts, axis) for axis in MESH_AXES)
    return Mesh(np.array(ordered).reshape(shape), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def host_memory(mesh: Mesh) -> str:
    """The kind of memory on the host that the devices of a mesh copy from and to without the processor's help.

    Raises:
        UserError: A device has none.
    """
    kind = "pinned_host"
    for device in mesh.local_devices:
        kinds = [memory.kind for memory in device.addressable_memories()]
        if kind not in kinds:
            raise UserError(
                f"Train.offload_optimizer = True needs memory of the kind {kind}, and {device} has "
                f"{', '.join(kinds) or 'none'}: set Train.offload_optimizer = False"
            )
    return kind
