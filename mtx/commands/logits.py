"""`mtx logits`: the scores of every next token, to compare a run with another implementation."""

from __future__ import annotations

import argparse
from pathlib import Path

from mtx.commands import options

NAME = "logits"
HELP = "fp32 logits for given token ids"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="run directory")
    text = "holds input_ids [batch, tokens] and, where they differ from the usual, attention_mask and position_ids"
    parser.add_argument("--inputs", type=Path, required=True, metavar="IN.npz", help=text)
    parser.add_argument("--out", type=Path, required=True, metavar="OUT.npz", help="gets logits; it must not exist")
    parser.add_argument("--step", type=int, metavar="N", help="checkpoint; default: the newest that verifies")
    options.add_common_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from mtx.errors import UserError
    from mtx.inference.layout import open_run
    from mtx.inference.logits import compute_logits, read_inputs, write_logits
    from mtx.mesh import start_process

    if args.out.exists():
        raise UserError(f"{args.out} exists; give another --out")
    if not args.out.parent.is_dir():
        raise UserError(f"{args.out.parent}: no such folder for --out")
    inputs = read_inputs(args.inputs)
    start_process()
    model = open_run(args.run_dir, args.step, quiet=args.quiet)
    logits = compute_logits(model.setup, model.params, **inputs)
    if not model.is_primary:
        return 0
    write_logits(args.out, logits)
    if args.json:
        options.print_json({"out": str(args.out), "step": model.step, "shape": list(logits.shape)})
    elif not args.quiet:
        print(f"{args.out}: logits {list(logits.shape)} of step {model.step}")
    return 0
