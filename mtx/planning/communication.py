"""How long exchanges between GPUs take, by the links that their groups cross.

Decides how groups lie in the NVLink domains: devices are numbered in mesh order, `tensor` innermost, and a domain has
neighbours. What leaves a domain is shared out over the network adapters of the members that are in it, as NCCL does.

Invariant: a slower link never makes an exchange faster.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mtx.config.axes import MESH_AXES
from mtx.planning.case import Cluster
from mtx.planning.constants import Constants


@dataclass(frozen=True)
class Group:
    """Devices that exchange with each other.

    Attributes:
        size: How many.
        local: How many of them are in one NVLink domain.
    """

    size: int
    local: int

    @property
    def domains(self) -> int:
        """Over how many NVLink domains it extends."""
        return -(-self.size // self.local)


@dataclass(frozen=True)
class Network:
    """The links of a cluster, as a mesh lies on it.

    Attributes:
        sizes: Devices along each mesh axis.
        shares_adapters: Whether what all members of a group that are in one domain need comes into it once.
    """

    cluster: Cluster
    sizes: Mapping[str, int]
    constants: Constants
    shares_adapters: bool = True

    def group(self, axes: Sequence[str]) -> Group:
        """The devices that differ along these mesh axes only."""
        size, local = math.prod(self.sizes[axis] for axis in axes), 1
        for axis in axes:
            place = MESH_AXES.index(axis)
            stride = math.prod(self.sizes[inner] for inner in MESH_AXES[place + 1 :])
            local *= max(1, min(self.sizes[axis], self.cluster.domain // stride))
        return Group(size, min(size, local))

    def gather_seconds(self, size_bytes: float, axes: Sequence[str]) -> float:
        """Of an all-gather, or a reduce-scatter, of what is `size_bytes` when it is whole."""
        group = self.group(axes)
        if group.size == 1:
            return 0.0
        nvlink = size_bytes * (group.local - 1) / group.local / self._nvlink
        share = group.local if self.shares_adapters else 1
        network = size_bytes / share * (group.domains - 1) / group.domains / self._nic
        return max(nvlink, network) + self._latency(group)

    def reduce_seconds(self, size_bytes: float, axes: Sequence[str]) -> float:
        """Of an all-reduce: a reduce-scatter and an all-gather."""
        return 2 * self.gather_seconds(size_bytes, axes)

    def permute_seconds(self, size_bytes: float, axis: str) -> float:
        """Of sending to the next device along an axis; the slowest pair counts."""
        group = self.group((axis,))
        if group.size == 1:
            return 0.0
        if group.domains > 1:
            return size_bytes / self._nic + self.constants.network_latency_s
        return size_bytes / self._nvlink + self.constants.nvlink_latency_s

    def exchange_seconds(self, size_bytes: float, axes: Sequence[str]) -> float:
        """Of an all-to-all in which each device sends `size_bytes` in all, its own part among them."""
        group = self.group(axes)
        if group.size == 1:
            return 0.0
        nvlink = size_bytes * (group.local - 1) / group.size / self._nvlink
        network = size_bytes * (group.size - group.local) / group.size / self._nic
        return max(nvlink, network) + self._latency(group)

    @property
    def _nvlink(self) -> float:
        return self.cluster.gpu.nvlink_bandwidth * self.constants.nvlink_efficiency

    @property
    def _nic(self) -> float:
        return self.cluster.nic_bandwidth * self.constants.network_efficiency

    def _latency(self, group: Group) -> float:
        constants = self.constants
        return (group.local - 1) * constants.nvlink_latency_s + (group.domains - 1) * constants.network_latency_s
