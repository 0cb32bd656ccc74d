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
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mtx.data import integrity
from mtx.data.arrays import CHUNK, ArrayWriter
from mtx.data.encode import Counts, Part, Report, read_part, token_dtype
from mtx.data.encode_pool import Progress, encode_all, part_path
from mtx.data.inputs import BLOCK_BYTES, Selection, Source, find_sources, read_blocks
from mtx.data.store import FORMAT, VERSION
from mtx.data.tokenizer import CONFIG, Tokenizer, load_tokenizer
from mtx.errors import UserError

SHARD_TOKENS = 16 << 20
PLAN = "plan.json"
_PARTS_VERSION = 2
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_BAD_SHOWN = 5


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
    on_note: Callable[[str], None] = lambda note: None,
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
        on_note: Called with what the user should know, a line each.

    Raises:
        UserError: `out` exists, the inputs hold no document or more than `max_bad` bad records, or a file fails.
    """
    check_new(out)
    check_shard_tokens(shard_tokens)
    work = work_folder(out)
    with user_errors(work):
        sources, ignored = find_sources(inputs)
        tokenizer = load_tokenizer(tokenizer_path, end_of_document=end_of_document)
        plan = make_plan(sources, tokenizer, selection)
        with locked(work, on_note=on_note):
            _start_or_resume(work, plan)
            encoder = (tokenizer_path, end_of_document, selection)
            total_bytes = sum(source.size_bytes for source in sources)
            needed = workers if total_bytes > BLOCK_BYTES else 1
            parts = work / "parts"
            reports = encode_all(read_blocks(sources, BLOCK_BYTES), total_bytes, encoder, parts, needed, on_progress)
            bad = bad_lines(sources, reports)
            refuse_changed(sources)
            refuse_bad(bad, max_bad, work)
            read = (read_part(part_path(parts, number)) for number in range(len(reports)))
            manifest = assemble(work, sources, tokenizer, selection, reports, read, bad, shard_tokens)
            publish(work / "store", out)
            shutil.rmtree(work)
    return Built(manifest=manifest, ignored=ignored, bad=bad)


def work_folder(out: Path) -> Path:
    """Where the work on a store is kept until it is one."""
    return out.with_name(out.name + ".building")


def check_new(out: Path) -> None:
    """Raises: UserError: There is something with the name of the store."""
    if out.exists():
        raise UserError(f"{out}: exists already and is not overwritten; give another --out or remove it")


def check_shard_tokens(shard_tokens: int) -> None:
    """Raises: UserError: The files of the store would not hold whole chunks."""
    if shard_tokens % CHUNK:
        raise UserError(f"--shard-tokens {shard_tokens}: must be a multiple of {CHUNK}")


@contextmanager
def user_errors(work: Path) -> Iterator[None]:
    """What the operating system refuses is the user's to mend."""
    try:
        yield
    except OSError as error:
        cure = ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            cure = f"; make room, and the same command goes on from what is in {work}"
        raise UserError(f"{error.filename or work}: {error.strerror}{cure}") from None


@contextmanager
def locked(work: Path, *, shared: bool = False, on_note: Callable[[str], None] = lambda note: None) -> Iterator[None]:
    """Holds the work folder. The lock goes with the process, however that ends.

    Args:
        work: Made if need be.
        shared: Whether others that also share it may work there at the same time.
        on_note: Told where the file system has no locks.

    Raises:
        UserError: Another process holds it, or has just finished with it.
    """
    work.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("a+") as file:  # both: network file systems want it open for what the lock is for
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{work}: another process is building there; wait for it or give another --out") from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            on_note(
                f"{work}: this file system has no locks ({error.strerror}): see to it that there is one build of the "
                "store at a time, and that its --merge begins when all its shards have ended"
            )
        if os.fstat(file.fileno()).st_nlink == 0:
            raise UserError(f"{work}: another process has just finished there; start again if the store is not there")
        yield


