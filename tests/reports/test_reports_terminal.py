"""Progress on a terminal is one line that is redrawn; numbers read well."""

import io

import pytest
from rich.console import Console

from mtx.reports.terminal import LiveProgress
from mtx.reports.units import format_bytes, format_count, format_duration


def test_live_line_is_redrawn_and_messages_stay() -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100, legacy_windows=False)
    progress = LiveProgress(100, 20, console)
    for step in (30, 40):
        progress.log({"step": step, "loss": 3.0, "mfu": 0.412, "step_seconds": 1.0, "tokens_per_second": 2e6})
    progress.message("a [message]")
    progress.rewind(20)
    progress.close()
    text = screen.getvalue()
    assert "step 30/100  loss 3.0000  2M tokens/s  MFU 41.2%  ETA 1m 10s" in text
    assert "step 40/100" in text
    assert "a [message]" in text
    assert "back to step 20" in text
    assert text.count("\n") < 7


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (7, "7"),
        (950, "950"),
        (1234, "1.23k"),
        (999_600, "1M"),
        (124_439_808, "124M"),
        (1e13, "10T"),
        (0.5, "0.5"),
    ],
)
def test_counts(value: float, text: str) -> None:
    assert format_count(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.421, "0.42s"),
        (12.34, "12.3s"),
        (59.97, "1m 00s"),
        (245, "4m 05s"),
        (7261, "2h 01m"),
        (1e6, "11d 13h"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_sizes() -> None:
    assert [format_bytes(value) for value in (999, 1500, 1_999_999_999)] == ["999 B", "1.5 kB", "2 GB"]
