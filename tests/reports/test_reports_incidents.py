"""Every event has a sentence, whatever a journal holds; the report tells how a run went through its failures."""

import html
import json
import random
from pathlib import Path
from typing import Any, get_args

import pytest

from mtx.checkpoints import manifest
from mtx.health.interval import advise_interval
from mtx.health.journal import Event, Journal
from mtx.reports.html import write_report
from mtx.reports.incidents import describe_event, draw_journal
from mtx.reports.metrics import MetricsFile
from mtx.reports.survival import describe_advice

EVENTS: list[tuple[dict[str, Any], str]] = [
    (
        {"event": "start", "parameters": 1234, "devices": 8, "device_kind": "X", "mesh": {"data": 4, "pipe": 1}},
        "1,234 parameters, 8 x X, mesh data 4",
    ),
    (
        {"event": "resumed", "step": 1000, "seconds": 6.2, "proof": {"loss": "equal"}},
        "goes on from step 1,000 after 6.20s; what it restored is proven",
    ),
    ({"event": "accepted", "step": 5, "changes": ["Train.seed: 0 -> 1"]}, "at step 5; changed: Train.seed: 0 -> 1"),
    (
        {"event": "compiled", "seconds": 41.0, "temp_bytes": 12_400_000_000},
        "the step in 41.0s, 12.4 GB of temporary memory",
    ),
    (
        {"event": "started", "step": 1, "seconds": 7.5, "parts": {"trace": 1.0}},
        "step 1 was read 7.50s after the command",
    ),
    ({"event": "evaluated", "step": 400, "seconds": 9.0}, "after step 400, in 9.00s"),
    ({"event": "saved", "step": 400, "seconds": 0.5}, "step 400, the loop stood still for 0.50s"),
    ({"event": "stored", "step": 400, "seconds": 20.0, "size_bytes": 1_500_000}, "step 400 after 20.0s, 1.5 MB"),
    (
        {"event": "save_failed", "step": 400, "cause": "No space left"},
        "the checkpoint of step 400 is not there, those before it are: No space left",
    ),
    ({"event": "skipped", "step": 7, "cause": "loss nan"}, "step 7: no update, its numbers are not finite: loss nan"),
    ({"event": "spike", "step": 7, "cause": "loss 9 is 4 above"}, "step 7: loss 9 is 4 above"),
    (
        {"event": "rollback", "step": 400, "from_step": 460, "skipped_samples": 1920, "cause": "a spike"},
        "from step 460 back to step 400; 1,920 samples left out: a spike",
    ),
    (
        {"event": "straggler", "step": 7, "late_process": 3, "late_host": "n3", "cause": "1.4 s a step"},
        "step 7: process 3 on n3 is behind the others: 1.4 s a step",
    ),
    ({"event": "corruption", "step": 7, "cause": "n3 differs in w"}, "step 7: n3 differs in w"),
    (
        {
            "event": "hang",
            "cause": "no progress for 60 s",
            "late": [{"process": 1, "host": "n1", "phase": "step", "step": 9, "seconds": 61.0}],
        },
        "no progress for 60 s; late: process 1 on n1, in step of step 9 for 1m 01s",
    ),
    ({"event": "preempted", "step": 7, "cause": "SIGTERM"}, "stopped after step 7: SIGTERM"),
    (
        {
            "event": "plan",
            "step": 20,
            "planned_step_seconds": 2.0,
            "step_seconds": 2.5,
            "planned_bytes": 70_500_000_000,
            "peak_bytes": 66_500_000_000,
        },
        "planned 2.00s a step, measured 2.50s (+25%); 70.5 GB of memory, 66.5 GB",
    ),
    ({"event": "finished", "step": 2000}, "all 2,000 steps are done"),
]


@pytest.mark.parametrize(("event", "sentence"), EVENTS, ids=[event["event"] for event, _ in EVENTS])
def test_sentences(event: dict[str, Any], sentence: str) -> None:
    assert describe_event({**event, "time": 0.0, "host": "h", "process": 0}) == sentence


def test_every_event_has_a_sentence() -> None:
    assert [event["event"] for event, _ in EVENTS] == list(get_args(Event))
    assert (
        describe_event({"event": "exploded", "time": 1.0, "where": {"host": [1, 0.123456]}})
        == "where host [1, 0.123456]"
    )


def test_odd_fields_break_nothing() -> None:
    rng = random.Random(0)
    odd: list[Any] = [None, "<b>", 1.5, [], {}, [{}], {"<i>": None}, True, -1]
    for event, _ in EVENTS:
        for _ in range(50):
            changed = {key: value if key == "event" else rng.choice(odd) for key, value in event.items()}
            for key in [key for key in changed if key != "event" and rng.random() < 0.3]:
                del changed[key]
            table = draw_journal([{"time": 0.0, **changed}], "Journal")
            assert "<b>" not in table
            assert "<i>" not in table


