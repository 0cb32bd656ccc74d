"""Text files to documents: which files there are, how they are cut into blocks, what is a bad record.

Decides the input formats. Does not decide what becomes of a document.

Invariant: documents come in one order, that of the inputs, and whatever is not read as a document is reported with its
file and line.
"""

from __future__ import annotations

import fnmatch
import glob
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtx.errors import UserError

# Ending -> (a line is a record or the file is a document, compression). Longer endings come first.
_ENDINGS = {
    ".jsonl.gz": ("jsonl", "gz"),
    ".jsonl.zst": ("jsonl", "zst"),
    ".txt.gz": ("txt", "gz"),
    ".txt.zst": ("txt", "zst"),
    ".jsonl": ("jsonl", None),
    ".txt": ("txt", None),
    ".zst": ("jsonl", "zst"),
}
_READ_BYTES = 1 << 18
BLOCK_BYTES = 4 << 20  # of text that are encoded at a time: a third of a second to a few seconds of work


@dataclass(frozen=True, kw_only=True)
class Source:
    """An input file. `path` is as the user wrote it, or below the folder as the user wrote it."""

    path: str
    kind: str
    compression: str | None
    size_bytes: int
    mtime_ns: int


@dataclass(frozen=True, kw_only=True)
class BadRecord:
    """Something in an input that is not a document. `line` counts from 1; it is 0 where a file has no lines."""

    source: int
    line: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Whole records of one source: lines of a `jsonl`, or a whole `txt`. After it, the source may break off."""

    source: int
    kind: str
    path: str
    first_line: int
    data: bytes
    broken: BadRecord | None = None


@dataclass(frozen=True, kw_only=True)
class Block:
    """The segments that are encoded at a time.

    Attributes:
        number: Counts from 0 in what was read.
        segments: In the order of the inputs.
        position: Bytes of input read so far, as stored.
        loose: Whether only what precedes these segments in the inputs, which was not read, says where the cuts are.
    """

    number: int
    segments: tuple[Segment, ...]
    position: int
    loose: bool = False


@dataclass(frozen=True, kw_only=True)
class Span:
    """Consecutive input: from the first place on, up to the second. A place is a source and a byte of it, as stored."""

    first: tuple[int, int]
    end: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which part of a record is the document, and which documents are wanted.

    Attributes:
        field: JSON key of the text.
        id_field: JSON key of the id; a record may lack it unless `select` is set. The id of a `txt` is its path.
        select: Patterns on the id (`*`, `?`, `[]`, case counts); a document is wanted where one matches. Empty: all.
    """

    field: str = "text"
    id_field: str = "id"
    select: tuple[str, ...] = ()

    def wants(self, document_id: str) -> bool:
        """Whether the document with this id is wanted."""
        return not self.select or any(fnmatch.fnmatchcase(document_id, pattern) for pattern in self.select)


@dataclass(frozen=True, kw_only=True)
class Document:
    """A document of an input. `id` is empty where the record has none."""

    source: int
    line: int
    id: str
    text: str


def find_sources(inputs: Sequence[str]) -> tuple[list[Source], list[str]]:
    """The input files that names, folders and globs stand for, in the order given, sorted within each.

    Returns:
        The sources, and the files in folders that are none by their ending.

    Raises:
        UserError: Nothing there, no text in a folder, an unknown ending, or a file that is named twice.
    """
    paths: list[str] = []
    others: list[str] = []
    for name in inputs:
        if Path(name).is_file():
            paths.append(name)
        elif Path(name).is_dir():
            inside = sorted(path for path in Path(name).rglob("*") if path.is_file())
            texts = [str(path) for path in inside if _ending(path.name)]
            if not texts:
                raise UserError(f"{name}: no file in this folder ends in {' '.join(_ENDINGS)}")
            paths += texts
            others += [str(path) for path in inside if not _ending(path.name)]
        else:
            matches = sorted(path for path in glob.glob(name, recursive=True) if Path(path).is_file())
            if not matches:
                raise UserError(f"{name}: no such file or folder, and no file matches it as a pattern")
            paths += matches
    seen: dict[Path, str] = {}
    for path in paths:
        file = Path(path).resolve()
        if file in seen:
            raise UserError(
                f"{path}: given twice (also as {seen[file]}), its documents would count double; name it once"
            )
        seen[file] = path
    return [_source(path) for path in paths], others


