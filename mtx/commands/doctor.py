"""`mtx doctor`: what this machine, or with `--cluster` every host of a job, has and what is wrong, with the cure."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from mtx.commands import options
from mtx.errors import UserError

if TYPE_CHECKING:
    from mtx.health.cluster import Examination
    from mtx.health.cluster_judge import Report

NAME = "doctor"
HELP = "show what this machine has and what is wrong with it, each with its cure"

MAX_HOSTS = 32
"""In the table: of more, only those that something is wrong with."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    text = "examine all hosts of a job and the links between them; to be run in every process of the job"
    parser.add_argument("--cluster", action="store_true", help=text)
    text = "with --cluster: the run directory, which all processes must see"
    parser.add_argument("--run-dir", type=Path, metavar="DIR", help=text)
    text = "with --cluster: how long to wait for other processes at each stage; default: 120"
    parser.add_argument("--timeout-s", type=options.positive_int, metavar="SECONDS", help=text)
    options.add_common_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Returns 2 where something is wrong."""
    import dataclasses

    from mtx.health.machine import examine_machine

    if args.cluster:
        return _run_cluster(args)
    if args.run_dir is not None or args.timeout_s is not None:
        raise UserError("--run-dir and --timeout-s belong to `mtx doctor --cluster`")
    findings = examine_machine(Path.cwd())
    faults = [finding for finding in findings if finding.fault is not None]
    if args.json:
        options.print_json({"ok": not faults, "findings": [dataclasses.asdict(finding) for finding in findings]})
        return 2 if faults else 0
    for finding in faults if args.quiet else findings:
        print(f"{'!' if finding.fault else ' '} {finding.name:<20} {finding.value}")
        if finding.fault is not None:
            print(f"  {'':<20} wrong: {finding.fault}\n  {'':<20} cure:  {finding.cure}")
    if not args.quiet:
        print(f"{len(faults)} faults" if len(faults) > 1 else "1 fault" if faults else "nothing wrong")
    return 2 if faults else 0


def _run_cluster(args: argparse.Namespace) -> int:
    """Prints on process 0 only; returns the same on all processes."""
    import dataclasses

    from mtx.health.cluster import examine_cluster

    speaks = os.environ.get("MTX_PROCESS_ID", "0") == "0"

    def complain(message: str) -> None:  # comes from within the `with` below only
        if args.json and speaks:
            answer = json.dumps({"error": message, "exit_code": UserError.exit_code})
            os.write(stdout, f"{answer}\n".encode())
        print(f"mtx: {message}", file=sys.stderr, flush=True)

    with _stdout_apart() as stdout:
        found = examine_cluster(args.run_dir, timeout_s=args.timeout_s or 120, complain=complain)
    if speaks and args.json:
        document = {key: value for key, value in dataclasses.asdict(found).items() if key != "ok"}
        options.print_json({"ok": found.ok, **document})
    elif speaks:
        print("\n".join(describe(found, quiet=args.quiet)), flush=True)
    return 0 if found.ok else UserError.exit_code


@contextlib.contextmanager
def _stdout_apart() -> Iterator[int]:
    """Lets what libraries write to stdout, as Gloo does, go to stderr; the file descriptor of the real stdout."""
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        yield stdout
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)


def describe(found: Examination, *, quiet: bool = False) -> list[str]:
    """Lines for people: a table of the hosts, then what is wrong. Of many hosts, only those with something wrong."""
    hosts: dict[str, list[Report]] = {}
    for report in found.reports:
        hosts.setdefault(report.host, []).append(report)
    lines = []
    if not quiet:
        named = {host for finding in found.findings for host in finding.hosts}
        shown = [host for host in hosts if len(hosts) <= MAX_HOSTS or host in named][:MAX_HOSTS]
        rows = [_row(host, hosts[host], found) for host in shown]
        head = ["host", "devices", "TFLOP/s", "memory GB/s", "within GB/s", "links GB/s", "clock s", "disk GB"]
        widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
        if rows:
            table = [head, *rows]
            lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in table]
        if len(hosts) > len(shown):
            lines.append(f"{len(hosts) - len(shown)} more of {len(hosts)} hosts")
    for finding in sorted(found.findings, key=lambda finding: not finding.is_fault):
        where = ", ".join(finding.hosts[:8]) + (f" and {len(finding.hosts) - 8} more" if len(finding.hosts) > 8 else "")
        lines.append(f"{'!' if finding.is_fault else '-'} {where}: {finding.what}: {finding.fault}")
        lines.append(f"  cure: {finding.cure}")
    if not quiet:
        faults = sum(finding.is_fault for finding in found.findings)
        verdict = f"{faults} faults" if faults > 1 else "1 fault" if faults else "nothing wrong"
        seconds = ", ".join(f"{stage} {spent:.1f}" for stage, spent in found.seconds.items())
        lines.append(f"{verdict}; {len(hosts)} hosts, {len(found.reports)} processes; seconds: {seconds}")
    return lines


def _row(host: str, reports: list[Report], found: Examination) -> list[str]:
    """Of several devices, links or processes the slowest or the one with least."""
    rates = [rate for report in reports for rate in report.rates]
    links = [value for first, second, value in found.links.between if host in (first, second)]
    within = found.links.within.get(host)
    free = [report.free_disk for report in reports if report.free_disk is not None]
    devices = reports[0].facts.get("devices", "none")
    return [
        host,
        devices if len(reports) == 1 else f"{len(reports)} x ({devices})",
        f"{min(rate['matmul_tflops'] for rate in rates):.3g}" if rates else "-",
        f"{min(rate['memory_gbs'] for rate in rates):.3g}" if rates else "-",
        "-" if within is None else f"{within:.3g}",
        f"{min(links):.3g}" if links else "-",
        f"{max((report.skew_s for report in reports), key=abs):+.3f}",
        f"{min(free) / 1e9:.1f}" if free else "-",
    ]
