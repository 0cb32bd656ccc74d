"""A token store made by many machines: shards of the work, each a command of its own, then one that merges them.

    STORE.building/plan.json         inputs, tokenizer, selection, and what of the inputs each shard reads
    STORE.building/parts/I/          what shard I encoded, a file per block
    STORE.building/shards/I.json     shard I is done: how many parts, what was counted

Decides what a shard reads and when it is done. What is common with a build on one machine is in `build.py`.

Invariant: the store is the one that a build on one machine makes, byte for byte, and no shard removes what another one
made.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from mtx.data import build, integrity
from mtx.data.build import PLAN, SHARD_TOKENS, Built, locked, user_errors, work_folder
from mtx.data.encode import CHECK_EVERY, Counts, Part, Report, read_part, read_report, temporary_name
from mtx.data.encode_pool import Progress, encode_all, part_path
from mtx.data.inputs import Block, Selection, Source, Span, find_cuts, find_sources
from mtx.data.tokenizer import Tokenizer, load_tokenizer
from mtx.errors import UserError

_EXPANSION = 3
"""Bytes of text that a byte of a compressed file is taken for, when the work is shared out."""
_PIECES = 64
"""Into so many pieces per shard large files are cut, so that shards differ by a few percent at most."""
_SHOWN = 40


@dataclass(frozen=True, kw_only=True)
class ShardBuilt:
    """What a shard leaves.

    Attributes:
        parts: Files that it has made, now or before.
        reused_parts: Those that were there.
        counts: What it found; of the round trips, only those that it can count alone.
        ignored: Files of the folders that were not read.
        already: Whether there was nothing to do.
    """

    parts: int
    reused_parts: int
    counts: Counts
    ignored: list[str]
    already: bool


def build_shard(
    inputs: Sequence[str],
    *,
    tokenizer_path: str,
    out: Path,
    selection: Selection,
    shard: int,
    num_shards: int,
    workers: int,
    end_of_document: str | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    on_note: Callable[[str], None] = lambda note: None,
) -> ShardBuilt:
    """Encodes one shard of the work. May be repeated, also while another process is at the same one.

    Args:
        shard: Which, from 0.
        num_shards: Into how many the work is divided; the same for all.

    The others: see `build_store`.

    Raises:
        UserError: The work folder holds that of other inputs or options, or a file fails. Nothing there is removed.
    """
    work = work_folder(out)
    with user_errors(work):
        sources, ignored = find_sources(inputs)
        tokenizer = load_tokenizer(tokenizer_path, end_of_document=end_of_document)
        if out.exists():
            _refuse_other_store(out, sources, tokenizer, selection)
            on_note(f"{out}: is there already, made from the same inputs")
            return ShardBuilt(parts=0, reused_parts=0, counts=Counts(), ignored=ignored, already=True)
        with locked(work, shared=True, on_note=on_note):
            plan = build.make_plan(sources, tokenizer, selection)
            span = _join(work, plan, sources, num_shards)[shard]
            folder = work / "parts" / f"{shard:05}"
            folder.mkdir(parents=True, exist_ok=True)
            done = _read_done(work, shard)
            if done is not None:
                reports = [read_report(part_path(folder, number)) for number in range(done["parts"])]
                on_note(f"shard {shard}/{num_shards} is done already: {len(reports)} parts")
                reused = len(reports)
            else:
                newlines = _Newlines(span)
                last = Progress(position=0, total_bytes=0, reused_parts=0, counts=Counts())

                def progress(now: Progress) -> None:
                    nonlocal last
                    last = now
                    on_progress(now)

                blocks = newlines.count(build.read_blocks(sources, build.BLOCK_BYTES, span))
                total_bytes = _stored_bytes(sources, span)
                needed = workers if total_bytes > build.BLOCK_BYTES else 1
                encoder = (tokenizer_path, end_of_document, selection)
                reports = encode_all(blocks, total_bytes, encoder, folder, needed, progress)
                reused = last.reused_parts
                build.refuse_changed(sources[span.first[0] : span.end[0] + (span.end[1] > 0)])
                _write_done(work, shard, {"parts": len(reports), "newlines": newlines.last_source})
    return ShardBuilt(
        parts=len(reports),
        reused_parts=reused,
        counts=sum((counts for report in reports for counts in report.counts.values()), Counts()),
        ignored=ignored,
        already=done is not None,
    )


def merge_shards(
    inputs: Sequence[str],
    *,
    tokenizer_path: str,
    out: Path,
    selection: Selection,
    end_of_document: str | None = None,
    shard_tokens: int = SHARD_TOKENS,
    max_bad: int = 0,
    on_note: Callable[[str], None] = lambda note: None,
) -> Built:
    """Makes the store of all shards, and removes their work. Where that store is already, it is left as it is.

    Args: See `build_store`.

    Raises:
        UserError: Shards are missing, or at work; they were made from other inputs or with other options; `out` is
            another store; there is no document, or more than `max_bad` bad records.
    """
    build.check_shard_tokens(shard_tokens)
    work = work_folder(out)
    with user_errors(work):
        sources, ignored = find_sources(inputs)
        tokenizer = load_tokenizer(tokenizer_path, end_of_document=end_of_document)
        if out.exists():
            manifest = _refuse_other_store(out, sources, tokenizer, selection)
            on_note(f"{out}: is there already, made from the same inputs; nothing is left to merge")
            if (work / PLAN).exists():  # of a merge that was killed after its last but one step
                with locked(work, on_note=on_note):
                    _read_plan(work, build.make_plan(sources, tokenizer, selection))
                    shutil.rmtree(work)
            bad = (out / "bad_records.txt").read_text(encoding="utf-8").splitlines()
            return Built(manifest=manifest, ignored=ignored, bad=bad)
        if not (work / PLAN).exists():
            raise UserError(f"{work}: there is nothing to merge; run the same command with --shard 0/N to N-1/N first")
        with locked(work, on_note=on_note):
            spans = _read_plan(work, build.make_plan(sources, tokenizer, selection))
            merge = _Merge(work, spans)
            reports = merge.reports()
            bad = build.bad_lines(sources, reports)
            build.refuse_changed(sources)
            build.refuse_bad(bad, max_bad, work)
            shutil.rmtree(work / "store", ignore_errors=True)  # of a merge that was killed
            manifest = build.assemble(work, sources, tokenizer, selection, reports, merge.parts(), bad, shard_tokens)
            build.publish(work / "store", out)
            shutil.rmtree(work)
    return Built(manifest=manifest, ignored=ignored, bad=bad)


def share_out(sources: Sequence[Source], num_shards: int, block_bytes: int) -> list[Span]:
    """What each shard reads: consecutive input, such that the largest share is as small as can be.

    A compressed file, or a `txt`, is one shard's whole; a large `.jsonl` is cut.
    """
    weights = [source.size_bytes * (1 if source.compression is None else _EXPANSION) for source in sources]
    spacing = max(block_bytes, sum(weights) // (_PIECES * num_shards))
    pieces: list[tuple[tuple[int, int], int]] = []  # where a piece begins, and its weight
    for index, (source, weight) in enumerate(zip(sources, weights)):
        cuts = find_cuts(source, block_bytes, spacing) if source.size_bytes > spacing else []
        edges = [0, *cuts, source.size_bytes] if cuts else [0, weight]
        pieces += [((index, begin), end - begin) for begin, end in pairwise(edges)]
    low, high = max(weight for _, weight in pieces), sum(weights)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(_fill(pieces, middle)) <= num_shards else (middle + 1, high)
    end = (len(sources), 0)
    begins = [*_fill(pieces, low), *[end] * num_shards][:num_shards]
    return [Span(first=first, end=after) for first, after in zip(begins, [*begins[1:], end])]


def _fill(pieces: Iterable[tuple[tuple[int, int], int]], capacity: int) -> list[tuple[int, int]]:
    """Where shares begin that hold at most so much."""
    begins: list[tuple[int, int]] = []
    held = 0
    for begin, weight in pieces:
        if not begins or held + weight > capacity:
            begins.append(begin)
            held = 0
        held += weight
    return begins


def _join(work: Path, plan: dict[str, Any], sources: Sequence[Source], num_shards: int) -> list[Span]:
    """Makes the plan of all shards, unless it is there; what each shard reads."""
    path = work / PLAN
    if not path.exists():
        spans = [dataclasses.asdict(span) for span in share_out(sources, num_shards, build.BLOCK_BYTES)]
        text = json.dumps({**plan, "shards": num_shards, "spans": spans}, indent=1)
        temporary = _write_temporary(path, text)
        try:
            os.link(temporary, path)  # which fails where another shard was first; a rename would overwrite its plan
        except FileExistsError:
            pass
        finally:
            temporary.unlink()
    return _read_plan(work, plan, num_shards)


def _read_plan(work: Path, plan: dict[str, Any], num_shards: int | None = None) -> list[Span]:
    """What each shard reads.

    Raises:
        UserError: The plan in the folder is another one.
    """
    path = work / PLAN
    cure = "; nothing was removed: give the same as the others, another --out, or remove the folder if it is not wanted"
    stored = json.loads(path.read_text(encoding="utf-8"))
    if "shards" not in stored:
        raise UserError(
            f"{work}: holds a build without shards; finish it with the command that began it, or remove the folder"
        )
    wanted = json.loads(json.dumps(plan))
    if stored["sources"] != wanted["sources"]:
        before = [source["path"] for source in stored["sources"]]
        now = [source["path"] for source in wanted["sources"]]
        differs = [new["path"] for old, new in zip(stored["sources"], wanted["sources"]) if old != new]
        what = f"{differs[0]} changed since (its size or date)" if before == now else f"{len(before)} files, not these"
        raise UserError(f"{path}: the shards there are of other inputs: {what}{cure}")
    for name in wanted:
        if stored.get(name) != wanted[name]:
            names = {"tokenizer": "another tokenizer", "end_of_document_id": "another --end-of-document"}
            names["selection"] = f"another --field, --id-field or --select: {stored.get(name)}"
            what = names.get(name, f"another version of mtx ({name})")
            raise UserError(f"{path}: the shards there were made with {what}{cure}")
    if num_shards not in (None, stored["shards"]):
        raise UserError(f"{path}: the work is divided into {stored['shards']} shards there, not {num_shards}{cure}")
    return [Span(first=_place(span["first"]), end=_place(span["end"])) for span in stored["spans"]]


def _place(pair: Sequence[int]) -> tuple[int, int]:
    return pair[0], pair[1]


def _write_temporary(path: Path, text: str) -> Path:
    """A file beside `path` whose name no other process uses, on disk."""
    temporary = temporary_name(path)
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    return temporary


def _done_path(work: Path, shard: int) -> Path:
    return work / "shards" / f"{shard:05}.json"


def _write_done(work: Path, shard: int, content: dict[str, int]) -> None:
    path = _done_path(work, shard)
    path.parent.mkdir(exist_ok=True)
    _write_temporary(path, json.dumps(content)).replace(path)


def _read_done(work: Path, shard: int) -> dict[str, int] | None:
    """What a shard says of itself when it is done and all its parts are there; None: it is not."""
    path = _done_path(work, shard)
    if not path.exists():
        return None
    done: dict[str, int] = json.loads(path.read_text(encoding="utf-8"))
    folder = work / "parts" / f"{shard:05}"
    return done if all(part_path(folder, number).exists() for number in range(done["parts"])) else None


def _stored_bytes(sources: Sequence[Source], span: Span) -> int:
    return sum(source.size_bytes for source in sources[span.first[0] : span.end[0]]) + span.end[1] - span.first[1]


class _Newlines:
    """Counts the lines that a shard reads of its last source, which another shard goes on with."""

    def __init__(self, span: Span) -> None:
        self.last_source = 0
        self._source = span.end[0] if span.end[1] else None

    def count(self, blocks: Iterable[Block]) -> Iterator[Block]:
        for block in blocks:
            for segment in block.segments:
                if segment.source == self._source:
                    self.last_source += segment.data.count(b"\n") + 1  # the cut is at one that is in no segment
            yield block


class _Merge:
    """The parts of all shards, in the order of the inputs, with what their shards could not know put right."""

    def __init__(self, work: Path, spans: Sequence[Span]) -> None:
        """Raises: UserError: Shards are missing."""
        self._parts: list[tuple[Path, Span, int]] = []  # with the lines of the source before the span
        missing, lines = [], 0
        for shard, span in enumerate(spans):
            done = _read_done(work, shard)
            if done is None:
                missing.append(f"{shard}/{len(spans)}")
                continue
            before = lines if span.first[1] else 0
            folder = work / "parts" / f"{shard:05}"
            self._parts += [(part_path(folder, number), span, before) for number in range(done["parts"])]
            lines = done["newlines"] + (before if span.first[0] == span.end[0] else 0)
        if missing:
            more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
            raise UserError(
                f"{len(missing)} of {len(spans)} shards are not done; run --shard again for: "
                f"{' '.join(missing[:_SHOWN])}{more}"
            )

    def reports(self) -> list[Report]:
        """What the parts say, with lines that count from the beginnings of the sources and with all round trips."""
        filled, preceding = 0, 0  # text and documents in the block so far, were it of a build on one machine
        reports = []
        for path, span, lines in self._parts:
            report = read_report(path)
            bad = [
                dataclasses.replace(record, line=record.line + lines) if record.source == span.first[0] else record
                for record in report.bad
            ]
            counts, inexact, first = dict(report.counts), set(report.inexact), 0
            for stretch in report.stretches:
                if report.loose:
                    begin = first + -preceding % CHECK_EVERY
                    checked = range(begin, first + stretch.documents, CHECK_EVERY)
                    differ = sum(document in inexact for document in checked)
                    more = Counts(round_trips_checked=len(checked), round_trips_inexact=differ)
                    counts[stretch.source] += more
                first += stretch.documents
                preceding += stretch.documents
                filled += stretch.data_bytes
                if 2 * filled >= build.BLOCK_BYTES:
                    filled, preceding = 0, 0
            reports.append(dataclasses.replace(report, counts=counts, bad=bad))
        return reports

    def parts(self) -> Iterator[Part]:
        """The documents."""
        for path, span, lines in self._parts:
            part = read_part(path)
            if lines:
                counts = read_report(path).counts.get(span.first[0], Counts())
                part.lines[: counts.documents] += lines
            yield part


def _refuse_other_store(
    out: Path, sources: Sequence[Source], tokenizer: Tokenizer, selection: Selection
) -> dict[str, Any]:
    """The manifest of the store that is there.

    Raises:
        UserError: It is not whole, or was not made from these inputs with this tokenizer and selection.
    """
    try:
        manifest = integrity.read_manifest(out)
        lines = (out / "sources.jsonl").read_text(encoding="utf-8").splitlines()
        found = [(source["path"], source["size_bytes"]) for source in map(json.loads, lines)]
        same = (
            found == [(source.path, source.size_bytes) for source in sources]
            and manifest["tokenizer_fingerprint"] == tokenizer.fingerprint
            and manifest["end_of_document_id"] == tokenizer.end_of_document_id
            and manifest["selection"] == json.loads(json.dumps(dataclasses.asdict(selection)))
            and not integrity.check_sizes(out, manifest)
        )
    except (OSError, ValueError, KeyError):
        same, manifest = False, {}
    if not same:
        raise UserError(
            f"{out}: exists already and was not made from these inputs with this tokenizer and selection; it is not "
            "overwritten: give another --out or remove it"
        )
    return manifest