def read_blocks(sources: Sequence[Source], block_bytes: int, span: Span | None = None) -> Iterator[Block]:
    """Cuts the sources into blocks of whole records and about `block_bytes` of text; the cuts depend on nothing else.

    A source that cannot be decompressed to its end yields its whole lines, and a BadRecord for the rest.

    Args:
        span: What is read of them; None: all. Its places inside a source are of `find_cuts`, and lines count from
            there. The same records come, in the same order; the cuts are the same from the first block on that is not
            `loose`.

    Raises:
        UserError: The span ends where no record does, since the source changed.
    """
    first, end = (span.first, span.end) if span else ((0, 0), (len(sources), 0))
    number, position = 0, 0
    loose = first[0] > 0 and first[1] == 0
    segments: list[Segment] = []
    filled = 0
    for index in range(first[0], end[0] + (end[1] > 0)):
        source = sources[index]
        begin = here = first[1] if index == first[0] else 0
        stop = end[1] if index == end[0] else None
        with open(source.path, "rb") as file:
            file.seek(begin)
            for segment in _segments(index, source, file, block_bytes):
                segments.append(segment)
                filled += len(segment.data)
                here += len(segment.data) + 1
                if 2 * filled >= block_bytes:  # a segment ends with its last whole line, a little under the measure
                    read = position + file.tell() - begin
                    yield Block(number=number, segments=tuple(segments), position=read, loose=loose)
                    number, segments, filled = number + 1, [], 0
                    loose = loose and not _fills(segment, block_bytes)
                if stop is not None and here >= stop:
                    break
        if stop is not None and here != stop:
            raise UserError(f"{source.path}: changed while it was read; no line ends before byte {stop} any more")
        position += (source.size_bytes if stop is None else stop) - begin
    if segments:
        yield Block(number=number, segments=tuple(segments), position=position, loose=loose)


