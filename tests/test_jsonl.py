"""Files of one JSON object a line: whole lines or torn ones, never mixed."""

import errno
import json
import math
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest

from mtx import jsonl
from mtx.errors import UserError
from mtx.jsonl import LineWriter, read_records


def test_floats_keep_every_bit_and_the_text_is_strict_json(tmp_path: Path) -> None:
    values = [0.1, 1 / 3, 2.5e-310, 1e22, 12345678.12345678]
    writer = LineWriter(tmp_path / "x.jsonl")
    writer.append({"values": values, "loss": math.nan, "deep": [{"norm": -math.inf}], "none": None, "flag": True})
    writer.close()

    def refuse(name: str) -> None:
        raise AssertionError(name)

    record = json.loads((tmp_path / "x.jsonl").read_text(), parse_constant=refuse)
    assert record == {"values": values, "loss": None, "deep": [{"norm": None}], "none": None, "flag": True}


class Disk:
    """A disk with room for so many bytes more, in place of `os.write`."""

    def __init__(self, monkeypatch: Any, room: int) -> None:
        self.room, self._write = room, os.write
        monkeypatch.setattr(os, "write", self.write)

    def write(self, file: int, data: bytes) -> int:
        taken = data[: self.room]
        if not taken:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.room -= len(taken)
        return self._write(file, taken)


@pytest.mark.parametrize("room", range(16))
def test_lines_wait_for_room_on_a_full_disk(tmp_path: Path, monkeypatch: Any, room: int) -> None:
    path, said = tmp_path / "x.jsonl", list[str]()
    writer = LineWriter(path, warn=said.append)
    disk = Disk(monkeypatch, room)
    written = [writer.append({"a": number}, durable=True) for number in range(4)]
    assert written == [number < (room + 1) // 9 for number in range(4)]  # all but the newline is enough
    assert len(said) == 1
    assert f"{path}: No space left on device; its lines wait" in said[0]
    torn = path.read_text()
    disk.room = 1000
    assert writer.append({"a": 4})
    assert said[1:] == [f"{path}: there is room again, the lines that waited are written"]
    writer.append({"a": 5})
    writer.close()
    assert len(said) == 2
    assert read_records(path) == [{"a": number} for number in range(6)]
    assert path.read_text().startswith(torn)


def test_lines_that_wait_are_bounded(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(jsonl, "MAX_WAITING", 3)
    said: list[str] = []
    writer = LineWriter(tmp_path / "x.jsonl", warn=said.append)
    disk = Disk(monkeypatch, 0)
    for number in range(5):
        writer.append({"a": number})
    assert len(said) == 2
    assert "3 lines wait for room; from now on the oldest are dropped" in said[1]
    disk.room = 1000
    writer.append({"a": 5})
    assert said[2].endswith("there is room again, the lines that waited are written; 2 were dropped")
    disk.room = 0
    writer.append({"a": 6})
    writer.close()
    assert said[-1].endswith("No space left on device; 1 line is lost")
    assert [record["a"] for record in read_records(tmp_path / "x.jsonl")] == [2, 3, 4, 5]


def test_a_disk_that_tells_late_that_it_is_full(tmp_path: Path, monkeypatch: Any) -> None:
    said: list[str] = []
    writer = LineWriter(tmp_path / "x.jsonl", warn=said.append)

    def fail(file: int) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        assert not writer.append({"a": 1}, durable=True)
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    assert writer.append({"a": 2})
    assert len(synced) == 1
    assert "Disk quota exceeded" in said[0]
    assert "there is room again" in said[1]
    assert read_records(tmp_path / "x.jsonl") == [{"a": 1}, {"a": 2}]


def test_a_real_full_device_and_other_failures(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    writer = LineWriter(Path("/dev/full"))
    assert not writer.append({"a": 1})
    assert capsys.readouterr().err == (
        "/dev/full: No space left on device; its lines wait in memory until there is room\n"
    )
    with pytest.raises(UserError, match=r"none/x\.jsonl cannot be opened for writing: No such file or directory"):
        LineWriter(tmp_path / "none" / "x.jsonl")
    writer = LineWriter(tmp_path / "x.jsonl")

    def fail(file: int, data: bytes) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "write", fail)
    with pytest.raises(OSError, match="Input/output error"):
        writer.append({"a": 1})


def test_a_line_that_another_writer_tore_is_not_glued_to_ours(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    writer = LineWriter(path)
    writer.append({"a": 1})
    with path.open("a") as other:
        other.write('{"b": ')
    writer.append({"a": 2})
    assert path.read_text() == '{"a": 1}\n{"b": \n{"a": 2}\n'


def append_many(path: Path, writer: int) -> None:
    lines = LineWriter(path)
    for number in range(200):
        lines.append({"writer": writer, "number": number, "filler": "x" * (number * 7 % 300)})


def test_writers_share_a_file(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=append_many, args=(path, writer)) for writer in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    records = read_records(path)
    for writer in range(2):
        assert [record["number"] for record in records if record["writer"] == writer] == list(range(200))
