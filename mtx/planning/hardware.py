"""What GPUs can do: the table that MFU and every plan are measured against.

Decides the numbers and which device they belong to. Peaks are dense (without structured sparsity), as the vendor's
data sheets state them; `measured_flops` is the fastest matrix product that anybody has published for the part.

Invariant: a device that is not in the table has no peak. A sibling's would make a wrong MFU look right.

Sources. Peaks, memory, bandwidths and NVLink: NVIDIA's data sheets, NVLink halved there (one direction), structured
sparsity taken out. Measured products: stas00/ml-engineering (maximum achievable matmul FLOPS). Domains and adapters:
the DGX and NVL72 systems; clouds differ, so that a config's `Cluster` overrides both. From memory of the same sources,
not read again: multiprocessors, TF32, watts, the adapters of V100, A100-40 and GB200, and all of GB300 but its peak.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One model of GPU."""

    name: str
    device_kind: str
    """Regular expression that `jax.Device.device_kind`, the driver's name of the part, matches as a whole."""
    dense_flops: Mapping[str, float]
    """Format of the factors of a matrix product -> FLOP/s of the data sheet."""
    measured_flops: Mapping[str, float] = field(default_factory=dict)
    """The same, as the fastest product that was measured."""
    memory_bytes: int
    """Nominal; the driver keeps about 1 % of it."""
    memory_bandwidth: float
    """Bytes/s."""
    nvlink_bandwidth: float
    """Bytes/s per direction, to the GPUs of the same domain together."""
    nvlink_domain: int
    """GPUs that reach each other through NVLink, in the usual system."""
    nic_bandwidth: float
    """Bytes/s per direction and GPU, to other domains, in the usual system."""
    generation: str
    """Architecture: 'volta', 'ampere', 'hopper' or 'blackwell'."""
    multiprocessors: int
    """Among which the tiles of a matrix product are shared out."""
    float32_flops: float
    """FLOP/s of float32 products as XLA computes them unless it is told otherwise: in TF32, where there is such."""
    watts: float | None
    """Thermal design power of the module: what it draws at most; None: unknown."""

    def peak_flops(self, dtype: str) -> float | None:
        """Dense peak in FLOP/s of matrix products of this format; None where there is none to measure an MFU against.

        Args:
            dtype: 'bfloat16', 'float16' or 'float8'. float32 has no entry: what its products run at depends on the
                precision that XLA takes for them.
        """
        return self.dense_flops.get(dtype)


_TERA, _GIGA, _GIB, _GBIT = 1e12, 1e9, 2**30, 1e9 / 8


def _peaks(
    *, float16: float | None = None, bfloat16: float | None = None, float8: float | None = None
) -> dict[str, float]:
    tflops = {"float16": float16, "bfloat16": bfloat16, "float8": float8}
    return {name: value * _TERA for name, value in tflops.items() if value is not None}


