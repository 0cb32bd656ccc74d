"""Text to a token store: the story of a build.

    plan   = inputs, tokenizer, selection            written first; a later build with the same plan goes on
    parts  = blocks of text, encoded by workers       each file appears whole or not at all
    store  = the parts, in order, in shards           sealed by its manifest, then renamed to its name

Decides how a build survives a kill. Does not decide the input formats (`inputs.py`) or what a record becomes
(`encode.py`).

Invariant: equal inputs and options give equal bytes, whatever the number of workers and kills, and nothing has the name
of the store before it is one.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mtx.data import integrity
from mtx.data.arrays import CHUNK, ArrayWriter
from mtx.data.encode import (
    Counts,
    Encoder,
    Report,
    encode_in_worker,
    read_part,
    read_report,
    start_worker,
    token_dtype,
)
from mtx.data.inputs import BLOCK_BYTES, Block, Selection, Source, find_sources, read_blocks
from mtx.data.store import FORMAT, VERSION
from mtx.data.tokenizer import CONFIG, Tokenizer, load_tokenizer
from mtx.errors import UserError

SHARD_TOKENS = 16 << 20
_BAD_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a build is: bytes of input as stored, and what was found in them."""

    position: int
    total_bytes: int
    reused_parts: int
    counts: Counts


@dataclass(frozen=True, kw_only=True)
class Built:
    """What `build_store` leaves: the manifest, files of the folders that were not read, bad records as file:line."""

    manifest: dict[str, Any]
    ignored: list[str]
    bad: list[str]


