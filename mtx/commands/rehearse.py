"""`mtx rehearse`: the step of a run, compiled for a cluster that is not there, and audited."""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mtx.commands import options
from mtx.errors import UserError

if TYPE_CHECKING:
    from mtx.config.reader import Config
    from mtx.planning.budget import Comparison
    from mtx.planning.case import Case
    from mtx.planning.rehearsal import Compiled

NAME = "rehearse"
HELP = "compile the step of a run for a cluster without it: memory, exchanges, FLOPs, and what is wrong with them"

GREW = 1
"""A figure has grown past its budget."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_config_arguments(parser)
    parser.add_argument("--gpu", metavar="NAME", help="model of GPU, instead of Cluster.gpu")
    text = "number of machines; default: as many as Cluster.gpus or the mesh needs"
    parser.add_argument("--hosts", type=options.positive_int, metavar="N", help=text)
    text = "GPUs of each, instead of Cluster.gpus_per_host"
    parser.add_argument("--gpus-per-host", type=options.positive_int, metavar="M", help=text)
    text = "exit with 1 where a figure has grown past this file"
    parser.add_argument("--budget", type=Path, metavar="FILE", help=text)
    text = "write the figures to a budget, or bring one up to date"
    parser.add_argument("--write-budget", type=Path, metavar="FILE", help=text)
    text = "keep the program and all that XLA dumps in a new folder"
    parser.add_argument("--dump", type=Path, metavar="DIR", help=text)
    text = "give up after this long; default: %(default)s"
    parser.add_argument("--timeout-s", type=options.positive_int, default=600, metavar="SECONDS", help=text)
    options.add_common_arguments(parser, devices=False)


def run(args: argparse.Namespace) -> int:
    """Returns 1 where a figure has grown past its budget."""
    from mtx.planning.audit import audit
    from mtx.planning.budget import check_place, read_budget, write_budget
    from mtx.planning.dissection import Dissection
    from mtx.reports import rehearsal_text

    budget = None if args.budget is None else read_budget(args.budget)
    if args.write_budget is not None:
        check_place(args.write_budget)  # what could not be written is refused before the work is done
    case, gpus_per_host = _make_case(args, options.load_config(args))
    if budget is not None:
        budget.check_setting(case)
    options.end_as_ctrl_c()
    step = Dissection(case, _compile(case, gpus_per_host, args))
    findings = audit(step)
    rows: list[Comparison] = [] if budget is None else budget.compare(step)
    if args.write_budget is not None:
        changes = write_budget(args.write_budget, step)
        print("\n  ".join([f"wrote {args.write_budget}", *changes]), file=sys.stderr)
    if args.json:
        document = step.as_json() | {"findings": [dataclasses.asdict(finding) for finding in findings]}
        if budget is not None:
            document["grown"] = [row.name for row in rows if row.has_grown]
        options.print_json(document)
    else:
        rehearsal_text.print_rehearsal(step, findings)
        if budget is not None:
            rehearsal_text.print_comparison(rows)
    return GREW if any(row.has_grown for row in rows) else 0


def _make_case(args: argparse.Namespace, config: Config) -> tuple[Case, int]:
    """The run on its cluster, and the GPUs of a machine."""
    from mtx.config.axes import MESH_AXES
    from mtx.config.layout import check_layout, resolve_mesh
    from mtx.planning.case import Case, Cluster, check_mesh
    from mtx.planning.hardware import GPUS
    from mtx.planning.target import TARGETS

    wanted, mesh = config.run.cluster, config.run.mesh
    name = args.gpu or wanted.gpu
    if name is None:
        raise UserError(f"which GPU? Give --gpu NAME, or Cluster.gpu = 'NAME'; there are {', '.join(TARGETS)}")
    if name not in GPUS:
        raise UserError(f"no GPU {name!r} in the table; there are {', '.join(TARGETS)}")
    sizes = [getattr(mesh, axis) for axis in MESH_AXES]
    per_host = args.gpus_per_host or wanted.gpus_per_host
    if args.hosts is not None:
        count = args.hosts * per_host
    elif (known := wanted.gpus or (None if -1 in sizes else math.prod(sizes))) is None:
        raise UserError("how many GPUs? Give --hosts N, or Cluster.gpus = N, or a mesh without -1")
    else:
        count, per_host = known, min(known, per_host)
    if count % per_host:
        raise UserError(f"{count} GPUs are no whole number of machines with {per_host}: --gpus-per-host divides them")
    check_mesh(mesh, count)
    check_layout(config.run, resolve_mesh(mesh, count), config.provenance)
    nic = None if wanted.nic_gbps is None else wanted.nic_gbps * 1e9 / 8
    cluster = Cluster.of(GPUS[name], count, domain=wanted.nvlink_domain, nic_bandwidth=nic)
    return Case.of(config.run, cluster), per_host


def _compile(case: Case, gpus_per_host: int, args: argparse.Namespace) -> Compiled:
    from mtx.planning.rehearsal import compile_apart

    lively = sys.stderr.isatty() and not args.quiet
    what = f"compiling for {case.cluster.num_gpus:,} {case.cluster.gpu.name}"
    if not lively and not args.quiet:
        print(f"{what} ...", file=sys.stderr, flush=True)

    def show(seconds: float) -> None:
        if lively:
            print(f"\r{what} ... {seconds:.0f} s", end="", file=sys.stderr, flush=True)

    try:
        return compile_apart(
            case, gpus_per_host=gpus_per_host, timeout_s=args.timeout_s, keep=args.dump, on_wait=show
        )  # fmt: skip
    finally:
        if lively:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