_GPUS = (
    Gpu(
        name="V100",
        device_kind=r"Tesla V100-SXM[23]-32GB(-LS)?",
        dense_flops=_peaks(float16=125),
        memory_bytes=32 * _GIB,
        memory_bandwidth=0.9 * _TERA,
        nvlink_bandwidth=150 * _GIGA,
        nvlink_domain=8,
        nic_bandwidth=50 * _GBIT,
        generation="volta",
        multiprocessors=80,
        float32_flops=15.7 * _TERA,
        watts=300,
    ),
    Gpu(
        name="A100-40",
        device_kind=r"(NVIDIA )?A100-SXM4-40GB",
        dense_flops=_peaks(float16=312, bfloat16=312),
        measured_flops=_peaks(bfloat16=271.2),
        memory_bytes=40 * _GIB,
        memory_bandwidth=1.555 * _TERA,
        nvlink_bandwidth=300 * _GIGA,
        nvlink_domain=8,
        nic_bandwidth=200 * _GBIT,
        generation="ampere",
        multiprocessors=108,
        float32_flops=156 * _TERA,
        watts=400,
    ),
    Gpu(
        name="A100-80",
        device_kind=r"(NVIDIA )?A100-SXM4-80GB",
        dense_flops=_peaks(float16=312, bfloat16=312),
        measured_flops=_peaks(bfloat16=271.2),
        memory_bytes=80 * _GIB,
        memory_bandwidth=2.039 * _TERA,
        nvlink_bandwidth=300 * _GIGA,
        nvlink_domain=8,
        nic_bandwidth=200 * _GBIT,
        generation="ampere",
        multiprocessors=108,
        float32_flops=156 * _TERA,
        watts=400,
    ),
    Gpu(
        name="H100",
        device_kind=r"NVIDIA H100 80GB HBM3",
        dense_flops=_peaks(float16=989, bfloat16=989, float8=1979),
        measured_flops=_peaks(bfloat16=794.5, float8=1402.6),
        memory_bytes=80 * _GIB,
        memory_bandwidth=3.35 * _TERA,
        nvlink_bandwidth=450 * _GIGA,
        nvlink_domain=8,
        nic_bandwidth=400 * _GBIT,
        generation="hopper",
        multiprocessors=132,
        float32_flops=494.5 * _TERA,
        watts=700,
    ),
    Gpu(
        name="H200",
        device_kind=r"NVIDIA H200",
        dense_flops=_peaks(float16=989, bfloat16=989, float8=1979),
        measured_flops=_peaks(bfloat16=794.5, float8=1453.4),
        memory_bytes=141 * _GIB,
        memory_bandwidth=4.8 * _TERA,
        nvlink_bandwidth=450 * _GIGA,
        nvlink_domain=8,
        nic_bandwidth=400 * _GBIT,
        generation="hopper",
        multiprocessors=132,
        float32_flops=494.5 * _TERA,
        watts=700,
    ),
    Gpu(
        name="B200",
        device_kind=r"NVIDIA B200",
        dense_flops=_peaks(float16=2250, bfloat16=2250, float8=4500),
        measured_flops=_peaks(bfloat16=1745, float8=3432.5),
        memory_bytes=180 * _GIB,
        memory_bandwidth=8.0 * _TERA,
        nvlink_bandwidth=900 * _GIGA,
        nvlink_domain=8,
        nic_bandwidth=400 * _GBIT,
        generation="blackwell",
        multiprocessors=148,
        float32_flops=1125 * _TERA,
        watts=1000,
    ),
    Gpu(
        name="GB200",
        device_kind=r"NVIDIA GB200",
        dense_flops=_peaks(float16=2500, bfloat16=2500, float8=5000),
        measured_flops=_peaks(bfloat16=1822, float8=3615.6),
        memory_bytes=186 * _GIB,
        memory_bandwidth=8.0 * _TERA,
        nvlink_bandwidth=900 * _GIGA,
        nvlink_domain=72,
        nic_bandwidth=400 * _GBIT,
        generation="blackwell",
        multiprocessors=152,
        float32_flops=1250 * _TERA,
        watts=1200,
    ),
    Gpu(
        name="GB300",
        device_kind=r"NVIDIA GB300",
        dense_flops=_peaks(float16=2500, bfloat16=2500, float8=5000),
        memory_bytes=288 * _GIB,
        memory_bandwidth=8.0 * _TERA,
        nvlink_bandwidth=900 * _GIGA,
        nvlink_domain=72,
        nic_bandwidth=800 * _GBIT,
        generation="blackwell",
        multiprocessors=152,
        float32_flops=1250 * _TERA,
        watts=1400,
    ),
)

GPUS: Mapping[str, Gpu] = {gpu.name: gpu for gpu in _GPUS}
"""By the name that commands take."""


def find_gpu(device_kind: str) -> Gpu | None:
    """The row of a device; None for those that the table does not have, CPUs among them.

    Args:
        device_kind: As `jax.Device.device_kind` says it, e.g. 'NVIDIA H100 80GB HBM3'.
    """
    return next((gpu for gpu in _GPUS if re.fullmatch(gpu.device_kind, device_kind)), None)
