"""Every document of every kind of file, in order; every bad record with its file and line."""

import gzip
import json
import random

import pytest
import zstandard

from mtx.data import inputs
from mtx.data.inputs import BadRecord, Document, Selection, find_sources, read_blocks, read_records
from mtx.errors import UserError


def read(paths, *, selection=None, block_bytes=1 << 20):
    """Documents and bad records of files, as (id, text) and (line, reason)."""
    sources, _ = find_sources([str(path) for path in paths])
    documents, bad, unselected = [], [], 0
    for block in read_blocks(sources, block_bytes):
        for segment in block.segments:
            for record in read_records(segment, selection or Selection()):
                if record is None:
                    unselected += 1
                elif isinstance(record, BadRecord):
                    bad.append((record.line, record.reason))
                else:
                    documents.append(record)
    return documents, bad, unselected


def jsonl(texts, **extra):
    return "".join(json.dumps({"id": f"d{i}", "text": text} | extra) + "\n" for i, text in enumerate(texts)).encode()


def zst(data):
    return zstandard.ZstdCompressor().compress(data)


TEXTS = ["first", "second\nwith two lines", "\u00e9\U0001f600\u2028", "last"]


@pytest.mark.parametrize("block_bytes", [1, 50, 1 << 20])
@pytest.mark.parametrize(
    ("name", "pack"), [("a.jsonl", bytes), ("a.jsonl.gz", gzip.compress), ("a.jsonl.zst", zst), ("a.zst", zst)]
)
def test_lines_are_documents(tmp_path, monkeypatch, name, pack, block_bytes):
    monkeypatch.setattr(inputs, "_READ_BYTES", 7)  # so that everything straddles two reads
    (tmp_path / name).write_bytes(pack(jsonl(TEXTS)))
    documents, bad, _ = read([tmp_path / name], block_bytes=block_bytes)
    assert [(d.id, d.text, d.line) for d in documents] == [(f"d{i}", text, i + 1) for i, text in enumerate(TEXTS)]
    assert not bad


@pytest.mark.parametrize(("name", "pack"), [("a.txt", bytes), ("a.txt.gz", gzip.compress), ("a.txt.zst", zst)])
def test_a_text_file_is_one_document(tmp_path, name, pack):
    text = "one\n\n two\r\n\0"
    (tmp_path / name).write_bytes(pack(text.encode()))
    documents, bad, _ = read([tmp_path / name], block_bytes=1)
    assert documents == [Document(source=0, line=0, id=str(tmp_path / name), text=text)]
    assert not bad


def test_no_newline_at_the_end_blank_lines_and_crlf(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(["x"]) + b"\n  \r\n" + jsonl(["y"]).rstrip())
    documents, bad, _ = read([tmp_path / "a.jsonl"])
    assert [(d.text, d.line) for d in documents] == [("x", 1), ("y", 4)]
    assert not bad


def test_files_of_several_streams(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(jsonl(["x"])) + gzip.compress(jsonl(["y"])) + b"\0" * 512)
    (tmp_path / "b.jsonl.zst").write_bytes(zst(jsonl(["z"])) + zst(jsonl(["w"])))
    documents, bad, _ = read([tmp_path / "a.jsonl.gz", tmp_path / "b.jsonl.zst"])
    assert [(d.text, d.line) for d in documents] == [("x", 1), ("y", 2), ("z", 1), ("w", 2)]
    assert not bad


