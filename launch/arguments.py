"""What every target takes: the arguments, and the fields of a job that follow from them.

Invariant: a mistake is told with what was allowed.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch import environment
from launch.job import Job, LaunchError, find_run_dir, make_name, option


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """To the parser of a target."""
    add = parser.add_argument
    add("--run-dir", metavar="DIR", help="the run directory, where the command does not say it")
    add("--name", metavar="NAME", help="by which status, logs and stop find the job; default: the run directory's")
    text = "simulated CPU devices of each process; default: the machine's own, GPUs shared out evenly"
    add("--devices-per-process", type=int, metavar="M", help=text)
    text = "failures in a row, without a newer checkpoint, after which to give up; default: %(default)s"
    add("--max-restarts", type=int, default=Job.max_restarts, metavar="N", help=text)
    text = "seconds before the first restart that waits, doubled with each failure; default: %(default)s"
    add("--backoff-s", type=float, default=Job.backoff_s, metavar="S", help=text)
    text = "seconds that processes have to end by themselves when one has failed, and again after SIGTERM, before "
    add("--grace-s", type=float, default=Job.grace_s, metavar="S", help=text + "SIGKILL; default: %(default)s")
    text = "examine the hosts with `mtx doctor --cluster` before the first attempt"
    add("--preflight", action="store_true", help=text)
    text = "run the command for N shards of work (`--shard I/N` is added), then once with `--merge`"
    add("--array", type=int, metavar="N", help=text)
    add("--parallel", type=int, metavar="N", help="tasks of an array at a time; default: as many as there is room for")
    environment.add_arguments(parser)
    add("--dry-run", action="store_true", help="print what would be started, and start nothing")


def add_host_arguments(parser: argparse.ArgumentParser, *, nodes: bool) -> None:
    """To the parser of a target of several hosts. Args: nodes: Whether their number is the user's to say."""
    add = parser.add_argument
    if nodes:
        add("--nodes", type=int, default=1, metavar="N", help="hosts of the run; default: %(default)s")
    add("--gpus-per-node", type=int, metavar="G", help="GPUs of each host that the run uses; 0: it runs on CPUs")
    text = "processes on each host; default: one per GPU on several hosts, else one"
    add("--processes-per-node", type=int, metavar="P", help=text)
    text = "seconds in which every host must have begun; default: %(default)s"
    add("--start-timeout-s", type=float, default=Job.start_timeout_s, metavar="S", help=text)
    text = "the interpreter on the hosts, 3.9 or newer; default: the one beside the command's program, else this one"
    add("--python", metavar="PATH", help=text)


def common_fields(args: argparse.Namespace, command: Sequence[str]) -> dict[str, Any]:
    """Fields of a job that `add_common_arguments` asked for.

    Raises:
        LaunchError: They contradict each other, or what the command says.
    """
    check_least(
        ("--devices-per-process", args.devices_per_process, 1),
        ("--max-restarts", args.max_restarts, 0),
        ("--backoff-s", args.backoff_s, 0),
        ("--grace-s", args.grace_s, 0),
        ("--array", args.array, 1),
        ("--parallel", args.parallel, 1),
    )
    if args.devices_per_process is not None and any(word.startswith("--cpu-devices") for word in command):
        raise LaunchError("--devices-per-process and the command's own --cpu-devices say the same: give one of them")
    found = find_run_dir(command)
    if found is not None and args.run_dir is not None and Path(found) != Path(args.run_dir):
        raise LaunchError(
            f"--run-dir {args.run_dir}: the command uses {found}; say it once, after `--`: ... --run-dir {args.run_dir}"
        )
    run_dir = found or args.run_dir
    if args.array is not None:
        store = option(command, "--out")
        if store is None:
            raise LaunchError(
                "--array is for commands that make one thing of many shards: `mtx data build ... --out STORE`"
            )
        for name, value in (("--preflight", args.preflight), ("--devices-per-process", args.devices_per_process)):
            if value:
                raise LaunchError(f"{name} is for runs: the tasks of an array do not know of each other")
        run_dir = args.run_dir or f"{store.rstrip('/')}.launch"
    elif args.parallel is not None:
        raise LaunchError("--parallel is for --array")
    if run_dir is None:
        raise LaunchError("which run directory? give `--run-dir DIR`, here or in the command")
    args.environment = choose_environment(args, command)
    return {
        "command": tuple(command),
        "run_dir": run_dir,
        "name": make_name(args.name, run_dir),
        "working_directory": os.getcwd(),
        "devices_per_process": args.devices_per_process,
        "environment": args.environment.pairs,
        "max_restarts": args.max_restarts,
        "backoff_s": args.backoff_s,
        "grace_s": args.grace_s,
        "preflight": args.preflight,
        "tasks": args.array,
        "parallel": args.parallel,
    }


def choose_environment(args: argparse.Namespace, command: Sequence[str]) -> environment.Environment:
    """What the processes get, as `environment.add_arguments` asked for it.

    Raises:
        LaunchError: Something in it cannot be used.
    """
    elsewhere = getattr(args, "image", None) is not None
    python = None if elsewhere else getattr(args, "python", None) or environment.find_program_python(command[0])
    return environment.choose(
        profile=args.profile,
        gpu=args.gpu,
        jaxlib=args.jaxlib,
        python=python,
        given=args.env,
        cache=args.compilation_cache,
        simulated=args.devices_per_process is not None
        or getattr(args, "gpus_per_node", None) == 0
        or any(word.startswith("--cpu-devices") for word in command),
    )


def host_fields(args: argparse.Namespace, command: Sequence[str], num_nodes: int) -> dict[str, Any]:
    """Fields of a job that `add_host_arguments` asked for.

    Raises:
        LaunchError: They contradict each other.
    """
    check_least(
        ("--nodes", num_nodes, 1),
        ("--gpus-per-node", args.gpus_per_node, 0),
        ("--processes-per-node", args.processes_per_node, 1),
        ("--start-timeout-s", args.start_timeout_s, 0),
    )
    per_node = args.processes_per_node or (args.gpus_per_node or 1 if num_nodes > 1 else 1)
    if args.gpus_per_node and args.gpus_per_node % per_node:
        raise LaunchError(
            f"--processes-per-node {per_node} cannot share {args.gpus_per_node} GPUs evenly: choose a divisor of that"
        )
    return {
        "num_nodes": num_nodes,
        "gpus_per_node": args.gpus_per_node,
        "processes_per_node": per_node,
        "start_timeout_s": args.start_timeout_s,
        "python": args.python or find_python(command[0]),
    }


def find_python(program: str) -> str:
    """The interpreter of the environment that a program is in; this one where there is none beside it."""
    return environment.find_program_python(program) or sys.executable


def check_least(*limits: tuple[str, float | None, float]) -> None:
    """Raises: LaunchError: An option, (name, value, least), is too small."""
    for name, value, least in limits:
        if value is not None and value < least:
            raise LaunchError(f"{name} {value}: {least} or more")
