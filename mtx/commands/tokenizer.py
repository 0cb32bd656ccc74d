"""`mtx tokenizer train`: a vocabulary from text.

Decides what the command says; how a vocabulary is learned is decided in `mtx/data/tokenizer_training.py`.
"""

from __future__ import annotations

import argparse
import sys
import time

from mtx.commands import options
from mtx.commands.data import add_text_arguments

NAME = "tokenizer"
HELP = "train a SentencePiece tokenizer"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    train = actions.add_parser("train", help="a vocabulary from text", description="A SentencePiece model from text.")
    add_text_arguments(train)
    train.add_argument(
        "--vocab-size", type=options.positive_int, required=True, metavar="N", help="pieces, 258 fixed ones included"
    )
    train.add_argument("--out", required=True, metavar="FILE.model", help="file to write; never overwritten")
    train.add_argument(
        "--model-type", choices=("unigram", "bpe"), default="unigram", help="unigram encodes four times as fast"
    )
    train.add_argument(
        "--max-sentences",
        type=options.positive_int,
        default=2_000_000,
        metavar="N",
        help="lines to learn from; of more, an even sample is taken (default: 2000000)",
    )
    options.add_common_arguments(train, devices=False)


def run(args: argparse.Namespace) -> int:
    from pathlib import Path

    from mtx.data.inputs import Selection, read_texts
    from mtx.data.tokenizer import load_tokenizer
    from mtx.data.tokenizer_training import train_sentencepiece

    selection = Selection(field=args.field, id_field=args.id_field, select=tuple(args.select))
    begin = time.monotonic()
    if not args.quiet:
        print(f"learning {args.vocab_size:,} pieces from {' '.join(args.inputs)}", file=sys.stderr)
    train_sentencepiece(
        read_texts(args.inputs, selection),
        vocab_size=args.vocab_size,
        out=Path(args.out),
        model_type=args.model_type,
        max_sentences=args.max_sentences,
    )
    tokenizer = load_tokenizer(args.out)
    seconds = time.monotonic() - begin
    if args.json:
        options.print_json(
            {
                "tokenizer": args.out,
                "vocab_size": tokenizer.vocab_size,
                "fingerprint": tokenizer.fingerprint,
                "end_of_document_id": tokenizer.end_of_document_id,
                "seconds": seconds,
            }
        )
    else:
        print(f"{args.out}: {tokenizer.vocab_size:,} pieces, fingerprint {tokenizer.fingerprint}; {seconds:.1f} s")
    return 0