def make_survivor(run_dir: Path, monkeypatch: Any) -> Path:
    """A run directory with a crash, a rollback and a checkpoint that tells of the data, on a clock of its own."""
    run_dir.mkdir()
    (run_dir / "config.gin").write_text("Checkpoint.every_steps = 100\n")
    now = [1e9]
    monkeypatch.setattr("mtx.health.journal.time.time", lambda: now[0])
    journal = Journal(run_dir, config_digest="abc")

    def run(first: int, last: int) -> None:
        metrics = MetricsFile(run_dir, start_step=first)
        for step in range(first + 10, last + 1, 10):
            now[0] += 10.0
            metrics.log({"step": step, "loss": 2.0, "step_seconds": 1.0, "data_wait_seconds": 0.1})
            if step % 100 == 0:
                journal.record("saved", step=step, seconds=0.0)
                journal.record("stored", step=step, seconds=4.0, size_bytes=10)
        metrics.close()

    for first, last in [(0, 150), (100, 250)]:
        journal.record("start", step=first)
        if first:
            journal.record("resumed", step=first, proof={"loss": "2.0 <equal>"})
        now[0] += 5.0
        journal.record("compiled", seconds=5.0)
        run(first, last)
        now[0] += 60.0 if not first else 0.0
    journal.record("spike", step=250, cause="loss 9 <is> high")
    journal.record("rollback", step=200, from_step=250, skipped_samples=3, cause="a spike")
    journal.record("resumed", step=200)
    run(200, 300)
    journal.record("finished", step=300)
    journal.close()
    sources = [{"store": "a<b", "digest": "0123456789abcdef", "samples": 5, "tokens": 70, "epochs": 1.5}]
    (run_dir / "checkpoints" / "300").mkdir(parents=True)
    manifest.write(
        run_dir / "checkpoints" / "300", step=300, meta={"ledger": {"sources": sources}}, arrays={}, files={}
    )
    (run_dir / "checkpoints" / "400").mkdir()
    (run_dir / "checkpoints" / "400" / "manifest.json").write_text("damaged")
    return run_dir


def test_the_report_tells_how_a_run_survived(tmp_path: Path, monkeypatch: Any) -> None:
    run_dir = make_survivor(tmp_path / "run", monkeypatch)
    (figures,) = write_report([run_dir], tmp_path / "report.html")
    assert json.loads(json.dumps(figures)) == figures
    assert (figures["attempts"], figures["failures"], figures["rollbacks"]) == (2, 1, 1)
    parts = {name: value for name, value in figures.items() if name.endswith("_seconds") and "mtbf" not in name}
    wall = parts.pop("wall_seconds")
    assert sum(parts.values()) == pytest.approx(wall) == 5 + 150 + 60 + 5 + 150 + 100
    assert parts == pytest.approx(
        dict.fromkeys(parts, 0.0)
        | {"productive_seconds": 270.0, "data_wait_seconds": 30.0, "lost_seconds": 100.0, "compile_seconds": 10.0}
        | {"down_seconds": 60.0}
    )
    advice = figures["checkpoint_advice"]
    assert (advice["num_failures"], advice["every_steps"], advice["stored_seconds"]) == (2, 100, 4.0)
    assert advice["best_steps"] == 4  # a save costs nothing, and takes four seconds to be complete
    assert figures["data"][0]["epochs"] == 1.5
    assert [entry["ended"] for entry in figures["attempt_list"]] == ["killed", "finished"]
    page = html.unescape((tmp_path / "report.html").read_text())
    for text in ["lost work 1m 40s (21.3%)", "down 1m 00s", "killed or crashed", "2 failures and rollbacks in 6m 50s"]:
        assert text in page
    for text in [
        "2.0 <equal>",
        "loss 9 <is> high",
        "a<b",
        "0123456789ab",
        "1.500",
        "rollback at 250",
        "resumed at 100",
    ]:
        assert text in page
    raw = (tmp_path / "report.html").read_text()
    assert "<equal>" not in raw
    assert "<is>" not in raw
    assert "a<b" not in raw


@pytest.mark.parametrize(
    ("failures", "every", "words"),
    [
        (0, 1800, ["No failure in 20h 00m", "6h 40m apart, or more (at 95 %)", "takes 0.01% of the time and is good"]),
        (0, 1, ["There is no use in a checkpoint more often than every", "is too often."]),
        (4, 100, ["4 failures and rollbacks in 20h 00m of running: one every 5h 00m", "the best 0.7%: good enough."]),
        (4, 5000, ["Checkpoint.every_steps = 5000 (2h 46m)", "the best 0.7%: too rare."]),
        (1, None, ["1 failure or rollback", "Checkpoint.every_steps is not set"]),
    ],
)
def test_advice_in_words(failures: int, every: int | None, words: list[str]) -> None:
    advice = advise_interval(
        save_seconds=0.5,
        stored_seconds=20.0,
        step_seconds=2.0,
        up_seconds=20 * 3600.0,
        num_failures=failures,
        every_steps=every,
    )
    said = describe_advice(advice)
    for word in [*words, "holds the loop up for 0.50s and is complete after 20.0s"]:
        assert word in said