@pytest.mark.parametrize(("name", "pack"), [("a.jsonl.gz", gzip.compress), ("a.jsonl.zst", zst)])
def test_a_truncated_file_keeps_its_whole_lines_and_is_reported(tmp_path, name, pack):
    rng = random.Random(0)
    data = jsonl([str(rng.random()) for _ in range(5000)])
    packed = pack(data)
    (tmp_path / name).write_bytes(packed[: len(packed) * 3 // 4])
    documents, bad, _ = read([tmp_path / name], block_bytes=5000)
    assert [d.line for d in documents] == list(range(1, len(documents) + 1))
    assert 0 < len(documents) < 5000
    assert bad == [(len(documents) + 1, "the compressed file ends early: it is truncated")]


def test_a_damaged_file_is_reported(tmp_path):
    packed = bytearray(gzip.compress(jsonl(TEXTS)))
    packed[-5] ^= 1  # in the checksum
    (tmp_path / "a.jsonl.gz").write_bytes(packed)
    (tmp_path / "b.jsonl.zst").write_bytes(b"not zstd")
    _, bad, _ = read([tmp_path / "a.jsonl.gz", tmp_path / "b.jsonl.zst"])
    assert [reason.split(":")[0] for _, reason in bad] == ["the compressed file is damaged from here on"] * 2


BAD_LINES = {
    b"{": "invalid JSON",
    b"[" * 100_000: "invalid JSON",
    b'["text"]': "a JSON array, not an object",
    b"7": "a JSON number, not an object",
    b'{"id": "x"}': "no field 'text'; it has 'id'",
    b'{"id": "x", "text": null}': "field 'text' is a JSON null, not a string",
    b'{"id": "x", "text": true}': "field 'text' is a JSON boolean, not a string",
    b'{"id": ["x"], "text": "t"}': "field 'id' is a JSON array, not a string",
    b'{"id": "x", "text": "\\ud800"}': "field 'text' holds half of a surrogate pair",
    b'{"id": "x", "text": "\xff"}': "invalid UTF-8 at byte 21 of the line",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_bad_records_are_reported_with_their_line(tmp_path, line):
    (tmp_path / "a.jsonl").write_bytes(jsonl(["good"]) + line + b"\n" + jsonl(["good too"]))
    documents, bad, _ = read([tmp_path / "a.jsonl"])
    assert [d.text for d in documents] == ["good", "good too"]
    [(number, reason)] = bad
    assert number == 2
    assert reason.startswith(BAD_LINES[line])


def test_a_text_file_that_is_not_utf8(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\ntwo \xff")
    documents, bad, _ = read([tmp_path / "a.txt"])
    assert not documents
    assert bad == [(2, "invalid UTF-8 at byte 8 of the file")]


def test_fields_and_selection(tmp_path):
    lines = [{"body": f"text {i}", "key": f"{part}/{i}"} for i, part in enumerate(["train", "validation", "train"])]
    lines.append({"body": "x", "key": 7})
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def selected(*select):
        selection = Selection(field="body", id_field="key", select=select)
        documents, bad, unselected = read([tmp_path / "a.jsonl"], selection=selection)
        assert not bad
        assert len(documents) + unselected == 4
        return [d.id for d in documents]

    assert selected() == ["train/0", "validation/1", "train/2", "7"]
    assert selected("validation/*") == ["validation/1"]
    assert selected("*/[02]", "7") == ["train/0", "train/2", "7"]
    assert selected("TRAIN/*") == []


def test_an_id_may_be_absent_unless_it_is_selected_by(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n{"text": "b", "id": null}\n')
    documents, bad, _ = read([tmp_path / "a.jsonl"])
    assert [d.id for d in documents] == ["", ""]
    assert not bad
    documents, bad, _ = read([tmp_path / "a.jsonl"], selection=Selection(select=("*",)))
    assert not documents
    assert [reason.split(";")[0] for _, reason in bad] == ["no field 'id'", "field 'id' is a JSON null, not a string"]


def test_folders_and_globs(tmp_path):
    for name in ("b/2.txt", "b/10.txt", "b/c/0.jsonl", "b/README.md", "b/.hidden.txt", "a.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    sources, ignored = find_sources([str(tmp_path / "b"), str(tmp_path / "*.txt")])
    names = [source.path.removeprefix(f"{tmp_path}/") for source in sources]
    assert names == ["b/10.txt", "b/2.txt", "b/c/0.jsonl", "a.txt"]
    assert ignored == [str(tmp_path / "b/.hidden.txt"), str(tmp_path / "b/README.md")]
    assert [s.path for s in find_sources([str(tmp_path / "**/*.jsonl")])[0]] == [str(tmp_path / "b/c/0.jsonl")]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["absent.txt"], "no such file"),
        (["*.nothing"], "no file matches"),
        (["empty"], "no file in this folder ends in"),
        (["notes.md"], "its name must end in"),
        (["a.txt", "a.txt"], "given twice"),
        (["a.txt", "link.txt"], "given twice"),
    ],
)
def test_inputs_that_are_none(tmp_path, monkeypatch, names, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "notes.md").write_text("x")
    (tmp_path / "link.txt").symlink_to("a.txt")
    with pytest.raises(UserError, match=message):
        find_sources(names)


def test_texts_stop_at_a_bad_record(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(["good"]) + b"{}\n")
    texts = inputs.read_texts([str(tmp_path / "a.jsonl")], Selection())
    assert next(texts) == "good"
    with pytest.raises(UserError, match=r"a\.jsonl:2: no field 'text'"):
        next(texts)
