"""`mtx train`: trains, or goes on where the run directory stands."""

from __future__ import annotations

import argparse
from pathlib import Path

from mtx.commands import options
from mtx.errors import UserError

NAME = "train"
HELP = "train a model, or go on with a run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_config_arguments(parser)
    options.add_common_arguments(parser, reports=False)
    parser.add_argument("--run-dir", type=Path, metavar="DIR", help="of the run; default: runs/NAME of RUN.gin")
    text = "auto: from the newest checkpoint that verifies; never: a new run; STEP: from that checkpoint"
    parser.add_argument("--resume", type=_resume, default="auto", metavar="auto|never|STEP", help=text)


def run(args: argparse.Namespace) -> int:
    config = options.load_config(args)
    from mtx.mesh import start_process

    start_process()
    import jax

    from mtx.reports.html import write_report
    from mtx.training.loop import train

    run_dir = args.run_dir or Path("runs") / Path(args.config).stem
    directory = train(config, run_dir, resume=args.resume, quiet=args.quiet)
    if jax.process_index() == 0:
        report = directory.path / "report.html"
        write_report([directory.path], report)
        if not args.quiet:
            print(f"{directory.path}: checkpoints, metrics and {report.name}")
    return 0


def _resume(text: str) -> str:
    if text not in ("auto", "never") and not text.isdecimal():
        raise UserError(f"--resume {text}: auto, never or the number of a step")
    return text
