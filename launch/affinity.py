"""Which cores a process runs on: those of the NUMA node that its GPUs hang on.

`python -m launch.affinity` prints what this machine says, the InfiniBand devices near each GPU included. Those are only
shown: NCCL reads the same topology and more of it (PCI switches), and uses the devices of other GPUs on purpose, so a
list per process (NCCL_IB_HCA) could only take paths away.

Invariant: where the machine does not say, nothing is bound.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/")


@dataclass(frozen=True)
class Gpu:
    """A GPU that this machine shows.

    Attributes:
        address: Of PCI.
        node: NUMA node; None: the machine does not say.
    """

    address: str
    uuid: str
    model: str
    node: int | None


def cores_near(
    shares: Sequence[str],
    local: int,
    *,
    root: Path = ROOT,
    allowed: Collection[int] | None = None,
    environment: Mapping[str, str] | None = None,
) -> tuple[int, ...]:
    """Cores close to the GPUs of one of the processes here; those with GPUs of the same node get an even share each.

    Hardware threads of a core stay together. Nothing for a process whose GPUs are on several nodes.

    Args:
        shares: The GPUs of each process here, as in CUDA_VISIBLE_DEVICES.
        local: Which of the processes.
        root: Of /proc, /sys and /dev.
        allowed: Cores that this process may use, by default.
        environment: Of the processes, by default of this one.
    """
    if allowed is None:
        if not hasattr(os, "sched_getaffinity"):
            return ()
        allowed = os.sched_getaffinity(0)
    gpus = find_gpus(root)
    ordered = len({gpu.model for gpu in gpus}) == 1 or (
        (os.environ if environment is None else environment).get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"
    )
    nodes = [_node_of(share, gpus, ordered) for share in shares]
    node = nodes[local]
    if node is None:
        return ()
    units = _by_core(sorted(set(_read_list(root / f"sys/devices/system/node/node{node}/cpulist")) & set(allowed)), root)
    fellows = [index for index, other in enumerate(nodes) if other == node]
    place, count = fellows.index(local), len(fellows)
    mine = units[place * len(units) // count : (place + 1) * len(units) // count]
    return tuple(sorted(core for unit in (mine or units) for core in unit))


def find_gpus(root: Path = ROOT) -> list[Gpu]:
    """The GPUs of this machine, or container, in the order of their PCI addresses."""
    gpus = []
    for path in sorted((root / "proc/driver/nvidia/gpus").glob("*/information")):
        fields = dict(re.findall(r"^([^:\n]+):\s*(.*?)\s*$", path.read_text(errors="replace"), re.MULTILINE))
        minor = fields.get("Device Minor", "")
        if minor.isdecimal() and not (root / f"dev/nvidia{minor}").exists():
            continue  # of another container: CUDA does not count it
        address = path.parent.name.lower()
        node = _read_node(root / "sys/bus/pci/devices" / address / "numa_node")
        gpus.append(Gpu(address, fields.get("GPU UUID", ""), fields.get("Model", ""), node))
    return gpus


def devices_near(node: int | None, root: Path = ROOT) -> list[str]:
    """InfiniBand devices on a NUMA node."""
    paths = sorted((root / "sys/class/infiniband").glob("*/device/numa_node"))
    return [path.parts[-3] for path in paths if node is not None and _read_node(path) == node]


def report(root: Path = ROOT) -> str:
    """A line for each GPU: its address, NUMA node, cores and InfiniBand devices."""
    lines = []
    for index, gpu in enumerate(find_gpus(root)):
        cores = cores_near([gpu.uuid], 0, root=root)
        near = " ".join(devices_near(gpu.node, root)) or "none"
        where = "NUMA node unknown" if gpu.node is None else f"NUMA node {gpu.node}"
        lines.append(f"GPU {index} {gpu.address} {gpu.model}: {where}, {len(cores)} cores, InfiniBand near: {near}")
    return "\n".join(lines) or "no GPU in /proc/driver/nvidia/gpus"


def _node_of(share: str, gpus: Sequence[Gpu], ordered: bool) -> int | None:
    """The one NUMA node of the GPUs that CUDA_VISIBLE_DEVICES names; None: several, or the machine does not say."""
    nodes = set()
    for name in filter(None, (part.strip() for part in share.split(","))):
        if name.isdecimal():
            known = [gpus[int(name)]] if ordered and int(name) < len(gpus) else []
        else:
            known = [gpu for gpu in gpus if gpu.uuid.startswith(name)]
        nodes.add(known[0].node if len(known) == 1 else None)
    return nodes.pop() if len(nodes) == 1 else None


def _by_core(threads: Sequence[int], root: Path) -> list[list[int]]:
    """Hardware threads, those of a core together."""
    cores: dict[int, list[int]] = {}
    for thread in threads:
        siblings = _read_list(root / f"sys/devices/system/cpu/cpu{thread}/topology/thread_siblings_list")
        cores.setdefault(min(siblings, default=thread), []).append(thread)
    return [cores[first] for first in sorted(cores)]


def _read_node(path: Path) -> int | None:
    try:
        node = int(path.read_text())
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None


def _read_list(path: Path) -> list[int]:
    """Numbers of a list such as `0-3,8`."""
    try:
        text = path.read_text().strip()
        parts = [part.partition("-") for part in text.split(",") if part]
        return [number for low, _, high in parts for number in range(int(low), int(high or low) + 1)]
    except (OSError, ValueError):
        return []


if __name__ == "__main__":
    print(report())
