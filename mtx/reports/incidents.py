"""Events of the journal in words, the same on the terminal and in the report.

Decides the sentence of each event. It trusts nothing in a journal: a field that is missing or odd is left out or shown
as it is.

Invariant: every event has a sentence, also one that this version does not know.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from mtx.reports.elements import draw_table, format_time, plural
from mtx.reports.units import format_bytes, format_duration

Event = Mapping[str, Any]

_ORIGIN = {"event", "time", "time_utc", "host", "process", "config_digest", "git_revision"}
# They happen as they should, many times; the report counts them.
ROUTINE = ("saved", "stored", "evaluated")


def describe_event(event: Event) -> str:
    """The sentence of an event, without its time and origin."""
    describe = _SENTENCES.get(event["event"], _describe_fields)
    try:
        return describe(event)
    except (KeyError, TypeError, ValueError, AttributeError):  # of another version
        return _describe_fields(event)


def draw_journal(journal: Sequence[Event], heading: str) -> str:
    """The journal as a table, without what happened as it should, which is counted below."""
    rows = []
    for event in journal:
        if event["event"] not in ROUTINE:
            mark = f'<span class="event {escape(event["event"])}">{escape(event["event"].replace("_", " "))}</span>'
            origin = str(event.get("host", ""))
            if event.get("process"):
                origin += f" / {event['process']}"
            rows.append([format_time(event["time"]), mark, escape(origin), escape(describe_event(event))])
    if not rows:
        return ""
    counts = {name: sum(event["event"] == name for event in journal) for name in ROUTINE}
    saved = f"{plural(counts['saved'], 'checkpoint')} saved" if counts["saved"] else "No checkpoint saved yet"
    evaluated = f", {plural(counts['evaluated'], 'evaluation')} made" if counts["evaluated"] else ""
    table = draw_table(["time (UTC)", "event", "host", "what"], rows, "journal")
    return f"<h2>{escape(heading)}</h2>{table}<p class=note>{saved}{evaluated}.</p>"


def _start(event: Event) -> str:
    said = [f"{event['parameters']:,} parameters" if event.get("parameters") else ""]
    if event.get("device_kind"):
        said.append(f"{event.get('devices', 1)} x {event['device_kind']}")
    mesh = [f"{axis} {size}" for axis, size in (event.get("mesh") or {}).items() if size != 1]
    said.append(f"mesh {' x '.join(mesh)}" if mesh else "")
    if (event.get("processes") or 1) > 1:
        said.append(f"{event['processes']} processes")
    return ", ".join(part for part in said if part)


def _resumed(event: Event) -> str:
    took = f" after {format_duration(event['seconds'])}" if event.get("seconds") is not None else ""
    proof = "; what it restored is proven" if event.get("proof") else ""
    return f"goes on from step {event['step']:,}{took}{proof}{_list_changes(event)}"


def _list_changes(event: Event) -> str:
    return f"; changed: {', '.join(map(str, event['changes']))}" if event.get("changes") else ""


def _compiled(event: Event) -> str:
    memory = f", {format_bytes(event['temp_bytes'])} of temporary memory" if event.get("temp_bytes") else ""
    return f"the step in {format_duration(event['seconds'])}{memory}"


def _rollback(event: Event) -> str:
    skipped = f"; {plural(event['skipped_samples'], 'sample')} left out" if event.get("skipped_samples") else ""
    return f"from step {event['from_step']:,} back to step {event['step']:,}{skipped}{_because(event)}"


def _straggler(event: Event) -> str:
    who = f"process {event['late_process']}" if event.get("late_process") is not None else "a process"
    where = f" on {event['late_host']}" if event.get("late_host") else ""
    return f"step {event['step']:,}: {who}{where} is behind the others{_because(event)}"


def _hang(event: Event) -> str:
    late = [
        f"process {entry['process']} on {entry['host']}, in {entry['phase']} of step {entry['step']} for "
        f"{format_duration(entry['seconds'])}"
        for entry in event.get("late") or ()
    ]
    return str(event.get("cause", "no progress")) + (f"; late: {'; '.join(late)}" if late else "")


def _plan(event: Event) -> str:
    planned, measured = event["planned_step_seconds"], event["step_seconds"]
    times = f"planned {format_duration(planned)} a step, measured {format_duration(measured)}"
    peak = event.get("peak_bytes")
    memory = "" if peak is None else f"; {format_bytes(event['planned_bytes'])} of memory, {format_bytes(peak)}"
    return f"{times} ({measured / planned - 1:+.0%}){memory}"


def _because(event: Event) -> str:
    return f": {event['cause']}" if event.get("cause") else ""


def _at_step(text: str) -> Callable[[Event], str]:
    """A sentence that ends with the cause, with the step where `{}` stands."""
    return lambda event: text.format(f"step {event['step']:,}") + _because(event)


_SENTENCES: dict[str, Callable[[Event], str]] = {
    "start": _start,
    "resumed": _resumed,
    "accepted": lambda event: f"at step {event['step']:,}{_list_changes(event)}",
    "compiled": _compiled,
    "started": lambda event: f"step {event['step']:,} was read {format_duration(event['seconds'])} after the command",
    "evaluated": lambda event: f"after step {event['step']:,}, in {format_duration(event['seconds'])}",
    "saved": lambda event: f"step {event['step']:,}, the loop stood still for {format_duration(event['seconds'])}",
    "stored": lambda event: (
        f"step {event['step']:,} after {format_duration(event['seconds'])}, {format_bytes(event['size_bytes'])}"
    ),
    "save_failed": _at_step("the checkpoint of {} is not there, those before it are"),
    "skipped": _at_step("{}: no update, its numbers are not finite"),
    "spike": _at_step("{}"),
    "rollback": _rollback,
    "straggler": _straggler,
    "corruption": lambda event: (
        f"step {event['step']:,}{_because(event)}" if event.get("step") is not None else str(event["cause"])
    ),
    "hang": _hang,
    "plan": _plan,
    "preempted": _at_step("stopped after {}"),
    "finished": lambda event: f"all {event['step']:,} steps are done",
}


def _describe_fields(event: Event) -> str:
    return ", ".join(f"{name} {_show_field(value)}" for name, value in event.items() if name not in _ORIGIN)


def _show_field(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{key} {_show_field(item)}" for key, item in value.items())
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value)
