"""Blocks of documents to parts: token ids with their documents' names, in one file per block.

Decides what becomes of each record. Runs in worker processes. Does not decide the format of the store.

Invariant: a part depends on its block, the tokenizer and the selection alone, and a file with its name is whole.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import signal
import threading
import uuid
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mtx.data.inputs import BadRecord, Block, Document, Selection, read_records
from mtx.data.tokenizer import load_tokenizer
from mtx.errors import UserError

CHECK_EVERY = 16  # one document of a block in so many is decoded again and compared with its text


@dataclass(kw_only=True, slots=True)
class Counts:
    """What was found in a source. `tokens` counts the token that ends each document."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    id_bytes: int = 0
    empty_documents: int = 0
    unselected_documents: int = 0
    bad_records: int = 0
    round_trips_checked: int = 0
    round_trips_inexact: int = 0

    def __add__(self, other: Counts) -> Counts:
        names = (member.name for member in dataclasses.fields(Counts))
        return Counts(**{name: getattr(self, name) + getattr(other, name) for name in names})


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """What became of a segment: bytes of its text, and documents."""

    source: int
    data_bytes: int
    documents: int


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a part says of itself.

    Attributes:
        counts: By source. Of a loose block, without the round trips.
        bad: The bad records.
        stretches: The segments, in order.
        loose: Whether the block was.
        inexact: Documents of a loose block, from 0, that decoding changes; all of them were decoded.
    """

    counts: dict[int, Counts] = field(default_factory=dict)
    bad: list[BadRecord] = field(default_factory=list)
    stretches: list[Stretch] = field(default_factory=list)
    loose: bool = False
    inexact: list[int] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Part:
    """The documents of a block, one after the other.

    Attributes:
        tokens: uint16 or uint32[tokens]; each document is followed by the end-of-document id.
        lengths: int64[documents], with that id.
        lines: int64[documents], in their source.
        id_lengths: int64[documents], bytes.
        id_bytes: uint8[sum of id_lengths], UTF-8.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    lines: np.ndarray
    id_lengths: np.ndarray
    id_bytes: np.ndarray


def token_dtype(vocab_size: int) -> np.dtype:
    """The narrowest of the two types that hold the ids of a vocabulary."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


class Encoder:
    """Encodes blocks."""

    def __init__(self, tokenizer_path: str, end_of_document: str | None, selection: Selection):
        self._tokenizer = load_tokenizer(tokenizer_path, end_of_document=end_of_document)
        self._selection = selection

    def encode(self, block: Block, path: Path) -> Report:
        """Encodes a block and writes its part; returns the part's report."""
        report = Report(loose=block.loose)
        documents: list[Document] = []
        for segment in block.segments:
            before = len(documents)
            counts = report.counts.setdefault(segment.source, Counts())
            for record in read_records(segment, self._selection):
                if record is None:
                    counts.unselected_documents += 1
                elif isinstance(record, BadRecord):
                    counts.bad_records += 1
                    report.bad.append(record)
                elif not record.text:
                    counts.empty_documents += 1
                else:
                    documents.append(record)
            stretch = Stretch(source=segment.source, data_bytes=len(segment.data), documents=len(documents) - before)
            report.stretches.append(stretch)
        _write_part(path, self._part(documents, report), report)
        return report

    def _part(self, documents: list[Document], report: Report) -> Part:
        encoded = self._tokenizer.encode_batch([document.text for document in documents])
        end = np.array([self._tokenizer.end_of_document_id], np.int32)
        for i, (document, ids) in enumerate(zip(documents, encoded)):
            counts = report.counts[document.source]
            counts.documents += 1
            counts.tokens += len(ids) + 1
            counts.text_bytes += len(document.text.encode())
            counts.id_bytes += len(document.id.encode())
            if report.loose:
                if self._tokenizer.decode(ids) != document.text:
                    report.inexact.append(i)
            elif i % CHECK_EVERY == 0:
                counts.round_trips_checked += 1
                counts.round_trips_inexact += self._tokenizer.decode(ids) != document.text
        names = [document.id.encode() for document in documents]
        pieces = [piece for ids in encoded for piece in (ids, end)]
        dtype = token_dtype(self._tokenizer.vocab_size)
        return Part(
            tokens=np.concatenate(pieces, dtype=dtype, casting="unsafe") if pieces else np.empty(0, dtype),
            lengths=np.array([len(ids) + 1 for ids in encoded], np.int64),
            lines=np.array([document.line for document in documents], np.int64),
            id_lengths=np.array([len(name) for name in names], np.int64),
            id_bytes=np.frombuffer(b"".join(names), np.uint8),
        )


def read_report(path: Path) -> Report:
    """The report of a part."""
    content = json.loads(bytes(_load(path, "report")["report"]))
    return Report(
        counts={int(source): Counts(**counts) for source, counts in content["counts"].items()},
        bad=[BadRecord(**record) for record in content["bad"]],
        stretches=[Stretch(**stretch) for stretch in content["stretches"]],
        loose=content["loose"],
        inexact=content["inexact"],
    )


def read_part(path: Path) -> Part:
    """The documents of a part.

    Raises:
        UserError: The file is damaged.
    """
    return Part(**_load(path, *(member.name for member in dataclasses.fields(Part))))


def _load(path: Path, *names: str) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in names}
    except (zipfile.BadZipFile, ValueError, KeyError, EOFError):
        raise UserError(f"{path}: damaged; remove it, and the same command builds it again") from None


def _write_part(path: Path, part: Part, report: Report) -> None:
    content = {
        "counts": {source: dataclasses.asdict(counts) for source, counts in report.counts.items()},
        "bad": [dataclasses.asdict(record) for record in report.bad],
        "stretches": [dataclasses.asdict(stretch) for stretch in report.stretches],
        "loose": report.loose,
        "inexact": report.inexact,
    }
    arrays = {member.name: getattr(part, member.name) for member in dataclasses.fields(Part)}
    temporary = temporary_name(path)
    with temporary.open("wb") as file:
        np.savez(file, report=np.frombuffer(json.dumps(content).encode(), np.uint8), **arrays)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def temporary_name(path: Path) -> Path:
    """A name beside `path` that no other process uses: one on another host, taken for lost, may be at the same file."""
    return path.with_suffix(f".{uuid.uuid4().hex}.tmp")


# A worker process has one encoder for its life: loading a vocabulary costs more than encoding a block.
_encoder: Encoder | None = None


def start_worker(tokenizer_path: str, end_of_document: str | None, selection: Selection) -> None:
    """Prepares a worker process: its encoder, one thread, and an end with its parent."""
    global _encoder
    os.environ["RAYON_NUM_THREADS"] = "1"  # of the tokenizers library: the other cores have workers of their own
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it too, and ends the workers

    def end_with_parent() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()  # also where the parent was killed: without this, a worker would wait for work for ever
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    _encoder = Encoder(tokenizer_path, end_of_document, selection)


def encode_in_worker(block: Block, path: Path) -> Report:
    """`Encoder.encode` in a process that `start_worker` prepared."""
    assert _encoder is not None
    return _encoder.encode(block, path)
