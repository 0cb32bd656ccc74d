"""What signs of life mean: silence is counted in time lived through, and who is late follows from the order of work."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mtx.health.heartbeat import FOLDER, Beat, read_beat, set_aside, write_beat
from mtx.health.peers import Peers, describe, find_late


def make_beat(process: int = 1, **values: Any) -> Beat:
    defaults: dict[str, Any] = {
        "host": f"h{process}", "pid": 7, "time": 1.5, "phase": "wait", "step": 120, "phase_seconds": 0.25, "beat": 1,
    }  # fmt: skip
    return Beat(process=process, **{**defaults, **values})


def test_beats_are_read_as_they_were_written(tmp_path: Path) -> None:
    assert read_beat(tmp_path, 1) is None
    long = make_beat(cause="because " * 500, exit_code=2)
    for beat in (make_beat(), long, make_beat(beat=3)):  # the last one over what is longer
        write_beat(tmp_path, beat)
        assert read_beat(tmp_path, 1) == beat


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"process": 1}', "\xff\xfe"])
def test_what_is_no_beat_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / "1.json").write_text(text)
    assert read_beat(tmp_path, 1) is None


def test_silence_is_counted_from_the_last_change(tmp_path: Path) -> None:
    peers = Peers(tmp_path, [1, 2])
    for process in (1, 2):
        write_beat(tmp_path, make_beat(process))
    peers.look([1, 2], 1.0)
    write_beat(tmp_path, make_beat(2, beat=2))
    peers.look([1, 2], 4.0)
    assert [beat.process for beat in peers.silent(4.0)] == [1]
    assert peers.silent(4.1) == []
    peers.forgive()
    assert peers.silent(0.1) == []
    peers.look([1, 2], 3.0)
    assert [beat.process for beat in peers.silent(3.0)] == [1, 2]
    write_beat(tmp_path, make_beat(1, beat=2))
    peers.look([1, 2], 3.0)
    assert [beat.process for beat in peers.silent(3.0)] == [2]


def test_who_ended_is_not_silent(tmp_path: Path) -> None:
    peers = Peers(tmp_path, [1, 2])
    write_beat(tmp_path, make_beat(1, exit_code=0))
    write_beat(tmp_path, make_beat(2))
    for _ in range(3):
        peers.look([1, 2], 5.0)
    assert [beat.process for beat in peers.silent(10.0)] == [2]
    assert peers.failed() == []
    assert not peers.are_gone(11.0)
    assert peers.are_gone(10.0)
    write_beat(tmp_path, make_beat(2, exit_code=2))
    peers.look([2], 0.0)
    assert [beat.process for beat in peers.failed()] == [2]


def test_who_has_not_begun_is_neither_silent_nor_gone(tmp_path: Path) -> None:
    write_beat(tmp_path, make_beat(1, exit_code=6))  # of an earlier attempt
    peers = Peers(tmp_path, [1, 2])
    for _ in range(3):
        peers.look([1, 2], 100.0)
    assert peers.silent(1.0) == peers.failed() == []
    assert not peers.are_gone(1.0)
    assert [beat.host for beat in peers.beats([1, 2])] == ["unknown", "unknown"]
    write_beat(tmp_path, make_beat(1, beat=2))
    peers.look([1, 2], 1.0)
    assert [beat.host for beat in peers.beats([1, 2])] == ["h1", "unknown"]


def test_one_buries_the_lost(tmp_path: Path) -> None:
    write_beat(tmp_path, make_beat(0))
    peers = Peers(tmp_path, [0])
    write_beat(tmp_path, make_beat(0, beat=2))
    peers.look([0], 1.0)
    assert set_aside(tmp_path, 0, tmp_path / "kept.json")
    assert not set_aside(tmp_path, 0, tmp_path / "again.json")
    peers.look([0], 9.0)  # for the others nothing has changed
    assert [beat.beat for beat in peers.silent(9.0)] == [2]


@pytest.mark.parametrize(
    ("places", "late"),
    [
        ([("wait", 120), ("wait", 120)], []),
        ([("wait", 120), ("data", 120), ("wait", 120)], [1]),
        ([("wait", 121), ("wait", 120)], [1]),
        ([("data", 121), ("wait", 120)], [1]),
        ([("save", 120), ("evaluate", 120), ("evaluate", 120)], [1, 2]),
        ([("restore", 400), ("start", 0)], [1]),
        ([("compile", 400), ("restore", 400)], [1]),
        ([("data", 9)], []),
    ],
)
def test_the_late_are_those_least_far(places: list[tuple[Any, int]], late: list[int]) -> None:
    beats = [make_beat(index, phase=phase, step=step) for index, (phase, step) in enumerate(places)]
    assert [beat.process for beat in find_late(beats)] == late


def test_nobody_waits_for_who_has_ended() -> None:
    beats = [make_beat(0, phase="finish"), make_beat(1, exit_code=0), make_beat(2, phase="finish")]
    assert find_late(beats) == []


def test_many_are_counted() -> None:
    assert describe([make_beat()]) == "process 1 on host h1 (phase wait, step 120)"
    text = describe([replace(make_beat(), process=index) for index in range(10)])
    assert text.count("process ") == 4
    assert text.endswith(" and 6 more")
