"""`metrics.jsonl` of an interrupted run reads like that of one that never was, and no line is lost."""

import errno
import json
import math
from pathlib import Path
from typing import Any

import pytest
from tensorboardX.proto.event_pb2 import Event

from mtx.errors import UserError
from mtx.reports.metrics import MetricsFile, read_metrics, read_undone_metrics
from mtx.reports.reporter import Reporter


def record(step: int, loss: float) -> dict[str, Any]:
    return {"step": step, "tokens": step * 64, "loss": loss, "grad_norm": 1 / step, "mfu": None}


def test_resume_leaves_what_an_undisturbed_run_would_have(tmp_path: Path) -> None:
    undisturbed, interrupted = tmp_path / "a", tmp_path / "b"
    for run_dir, attempts in [(undisturbed, [(0, 9)]), (interrupted, [(0, 7), (4, 5), (2, 9)])]:
        run_dir.mkdir()
        for start, end in attempts:
            metrics = MetricsFile(run_dir, start_step=start)
            for step in range(start + 1, end + 1):
                metrics.log(record(step, 1 / (3 * step)))
                metrics.log({"step": step, "eval": "books", "loss": 2 / step})
            metrics.close()
    assert (interrupted / "metrics.jsonl").read_bytes() == (undisturbed / "metrics.jsonl").read_bytes()
    undone = read_undone_metrics(interrupted)
    assert [sorted({line["step"] for line in batch}) for batch in undone] == [[5, 6, 7], [3, 4, 5]]
    assert read_undone_metrics(undisturbed) == []


def test_a_torn_line_moves_aside_with_the_later_ones(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path, start_step=0)
    for step in (1, 2, 3):
        metrics.log(record(step, 0.5))
    metrics.close()
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    MetricsFile(tmp_path, start_step=2).close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]
    assert (tmp_path / "metrics.before-resume-1.jsonl").read_bytes().startswith(b'{"step": 3')
    MetricsFile(tmp_path, start_step=2).close()
    assert not (tmp_path / "metrics.before-resume-2.jsonl").exists()


def test_a_rollback_moves_later_lines_aside(tmp_path: Path, capsys: Any) -> None:
    with Reporter(tmp_path, total_steps=10) as reporter:
        for step in (1, 2, 3, 4):
            reporter.log(record(step, 1 / step))
        reporter.rewind(2)
        for step in (3, 4, 5):
            reporter.log(record(step, 2 / step))
    assert [line["loss"] for line in read_metrics(tmp_path)] == [1, 1 / 2, 2 / 3, 2 / 4, 2 / 5]
    assert [[line["loss"] for line in batch] for batch in read_undone_metrics(tmp_path)] == [[1 / 3, 1 / 4]]
    purges = [event.step for event in read_events(tmp_path) if event.HasField("session_log")]
    assert purges == [1, 3]


def test_lines_that_a_full_disk_tore_stay_among_those_that_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 2}\n{"step": 3}\n{"ste')
    MetricsFile(tmp_path, start_step=2).close()
    assert path.read_text() == '{"step": 1}\n{"st\n{"step": 2}\n'
    assert (tmp_path / "metrics.before-resume-1.jsonl").read_text() == '{"step": 3}\n{"ste'


def test_files_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none/metrics\.jsonl cannot be opened for writing: No such file"):
        MetricsFile(tmp_path / "none", start_step=0)
    (tmp_path / "metrics.jsonl").write_text('{"step": 3}\n')
    (tmp_path / "metrics.before-resume-1.jsonl").symlink_to(tmp_path / "none" / "x")  # there is none, nor can there be
    with pytest.raises(UserError, match="lines after step 2 cannot be moved aside"):
        MetricsFile(tmp_path, start_step=2)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 3}\n'


def test_tensorboard_never_ends_a_run(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    from tensorboardX.record_writer import RecordWriter

    def full(writer: RecordWriter) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with Reporter(tmp_path, total_steps=10, quiet=True) as reporter:
        monkeypatch.setattr(RecordWriter, "flush", full)
        for step in (1, 2, 3):
            reporter.log(record(step, 1.0))
    assert capsys.readouterr().err == (
        f"{tmp_path}/tensorboard: No space left on device; nothing more is written there, the run goes on\n"
    )
    assert len(read_metrics(tmp_path)) == 3
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "tensorboard").write_text("a file")
    with Reporter(tmp_path / "b", total_steps=10, quiet=True) as reporter:
        reporter.log(record(1, 1.0))
        reporter.rewind(0)
    assert capsys.readouterr().err.count("b/tensorboard: File exists; nothing more is written there") == 2


