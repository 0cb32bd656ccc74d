"""The journal survives kills: lines are whole or torn, never mixed."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mtx.health.journal import Journal, read_journal


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
