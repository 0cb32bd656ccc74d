"""The table of GPUs against the strings that drivers report."""

import pytest

from mtx.planning.hardware import GPUS, find_gpu


@pytest.mark.parametrize(
    ("device_kind", "name"),
    [
        ("Tesla V100-SXM2-32GB", "V100"),
        ("A100-SXM4-40GB", "A100-40"),
        ("NVIDIA A100-SXM4-40GB", "A100-40"),
        ("NVIDIA A100-SXM4-80GB", "A100-80"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA GB200", "GB200"),
        ("NVIDIA GB300", "GB300"),
    ],
)
def test_devices_are_found_by_the_name_that_jax_reports(device_kind, name):
    assert find_gpu(device_kind) is GPUS[name]


@pytest.mark.parametrize("device_kind", ["cpu", "TPU v4", "NVIDIA H100 PCIe", "NVIDIA H200 NVL", "NVIDIA L4", ""])
def test_siblings_and_strangers_are_not_found(device_kind):
    assert find_gpu(device_kind) is None


def test_peaks_belong_to_a_format():
    assert GPUS["H100"].peak_flops("bfloat16") == 989e12
    assert GPUS["H100"].peak_flops("float8") == 1979e12
    assert GPUS["H100"].peak_flops("float32") is None
    assert GPUS["V100"].peak_flops("bfloat16") is None  # V100 has none
    assert GPUS["A100-80"].peak_flops("float8") is None


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
def test_figures_have_the_right_units(gpu):
    assert 16 * 2**30 <= gpu.memory_bytes <= 512 * 2**30
    assert 0.5e12 < gpu.memory_bandwidth < 20e12
    assert gpu.nic_bandwidth < gpu.nvlink_bandwidth < gpu.memory_bandwidth < min(gpu.dense_flops.values())
    for dtype, measured in gpu.measured_flops.items():
        assert 0.6 < measured / gpu.dense_flops[dtype] < 0.9