def make_plan(sources: list[Source], tokenizer: Tokenizer, selection: Selection) -> dict[str, Any]:
    """All that the parts depend on."""
    return {
        "version": VERSION,
        "parts_version": _PARTS_VERSION,
        "block_bytes": BLOCK_BYTES,
        "tokenizer": tokenizer.fingerprint,
        "end_of_document_id": tokenizer.end_of_document_id,
        "selection": dataclasses.asdict(selection),
        "sources": [dataclasses.asdict(source) for source in sources],
    }


def _start_or_resume(work: Path, plan: dict[str, Any]) -> None:
    """Keeps the parts of an earlier build if they are of this plan.

    Raises:
        UserError: The folder holds the work of shards, which may be that of many machines.
    """
    path, text = work / PLAN, json.dumps(plan, indent=1)
    if path.is_file() and "shards" in json.loads(path.read_text(encoding="utf-8")):
        raise UserError(
            f"{work}: holds the work of `--shard` commands; finish it with `--merge`, or remove the folder if it is "
            "not wanted"
        )
    shutil.rmtree(work / "store", ignore_errors=True)
    if not (path.is_file() and path.read_text(encoding="utf-8") == text):
        shutil.rmtree(work / "parts", ignore_errors=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    (work / "parts").mkdir(exist_ok=True)
    for leftover in (work / "parts").glob("*.tmp"):
        leftover.unlink()


def bad_lines(sources: Sequence[Source], reports: Iterable[Report]) -> list[str]:
    """The bad records, as file:line: reason."""
    return [
        f"{sources[record.source].path}:{record.line}: {record.reason}" for report in reports for record in report.bad
    ]


def refuse_changed(sources: Iterable[Source]) -> None:
    """Raises: UserError: A source is not what it was when the build began."""
    for source in sources:
        status = Path(source.path).stat()
        if (status.st_size, status.st_mtime_ns) != (source.size_bytes, source.mtime_ns):
            raise UserError(f"{source.path}: changed while it was read; start the build again when it is complete")


def refuse_bad(bad: list[str], max_bad: int, work: Path) -> None:
    """Raises: UserError: There are more bad records than are put up with."""
    if len(bad) > max_bad:
        shown = "\n  ".join(bad[:_BAD_SHOWN])
        more = f"\n  and {len(bad) - _BAD_SHOWN} more" if len(bad) > _BAD_SHOWN else ""
        raise UserError(
            f"{len(bad)} bad records, {max_bad} allowed; no store was made:\n  {shown}{more}\n"
            f"mend them, or leave them out with --max-bad {len(bad)} (what is encoded already is kept in {work})"
        )


def assemble(
    work: Path,
    sources: list[Source],
    tokenizer: Tokenizer,
    selection: Selection,
    reports: Iterable[Report],
    parts: Iterable[Part],
    bad: list[str],
    shard_tokens: int,
) -> dict[str, Any]:
    """Writes the store from the parts, as `work/store`, and seals it. Returns its manifest.

    Raises:
        UserError: There is no document.
    """
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
    _write_arrays(store, parts, total, dtype, shard_tokens)
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


def _write_arrays(store: Path, parts: Iterable[Part], total: Counts, dtype: np.dtype, shard_tokens: int) -> None:
    def writer(name: str, dtype: np.dtype, length: int) -> ArrayWriter:
        return ArrayWriter(store / name, dtype=dtype, length=length, shard=shard_tokens)

    tokens = writer("tokens", dtype, total.tokens)
    ends = writer("document_ends", np.dtype(np.int64), total.documents)
    lines = writer("document_lines", np.dtype(np.int64), total.documents)
    id_ends = writer("id_ends", np.dtype(np.int64), total.documents)
    ids = writer("id_bytes", np.dtype(np.uint8), total.id_bytes)
    token_end, id_end = 0, 0
    for part in parts:
        tokens.append(part.tokens)
        ends.append(token_end + part.lengths.cumsum())
        lines.append(part.lines)
        id_ends.append(id_end + part.id_lengths.cumsum())
        ids.append(part.id_bytes)
        token_end += len(part.tokens)
        id_end += len(part.id_bytes)
    for array in (tokens, ends, lines, id_ends, ids):
        array.close()


def publish(folder: Path, out: Path) -> None:
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
