"""`mtx data`: builds token stores, and looks into them.

Decides how a build and a store are shown; what they are is decided in `mtx/data`.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from mtx.commands import options
from mtx.errors import UserError

if TYPE_CHECKING:
    from mtx.data.build import Built
    from mtx.data.store import Store
    from mtx.data.tokenizer import Tokenizer

NAME = "data"
HELP = "build, verify and read token stores"

_QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)
_SHOWN, _LISTED = 5, 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)

    build = actions.add_parser("build", help="text to a token store", description="Text to a token store.")
    add_text_arguments(build)
    build.add_argument(
        "--tokenizer",
        required=True,
        metavar="PATH",
        help="SentencePiece .model, tokenizer.json, or folder with GPT-2's encoder.json and vocab.bpe",
    )
    build.add_argument("--out", required=True, metavar="STORE", help="folder to make; work in progress: STORE.building")
    build.add_argument(
        "--end-of-document", metavar="TOKEN", help="token that ends documents, where the tokenizer does not say"
    )
    build.add_argument(
        "--workers", type=options.positive_int, metavar="N", help="processes that encode (default: the cores)"
    )
    build.add_argument(
        "--shard-tokens", type=options.positive_int, metavar="N", help="tokens per file (default: 16777216)"
    )
    build.add_argument("--max-bad", type=_count, default=0, metavar="N", help="bad records to put up with (default: 0)")
    several = build.add_mutually_exclusive_group()
    text = "encode one of N shards of the work, from 0/N to N-1/N, here or on other machines; --max-bad and "
    several.add_argument("--shard", type=_shard, metavar="I/N", help=text + "--shard-tokens count for --merge alone")
    several.add_argument("--merge", action="store_true", help="make the store of all shards, once they are done")
    build.set_defaults(action=_build)

    verify = actions.add_parser("verify", help="read every byte of a store and name what is damaged")
    verify.set_defaults(action=_verify)
    stats = actions.add_parser("stats", help="documents, tokens, bytes, lengths, sources")
    stats.set_defaults(action=_stats)
    show = actions.add_parser("show", help="print documents")
    show.set_defaults(action=_show)
    for action in (verify, stats, show):
        action.add_argument("store", metavar="STORE", help="folder that `mtx data build` made")
    first = show.add_mutually_exclusive_group()
    first.add_argument("--document", type=_count, metavar="N", help="the first to print, by number from 0 (default: 0)")
    first.add_argument("--id", metavar="ID", help="the document with this id")
    show.add_argument("--limit", type=options.positive_int, default=1, metavar="N", help="how many (default: 1)")

    which = actions.add_parser("which", help="which documents were in which steps of a run")
    which.add_argument("path", metavar="PATH", help="run directory; or a store, to see its documents alone")
    which.add_argument("--run", dest="run_dir", metavar="RUN_DIR", help="the run, where PATH is a store")
    which.add_argument("--steps", type=_steps, metavar="A..B", help="steps, or one step; the first update is step 1")
    document = which.add_mutually_exclusive_group()
    document.add_argument("--document", type=_count, metavar="N", help="only the document with this number, of a store")
    document.add_argument("--id", metavar="ID", help="only the document with this id")
    which.add_argument(
        "--limit", type=options.positive_int, metavar="N", help="documents of a step (default: 20; --json: all)"
    )
    which.set_defaults(action=_which)
    for action in (build, verify, stats, show, which):
        options.add_common_arguments(action, devices=False)


def run(args: argparse.Namespace) -> int:
    action: Callable[[argparse.Namespace], int] = args.action
    return action(args)


def add_text_arguments(parser: argparse.ArgumentParser) -> None:
    """Inputs, and which of their documents are meant."""
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="files (.txt .jsonl .gz .zst), folders, globs")
    parser.add_argument("--field", default="text", metavar="KEY", help="JSON key of the text (default: text)")
    parser.add_argument("--id-field", default="id", metavar="KEY", help="JSON key of the id (default: id)")
    parser.add_argument(
        "--select", action="append", default=[], metavar="GLOB", help="only documents whose id matches; repeatable"
    )


def _build(args: argparse.Namespace) -> int:
    from mtx.data.build import SHARD_TOKENS, build_store
    from mtx.data.shards import merge_shards
    from mtx.reports.build_bar import BuildBar

    if args.shard is not None:
        return _build_shard(args)
    begin = time.monotonic()
    finish = {"shard_tokens": args.shard_tokens or SHARD_TOKENS, "max_bad": args.max_bad, "on_note": _note(args)}
    if args.merge:
        built = merge_shards(args.inputs, **_build_options(args), **finish)
    else:
        with BuildBar(quiet=args.quiet) as bar:
            built = build_store(
                args.inputs, **_build_options(args), **finish, workers=_workers(args), on_progress=bar.update
            )
    return _show_built(args, built, time.monotonic() - begin)


def _build_options(args: argparse.Namespace) -> dict[str, Any]:
    """What all kinds of a build are given."""
    from pathlib import Path

    from mtx.data.inputs import Selection

    return {
        "tokenizer_path": args.tokenizer,
        "out": Path(args.out),
        "selection": Selection(field=args.field, id_field=args.id_field, select=tuple(args.select)),
        "end_of_document": args.end_of_document,
    }


def _workers(args: argparse.Namespace) -> int:
    return args.workers or len(os.sched_getaffinity(0))


def _note(args: argparse.Namespace) -> Callable[[str], None]:
    return lambda note: None if args.quiet else print(f"mtx: {note}", file=sys.stderr, flush=True)


def _build_shard(args: argparse.Namespace) -> int:
    from mtx.data.shards import build_shard
    from mtx.reports.build_bar import BuildBar

    begin = time.monotonic()
    shard, num_shards = args.shard
    with BuildBar(quiet=args.quiet) as bar:
        built = build_shard(
            args.inputs,
            **_build_options(args),
            shard=shard,
            num_shards=num_shards,
            workers=_workers(args),
            on_progress=bar.update,
            on_note=_note(args),
        )
    seconds, counts = time.monotonic() - begin, built.counts
    if counts.bad_records:
        _warn(f"{counts.bad_records} bad records in this shard; --merge names them, and --max-bad decides there", [])
    if args.json:
        shown = {"documents": counts.documents, "tokens": counts.tokens, "text_bytes": counts.text_bytes}
        parts = {"parts": built.parts, "reused_parts": built.reused_parts, "already_done": built.already}
        options.print_json(
            {"store": args.out, "shard": shard, "shards": num_shards, "seconds": seconds, **parts, **shown}
            | {"bad_records": counts.bad_records, "ignored_files": built.ignored}
        )
        return 0
    reused = f" ({built.reused_parts:,} of them were there)" if built.reused_parts else ""
    print(
        f"{args.out}: shard {shard}/{num_shards} is done: {built.parts:,} parts{reused}, "
        f"{counts.documents:,} documents, {counts.tokens:,} tokens; {seconds:.1f} s"
    )
    return 0


def _show_built(args: argparse.Namespace, built: Built, seconds: float) -> int:
    counts = built.manifest["counts"]
    if built.bad:
        _warn(f"{len(built.bad)} bad records left out (all of them: {args.out}/bad_records.txt):", built.bad)
    if built.ignored:
        _warn(f"{len(built.ignored)} files of the folders were not read, for their endings:", built.ignored)
    if counts["round_trips_inexact"]:
        _warn(
            f"{args.tokenizer} changes text: {counts['round_trips_inexact']} of {counts['round_trips_checked']} "
            "documents that were decoded again differ (it normalizes, or cannot spell every character)",
            [],
        )
    if args.json:
        options.print_json(
            {"store": args.out, "seconds": seconds, "ignored_files": built.ignored} | _summary(built.manifest)
        )
    else:
        rate = counts["text_bytes"] / 1e6 / seconds
        print(
            f"{args.out}: {counts['documents']:,} documents, {counts['tokens']:,} tokens of "
            f"{counts['text_bytes'] / counts['tokens']:.2f} bytes; {seconds:.1f} s, {rate:.1f} MB/s of text"
        )
        left_out = {
            "empty": counts["empty_documents"],
            "not selected": counts["unselected_documents"],
            "bad": counts["bad_records"],
        }
        if any(left_out.values()):
            print("left out: " + ", ".join(f"{count:,} {name}" for name, count in left_out.items() if count))
    return 0


def _verify(args: argparse.Namespace) -> int:
    from pathlib import Path

    from mtx.data import integrity
    from mtx.data.store import read_store_manifest

    path = Path(args.store)
    manifest = read_store_manifest(path)
    problems = integrity.check_digests(path, manifest)
    files = len(manifest["files"])
    size_bytes = sum(entry["size_bytes"] for entry in manifest["files"].values())
    if args.json:
        options.print_json(
            {"store": args.store, "ok": not problems, "files": files, "bytes": size_bytes, "problems": problems}
        )
    if problems:
        lines = "\n  ".join(problems)
        message = f"{path}: {len(problems)} of {files} files are damaged:\n  {lines}\nrestore them or build it again"
        if not args.json:
            raise UserError(message)
        print(f"mtx: {message}", file=sys.stderr)
        return UserError.exit_code
    if not args.json:
        print(f"{path}: whole; {files} files, {size_bytes:,} bytes, every digest fits")
    return 0


def _stats(args: argparse.Namespace) -> int:
    from mtx.data.store import open_store

    store = open_store(args.store)
    quantiles = store.document_length_quantiles(_QUANTILES)
    mean = store.num_tokens / store.num_documents - 1
    summary = _summary(store.manifest) | {
        "store": args.store,
        "document_tokens_mean": mean,
        "document_tokens_quantiles": {f"{q:g}": tokens for q, tokens in quantiles.items()},
        "sources": store.sources,
    }
    if args.json:
        options.print_json(summary)
        return 0
    print(
        f"{args.store}: {store.num_documents:,} documents, {store.num_tokens:,} tokens "
        f"(each document ends with token {store.end_of_document_id}, {store.manifest['end_of_document']})\n"
        f"text: {summary['text_bytes']:,} bytes, {summary['bytes_per_token']:.3f} per token\n"
        f"left out: {summary['empty_documents']:,} empty, {summary['unselected_documents']:,} not selected, "
        f"{summary['bad_records']:,} bad\n"
        f"tokenizer: vocabulary of {store.vocab_size:,}, fingerprint {store.tokenizer_fingerprint}; "
        f"{summary['round_trips_checked']:,} documents decoded again, {summary['round_trips_inexact']:,} differ\n"
        f"tokens per document: mean {mean:,.1f}; " + ", ".join(f"{q:.0%} {n:,}" for q, n in quantiles.items())
    )
    for source in store.sources[:_SHOWN]:
        print(f"  {source['path']}: {source['documents']:,} documents, {source['tokens']:,} tokens")
    if len(store.sources) > _SHOWN:
        print(f"  and {len(store.sources) - _SHOWN:,} sources more (--json has them all)")
    return 0


def _show(args: argparse.Namespace) -> int:
    from mtx.data.store import open_store

    store = open_store(args.store, cache_bytes=0)
    first = store.find_document(args.id) if args.id is not None else args.document or 0
    last = max(first + 1, min(first + args.limit, store.num_documents))  # past the end: told by the first one
    tokenizer = store.tokenizer()
    documents = [_document(store, tokenizer, index) for index in range(first, last)]
    if args.json:
        options.print_json({"store": args.store, "documents": documents})
        return 0
    for document in documents:
        place = f"{document['source']}:{document['line']}"
        print(f"--- document {document['document']}  {document['id']}  {place}  {document['num_tokens']:,} tokens")
        print(document["text"])
    return 0


def _which(args: argparse.Namespace) -> int:
    from dataclasses import asdict
    from itertools import chain, groupby
    from pathlib import Path

    from mtx.checkpoints import steps
    from mtx.data import which
    from mtx.reports.metrics import read_metrics

    run_dir = Path(args.run_dir or args.path)
    logged = [line["step"] for line in read_metrics(run_dir)]
    done = max([*logged, *steps.list_steps(run_dir / steps.NAME)], default=0)
    wanted = args.id if args.document is None else args.document
    if args.steps is None and (wanted is None or not done):
        raise UserError("which steps? --steps 7 or --steps 7..9; without, --id ID looks through all steps done so far")
    first, last = args.steps or (1, done)
    batches = which.open_batches(run_dir)
    stores = which.find_stores(batches, args.path if args.run_dir else None)
    found: Iterable[which.Occurrence]
    if wanted is None:
        found = chain.from_iterable(which.documents_of(batches, step, stores) for step in range(first, last + 1))
    else:
        found = which.steps_with(batches, stores, wanted, first, last)
    by_step = [(step, list(several)) for step, several in groupby(found, key=lambda occurrence: occurrence.step)]
    if args.json:
        documents = [asdict(one) for _, several in by_step for one in several[: args.limit]]
        answer = {"run": str(run_dir), "steps": [first, last], "steps_done": done, "documents": documents}
        options.print_json(answer)
        return 0
    limit = args.limit or _LISTED
    for step, several in by_step:
        tokens = sum(one.tokens for one in several)
        planned = f"; planned, the run has done {done:,}" if step > done else ""
        print(f"step {step}: {len(several):,} documents, {tokens:,} tokens{planned}")
        for one in several[:limit]:
            print(f"  {one.tokens:,} tokens of {one.store} document {one.document}  {one.id}")
        if len(several) > limit:
            print(f"  and {len(several) - limit:,} documents more")
    if not by_step:
        print(f"none in steps {first} to {last}")
    return 0


def _document(store: Store, tokenizer: Tokenizer, index: int) -> dict[str, Any]:
    document = store.document(index)
    return {
        "document": index,
        "id": document.id,
        "source": document.source,
        "line": document.line,
        "num_tokens": len(document.tokens),
        "text": tokenizer.decode(document.tokens.tolist()),
    }


def _summary(manifest: dict[str, Any]) -> dict[str, Any]:
    """What every report on a store says, by its JSON keys."""
    counts = manifest["counts"]
    names = ("vocab_size", "dtype", "tokenizer_fingerprint", "end_of_document", "end_of_document_id")
    return (
        counts | {name: manifest[name] for name in names} | {"bytes_per_token": counts["text_bytes"] / counts["tokens"]}
    )


def _warn(message: str, lines: list[str]) -> None:
    more = [f"and {len(lines) - _SHOWN:,} more"] if len(lines) > _SHOWN else []
    print("\n  ".join([f"mtx: {message}", *lines[:_SHOWN], *more]), file=sys.stderr)


def _count(text: str) -> int:
    """An argument type: 0, 1, ..."""
    return 0 if text == "0" else options.positive_int(text)


def _shard(text: str) -> tuple[int, int]:
    """An argument type: '0/64' to '63/64'."""
    first, slash, last = text.partition("/")
    if not (slash and first.isdecimal() and last.isdecimal() and int(first) < int(last)):
        raise argparse.ArgumentTypeError(f"expected I/N with I from 0 to N-1, such as 0/64, not {text!r}")
    return int(first), int(last)


def _steps(text: str) -> tuple[int, int]:
    """An argument type: '7' or '7..9'."""
    first, _, last = text.partition("..")
    steps = options.positive_int(first), options.positive_int(last or first)
    if steps[0] > steps[1] or text.endswith("."):
        raise argparse.ArgumentTypeError(f"expected steps such as 7 or 7..9, not {text!r}")
    return steps
