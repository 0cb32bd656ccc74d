"""The wall-clock limit: its forms, and which clock counts."""

from __future__ import annotations

import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest

from mtx.config.deadline import parse_stop_before
from mtx.errors import UserError
from mtx.health.deadline import Deadline


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        (42600, 42600.0), (0.5, 0.5), ("11h50m", 42600.0), ("90s", 90.0), ("1.5h", 5400.0), ("2d", 172800.0),
        ("1d2h3m4s", 93784.0), ("01:30:00", 5400.0), ("100:00:01", 360001.0), ("2-00:00:00", 172800.0),
    ],
)  # fmt: skip
def test_durations(text: Any, seconds: float) -> None:
    assert parse_stop_before(text) == seconds


def test_times() -> None:
    assert parse_stop_before("2026-11-23T18:00:00+01:00") == datetime(2026, 11, 23, 17, tzinfo=UTC)
    assert parse_stop_before("2026-11-23 18:00:00Z") == datetime(2026, 11, 23, 18, tzinfo=UTC)
    local = datetime(2026, 11, 23, 18).astimezone()  # as this machine has it
    assert parse_stop_before("2026-11-23T18:00") == local


@pytest.mark.parametrize(
    "text",
    ["", "soon", "11", "50m11h", "11h 50m", "1:30", "01:60:00", "-5s", "2026-11-23", "2026-13-01T00:00:00", "inf"],
)
def test_nothing_else(text: str) -> None:
    with pytest.raises(ValueError, match="wall-clock limit"):
        parse_stop_before(text)


def test_a_duration_counts_from_the_start_of_the_process() -> None:
    program = (
        "import time; time.sleep(1.0)\n"
        "from mtx.health.deadline import Deadline\n"
        "print(Deadline('100s').remaining_seconds())"
    )
    begin = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert 100 - (time.monotonic() - begin) - 0.1 <= float(done.stdout) <= 99.0


def test_no_change_of_the_date_touches_a_duration(monkeypatch: pytest.MonkeyPatch) -> None:
    deadline = Deadline("1000000s")
    before = deadline.remaining_seconds()
    true_time = time.time
    monkeypatch.setattr(time, "time", lambda: true_time() + 1e7)
    assert before - 5 < deadline.remaining_seconds() <= before


def test_a_time_of_day_is_that_of_the_wall(monkeypatch: pytest.MonkeyPatch) -> None:
    end = datetime.now(timezone(timedelta(hours=5))) + timedelta(hours=1)
    deadline = Deadline(end.isoformat())
    assert 3590 < deadline.remaining_seconds() <= 3600
    true_time = time.time
    monkeypatch.setattr(time, "time", lambda: true_time() + 7200)
    assert -3610 < deadline.remaining_seconds() <= -3600


@pytest.mark.parametrize("text", ["2020-01-01T00:00:00", "0s", 0.001])
def test_a_limit_that_has_passed_is_a_mistake(text: Any) -> None:
    with pytest.raises(UserError, match=r"Train\.stop_before = .* has passed"):
        Deadline(text)
