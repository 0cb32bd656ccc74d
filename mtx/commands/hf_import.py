"""`mtx import`: a run directory at step 0 from weights of other projects."""

from __future__ import annotations

import argparse
from pathlib import Path

from mtx.commands import options

NAME = "import"
HELP = "make a run directory from Hugging Face files"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    text = "folder with config.json and .safetensors files, and the tokenizer's; or a .gguf file"
    parser.add_argument("source", type=Path, metavar="HF_DIR", help=text)
    parser.add_argument("--out", type=Path, required=True, metavar="RUN_DIR", help="run directory; it must not exist")
    options.add_set_argument(parser)
    options.add_common_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from mtx.interop.importing import import_run
    from mtx.mesh import start_process
    from mtx.models import count_parameters

    start_process()
    directory = import_run(args.source, args.out, args.overrides)
    count = count_parameters(directory.config().run.model)
    if args.json:
        options.print_json({"run_dir": str(directory.path), "parameters": count})
    elif not args.quiet:
        print(f"{directory.path}: {count:,} parameters at step 0")
    return 0
