"""Runs programs in processes of their own: simulated devices can deadlock or abort the process (XLA on CPU)."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent

FLAGS = (
    # That scheduler lets devices start independent collectives in different orders, which then wait for each other.
    "--xla_cpu_enable_concurrency_optimized_scheduler=false",
    # Halves the compile time, which is most of what these tests take; the numbers differ in rounding only.
    "--xla_backend_optimization_level=0",
)


ROUND_AS_WRITTEN = "--xla_allow_excess_precision=false"
"""Flag of XLA: round wherever the program converts. Else programs differ in rounding where their fusions differ."""


def environment(devices: int = 1, *flags: str, **more: str) -> dict[str, str]:
    """Of a process with simulated CPU devices, and more flags of XLA."""
    all_flags = " ".join([f"--xla_force_host_platform_device_count={devices}", *FLAGS, *flags])
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("MTX_", "XLA_", "JAX_"))}
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    # A device that waits in a collective keeps a thread: with one per core, those that are late may never get one.
    threads = str(2 * devices + (os.cpu_count() or 1))
    return {
        **inherited, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": all_flags, "PJRT_NPROC": threads, "PYTHONPATH": paths, **more,
    }  # fmt: skip


def run(arguments: list[str], *, timeout_s: float = 300, check: bool = True, env: dict[str, str] | None = None) -> Any:
    """Runs a Python program to its end; killed with SIGKILL at the time limit, since a deadlock ignores SIGTERM."""
    process = subprocess.run(
        [sys.executable, *arguments],
        env=env or environment(),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        cwd=ROOT,
    )
    if check:
        assert process.returncode == 0, f"exit {process.returncode}\n{process.stdout}\n{process.stderr}"
    return process


def start(arguments: list[str], *, env: dict[str, str]) -> subprocess.Popen[bytes]:
    """Starts a Python program whose output nobody reads; whoever starts it ends it."""
    quiet = subprocess.DEVNULL
    return subprocess.Popen([sys.executable, *arguments], env=env, stdout=quiet, stderr=quiet, cwd=ROOT)


def run_json(program: str, *arguments: str, devices: int, flags: Sequence[str] = (), timeout_s: float = 400) -> Any:
    """What a program of `tests/` prints as JSON on its last line."""
    env = environment(devices, *flags)
    process = run([str(ROOT / "tests" / program), *arguments], env=env, timeout_s=timeout_s)
    return json.loads(process.stdout.splitlines()[-1])


def run_processes(arguments: list[str], *, count: int, env: dict[str, str], timeout_s: float = 300) -> list[str]:
    """Runs the processes of one distributed program to their ends; what each prints, errors included.

    Each has a process group of its own, which is killed at the time limit or when another process fails.
    """
    launcher = {"MTX_COORDINATOR": f"127.0.0.1:{free_port()}", "MTX_NUM_PROCESSES": str(count)}
    with ExitStack() as stack:
        files = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(count)]
        processes = [
            subprocess.Popen(
                [sys.executable, *arguments],
                env={**env, **launcher, "MTX_PROCESS_ID": str(index)},
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                start_new_session=True,
            )
            for index, file in enumerate(files)
        ]
        deadline = time.monotonic() + timeout_s
        try:
            while any(process.poll() is None for process in processes) and not any(p.returncode for p in processes):
                if time.monotonic() > deadline:
                    break
                time.sleep(0.05)
        finally:
            for process in processes:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        for file in files:
            file.seek(0)
        outputs = [file.read() for file in files]
    codes = [process.returncode for process in processes]
    assert codes == [0] * count, f"exits {codes}\n" + "\n".join(outputs)
    return outputs


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
