"""What the compiler is told of GPUs."""

import re

import pytest

from mtx.errors import UserError
from mtx.planning.hardware import GPUS
from mtx.planning.target import TARGETS, find_target


@pytest.mark.parametrize("name", TARGETS)
def test_targets_are_gpus_of_the_hardware_table(name):
    gpu, target = GPUS[name], TARGETS[name]
    assert re.fullmatch(gpu.device_kind, target.device)
    assert 0.93 * gpu.memory_bytes < target.memory_bytes <= 1.01 * gpu.memory_bytes
    assert target.memory_bandwidth == pytest.approx(gpu.memory_bandwidth, rel=0.05)


def test_the_text_has_every_field_once():
    text = TARGETS["GB300"].text()
    names = re.findall(r"(\w+):", text)
    assert len(names) == len(set(names))
    assert "cuda_compute_capability { major: 10 minor: 3 }" in text
    assert "device_memory_size: 297021079552" in text
    assert 'platform_name: "CUDA"' in text


def test_gpus_that_the_compiler_has_dropped_are_refused():
    with pytest.raises(UserError, match=r"--gpu V100: this version of JAX compiles for A100-40, .* `mtx plan`"):
        find_target("V100")