def find_cuts(source: Source, block_bytes: int, spacing: int) -> list[int]:
    """Bytes of a source where blocks begin whatever precedes it, at least `spacing` apart; none of a compressed one or
    of a `txt`. Reads a small part of it."""
    cuts: list[int] = []
    if source.kind != "jsonl" or source.compression is not None:
        return cuts
    with open(source.path, "rb") as file:
        start, end = 0, -(-block_bytes // _READ_BYTES) * _READ_BYTES
        while start + block_bytes <= source.size_bytes and end < source.size_bytes + _READ_BYTES:
            chunk_begin = end - _READ_BYTES  # `_segments` cuts at the last newline of the chunk that fills a block
            file.seek(chunk_begin)
            newline = file.read(_READ_BYTES).rfind(b"\n")
            if newline < 0:
                end += _READ_BYTES
                continue
            cut = chunk_begin + newline + 1
            far = cut - (cuts[-1] if cuts else 0) >= spacing and cut < source.size_bytes
            if far and 2 * (cut - 1 - start) >= block_bytes:
                cuts.append(cut)
            start, end = cut, -(-(cut + block_bytes) // _READ_BYTES) * _READ_BYTES
    return cuts


def _fills(segment: Segment, block_bytes: int) -> bool:
    """Whether a block ends with this segment, whatever it began with."""
    return 2 * len(segment.data) >= block_bytes


def read_records(segment: Segment, selection: Selection) -> Iterator[Document | BadRecord | None]:
    """The documents and the bad records of a segment, in order; None for a document that is not wanted."""

    def bad(line: int, reason: str) -> BadRecord:
        return BadRecord(source=segment.source, line=line, reason=reason)

    if segment.kind == "txt" and segment.broken is None:
        try:
            document = Document(source=segment.source, line=0, id=segment.path, text=segment.data.decode("utf-8"))
            yield document if selection.wants(document.id) else None
        except UnicodeDecodeError as error:
            line = segment.data.count(b"\n", 0, error.start) + 1
            yield bad(line, f"invalid UTF-8 at byte {error.start} of the file")
    if segment.kind == "jsonl":
        for line, raw in enumerate(segment.data.split(b"\n"), start=segment.first_line):
            if raw.strip():
                try:
                    document_id, text = _parse(raw, selection)
                except ValueError as error:
                    yield bad(line, str(error))
                    continue
                wanted = selection.wants(document_id)
                yield Document(source=segment.source, line=line, id=document_id, text=text) if wanted else None
    if segment.broken:
        yield segment.broken


def read_texts(inputs: Sequence[str], selection: Selection) -> Iterator[str]:
    """The texts of the wanted documents.

    Raises:
        UserError: As `find_sources`; or a bad record, with its file and line.
    """
    sources, _ = find_sources(inputs)
    for block in read_blocks(sources, BLOCK_BYTES):
        for segment in block.segments:
            for record in read_records(segment, selection):
                if isinstance(record, BadRecord):
                    raise UserError(f"{segment.path}:{record.line}: {record.reason}")
                if record is not None:
                    yield record.text


def _parse(raw: bytes, selection: Selection) -> tuple[str, str]:
    """Id and text of a line. ValueError says what is wrong with it."""
    try:
        record = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"invalid UTF-8 at byte {error.start} of the line") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"invalid JSON: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"a JSON {_json_type(record)}, not an object")
    text = _member(record, selection.field, (str,))
    if record.get(selection.id_field) is None and not selection.select:
        document_id = ""
    else:
        document_id = str(_member(record, selection.id_field, (str, int)))
    for name, value in ((selection.field, text), (selection.id_field, document_id)):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(f"field {name!r} holds half of a surrogate pair, which is no character") from None
    return document_id, text


def _member(record: dict[str, Any], name: str, types: tuple[type, ...]) -> Any:
    if name not in record:
        raise ValueError(f"no field {name!r}; it has {' '.join(map(repr, list(record)[:8])) or 'none'}")
    value = record[name]
    if not isinstance(value, types) or isinstance(value, bool):
        raise ValueError(f"field {name!r} is a JSON {_json_type(value)}, not a string")
    return value


def _json_type(value: Any) -> str:
    names = {dict: "object", list: "array", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null")


def _ending(name: str) -> str | None:
    if name.startswith("."):
        return None
    return next((ending for ending in _ENDINGS if name.endswith(ending)), None)


def _source(path: str) -> Source:
    ending = _ending(Path(path).name)
    if ending is None:
        raise UserError(f"{path}: not a kind of file that can be read; its name must end in {' '.join(_ENDINGS)}")
    kind, compression = _ENDINGS[ending]
    status = Path(path).stat()
    return Source(path=path, kind=kind, compression=compression, size_bytes=status.st_size, mtime_ns=status.st_mtime_ns)


def _segments(index: int, source: Source, file: Any, block_bytes: int) -> Iterator[Segment]:
    """Segments of one source. A source without a single byte of text is an empty document if it is a `txt`."""
    line = 0 if source.kind == "txt" else 1
    held: list[bytes] = []
    held_bytes = 0

    def segment(data: bytes, broken: BadRecord | None = None) -> Segment:
        return Segment(source=index, kind=source.kind, path=source.path, first_line=line, data=data, broken=broken)

    try:
        for chunk in _decompressed(source, file):
            held.append(chunk)
            held_bytes += len(chunk)
            if source.kind == "jsonl" and held_bytes >= block_bytes and b"\n" in chunk:
                data, rest = b"".join(held).rsplit(b"\n", 1)
                yield segment(data)
                line += data.count(b"\n") + 1
                held, held_bytes = [rest], len(rest)
    except ValueError as error:
        # The incomplete last line is what is reported; the lines before it are whole.
        data, newline, _ = b"".join(held).rpartition(b"\n")
        last = line + data.count(b"\n") + len(newline) if source.kind == "jsonl" else 0
        yield segment(data, BadRecord(source=index, line=last, reason=str(error)))
        return
    data = b"".join(held)
    if data or source.kind == "txt":
        yield segment(data)


def _decompressed(source: Source, file: Any) -> Iterator[bytes]:
    """The bytes of a source. ValueError where they are damaged or end early."""
    if source.compression is None:
        while chunk := file.read(_READ_BYTES - file.tell() % _READ_BYTES):  # chunks end at the same bytes in a span
            yield chunk
        return
    start, damage, padding = _decompressor(source.compression)
    stream = None
    while stored := file.read(_READ_BYTES):
        while stored := stored if stream else stored.lstrip(padding):
            stream = stream or start()  # a file may hold several streams, one after the other
            try:
                yield stream.decompress(stored)
            except damage as error:
                raise ValueError(f"the compressed file is damaged from here on: {error}") from None
            stored = b""
            if stream.eof:
                stored, stream = stream.unused_data, None
    if stream is not None:
        raise ValueError("the compressed file ends early: it is truncated")


def _decompressor(compression: str) -> tuple[Callable[[], Any], type[Exception], bytes]:
    """What makes a decompressor, what that raises, and the bytes that may pad a file between streams."""
    if compression == "gz":
        return lambda: zlib.decompressobj(wbits=31), zlib.error, b"\0"  # 31: a gzip header, its checksum is checked
    import zstandard

    return lambda: zstandard.ZstdDecompressor().decompressobj(), zstandard.ZstdError, b""
