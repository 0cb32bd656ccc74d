"""How a run went through its failures: where the time went, its attempts, what resumes proved, data, and advice.

Decides what is said of them; the numbers are those of `History`.

Invariant: every text that comes from a run directory is escaped.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from mtx.health.goodput import Attempt, Goodput
from mtx.health.interval import Advice
from mtx.reports.elements import UNKNOWN, draw_legend, draw_table, fold, format_time, show
from mtx.reports.history import History
from mtx.reports.svg import draw_bar
from mtx.reports.units import format_count, format_duration

# Field of Goodput, what it is called, class of its colour.
_PARTS = (
    ("productive_seconds", "training", "t0"),
    ("data_wait_seconds", "waiting for data", "t1"),
    ("save_seconds", "saving", "t2"),
    ("evaluate_seconds", "evaluating", "t3"),
    ("compile_seconds", "compiling", "t4"),
    ("restart_seconds", "starting and restoring", "t5"),
    ("lost_seconds", "lost work", "t6"),
    ("stalled_seconds", "hung", "t7"),
    ("down_seconds", "down", "t8"),
    ("other_seconds", "other", "t9"),
)

_ENDINGS = {"killed": "killed or crashed", "running": "no end recorded yet", "hang": "hung", "corruption": "corrupted"}


def draw_survival(history: History) -> str:
    """The sections of the page on one run; empty before it has run."""
    if not history.goodput.wall_seconds:
        return ""
    parts = [
        f"<h2>Where the time went</h2>{_draw_time(history.goodput)}",
        _draw_advice(history.advice),
        _draw_attempts(history.goodput.attempts),
        _draw_proofs(history.journal),
        _draw_ledger(history.ledger),
    ]
    return "".join(parts)


def _draw_time(goodput: Goodput) -> str:
    labelled = []
    for name, text, color in _PARTS:
        seconds = getattr(goodput, name)
        if seconds > 0.0005 * goodput.wall_seconds:
            labelled.append(
                (f"{text} {format_duration(seconds)} ({seconds / goodput.wall_seconds:.1%})", seconds, color)
            )
    return draw_bar(labelled) + draw_legend((color, label) for label, _, color in labelled)


def describe_advice(advice: Advice) -> str:
    """What there is to say about the interval between checkpoints, in a few sentences."""
    up, low = format_duration(advice.up_seconds), format_duration(advice.mtbf_low_seconds)

    def interval(seconds: float) -> str:
        return f"{advice.steps(seconds):,} steps ({format_duration(seconds)})"

    if advice.best_seconds is None or advice.mtbf_seconds is None or advice.mtbf_high_seconds is None:
        rate = f"No failure in {up} of running: they are {low} apart, or more (at 95 %)."
        best = f"There is no use in a checkpoint more often than every {interval(advice.low_seconds)}."
    else:
        what = (
            "1 failure or rollback" if advice.num_failures == 1 else f"{advice.num_failures:,} failures and rollbacks"
        )
        mean, high = format_duration(advice.mtbf_seconds), format_duration(advice.mtbf_high_seconds)
        rate = f"{what} in {up} of running: one every {mean} (at 90 % between {low} and {high})."
        least, most = advice.steps(advice.low_seconds), advice.steps(advice.high_seconds or advice.low_seconds)
        unsure = f", or between {least:,} and {most:,} with so few" if least < most else ""
        best = f"Least is lost with one every {interval(advice.best_seconds)}{unsure}."
    stored = f" and is complete after {format_duration(advice.stored_seconds)}" if advice.stored_seconds else ""
    save = f"A checkpoint holds the loop up for {format_duration(advice.save_seconds)}{stored}."
    return " ".join([rate, save, best, _judge(advice)])


def _judge(advice: Advice) -> str:
    """What the config's interval is worth."""
    if advice.every_seconds is None:
        return "Checkpoint.every_steps is not set: set it, or a failure costs the whole run."
    now = f"Checkpoint.every_steps = {advice.every_steps} ({format_duration(advice.every_seconds)})"
    word = "good enough" if advice.verdict == "good" else advice.verdict
    cost = advice.cost(advice.every_seconds)
    if cost is None or advice.best_seconds is None:
        return f"{now} takes {advice.save_seconds / advice.every_seconds:.2%} of the time and is {word}."
    best = advice.cost(advice.best_seconds) or 0.0
    return f"{now} costs {min(1.0, cost):.1%} of the time in saves and work done twice, the best {best:.1%}: {word}."


def _draw_advice(advice: Advice | None) -> str:
    if advice is None:
        return ""
    return f'<p class="advice {"good" if advice.verdict == "good" else "bad"}">{escape(describe_advice(advice))}</p>'


def _draw_attempts(attempts: Sequence[Attempt]) -> str:
    rows = []
    for number, attempt in enumerate(attempts, 1):
        name = _ENDINGS.get(attempt.ended, attempt.ended)
        rows.append(
            [
                str(number),
                format_time(attempt.start),
                format_duration(attempt.end - attempt.start),
                f'<span class="event {attempt.ended}">{name}</span>',
                UNKNOWN if attempt.first_step is None else f"{attempt.first_step:,} to {attempt.last_step:,}",
                f"{attempt.lost_steps:,}" if attempt.lost_steps else UNKNOWN,
                show(attempt.recovery_seconds, format_duration),
            ]
        )
    head = ["", "began (UTC)", "ran for", "ended", "steps", "steps lost", "back at work after"]
    table = draw_table(head, rows, "attempts")
    return f"<h2>Attempts</h2>{fold(f'All {len(rows)} attempts', table) if len(rows) > 20 else table}"


def _draw_proofs(journal: Sequence[dict[str, Any]]) -> str:
    proofs = [event for event in journal if event["event"] == "resumed" and isinstance(event.get("proof"), dict)]
    rows = []
    for event in proofs:
        facts = "<br>".join(f"<b>{escape(str(key))}</b> {escape(str(value))}" for key, value in event["proof"].items())
        rows.append([format_time(event["time"]), escape(f"{event.get('step', '')}"), facts])
    if not rows:
        return ""
    table = draw_table(["time (UTC)", "step", "what the resume proved before it went on"], rows, "proofs")
    return f"<h2>Resumes</h2>{fold(f'All {len(rows)} resumes', table) if len(rows) > 20 else table}"


def _draw_ledger(ledger: Sequence[dict[str, Any]]) -> str:
    rows = []
    for source in ledger:
        digest = escape(str(source.get("digest") or "")[:12])
        numbers = [show(source.get(key), format_count) for key in ("samples", "tokens")]
        epochs = show(source.get("epochs"), "{:.3f}".format)
        skipped = show(source.get("skipped_samples") or None, format_count)
        rows.append([escape(str(source.get("store", ""))), f"<code>{digest}</code>", *numbers, epochs, skipped])
    if not rows:
        return ""
    head = ["source", "digest", "samples", "tokens", "epochs", "samples skipped"]
    return f"<h2>Data up to the newest checkpoint</h2>{draw_table(head, rows, 'numbers ledger')}"
