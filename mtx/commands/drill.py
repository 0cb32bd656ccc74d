"""`mtx drill`: kills, stalls, corrupts and fills the disk of a small copy of a run, and says what was lost."""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from mtx.commands import options
from mtx.errors import UserError

if TYPE_CHECKING:
    from mtx.config import schema
    from mtx.evaluation.drill import Result, Scenario
    from mtx.evaluation.drill_kills import Kills
    from mtx.evaluation.drill_run import Place

NAME = "drill"
HELP = "fire drill: kill, stall and corrupt a small copy of a run, and say what was lost"

FAILED = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_config_arguments(parser)
    text = "keep all runs and logs in this new folder; default: a temporary one, kept if something fails"
    parser.add_argument("--out", type=Path, metavar="DIR", help=text)
    text = "play this scenario; repeatable; default: all"
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help=text)
    parser.add_argument("--list", action="store_true", help="list the scenarios and play none")
    text = "of the runs that have several, 2 or more; default: %(default)s"
    parser.add_argument("--processes", type=options.positive_int, default=2, metavar="N", help=text)
    text = "instead of the scenarios: one run that is killed N times at random moments"
    parser.add_argument("--kills", type=options.positive_int, metavar="N", help=text)
    parser.add_argument("--seed", type=int, default=0, metavar="SEED", help="of the moments of --kills")
    text = "give a run up after this long; default: %(default)s"
    parser.add_argument("--timeout-s", type=options.positive_int, default=300, metavar="SECONDS", help=text)
    options.add_common_arguments(parser, devices=False)


def run(args: argparse.Namespace) -> int:
    """Returns 2 where a scenario fails."""
    from mtx.evaluation.drill import list_scenarios
    from mtx.evaluation.drill_faults import make_room_for_mounts

    scenarios = _choose(args.only, list_scenarios(max(2, args.processes)))
    if args.list:
        _list(scenarios, args.json)
        return 0
    config = options.load_config(args)
    no_mounts = make_room_for_mounts()  # before anything starts a thread
    signal.signal(signal.SIGTERM, _interrupt)
    if args.out is not None:
        if args.out.exists():
            raise UserError(f"{args.out} exists already; give another --out")
        args.out.mkdir(parents=True)
    folder = (args.out or Path(tempfile.mkdtemp(prefix="mtx-drill-"))).absolute()
    ok = False
    try:
        if args.kills is not None:
            ok = _play_kills(args, config.run, folder)
        else:
            ok = _play_scenarios(args, config.run, folder, scenarios, no_mounts)
    finally:
        if ok and args.out is None:
            shutil.rmtree(folder)
        else:
            print(f"runs and logs are kept in {folder}", file=sys.stderr)
    return 0 if ok else FAILED


def _choose(names: list[str], scenarios: list[Scenario]) -> list[Scenario]:
    from mtx.config.statements import nearest

    known = {scenario.name: scenario for scenario in scenarios}
    for name in names:
        if name not in known:
            raise UserError(f"--only {name}: no such scenario; {nearest(name, known)}")
    return [scenario for scenario in scenarios if not names or scenario.name in names]


def _list(scenarios: list[Scenario], as_json: bool) -> None:
    if as_json:
        options.print_json({"scenarios": [{"name": s.name, "what": s.what} for s in scenarios]})
        return
    width = max(len(scenario.name) for scenario in scenarios)
    for scenario in scenarios:
        print(f"{scenario.name.ljust(width)}  {scenario.what}")


def _make_place(args: argparse.Namespace, run: schema.Run, folder: Path, steps: int) -> Place:
    from mtx.evaluation.drill_copy import make_copy
    from mtx.evaluation.drill_run import Place

    copy = make_copy(run, folder / "copy", processes=max(2, args.processes), steps=steps)
    return Place(folder, copy, options.simulated_environment, args.timeout_s)


def _play_scenarios(
    args: argparse.Namespace, run: schema.Run, folder: Path, scenarios: list[Scenario], no_mounts: str | None
) -> bool:
    from mtx.evaluation.drill import STEPS, as_json
    from mtx.evaluation.drill_play import Stage

    stage = Stage(_make_place(args, run, folder, STEPS), no_mounts=no_mounts)
    results: list[Result] = []
    for number, scenario in enumerate(scenarios, 1):
        _tell(args, f"scenario {number} of {len(scenarios)}: {scenario.name}, {scenario.what}")
        results.append(stage.play(scenario))
        _tell(args, "  " + ", ".join(cell for cell in _cells(results[-1])[1:] if cell))
    document = as_json(results)
    if args.json:
        options.print_json(document)
    else:
        _print_table(results)
    return bool(document["ok"])


def _play_kills(args: argparse.Namespace, run: schema.Run, folder: Path) -> bool:
    from mtx.evaluation.drill_kills import count_steps, play_kills
    from mtx.evaluation.drill_play import Stage

    place = _make_place(args, run, folder, count_steps(args.kills))
    reference = Stage(place, no_mounts=None).reference(1)
    run_dir, begin = folder / "kills" / "run", time.monotonic()
    run_dir.parent.mkdir()

    def tell(done: int) -> None:
        _tell(args, f"kill {done} of {args.kills}, {time.monotonic() - begin:.0f} s")

    kills = play_kills(place, run_dir, reference, kills=args.kills, seed=args.seed, tell=tell)
    if args.json:
        options.print_json(dataclasses.asdict(kills))
    else:
        print(_describe(kills))
    return kills.ok


def _tell(args: argparse.Namespace, line: str) -> None:
    if not args.quiet:
        print(line, file=sys.stderr, flush=True)


def _describe(kills: Kills) -> str:
    return (
        f"{kills.kills} kills, {kills.early} of them before it got further, over {kills.steps} steps: "
        f"{kills.steps_lost} steps done again, at most {kills.most_lost} after one kill; "
        f"losses {kills.losses}; {kills.seconds:.0f} s; " + ("passed" if kills.ok else f"FAILED: {kills.detail}")
    )


def _print_table(results: list[Result]) -> None:
    head = ["scenario", "", "exit codes", "losses", "lost", "recovered"]
    rows = [_cells(result)[: len(head)] for result in results]
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table(*head)
        for row, result in zip(rows, results):
            table.add_row(*row, style="bold red" if result.outcome == "failed" else None)
        Console().print(table)
    else:
        widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
        for row in [head, *rows]:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    for result in results:
        if result.detail:
            print(f"{result.name}: {result.outcome}: {result.detail}")
    counts = {outcome: sum(result.outcome == outcome for result in results) for outcome in _WORDS}
    print(", ".join(f"{count} {outcome}" for outcome, count in counts.items() if count))


_WORDS = {"passed": "passed", "failed": "FAILED", "not possible here": "not possible here"}


def _cells(result: Result) -> list[str]:
    """Name, outcome, exit codes of each attempt, losses, steps lost, seconds to recover, detail."""
    codes = ", then ".join("/".join(map(str, codes)) for codes in result.exit_codes)
    return [
        result.name,
        _WORDS[result.outcome],
        codes and f"exit {codes}",
        result.losses or "",
        "" if result.steps_lost is None else f"{result.steps_lost} steps",
        "" if result.seconds_to_recover is None else f"{result.seconds_to_recover:.1f} s",
        result.detail,
    ]


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Ends a drill as Ctrl-C does, through every `finally`."""
    raise KeyboardInterrupt
