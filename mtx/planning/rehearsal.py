"""The real step, compiled for a cluster that is not there: starts the process that does it, and answers for it.

Decides what that process may see and take: no accelerator, no flags of XLA's that would abort it, no longer than a time
limit, and not beyond the end of this process. Where the compiler is, and the one command that installs it.

Invariant: JAX is not imported here. Whatever happens in the other process ends as a message or as a result.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, fields
from importlib import metadata
from pathlib import Path

from mtx.config import render
from mtx.errors import UserError
from mtx.planning.case import Case
from mtx.planning.target import find_target

PACKAGE = "jax-cuda13-pjrt"
PLUGIN = "jax_plugins.xla_cuda13"
FOLDER = Path(sys.prefix) / "mtx-plan"
"""Where the compiler is installed: beside the environment's packages, not among them, since JAX would try to start it,
and complain, whenever a program begins to compute on a machine without GPUs."""

COMMAND = (sys.executable, "-m", "mtx.planning.rehearsal_child")
TIMEOUT_S = 600
_POLL_S = 0.1
_BUFFERS = "*buffer-assignment.txt"


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a step, on each device.

    Attributes:
        program: Text of the optimized program.
        buffers: XLA's text on its buffers.
        log: What the process said.
        argument_bytes: State and batch.
        output_bytes: State and metrics.
        alias_bytes: Of the arguments whose memory holds results.
        temp_bytes: Everything between.
        code_bytes: Of the machine code.
        peak_bytes: Most that is in use at a time, arguments included.
        lower_seconds: From Python to the compiler's input.
        compile_seconds: In the compiler.
        jax: Its version.
        memory_of_compiler_bytes: Most that the process took of this machine.
    """

    program: str
    buffers: str
    log: str
    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temp_bytes: int
    code_bytes: int
    peak_bytes: int
    lower_seconds: float
    compile_seconds: float
    jax: str
    memory_of_compiler_bytes: int


def install_command() -> list[str]:
    """Arguments of the command that installs the compiler, of the version of this environment's jaxlib."""
    package = f"{PACKAGE}=={metadata.version('jaxlib')}"
    return [sys.executable, "-m", "pip", "install", "--no-deps", "--upgrade", "--target", str(FOLDER), package]


def find_compiler() -> Path | None:
    """The folder in which the compiler is; None: among the packages of the environment, as on machines with GPUs.

    Raises:
        UserError: There is none, or it is of another version than jaxlib.
    """
    wanted = metadata.version("jaxlib")
    if (FOLDER / PLUGIN.replace(".", "/")).is_dir():
        path, searched = FOLDER, [str(FOLDER)]
    elif importlib.util.find_spec("jax_plugins") is not None and importlib.util.find_spec(PLUGIN) is not None:
        path, searched = None, sys.path
    else:
        raise UserError(
            f"mtx rehearse needs XLA's compiler for NVIDIA GPUs, 390 MB. It is not installed; install it with\n"
            f"  {shlex.join(install_command())}"
        )
    found = next((d.version for d in metadata.distributions(name=PACKAGE, path=searched)), wanted)
    if found != wanted:
        raise UserError(
            f"the compiler for NVIDIA GPUs ({path or PLUGIN}) is of version {found} and jaxlib of {wanted}; install "
            f"its own with\n  {shlex.join(install_command())}"
        )
    return path


def compile_apart(
    case: Case,
    *,
    gpus_per_host: int,
    timeout_s: float = TIMEOUT_S,
    keep: Path | None = None,
    on_wait: Callable[[float], None] = lambda seconds: None,
) -> Compiled:
    """Compiles the step of a case in a process of its own.

    Args:
        gpus_per_host: Divides the cluster's number of GPUs.
        timeout_s: After which the process is killed.
        keep: An empty or new folder for the program and all that XLA dumps; None: they are not kept.
        on_wait: Called several times a second with the seconds since the start.

    Raises:
        UserError: The GPU is none that can be compiled for, the compiler is not installed or does not end well, or the
            step itself refuses the run.
        RuntimeError: The process failed otherwise: a fault of ours.
    """
    target, compiler = find_target(case.cluster.gpu.name), find_compiler()
    if case.run.train.offload_optimizer:
        raise UserError(
            "Train.offload_optimizer = True cannot be rehearsed: without a machine XLA knows no memory of its host; "
            "rehearse the rest with --set 'Train.offload_optimizer = False', `mtx plan` reckons with it"
        )
    with ExitStack() as stack:
        if keep is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mtx-rehearse-")))
        else:
            folder = _make_folder(keep)
        hosts = case.cluster.num_gpus // gpus_per_host
        request = {"config": render.dump(case.run, {}), "hosts": hosts, "gpus_per_host": gpus_per_host}
        (folder / "request.json").write_text(json.dumps(request))
        (folder / "target.txtpb").write_text(target.text())
        code = _run(folder, _environment(compiler), timeout_s, on_wait)
        return _read(folder, code)


def _make_folder(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--dump {path}: {error.strerror}; name a new folder") from None
    if any(path.iterdir()):
        raise UserError(f"--dump {path}: the folder is not empty; name a new one")
    return path


def _environment(compiler: Path | None) -> dict[str, str]:
    """Flags of XLA's stay behind: the ones that it does not know would abort it, and those for CPUs mean nothing."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_", "MTX_"))}
    paths = [str(compiler)] if compiler else []
    paths += [path for path in [inherited.get("PYTHONPATH")] if path]
    return {**inherited, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(paths)}


def _run(folder: Path, environment: dict[str, str], timeout_s: float, on_wait: Callable[[float], None]) -> int:
    """The exit code of the process; nothing of it is left."""
    begin = time.monotonic()
    with (folder / "output.txt").open("wb") as output:
        process = subprocess.Popen(
            [*COMMAND, str(folder)], env=environment, stdin=subprocess.PIPE, stdout=output, stderr=output
        )
    try:
        while process.poll() is None:
            elapsed = time.monotonic() - begin
            if elapsed > timeout_s:
                raise UserError(f"the step did not compile in {timeout_s:.0f} s: raise --timeout-s")
            on_wait(elapsed)
            time.sleep(_POLL_S)
    finally:
        process.kill()  # of no effect where it has ended
        process.communicate()
    return process.returncode


def _read(folder: Path, code: int) -> Compiled:
    log = (folder / "output.txt").read_text(errors="replace")
    if code < 0:
        words = "this machine has too little memory" if code == -9 else _last_words(log)
        raise UserError(f"the compiler was ended by signal {-code}: {words}; --dump DIR keeps what it wrote")
    if code:
        raise RuntimeError(f"the process that compiles failed:\n{log[-8000:]}")
    result = json.loads((folder / "result.json").read_text())
    if "error" in result:
        raise UserError(result["error"])
    figures = {field.name: result[field.name] for field in fields(Compiled) if field.name in result}
    buffers = sorted((folder / "dump").glob(_BUFFERS))
    if not buffers:
        raise RuntimeError(f"XLA {result['jax']} wrote nothing about its buffers")
    return Compiled(
        program=(folder / "program.hlo").read_text(), buffers=buffers[-1].read_text(), log=log, **figures
    )  # fmt: skip


def _last_words(log: str) -> str:
    """The last line that speaks of a failure, or the last one."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    telling = [line for line in lines if "Check failed" in line or "Error" in line or "Unknown flag" in line]
    return (telling or lines or ["it said nothing"])[-1][:500]
