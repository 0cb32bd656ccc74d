"""What XLA must know of a GPU that is not there: the description that it compiles for.

Decides the compiler's constants of each part and the text that they are written in. What plans reckon with (peaks,
bandwidths, links) is the hardware table's.

Invariant: a part without a description is refused; a sibling's would give a program that no such machine runs.

Source: the descriptions that openxla/xla ships (xla/backends/gpu/target_config/specs), which are what its drivers
report; `GpuTargetConfigProto` and `GpuDeviceInfoProto` of stream_executor/device_description.proto.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mtx.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Target:
    """A GPU as the compiler sees it.

    Attributes:
        device: The driver's name of the part.
        compute_capability: Major and minor version, such as (9, 0) for Hopper.
        core_count: Streaming multiprocessors.
        fpus_per_core: float32 units of each.
        shared_memory_per_core: Bytes.
        shared_memory_per_block: Most that a block may ask for, bytes.
        l2_bytes: Of the second-level cache.
        clock_ghz: Highest clock.
        memory_bandwidth: Bytes/s.
        memory_bytes: What the driver offers, which is a little less than what the part has.
    """

    device: str
    compute_capability: tuple[int, int]
    core_count: int
    fpus_per_core: int
    shared_memory_per_core: int
    shared_memory_per_block: int
    l2_bytes: int
    clock_ghz: float
    memory_bandwidth: int
    memory_bytes: int

    def text(self) -> str:
        """The description as the text of a `GpuTargetConfigProto`."""
        major, minor = self.compute_capability
        limits = {
            "threads_per_block_limit": 1024,
            "threads_per_warp": 32,
            "threads_per_core_limit": 2048,
            "block_dim_limit_x": 2**31 - 1,
            "block_dim_limit_y": 2**16 - 1,
            "block_dim_limit_z": 2**16 - 1,
            "registers_per_core_limit": 65536,
            "registers_per_block_limit": 65536,
            "shared_memory_per_block": 49152,
            "shared_memory_per_block_optin": self.shared_memory_per_block,
            "shared_memory_per_core": self.shared_memory_per_core,
            "core_count": self.core_count,
            "fpus_per_core": self.fpus_per_core,
            "memory_bandwidth": self.memory_bandwidth,
            "l2_cache_size": self.l2_bytes,
            "clock_rate_ghz": self.clock_ghz,
            "device_memory_size": self.memory_bytes,
        }
        lines = [f"  {name}: {value}" for name, value in limits.items()]
        capability = f"  cuda_compute_capability {{ major: {major} minor: {minor} }}"
        versions = [f'  {name}: "{CUDA_VERSION}"' for name in ("runtime_version", "compile_time_toolkit_version")]
        end = [*versions, "}", 'platform_name: "CUDA"', f'device_description_str: "{self.device}"', ""]
        return "\n".join(["gpu_device_info {", *lines, capability, *end])


CUDA_VERSION = "13.0.0"
"""That programs are compiled for. Without one XLA takes CUDA to be too old for 8-bit products."""

_HOPPER: dict[str, Any] = {
    "compute_capability": (9, 0), "core_count": 132, "fpus_per_core": 128, "shared_memory_per_core": 233472,
    "shared_memory_per_block": 232448, "l2_bytes": 50 * 2**20, "clock_ghz": 1.98,
}  # fmt: skip
_AMPERE: dict[str, Any] = {
    "compute_capability": (8, 0), "core_count": 108, "fpus_per_core": 64, "shared_memory_per_core": 167936,
    "shared_memory_per_block": 166912, "l2_bytes": 40 * 2**20, "clock_ghz": 1.41,
}  # fmt: skip
_BLACKWELL: dict[str, Any] = {"fpus_per_core": 128, "shared_memory_per_core": 233472, "shared_memory_per_block": 232448}

TARGETS: Mapping[str, Target] = {
    "A100-40": Target(
        device="NVIDIA A100-SXM4-40GB", memory_bandwidth=1_555_200_000_000, memory_bytes=42_331_013_120, **_AMPERE
    ),
    "A100-80": Target(
        device="NVIDIA A100-SXM4-80GB", memory_bandwidth=2_039_040_000_000, memory_bytes=85_100_068_864, **_AMPERE
    ),
    "H100": Target(
        device="NVIDIA H100 80GB HBM3", memory_bandwidth=3_352_320_000_000, memory_bytes=84_942_979_072, **_HOPPER
    ),
    "H200": Target(
        device="NVIDIA H200", memory_bandwidth=4_800_000_000_000, memory_bytes=151_397_597_184, **_HOPPER
    ),
    "B200": Target(
        device="NVIDIA B200", compute_capability=(10, 0), core_count=148, l2_bytes=132_644_864, clock_ghz=1.965,
        memory_bandwidth=7_672_320_000_000, memory_bytes=191_514_411_008, **_BLACKWELL,
    ),
    "GB200": Target(
        device="NVIDIA GB200", compute_capability=(10, 0), core_count=152, l2_bytes=135_528_448, clock_ghz=2.062,
        memory_bandwidth=7_928_064_000_000, memory_bytes=197_897_748_480, **_BLACKWELL,
    ),
    "GB300": Target(
        device="NVIDIA GB300", compute_capability=(10, 3), core_count=152, l2_bytes=135_528_448, clock_ghz=2.07,
        memory_bandwidth=7_928_064_000_000, memory_bytes=297_021_079_552, **_BLACKWELL,
    ),
}  # fmt: skip
"""By the names of the hardware table. V100 is missing: CUDA 13, which this JAX is built with, starts at capability
7.5."""


def find_target(gpu: str) -> Target:
    """The description of a GPU of the hardware table.

    Raises:
        UserError: There is none.
    """
    if gpu not in TARGETS:
        raise UserError(
            f"--gpu {gpu}: this version of JAX compiles for {', '.join(TARGETS)} (CUDA 13 has dropped GPUs before "
            "compute capability 7.5, V100 among them); `mtx plan` reckons with any GPU of its table"
        )
    return TARGETS[gpu]
