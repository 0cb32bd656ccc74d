"""Variables of NCCL, CUDA and JAX: which of them a profile sets on GPUs, and which are the site's or the user's.

NCCL finds its way by itself: it reads the topology of the machine, and its defaults are the vendor's. So little is set.

Invariant: each variable stands with its unit and where that is said.
"""

from __future__ import annotations

from dataclasses import dataclass

from launch.flags import AMPERE, HOPPER, TOOLBOX, Use

NCCL = "https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/env.html"
JAX = "https://docs.jax.dev/en/latest/config_options.html"


@dataclass(frozen=True)
class Variable:
    """A variable of the environment.

    Attributes:
        unit: Of its value.
        meaning: What it does.
        source: Where that is said.
        uses: Where a profile sets it; none: only the user does.
    """

    name: str
    unit: str
    meaning: str
    source: str
    uses: tuple[Use, ...] = ()


VARIABLES = (
    Variable(
        "CUDA_DEVICE_MAX_CONNECTIONS",
        "hardware queues",
        "with one, a collective starts in the order it was issued; on Blackwell that only costs time",
        TOOLBOX,
        (Use("1", ("throughput",), (AMPERE, HOPPER)),),
    ),
    Variable(
        "NCCL_DEBUG",
        "VERSION, WARN, INFO or TRACE",
        "what NCCL prints; WARN: only what has gone wrong",
        NCCL,
        (Use("WARN", ("throughput", "safe", "deterministic")), Use("INFO", ("debug",))),
    ),
    Variable(
        "NCCL_DEBUG_SUBSYS",
        "list of names",
        "of which parts; those that show which network is used",
        NCCL,
        (Use("INIT,ENV,NET,GRAPH", ("debug",)),),
    ),
    Variable(
        "NCCL_LAUNCH_MODE",
        "PARALLEL or GROUP",
        "GROUP: the GPUs of one process begin a collective together, against hangs with several GPUs a process",
        TOOLBOX,
        (Use("GROUP", ("safe",)),),
    ),
    Variable(
        "JAX_TRACEBACK_FILTERING",
        "off, tracebackhide, remove_frames, quiet_remove_frames or auto",
        "off: tracebacks show JAX's own frames",
        JAX,
        (Use("off", ("debug",)),),
    ),
    Variable(
        "JAX_OPTIMIZATION_LEVEL", "O0 to O3", "O1: a bundle of XLA flags (pipelined collectives and more)", TOOLBOX
    ),
    Variable("NCCL_SOCKET_IFNAME", "list of prefixes", "network interfaces for sockets: the site's to know", NCCL),
    Variable("NCCL_IB_HCA", "list of device[:port]", "InfiniBand devices: the site's to know", NCCL),
    Variable("NCCL_IB_TIMEOUT", "t of 4.096 us * 2^t", "wait for a packet before it is sent again", NCCL),
    Variable("NCCL_IB_RETRY_CNT", "times", "how often it is sent again before the connection is given up", NCCL),
    Variable("NCCL_NVLS_ENABLE", "0: off, 1: on, 2: where possible", "reductions in the NVLink switch", NCCL),
    Variable("NCCL_BUFFSIZE", "bytes", "buffer of each channel", NCCL),
    Variable("XLA_CLIENT_MEM_FRACTION", "share of 1", "of a GPU's memory, for arrays: `mtx` sets it", TOOLBOX),
)


def chosen(profile: str, generation: str) -> list[tuple[Variable, str]]:
    """The variables of a profile, with values."""
    return [
        (variable, use.value)
        for variable in VARIABLES
        for use in variable.uses
        if profile in use.profiles and generation in use.generations
    ]
