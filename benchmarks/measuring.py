"""What both sides of a comparison share: the clock, the loop of steps and ceilings, memory, the machine.

Nothing but the standard library: the peers' interpreter has no mtx, and mtx's no torch.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

LEARNING_RATE = 1e-4
SQUARE = {"cpu": 2048, "gpu": 8192}
"""Rows and columns of the matrix product that is the ceiling."""
_PRODUCTS = {"cpu": 3, "gpu": 10}
VARIABLES = ("GLIBC_TUNABLES", "XLA_FLAGS", "OMP_NUM_THREADS", "LD_PRELOAD", "PYTORCH_ALLOC_CONF")
"""What is written down of the environment: what changes how fast a program is."""


def seconds_since_start() -> float:
    """Since the process was started, before Python began; to 10 ms."""
    begin = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - begin


def peak_resident_bytes() -> int:
    """The most memory that the process had. Not `ru_maxrss`, which a child inherits from its parent."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def measure_steps(
    run: Callable[[int], None], multiply: Callable[[int], None], *, steps: int, group: int, platform: str
) -> dict[str, object]:
    """Times groups of steps, with a ceiling measured before each.

    Args:
        run: Runs so many steps one after the other, and waits for the last one's end only.
        multiply: Likewise for products of two matrices of `SQUARE[platform]` rows.
        steps: Groups that count.
        group: Steps of a group. More than one where a program may run ahead of its device, as in training.
        platform: 'cpu' or 'gpu'.

    Returns:
        `step_seconds` (median, min, max over groups, each divided by its steps), `steps`, `group`, and
        `matmul_tflops_per_device` (median and max).
    """
    products, size = _PRODUCTS[platform], SQUARE[platform]
    multiply(products)
    times, ceilings = [], []
    for _ in range(steps):
        begin = time.perf_counter()
        multiply(products)
        ceilings.append(products * 2 * size**3 / (time.perf_counter() - begin) / 1e12)
        begin = time.perf_counter()
        run(group)
        times.append((time.perf_counter() - begin) / group)
    return {
        "steps": steps,
        "group": group,
        "step_seconds": {"median": statistics.median(times), "min": min(times), "max": max(times)},
        "matmul_tflops_per_device": {"median": statistics.median(ceilings), "max": max(ceilings)},
    }


def read_environment() -> dict[str, str]:
    """The variables that change how fast a program is."""
    return {name: os.environ[name] for name in VARIABLES if name in os.environ}


def describe_processor() -> str:
    """The model of the processor."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def describe_gpu() -> dict[str, str] | None:
    """Name, driver and memory of the first GPU, as the driver's own tool says it; None where there is none."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    return dict(zip(("name", "driver", "memory"), lines[0].split(", "))) if lines else None


def write_json(path: Path, value: object) -> None:
    """Replaces a file; nobody sees half of it."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(partial, path)