def test_events_are_told_in_a_line(tmp_path: Path, capsys: Any) -> None:
    with Reporter(tmp_path, total_steps=10) as reporter:
        reporter.told("skipped", step=1200, cause="loss nan, gradient norm inf")
        reporter.told("spike", step=1300, cause="loss 9.1000 is 4.0000 above the median of 128 steps")
        reporter.told("save_failed", step=1400, cause="No space left on device")
    assert capsys.readouterr().err.splitlines() == [
        "skipped: step 1,200: no update, its numbers are not finite: loss nan, gradient norm inf",
        "spike: step 1,300: loss 9.1000 is 4.0000 above the median of 128 steps",
        "save failed: the checkpoint of step 1,400 is not there, those before it are: No space left on device",
    ]


def read_events(run_dir: Path) -> list[Any]:
    """Scalars of all event files in order of time: TFRecord framing is length, its CRC, data, its CRC."""
    events = []
    for path in sorted((run_dir / "tensorboard").iterdir()):
        content = path.read_bytes()
        while content:
            length = int.from_bytes(content[:8], "little")
            events.append(Event.FromString(content[12 : 12 + length]))
            content = content[12 + length + 4 :]
    return events


def test_reporter_feeds_every_sink(tmp_path: Path, capsys: Any) -> None:
    loss = 0.1 + 0.2
    with Reporter(tmp_path, total_steps=10) as reporter:
        reporter.log({**record(5, loss), "step_seconds": 0.5, "tokens_per_second": 12345.6, "data_wait_seconds": 0.001})
        reporter.evaluated("books", 5, 2.0, tokens=320)
        reporter.message("checkpoint 5 [saved]")
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines() == [
        "step 5/10  loss 0.3000  12.3k tokens/s  data wait 0.2%  ETA 2.50s",
        "step 5  books loss 2.0000  perplexity 7.389",
        "checkpoint 5 [saved]",
    ]
    train, evaluation = read_metrics(tmp_path)
    assert train["loss"] == loss
    assert evaluation == {"step": 5, "eval": "books", "loss": 2.0, "tokens": 320}
    scalars = {
        value.tag: (event.step, value.simple_value) for event in read_events(tmp_path) for value in event.summary.value
    }
    assert scalars["eval/books/loss"] == (5, 2.0)
    assert scalars["train/loss"] == (5, pytest.approx(loss))
    assert "train/mfu" not in scalars


def test_tensorboard_hides_what_a_resume_undid(tmp_path: Path) -> None:
    for start in (0, 4):
        with Reporter(tmp_path, total_steps=10, start_step=start, quiet=True) as reporter:
            reporter.log(record(start + 1, 1.0))
    purges = [event.step for event in read_events(tmp_path) if event.HasField("session_log")]
    assert purges == [1, 5]


def test_quiet_and_other_processes_print_nothing(tmp_path: Path, capsys: Any) -> None:
    for folder, options in [("a", {"quiet": True}), ("b", {"is_primary": False})]:
        (tmp_path / folder).mkdir()
        with Reporter(tmp_path / folder, total_steps=10, **options) as reporter:
            reporter.log(record(1, 1.0))
            reporter.message("hello")
    assert capsys.readouterr() == ("", "")
    assert len(read_metrics(tmp_path / "a")) == 1
    assert list((tmp_path / "b").iterdir()) == []


def test_a_loss_that_is_no_number_is_null_and_printed(tmp_path: Path, capsys: Any) -> None:
    with Reporter(tmp_path, total_steps=10) as reporter:
        reporter.log(record(1, math.nan))
        reporter.evaluated("books", 1, math.inf)
    assert "loss nan" in capsys.readouterr().err
    first = (tmp_path / "metrics.jsonl").read_text().splitlines()[0]
    assert json.loads(first)["loss"] is None
    assert "NaN" not in first
