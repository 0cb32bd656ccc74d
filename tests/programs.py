"""Runs test programs in processes of their own: simulated devices can deadlock or abort the process (XLA on CPU)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def environment(devices: int = 1, **more: str) -> dict[str, str]:
    """Of a process with simulated CPU devices."""
    flags = f"--xla_force_host_platform_device_count={devices} --xla_cpu_enable_concurrency_optimized_scheduler=false"
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("MTX_", "XLA_", "JAX_"))}
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return {**inherited, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": paths, **more}


def run(arguments: list[str], *, timeout_s: float = 300, check: bool = True, env: dict[str, str] | None = None) -> Any:
    """Runs a Python program to its end; killed with SIGKILL at the time limit, since a deadlock ignores SIGTERM."""
    process = subprocess.run(
        [sys.executable, *arguments], env=env or environment(), capture_output=True, text=True, timeout=timeout_s, cwd=ROOT
    )
    if check:
        assert process.returncode == 0, f"exit {process.returncode}\n{process.stdout}\n{process.stderr}"
    return process


def run_json(program: str, *arguments: str, devices: int, timeout_s: float = 400) -> Any:
    """What a program of `tests/` prints as JSON on its last line."""
    process = run([str(ROOT / "tests" / program), *arguments], env=environment(devices), timeout_s=timeout_s)
    return json.loads(process.stdout.splitlines()[-1])
