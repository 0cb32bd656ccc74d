"""`mtx generate`: text from a checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path

from mtx.commands import options

NAME = "generate"
HELP = "write text that follows a prompt, with the weights of a run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="run directory")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="text to go on from; empty: a new document")
    parser.add_argument(
        "--max-tokens", type=options.positive_int, default=128, metavar="N", help="at most so many new tokens (128)"
    )
    text = "1: as the model has it; lower: likelier text; 0: always the most likely token (1)"
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T", help=text)
    parser.add_argument("--top-k", type=int, metavar="K", help="draw among the K most likely tokens")
    text = "draw among the most likely tokens that have this probability together"
    parser.add_argument("--top-p", type=float, metavar="P", help=text)
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws (0)")
    parser.add_argument("--num-samples", type=options.positive_int, default=1, metavar="N", help="texts (1)")
    parser.add_argument("--step", type=int, metavar="N", help="checkpoint; default: the newest that verifies")
    parser.add_argument("--no-cache", action="store_true", help="compute every token from the start; for comparison")
    options.add_common_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from mtx.errors import UserError
    from mtx.inference.sampling import Sampling
    from mtx.mesh import start_process

    sampling = Sampling(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p)
    if sampling.temperature == 0 and args.num_samples > 1:
        raise UserError("--num-samples: at temperature 0 all samples are the same; leave one of the two out")
    if not 0 <= args.seed < 2**32:
        raise UserError(f"--seed {args.seed}: give a number from 0 to {2**32 - 1}")
    start_process()
    import dataclasses

    from mtx.inference.layout import open_run
    from mtx.inference.text import sample_text

    model = open_run(args.run_dir, args.step, quiet=args.quiet)
    tokenizer = model.directory.tokenizer()
    samples = sample_text(
        model.setup,
        model.params,
        tokenizer,
        [args.prompt],
        max_tokens=args.max_tokens,
        sampling=sampling,
        seed=args.seed,
        num_samples=args.num_samples,
        use_cache=not args.no_cache,
    )
    if not model.is_primary:
        return 0
    if args.json:
        options.print_json({"step": model.step, "samples": [dataclasses.asdict(sample) for sample in samples]})
    else:
        print("\n\n".join(sample.text for sample in samples))
    return 0
