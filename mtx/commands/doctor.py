"""`mtx doctor`: what this machine has and what is wrong with it, each with its cure."""

from __future__ import annotations

import argparse
from pathlib import Path

from mtx.commands import options

NAME = "doctor"
HELP = "show what this machine has and what is wrong with it, each with its cure"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_common_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Returns 2 where something is wrong."""
    import dataclasses

    from mtx.health.machine import examine_machine

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
