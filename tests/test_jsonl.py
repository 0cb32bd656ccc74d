"""Files of one JSON object a line: whole lines or torn ones, never mixed."""

import json
import math
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest

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


def test_a_line_is_torn_by_a_full_disk_and_the_next_is_whole(tmp_path: Path, monkeypatch: Any) -> None:
    writer = LineWriter(tmp_path / "x.jsonl")
    real, room = os.write, [4]

    def full(file: int, data: memoryview) -> int:
        taken = data[: room[0]]
        room[0] -= len(taken)
        if not taken:
            raise OSError(28, "No space left on device")
        return real(file, taken)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space"):
            writer.append({"a": 1})
    writer.append({"b": 2})
    assert (tmp_path / "x.jsonl").read_text() == '{"a"\n{"b": 2}\n'
    assert read_records(tmp_path / "x.jsonl") == [{"b": 2}]


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
