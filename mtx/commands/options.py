"""Arguments that several commands share, and what they do to the process. No command itself.

Invariant: what must be set before JAX starts is set here, before any command imports it.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mtx.config.reader import Config


def add_common_arguments(parser: argparse.ArgumentParser, *, devices: bool = True, reports: bool = True) -> None:
    """Args: devices: Whether the command computes. reports: Whether it answers with a JSON object on request."""
    if devices:
        text = "compute on N simulated CPU devices in this process"
        parser.add_argument("--cpu-devices", type=positive_int, metavar="N", help=text)
    if reports:
        parser.add_argument("--json", action="store_true", help="one JSON object on stdout, everything else on stderr")
    parser.add_argument("--quiet", action="store_true", help="errors and the result only")


def add_config_arguments(parser: argparse.ArgumentParser, *, metavar: str = "RUN.gin") -> None:
    """The config file and the statements that are applied last; `load_config` reads them."""
    parser.add_argument("config", nargs="?", metavar=metavar, help="config file")
    add_set_argument(parser)


def add_set_argument(parser: argparse.ArgumentParser) -> None:
    text = "set a field, as a line of the file would: --set 'Model.num_layers = 12'; repeatable"
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="STATEMENT", help=text)


def load_config(args: argparse.Namespace) -> Config:
    """The config that `add_config_arguments` asked for.

    Raises:
        UserError: All mistakes in it.
    """
    from mtx.config import reader

    return reader.load(args.config, args.overrides)


def apply(args: argparse.Namespace) -> None:
    """Prepares the process for the arguments. Runs before the command, which is the first to import JAX."""
    count = getattr(args, "cpu_devices", None)
    if count is None:
        return
    os.environ |= simulate(count, os.environ.get("XLA_FLAGS", ""))


def simulate(count: int, flags: str = "") -> dict[str, str]:
    """What the environment of a process with `count` simulated CPU devices has, with XLA's flags besides."""
    environment = {"JAX_PLATFORMS": "cpu"}
    flags = f"{flags} --xla_force_host_platform_device_count={count}"
    if count > 1:
        # That scheduler lets devices start independent collectives in different orders, which then wait for each other.
        flags += " --xla_cpu_enable_concurrency_optimized_scheduler=false"
        # A device that waits in a collective keeps a thread. With a thread per core, those that have not come yet may
        # never get one.
        environment["PJRT_NPROC"] = str(2 * count + (os.cpu_count() or 1))
    return {**environment, "XLA_FLAGS": flags.strip()}


def simulated_environment(count: int) -> dict[str, str]:
    """The environment of another process that checks numbers on `count` simulated CPU devices, alone.

    XLA is told not to optimize its machine code: that halves the time to compile, which is most of such a process, and
    changes rounding only. The collectives, decided before, stay as they are.
    """
    from mtx.mesh import ENVIRONMENT

    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_", *ENVIRONMENT))}
    return inherited | simulate(count, "--xla_backend_optimization_level=0")


def end_as_ctrl_c() -> None:
    """Lets SIGTERM end the process as Ctrl-C does, through every `finally`: of processes, locks and folders."""
    signal.signal(signal.SIGTERM, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def print_json(document: dict[str, Any]) -> None:
    """The answer of a command under --json, whole. NaN and infinities, which JSON lacks, are refused."""
    print(json.dumps(document, allow_nan=False))


def positive_int(text: str) -> int:
    """An argument type: 1, 2, ...

    Raises:
        ArgumentTypeError: Anything else.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, not {text!r}")
    return int(text)
