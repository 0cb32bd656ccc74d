"""`mtx study`: partial runs over sizes and layouts, and the table of what they reach."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtx.commands import options
from mtx.errors import UserError

if TYPE_CHECKING:
    from mtx.evaluation.study import Task
    from mtx.planning.constants import Constants

NAME = "study"
HELP = "partial runs over sizes and layouts: the scaling table, plan against measured"

PAGE = "study.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_config_arguments(parser, metavar="STUDY.gin")
    parser.add_argument("--out", type=Path, metavar="DIR", help="of the study; default: studies/NAME of STUDY.gin")
    parser.add_argument("--dry-run", action="store_true", help="show the points with their plans and run none")
    text = "run points again that failed; those that were measured are never run again"
    parser.add_argument("--retry", action="store_true", help=text)
    text = "write what the measured points say about this machine, for `mtx plan --calibration FILE`"
    parser.add_argument("--calibrate", type=Path, metavar="FILE", help=text)
    parser.add_argument("--calibration", type=Path, metavar="FILE", help="plan with what an earlier study has written")
    text = "simulate CPU devices: as many as a mesh names, N where it leaves them open (-1)"
    parser.add_argument("--cpu-devices", type=options.positive_int, dest="simulated", metavar="N", help=text)
    text = "start the processes of a point by `python -m launch WORDS`, such as 'local --processes 2'"
    parser.add_argument("--launch", metavar="WORDS", help=text)
    text = "with --launch: devices of its processes together; points that need another number of them wait"
    parser.add_argument("--devices", type=options.positive_int, metavar="N", help=text)
    options.add_common_arguments(parser, devices=False)


def run(args: argparse.Namespace) -> int:
    """Returns 2 where no point could be run for want of devices."""
    from mtx.config.study import load_study

    plan = load_study(args.config, args.overrides)
    if args.calibrate is not None:
        from mtx.planning.calibration import refuse_to_overwrite

        refuse_to_overwrite(args.calibrate)
    launcher = _check_launch(args, simulated=plan.study.simulated)
    from mtx.evaluation import study

    options.end_as_ctrl_c()
    folder = args.out or Path("studies") / Path(args.config).stem
    place = study.Place(folder, _environment, args.simulated, launcher=launcher, launched=args.devices)
    constants = _read_constants(args.calibration)
    with ExitStack() as stack:
        if not args.dry_run:
            _enter(folder, stack)
        tasks = study.make_tasks(plan, place, constants=constants, retry=args.retry, only_plan=args.dry_run)

        def document() -> dict[str, Any]:
            return study.make_document(plan, tasks, place, name=Path(args.config).stem, config=str(args.config))

        if args.dry_run:
            _show(document(), args)
            return 0
        _write(document(), folder)
        for task in study.play(plan, tasks, place, lambda text: _tell(args, text)):
            _tell(args, f"  {_describe(task)}")
            _write(document(), folder)
        final = document()
        if args.calibrate is not None:
            final["calibration"] = _calibrate(tasks, args.calibrate, constants)
        _write(final, folder)
    _show(final, args)
    counts = final["counts"]
    failed = f"{counts['failed']} of {len(tasks)} points failed" if counts["failed"] else "no point failed"
    _tell(args, f"{failed}; {folder} has {study.DOCUMENT}, {PAGE} and the run directory of each point")
    return 2 if counts["waiting"] == len(tasks) else 0


def _enter(folder: Path, stack: ExitStack) -> None:
    """Makes the folder of the study and keeps other studies out of it.

    Raises:
        UserError: It cannot be made, or has files that are not a study's: they might be overwritten.
    """
    from mtx.checkpoints import lock
    from mtx.evaluation.study import DOCUMENT, RECORDS
    from mtx.jsonl import say

    try:
        folder.mkdir(parents=True, exist_ok=True)
        names = {path.name for path in folder.iterdir()}
        if names - {lock.NAME} and not names & {DOCUMENT, RECORDS}:
            raise UserError(f"--out {folder}: that folder has other files, and no {RECORDS} of a study: name a new one")
        stack.enter_context(lock.hold_lock(folder, report=say, option="--out"))
    except OSError as error:
        raise UserError(f"--out {folder}: {error.strerror}; name a folder that can be written") from None


def _check_launch(args: argparse.Namespace, *, simulated: bool) -> tuple[str, ...]:
    """The words of --launch.

    Raises:
        UserError: They contradict something else.
    """
    if int(os.environ.get("MTX_NUM_PROCESSES", "1")) > 1:
        raise UserError(
            "a launcher has started this study several times: start `mtx study` once, with --launch 'TARGET OPTIONS' "
            "for the processes of its points"
        )
    if (args.launch is None) != (args.devices is None):
        raise UserError("--launch and --devices go together: how processes are started, and what they have together")
    if args.launch is None:
        return ()
    if simulated or args.simulated is not None:
        raise UserError("--launch is for the devices that there are: simulated ones are all in one process")
    try:
        words = tuple(shlex.split(args.launch))
    except ValueError as error:
        raise UserError(f"--launch {args.launch!r}: {error}") from None
    if "--" in words or not words or words[0].startswith("-"):
        raise UserError(f"--launch {args.launch!r}: a target of `python -m launch` and its options, such as 'local'")
    return words


def _environment(simulated: int | None) -> Mapping[str, str]:
    inherited = dict(os.environ)
    return inherited if simulated is None else inherited | options.simulate(simulated, inherited.get("XLA_FLAGS", ""))


def _read_constants(path: Path | None) -> Constants | None:
    if path is None:
        return None
    from mtx.planning.calibration import read_calibration

    return read_calibration(path).constants


def _calibrate(tasks: list[Task], path: Path, constants: Constants | None) -> dict[str, Any]:
    from mtx.evaluation.study_calibration import calibrate
    from mtx.planning.calibration import write_calibration

    calibration, summary = calibrate(tasks, path, constants)
    write_calibration(path, calibration)
    return summary


def _write(document: dict[str, Any], folder: Path) -> None:
    from mtx.evaluation.study import write_document
    from mtx.reports.study_page import write_study_page

    write_document(document, folder)
    write_study_page(folder / PAGE, document)


def _tell(args: argparse.Namespace, line: str) -> None:
    if not args.quiet:
        print(line, file=sys.stderr, flush=True)


def _describe(task: Task) -> str:
    from mtx.reports.units import format_duration

    record = task.record or {}
    if not record["measured"]:
        return f"FAILED, {record['failure']}: {record['reason']}"
    measured = record["measured"]
    assert task.plan is not None
    planned = format_duration(task.plan.step.seconds)
    return f"{format_duration(measured['step_seconds'])} a step ({planned} planned), {measured['steps']} steps"


def _show(document: dict[str, Any], args: argparse.Namespace) -> None:
    """On stdout, as text or JSON."""
    from mtx.evaluation.study_table import format_study

    if args.json:
        options.print_json(document)
    else:
        print(format_study(document, is_plan=args.dry_run))
