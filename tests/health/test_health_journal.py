"""The journal survives kills: lines are whole or torn, never mixed."""

import json
import math
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mtx.health.journal import Journal, read_journal
from mtx.health.jsonl import LineWriter, read_records


def test_events_carry_time_and_origin(tmp_path: Path) -> None:
    before = time.time()
    journal = Journal(tmp_path, config_digest="abc", process=3)
    journal.record("start", steps=10)
    journal.record("saved", step=5, seconds=0.25)
    journal.close()
    start, saved = read_journal(tmp_path)
    assert start["event"] == "start"
    assert before <= start["time"] <= time.time()
    assert start["time_utc"].startswith(time.strftime("%Y-%m-%dT%H:%M", time.gmtime(start["time"])))
    assert (start["process"], start["config_digest"], start["steps"]) == (3, "abc", 10)
    assert start["host"]
    assert (saved["event"], saved["step"], saved["seconds"]) == ("saved", 5, 0.25)


def test_the_list_of_events_is_closed(tmp_path: Path) -> None:
    journal = Journal(tmp_path, config_digest="abc")
    unknown: Any = "exploded"
    with pytest.raises(ValueError, match="exploded"):
        journal.record(unknown)
    with pytest.raises(ValueError, match="host"):
        journal.record("start", host="elsewhere")
    assert read_journal(tmp_path) == []


@pytest.mark.parametrize("cut", [1, 2, 30, 10_000])
def test_a_torn_line_is_not_glued_to_the_next(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "journal.jsonl"
    Journal(tmp_path, config_digest="a").record("start")
    Journal(tmp_path, config_digest="b").record("saved", step=5)
    whole = path.read_text()
    path.write_text(whole[: max(0, len(whole) - cut)])
    Journal(tmp_path, config_digest="c").record("resumed", step=0)
    events = read_journal(tmp_path)
    # Without its newline alone a line is still whole; anything less is torn; nothing left is an empty file.
    expected = {1: ["start", "saved", "resumed"], 10_000: ["resumed"]}.get(cut, ["start", "resumed"])
    assert [event["event"] for event in events] == expected
    assert path.read_text().startswith(whole[: max(0, len(whole) - cut)])


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


def test_a_killed_writer_loses_nothing_recorded(tmp_path: Path) -> None:
    program = (
        "import sys, itertools; from pathlib import Path; from mtx.health.journal import Journal\n"
        "journal = Journal(Path(sys.argv[1]), config_digest='a')\n"
        "for step in itertools.count(): journal.record('saved', step=step); print(step, flush=True)"
    )
    arguments = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = [process.stdout.readline() for _ in range(20)]
        process.kill()
        said += process.stdout.read().splitlines()
    steps = [event["step"] for event in read_journal(tmp_path)]
    assert steps == list(range(len(steps)))
    assert len(steps) >= len(said)


def test_the_journal_needs_no_jax() -> None:
    program = "import sys, mtx.health.journal, mtx.health.preemption; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
