"""Digests of a state's arrays that are the same on every layout, computed on the devices where the arrays lie.

    element   -> two 32-bit hashes of (its bits, its index in the whole array)
    shard     -> the sums of its elements' hashes, mod 2^32
    array     -> the sums over its shards, one copy of each: 64 bits

Sums do not depend on how an array is cut, so a state has the same digests on any mesh; and devices that hold the same
shard must have the same sums, or one of them holds what it should not. A changed bit changes one term of both sums,
and values that trade places change two.

Decides what a digest is, and which copies ought to agree; not what is done about those that do not.

Invariant: every device tells of its own copy; no device's memory answers for another's.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

LONGEST_HOST_NAME = 255


@dataclass(frozen=True)
class Holder:
    """A device that holds a copy.

    Attributes:
        device: Its id in the run.
        process: The process that it belongs to.
        host: The name of that process's host.
    """

    device: int
    process: int
    host: str


@dataclass(frozen=True)
class Disagreement:
    """Copies of one shard of an array that are not the same.

    Attributes:
        leaf: Path of the array, such as `params/embed/weight`.
        copies: How many there are.
        suspects: Those with another digest than most; all of them where no digest has more than half.
    """

    leaf: str
    copies: int
    suspects: tuple[Holder, ...]


def describe(disagreements: Sequence[Disagreement]) -> str:
    """A sentence for people: which devices, of which hosts, hold what others do not."""
    leaves: dict[tuple[Holder, ...], list[str]] = {}
    for one in disagreements:
        leaves.setdefault(one.suspects, []).append(one.leaf)
    told = []
    for suspects, names in leaves.items():
        devices = ", ".join(f"device {s.device} of process {s.process} on host {s.host}" for s in suspects)
        more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        told.append(f"{devices}: {names[0]}{more} differs from its copies elsewhere")
    return "; ".join(told)


class Digests:
    """The digests of one state, on their way from the devices. What reads them waits; no other process is needed."""

    def __init__(self, mesh: Mesh, hosts: Sequence[str], layouts: Mapping[str, _Layout], sums: jax.Array) -> None:
        self._mesh, self._hosts, self._layouts, self._sums = mesh, hosts, layouts, sums

    @cached_property
    def _by_device(self) -> np.ndarray:
        """uint32 [leaves, devices, 2]."""
        return np.asarray(self._sums)

    def leaf_digests(self) -> dict[str, str]:
        """16 hexadecimal digits of each array, by its path: equal on every layout."""
        digests = {}
        for (name, layout), sums in zip(self._layouts.items(), self._by_device):
            high, low = sums[np.unique(layout.first_copies)].sum(axis=0, dtype=np.uint32).tolist()
            digests[name] = f"{high:08x}{low:08x}"
        return digests

    def disagreements(self) -> list[Disagreement]:
        """Shards whose copies are not all the same."""
        found = []
        for (name, layout), sums in zip(self._layouts.items(), self._by_device):
            first = layout.first_copies
            for shard in np.unique(first[(sums != sums[first]).any(axis=-1)]):
                copies = np.flatnonzero(first == shard)
                _, which, counts = np.unique(sums[copies], axis=0, return_inverse=True, return_counts=True)
                has_majority = 2 * counts.max() > len(copies)
                odd = copies[which.reshape(-1) != counts.argmax()] if has_majority else copies
                suspects = tuple(self._holder(place) for place in odd.tolist())
                found.append(Disagreement(leaf=name, copies=len(copies), suspects=suspects))
        return found

    def _holder(self, place: int) -> Holder:
        device = self._mesh.devices.flat[place]
        return Holder(device=device.id, process=device.process_index, host=self._hosts[device.process_index])


class Digester:
    """Digests states on a mesh. Making one and calling it are collective: all processes, in the same order."""

    def __init__(self, mesh: Mesh) -> None:
        """Args: mesh: where the arrays lie. All processes are told the names of each other's hosts."""
        self._mesh, self._hosts = mesh, _gather_host_names()
        self._layouts: dict[tuple[NamedSharding, tuple[int, ...]], _Layout] = {}
        self._join = jax.jit(jnp.stack, out_shardings=NamedSharding(mesh, P()))

    def __call__(self, state: Mapping[str, Any]) -> Digests:
        """Begins to digest a state and returns at once; the state may be donated to the next step.

        Args:
            state: Dict of pytrees of `jax.Array` of 8, 16 or 32 bits, on the mesh, in memory of the devices or of
                their hosts: those come to the devices one at a time. Digests do not depend on the layout where the
                arrays are the same on every layout, as checkpoints hold them (`Canonical.store`).
        """
        layouts, sums = {}, []
        for path, leaf in jax.tree_util.tree_leaves_with_path(dict(state)):
            key = leaf.sharding, leaf.shape
            if key not in self._layouts:
                self._layouts[key] = _Layout(self._mesh, *key)
            layout = self._layouts[key]
            layouts[jax.tree_util.keystr(path, simple=True, separator="/")] = layout
            sums.append(layout.digest(leaf, layout.offsets))
        return Digests(self._mesh, self._hosts, layouts, self._join(sums))


