"""`mtx certify`: whether layouts of a run compute the loss and the gradients that one device computes."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from mtx.commands import options

if TYPE_CHECKING:
    from mtx.evaluation.certify import Plan, Result

NAME = "certify"
HELP = "prove that layouts compute the loss and gradients of one device"

DEPARTED = 1
"""A layout that computes something else is a bug of ours, or of the model file that the run names."""

DEVICES = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_config_arguments(parser)
    text = "such as 'pipe=2,tensor=2'; repeatable; default: a set of layouts that covers the config's own mesh"
    parser.add_argument("--layout", action="append", default=[], dest="layouts", metavar="AXIS=COUNT,...", help=text)
    text = "kill a layout after this long, compilation included, and call it failed; default: %(default)s"
    parser.add_argument("--timeout-s", type=options.positive_int, default=600, metavar="SECONDS", help=text)
    text = "layouts at a time; default: half of the cores"
    parser.add_argument("--jobs", type=options.positive_int, metavar="N", help=text)
    text = "compute on the devices of this machine in this process, one layout after the other, without a time limit"
    parser.add_argument("--in-process", action="store_true", help=text)
    options.add_common_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Returns 1 where a layout departs or fails."""
    from mtx.evaluation import covering
    from mtx.evaluation.certify import as_json, plan_certificate

    config = options.load_config(args)
    wanted = [covering.parse_layout(text) for text in args.layouts]
    plan = plan_certificate(config.run, wanted, _count_devices(args, wanted))
    if not args.quiet:
        _introduce(plan)
    results = []
    for number, (layout, result) in enumerate(zip(plan.layouts, _certify(plan, args)), 1):
        results.append(result)
        if not args.quiet:
            print(f"{number}/{len(plan.layouts)} {layout}: {_describe(result)}", file=sys.stderr, flush=True)
    if args.json:
        options.print_json(as_json(results))
    else:
        _print_table(plan, results)
    return 0 if all(result.ok for result in results) else DEPARTED


def _count_devices(args: argparse.Namespace, wanted: list) -> int:
    """How many devices a layout may need."""
    if args.in_process:
        import jax

        from mtx.mesh import start_process

        start_process()
        return len(jax.devices())
    return args.cpu_devices or max([DEVICES, *(layout.num_devices for layout in wanted)])


def _certify(plan: Plan, args: argparse.Namespace) -> Iterator[Result]:
    if args.in_process:
        from mtx.evaluation.certify import certify_here

        return certify_here(plan)
    from mtx.evaluation.isolation import certify_apart

    jobs = args.jobs or max(1, (os.cpu_count() or 1) // 2)
    return certify_apart(plan, options.simulated_environment, timeout_s=args.timeout_s, jobs=jobs)


def _introduce(plan: Plan) -> None:
    model, train = plan.reduced.model, plan.reduced.train
    print(
        f"{len(plan.layouts)} layouts against one device, in float32, at {model.num_layers} layers of width "
        f"{model.d_model}, {model.num_heads} heads, {model.vocab_size} words, {train.global_batch_size} rows of "
        f"{train.seq_len} tokens",
        file=sys.stderr,
    )
    for layout, reason in plan.left_out.items():
        print(f"left out, {layout}: {reason.splitlines()[0]}", file=sys.stderr)


def _describe(result: Result) -> str:
    if result.failure is not None:
        return f"FAILED in {result.seconds:.1f} s: {result.failure}"
    departs = "" if result.departs_at is None else f", departs first at {result.departs_at}"
    return f"{'ok' if result.ok else 'DEPARTS'} in {result.seconds:.1f} s{departs}"


def _print_table(plan: Plan, results: list[Result]) -> None:
    from mtx.evaluation.agreement import GRADIENT_TOLERANCE, LOSS_TOLERANCE

    head = ["layout", "loss", "loss error", "gradient error", "worst parameter", ""]
    rows = [[str(layout), *_cells(result)] for layout, result in zip(plan.layouts, results)]
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table(*head)
        for row, result in zip(rows, results):
            table.add_row(*row, style=None if result.ok else "bold red")
        Console().print(table)
    else:
        widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
        for row in [head, *rows]:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    for layout, result in zip(plan.layouts, results):
        if result.failure is not None:
            print(f"{layout}: {result.failure}")
        elif not result.ok:
            place = "at no place when taken apart" if result.departs_at is None else f"at {result.departs_at}"
            print(f"{layout}: departs first {place}, most in {result.departs_parameter or result.worst_parameter}")
    bad = sum(not result.ok for result in results)
    verdict = f"{bad} of {len(results)} layouts depart" if bad else f"{len(results)} layouts agree with one device"
    print(f"{verdict} (tolerances: loss {LOSS_TOLERANCE:.0e}, gradients {GRADIENT_TOLERANCE:.0e}, relative)")


def _cells(result: Result) -> list[str]:
    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    worst = result.worst_parameter or "-"
    if result.worst_layer is not None:
        worst += f" of layer {result.worst_layer}"
    errors = [number(error, ".1e") for error in (result.loss_error, result.gradient_error)]
    return [
        number(result.loss, ".6f"),
        *errors,
        worst,
        "ok" if result.ok else "FAILED" if result.failure else "DEPARTS",
    ]
