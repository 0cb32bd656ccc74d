"""`mtx train`: trains, or goes on where the run directory stands."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtx.commands import options
from mtx.errors import UserError
from mtx.health.startup import Startup

if TYPE_CHECKING:
    from mtx.training.run import Trained

NAME = "train"
HELP = "train a model, or go on with a run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_config_arguments(parser)
    options.add_common_arguments(parser, reports=False)
    parser.add_argument("--run-dir", type=Path, metavar="DIR", help="of the run; default: runs/NAME of RUN.gin")
    text = "auto: from the newest checkpoint that verifies; never: a new run; STEP: from that checkpoint"
    parser.add_argument("--resume", type=_resume, default="auto", metavar="auto|never|STEP", help=text)
    text = "agree that this field, such as Train.seed, changes the math or the data of a run that goes on; repeatable"
    parser.add_argument("--accept", action="append", default=[], metavar="KEY", help=text)
    text = "in the end, continue this text with the trained model; printed, and part of the report; repeatable"
    parser.add_argument("--sample", action="append", default=[], metavar="TEXT", help=text)


def run(args: argparse.Namespace) -> int:
    startup = Startup()
    config = options.load_config(args)
    startup.end("config")
    from mtx.checkpoints.drift import check_keys

    check_keys(args.accept)
    from mtx.mesh import start_process

    start_process(peer_timeout_s=config.run.health.peer_timeout_s)
    import jax

    from mtx.training.run import train

    startup.end("imports")
    run_dir = args.run_dir or Path("runs") / Path(args.config).stem
    accepted = frozenset(args.accept)
    trained = train(config, run_dir, resume=args.resume, accept=accepted, quiet=args.quiet, startup=startup)
    samples = _sample(trained, args.sample) if args.sample else []
    if jax.process_index() == 0:
        from mtx.reports.html import write_report

        if samples:
            _record(samples, trained.directory.path / "samples.jsonl")
        report = trained.directory.path / "report.html"
        write_report([trained.directory.path], report)
        if not args.quiet:
            for sample in samples:
                print(f"\n{sample['prompt']}{sample['text']}")
            print(f"\n{trained.directory.path}: checkpoints, metrics and {report.name}")
    return 0


def _sample(trained: Trained, prompts: list[str]) -> list[dict[str, Any]]:
    """On every process: text from the weights of the last checkpoint."""
    from mtx.checkpoints.run_directory import restore_params
    from mtx.inference.sampling import Sampling
    from mtx.inference.text import sample_text

    tokenizer = trained.directory.tokenizer()
    sampling = Sampling(temperature=0.8, top_k=40)  # a small model's unlikely tokens are noise
    canonical = trained.setup.canonical
    params, step = restore_params(trained.directory, canonical.abstract_state["params"])
    params = canonical.load({"params": params})["params"]
    samples = sample_text(trained.setup, params, tokenizer, prompts, sampling=sampling)
    return [
        {"step": step, "prompt": sample.prompt, "text": sample.text.removeprefix(sample.prompt)} for sample in samples
    ]


def _record(samples: list[dict[str, Any]], path: Path) -> None:
    from mtx.jsonl import LineWriter

    writer = LineWriter(path)
    for sample in samples:
        writer.append(sample)
    writer.close()


def _resume(text: str) -> str:
    if text not in ("auto", "never") and not text.isdecimal():
        raise UserError(f"--resume {text}: auto, never or the number of a step")
    return text