def _gather_host_names() -> list[str]:
    """The host of each process."""
    name = socket.gethostname()
    if jax.process_count() == 1:
        return [name]
    padded = np.frombuffer(name.encode()[:LONGEST_HOST_NAME].ljust(LONGEST_HOST_NAME, b"\0"), np.uint8)
    return [bytes(row).rstrip(b"\0").decode(errors="replace") for row in multihost_utils.process_allgather(padded)]


class _Layout:
    """How arrays of one shape lie on a mesh, and the program that digests one of them.

    Attributes:
        first_copies: int [devices]: for each device the first one in the mesh that holds the same shard.
        offsets: uint32 [devices, dims], a row on each device: the index at which its shard begins.
        digest: (array, offsets) -> uint32 [devices, 2], the sums of each device, a row on each.
    """

    def __init__(self, mesh: Mesh, sharding: NamedSharding, shape: tuple[int, ...]) -> None:
        begins = np.zeros((mesh.size, max(1, len(shape))), np.uint32)  # of a scalar: 0
        indices = sharding.devices_indices_map(shape)
        for place, device in enumerate(mesh.devices.flat):
            begins[place, : len(shape)] = [part.start or 0 for part in indices[device]]
        _, first, which = np.unique(begins, axis=0, return_index=True, return_inverse=True)
        self.first_copies = first[which.reshape(-1)]
        one_each = P(mesh.axis_names)
        self.offsets = jax.make_array_from_callback(
            begins.shape, NamedSharding(mesh, one_each), lambda index: begins[index]
        )
        # Manual over all axes: XLA takes no device's copy for another's.
        digest = jax.shard_map(_digest_shard, mesh=mesh, in_specs=(sharding.spec, one_each), out_specs=one_each)
        self.digest = jax.jit(lambda x, offsets: digest(jax.device_put(x, jax.memory.Space.Device), offsets))


def _digest_shard(x: jax.Array, offsets: jax.Array) -> jax.Array:
    """uint32 [1, 2]: the two sums of a shard, of which `offsets` [1, dims] says where it begins."""
    bits = {4: jnp.uint32, 2: jnp.uint16, 1: jnp.uint8}[x.dtype.itemsize]
    words = (x if x.dtype == jnp.bool else lax.bitcast_convert_type(x, bits)).astype(jnp.uint32)
    # A dim at a time: no index is computed that 32 bits do not hold.
    indices = [lax.broadcasted_iota(jnp.uint32, x.shape, dim) + offsets[0, dim] for dim in range(x.ndim)]

    def hashes(mix: Callable[[jax.Array], jax.Array]) -> jax.Array:
        place = jnp.uint32(0x9E3779B9)
        for index in indices:
            place = mix(place ^ index)
        return mix(words ^ place)

    # One reduction of both: XLA makes it one loop over the shard, with no array of hashes in memory.
    sums = lax.reduce(
        (hashes(_murmur), hashes(_lowbias)),
        (np.uint32(0), np.uint32(0)),
        lambda sums, terms: (sums[0] + terms[0], sums[1] + terms[1]),
        tuple(range(x.ndim)),
    )
    # Of each device its own, also where the array is the same on all.
    return jnp.stack(sums)[None] + 0 * offsets[:, :1]


def _murmur(h: jax.Array) -> jax.Array:
    """A bijection in which each bit depends on all. Source: MurmurHash3's 32-bit finalizer (Appleby)."""
    h = (h ^ (h >> 16)) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * np.uint32(0xC2B2AE35)
    return h ^ (h >> 16)


def _lowbias(h: jax.Array) -> jax.Array:
    """Another such bijection. Source: lowbias32 of the hash prospector (Wellons)."""
    h = (h ^ (h >> 16)) * np.uint32(0x7FEB352D)
    h = (h ^ (h >> 15)) * np.uint32(0x846CA68B)
    return h ^ (h >> 16)