def build_store(
    inputs: Sequence[str],
    *,
    tokenizer_path: str,
    out: Path,
    selection: Selection,
    workers: int,
    end_of_document: str | None = None,
    shard_tokens: int = SHARD_TOKENS,
    max_bad: int = 0,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Built:
    """Builds a token store at `out`.

    Args:
        inputs: Files, folders and globs.
        tokenizer_path: See `load_tokenizer`.
        out: Where the store comes to be; must not exist. Work in progress is kept beside it, in `OUT.building`.
        selection: Fields, and which documents.
        workers: Processes that encode. Small inputs are encoded in this one.
        end_of_document: See `load_tokenizer`.
        shard_tokens: Tokens per file; a multiple of 8192.
        max_bad: Bad records that are put up with.
        on_progress: Called after every block.

    Raises:
        UserError: `out` exists, the inputs hold no document or more than `max_bad` bad records, or a file fails.
    """
    if out.exists():
        raise UserError(f"{out}: exists already and is not overwritten; give another --out or remove it")
    if shard_tokens % CHUNK:
        raise UserError(f"--shard-tokens {shard_tokens}: must be a multiple of {CHUNK}")
    work = out.with_name(out.name + ".building")
    try:
        sources, ignored = find_sources(inputs)
        tokenizer = load_tokenizer(tokenizer_path, end_of_document=end_of_document)
        plan = _plan(sources, tokenizer, selection)
        with _locked(work):
            _start_or_resume(work, plan)
            encoder = (tokenizer_path, end_of_document, selection)
            reports = _encode_all(sources, encoder, work / "parts", workers, on_progress)
            bad = [
                f"{sources[record.source].path}:{record.line}: {record.reason}"
                for report in reports
                for record in report.bad
            ]
            _refuse_changed(sources)
            _refuse_bad(bad, max_bad, work)
            manifest = _assemble(work, sources, tokenizer, selection, reports, bad, shard_tokens)
            _publish(work / "store", out)
            shutil.rmtree(work)
    except OSError as error:
        cure = ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            cure = f"; make room, and the same command goes on from what is in {work}"
        raise UserError(f"{error.filename or work}: {error.strerror}{cure}") from None
    return Built(manifest=manifest, ignored=ignored, bad=bad)


@contextmanager
def _locked(work: Path) -> Iterator[None]:
    """Holds the work folder. The lock goes with the process, however that ends."""
    work.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{work}: another process is building there; wait for it or give another --out") from None
        yield


def _plan(sources: list[Source], tokenizer: Tokenizer, selection: Selection) -> dict[str, Any]:
    """All that the parts depend on."""
    return {
        "version": VERSION,
        "block_bytes": BLOCK_BYTES,
        "tokenizer": tokenizer.fingerprint,
        "end_of_document_id": tokenizer.end_of_document_id,
        "selection": dataclasses.asdict(selection),
        "sources": [dataclasses.asdict(source) for source in sources],
    }


def _start_or_resume(work: Path, plan: dict[str, Any]) -> None:
    """Keeps the parts of an earlier build if they are of this plan."""
    shutil.rmtree(work / "store", ignore_errors=True)
    path, text = work / "plan.json", json.dumps(plan, indent=1)
    if not (path.is_file() and path.read_text(encoding="utf-8") == text):
        shutil.rmtree(work / "parts", ignore_errors=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    (work / "parts").mkdir(exist_ok=True)
    for leftover in (work / "parts").glob("*.tmp"):
        leftover.unlink()


def _encode_all(
    sources: list[Source],
    encoder: tuple[str, str | None, Selection],
    parts: Path,
    workers: int,
    on_progress: Callable[[Progress], None],
) -> list[Report]:
    """Encodes the blocks that have no part yet. Returns the reports of all, in order."""
    total_bytes = sum(source.size_bytes for source in sources)
    reports: dict[int, Report] = {}
    counts, reused, position = Counts(), 0, 0

    def finish(block: Block, report: Report) -> None:
        nonlocal counts, position
        reports[block.number] = report
        counts = sum(report.counts.values(), counts)
        position = max(position, block.position)
        on_progress(Progress(position=position, total_bytes=total_bytes, reused_parts=reused, counts=counts))

    with _encoding(encoder, workers if total_bytes > BLOCK_BYTES else 1) as submit:
        running: dict[Future[Report], Block] = {}
        for block in read_blocks(sources, BLOCK_BYTES):
            path = part_path(parts, block.number)
            if path.exists():
                reused += 1
                finish(block, read_report(path))
                continue
            running[submit(block, path)] = block
            while len(running) >= 2 * workers:  # enough to keep every worker busy, and a bounded memory
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    finish(running.pop(future), future.result())
        for future, block in running.items():
            finish(block, future.result())
    return [report for _, report in sorted(reports.items())]


def part_path(parts: Path, number: int) -> Path:
    """File of a block's part."""
    return parts / f"{number:08}.npz"


@contextmanager
def _encoding(
    encoder: tuple[str, str | None, Selection], workers: int
) -> Iterator[Callable[[Block, Path], Future[Report]]]:
    """What encodes a block: in this process, or in a pool of others."""
    if workers == 1:
        here = Encoder(*encoder)

        def encode(block: Block, path: Path) -> Future[Report]:
            future: Future[Report] = Future()
            future.set_result(here.encode(block, path))
            return future

        yield encode
        return
    # Spawned, not forked: forking a process that has threads (TensorStore's, the tokenizer's) can deadlock.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=start_worker, initargs=encoder)
    try:
        yield lambda block, path: pool.submit(encode_in_worker, block, path)
    except BrokenProcessPool:
        raise UserError(
            "a worker process died, perhaps for lack of memory; the same command goes on from what is finished, "
            "with fewer --workers if memory was short"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _refuse_changed(sources: list[Source]) -> None:
    for source in sources:
        status = Path(source.path).stat()
        if (status.st_size, status.st_mtime_ns) != (source.size_bytes, source.mtime_ns):
            raise UserError(f"{source.path}: changed while it was read; start the build again when it is complete")


def _refuse_bad(bad: list[str], max_bad: int, work: Path) -> None:
    if len(bad) > max_bad:
        shown = "\n  ".join(bad[:_BAD_SHOWN])
        more = f"\n  and {len(bad) - _BAD_SHOWN} more" if len(bad) > _BAD_SHOWN else ""
        raise UserError(
            f"{len(bad)} bad records, {max_bad} allowed; no store was made:\n  {shown}{more}\n"
            f"mend them, or leave them out with --max-bad {len(bad)} (what is encoded already is kept in {work})"
        )


def _assemble(
    work: Path,
    sources: list[Source],
    tokenizer: Tokenizer,
    selection: Selection,
    reports: list[Report],
    bad: list[str],
    shard_tokens: int,
) -> dict[str, Any]:
    """Writes the store from the parts, below `work`, and seals it. Returns its manifest."""
    by_source = [Counts() for _ in sources]
    for report in reports:
        for index, counts in report.counts.items():
            by_source[index] += counts
    total = sum(by_source, Counts())
    if not total.documents:
        raise UserError(
            f"no documents in {len(sources)} files: {total.empty_documents} empty, "
            f"{total.unselected_documents} not selected by {list(selection.select)}"
        )
    store, dtype = work / "store", token_dtype(tokenizer.vocab_size)
    store.mkdir()
    _write_arrays(store, work / "parts", len(reports), total, dtype, shard_tokens)
    (store / "tokenizer").mkdir()
    for name, path in tokenizer.files.items():
        shutil.copyfile(path, store / "tokenizer" / name)
    end_of_document = tokenizer.token(tokenizer.end_of_document_id)
    # So that the copy, too, ends documents with this token, which may have come from the command line.
    (store / "tokenizer" / CONFIG).write_text(json.dumps({"eos_token": end_of_document}) + "\n", encoding="utf-8")
    with (store / "sources.jsonl").open("w", encoding="utf-8") as file:
        first = 0
        for source, counts in zip(sources, by_source):
            named = {"path": source.path, "size_bytes": source.size_bytes, "first_document": first}
            file.write(json.dumps(named | dataclasses.asdict(counts)) + "\n")
            first += counts.documents
    (store / "bad_records.txt").write_text("".join(f"{line}\n" for line in bad), encoding="utf-8")
    integrity.seal(
        store,
        {
            "format": FORMAT,
            "version": VERSION,
            "dtype": dtype.name,
            "num_tokens": total.tokens,
            "num_documents": total.documents,
            "vocab_size": tokenizer.vocab_size,
            "tokenizer_fingerprint": tokenizer.fingerprint,
            "end_of_document_id": tokenizer.end_of_document_id,
            "end_of_document": end_of_document,
            "selection": dataclasses.asdict(selection),
            "counts": dataclasses.asdict(total),
        },
    )
    return integrity.read_manifest(store)


def _write_arrays(store: Path, parts: Path, num_parts: int, total: Counts, dtype: np.dtype, shard_tokens: int) -> None:
    def writer(name: str, dtype: np.dtype, length: int) -> ArrayWriter:
        return ArrayWriter(store / name, dtype=dtype, length=length, shard=shard_tokens)

    tokens = writer("tokens", dtype, total.tokens)
    ends = writer("document_ends", np.dtype(np.int64), total.documents)
    lines = writer("document_lines", np.dtype(np.int64), total.documents)
    id_ends = writer("id_ends", np.dtype(np.int64), total.documents)
    ids = writer("id_bytes", np.dtype(np.uint8), total.id_bytes)
    token_end, id_end = 0, 0
    for number in range(num_parts):
        part = read_part(part_path(parts, number))
        tokens.append(part.tokens)
        ends.append(token_end + part.lengths.cumsum())
        lines.append(part.lines)
        id_ends.append(id_end + part.id_lengths.cumsum())
        ids.append(part.id_bytes)
        token_end += len(part.tokens)
        id_end += len(part.id_bytes)
    for array in (tokens, ends, lines, id_ends, ids):
        array.close()


def _publish(folder: Path, out: Path) -> None:
    """Gives the store its name, and makes the name last."""
    try:
        os.rename(folder, out)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        raise UserError(f"{out}: came to exist during the build and is not overwritten") from None
    parent = os.open(out.parent, os.O_RDONLY)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)
