"""What each process is told: how it finds the others, which of them it is, which GPUs are its own.

Nothing is left to be guessed from a scheduler's environment (jax issues 16788, 23452, 28194: one GPU per host, or the
wrong one).

Invariant: process index = node index * processes per node + index on the node, so that neighbours share a host.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

from launch.job import Job, LaunchError

LOOPBACK = "127.0.0.1"


def coordinates(job: Job, process: int, address: str) -> dict[str, str]:
    """What process number `process` is told of the others, which meet at `address`; nothing where it is alone."""
    if job.num_processes == 1:
        return {}
    return {
        "MTX_COORDINATOR": address,
        "MTX_NUM_PROCESSES": str(job.num_processes),
        "MTX_PROCESS_ID": str(process),
    }


def visible_gpus(job: Job, local: int, gpus: Sequence[str]) -> dict[str, str]:
    """The share of its host's GPUs that the `local`-th process there sees; all of them where it is alone.

    Raises:
        LaunchError: There are fewer than the job says, or they cannot be shared out evenly.
    """
    if is_simulated(job):
        return {}
    wanted = len(gpus) if job.gpus_per_node is None else job.gpus_per_node
    if len(gpus) < wanted:
        raise LaunchError(
            f"{socket.gethostname()} shows {len(gpus)} GPUs and the job wants {wanted} of each host: look at it with "
            "nvidia-smi, leave it out, or want fewer"
        )
    count = job.processes_per_node
    if not wanted or (count == 1 and wanted == len(gpus)):
        return {}
    share, rest = divmod(wanted, count)
    if rest or not share:
        raise LaunchError(
            f"{count} processes cannot share {wanted} GPUs evenly: choose a divisor of that, or make fewer visible "
            "(CUDA_VISIBLE_DEVICES)"
        )
    return {"CUDA_VISIBLE_DEVICES": ",".join(gpus[local * share : (local + 1) * share])}


def is_simulated(job: Job) -> bool:
    """Whether the job computes on CPU devices that its command asks for."""
    return job.devices_per_process is not None or any(word.startswith("--cpu-devices") for word in job.command)


def find_gpus(environment: Mapping[str, str]) -> list[str]:
    """The GPUs that this process may use, as CUDA names them."""
    if environment.get("JAX_PLATFORMS") == "cpu":
        return []
    if "CUDA_VISIBLE_DEVICES" in environment:
        return [name for name in environment["CUDA_VISIBLE_DEVICES"].split(",") if name.strip()]
    return [str(number) for number, _ in enumerate(Path("/dev").glob("nvidia[0-9]*"))]


def join_address(host: str, port: object) -> str:
    """HOST:PORT, with brackets round an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def free_port(host: str = LOOPBACK) -> int:
    """A TCP port that nobody listens at now.

    Args:
        host: The address it will be bound to; empty: all of this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.bind((host, 0))
        return int(listener.getsockname()[1])


def address_towards(hosts: Sequence[str]) -> str:
    """The address of this machine by which the given hosts can reach it; loopback where there are none.

    It is the one that the kernel sends from on the way to them, so neither what the own name resolves to (Debian:
    127.0.1.1) nor an interface without a route is taken. No packet is sent.

    Raises:
        LaunchError: A name does not resolve, or there is no route.
    """
    for host in hosts:
        try:
            family, kind, _, _, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
            with socket.socket(family, kind) as probe:
                probe.connect(target)
                return str(probe.getsockname()[0]).split("%")[0]
        except OSError as error:
            raise LaunchError(f"host {host}: {error.strerror or error}; it must resolve and have a route") from None
    return LOOPBACK
