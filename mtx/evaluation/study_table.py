"""The table of a study as text, from its document: the one of the field's papers, with the plan beside it.

Decides columns and wording; computes nothing.

Invariant: simulated devices are named as such wherever a figure of theirs stands.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mtx.reports.units import format_bytes, format_count, format_duration

Row = Mapping[str, Any]
_AXES = {"tensor": "TP", "pipe": "PP", "data": "DP", "fsdp": "FSDP", "context": "CP", "expert": "EP"}
_ALWAYS = ("tensor", "pipe")


def format_study(document: Mapping[str, Any], *, is_plan: bool = False) -> str:
    """The whole answer of the command.

    Args:
        document: Of `study_document`.
        is_plan: Of a dry run: what the points would be, and their plans.
    """
    rows = document["points"]
    columns = [*_shape_columns(rows), *(_plan_columns() if is_plan else _measured_columns(rows))]
    cells = [[head for head, _ in columns], *([text(row) for _, text in columns] for row in rows)]
    widths = [max(len(line[number]) for line in cells) for number in range(len(columns))]
    lines = [_headline(document)]
    for line in cells:
        first, *rest = zip(line, widths)
        lines.append("  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]).rstrip())
    lines += [f"{row['name']}: {row['failure'] or 'waits'}: {row['reason']}" for row in rows if row["reason"]]
    lines += _footnotes(document, is_plan)
    return "\n".join(lines)


def _headline(document: Mapping[str, Any]) -> str:
    counts, machine = document["counts"], document["machine"]
    where = ""
    if machine is not None:
        kind = "simulated CPU devices, which share the cores of one machine" if document["simulated"] else "devices"
        where = f" on {machine['device_kind']}, up to {machine['num_devices']} {kind}"
    told = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    return f"{document['name']}: {len(document['points'])} points{where}: {told}"


def _shape_columns(rows: list[Row]) -> list[tuple[str, Callable[[Row], str]]]:
    def shape(key: str) -> Callable[[Row], str]:
        return lambda row: "-" if row[key] is None else str(row[key])

    def axis(name: str) -> Callable[[Row], str]:
        return lambda row: "-" if row["mesh"] is None else str(row["mesh"][name])

    used = [
        name for name in _AXES if name in _ALWAYS or any((row["mesh"] or {}).get(name, 1) not in (1,) for row in rows)
    ]
    return [
        ("point", lambda row: row["name"]),
        ("parameters", lambda row: "-" if row["parameters"] is None else format_count(row["parameters"])),
        ("heads", shape("heads")),
        ("hidden", shape("hidden")),
        ("layers", shape("layers")),
        *((_AXES[name], axis(name)) for name in used),
        ("GPUs", lambda row: "-" if row["devices"] is None else f"{row['devices']}{'*' if row['simulated'] else ''}"),
        ("batch", shape("batch")),
        ("micro", shape("microbatch")),
    ]


def _plan_columns() -> list[tuple[str, Callable[[Row], str]]]:
    return [
        ("planned step", _of("plan", "step_seconds", format_duration)),
        ("planned memory", _of("plan", "memory_bytes", format_bytes)),
        ("bubble", _of("plan", "bubble_fraction", lambda value: f"{value:.1%}")),
    ]


def _measured_columns(rows: list[Row]) -> list[tuple[str, Callable[[Row], str]]]:
    columns = [
        ("step", _of("measured", "step_seconds", format_duration)),
        ("plan off", _of("error", "step_seconds", lambda value: f"{value:+.0%}")),
        ("memory", _of("measured", "memory_bytes", format_bytes)),
        ("plan off", _of("error", "memory_bytes", lambda value: f"{value:+.0%}")),
        ("TFLOP/s/GPU", _of("achieved", "model_tflops_per_device", lambda value: f"{value:.3g}")),
        ("% of peak", _of("achieved", "mfu_model_full", lambda value: f"{value:.1%}")),
        ("HFU", _of("achieved", "hfu", lambda value: f"{value:.1%}")),
        ("PFLOP/s", _of("achieved", "aggregate_pflops", lambda value: f"{value:.3g}")),
    ]
    entries = [entry["tokens"] for row in rows if row["achieved"] for entry in row["achieved"]["train_days"]]
    if entries:
        columns.append((f"days for {format_count(entries[0])}", lambda row: _days(row, entries[0])))
    return columns


def _of(part: str, key: str, text: Callable[[Any], str]) -> Callable[[Row], str]:
    return lambda row: "-" if row[part] is None or row[part][key] is None else text(row[part][key])


def _days(row: Row, tokens: float) -> str:
    entries = row["achieved"]["train_days"] if row["achieved"] else []
    return next((f"{entry['days']:.3g}" for entry in entries if entry["tokens"] == tokens), "-")


def _footnotes(document: Mapping[str, Any], is_plan: bool) -> list[str]:
    notes = []
    if document["simulated"]:
        notes.append("* simulated CPU devices: figures compare layouts, and say nothing of a cluster's speed")
    if is_plan:
        return [*notes, document["conventions"]["plan"]]
    machine = document["machine"]
    peak = "the data sheet's" if machine and machine["in_table"] else "of the fastest matrix product measured here"
    notes.append(
        f"TFLOP/s and % of peak: model FLOPs, attention in full, recomputation not counted; peak: {peak}. HFU: with "
        "recomputation. Plan off: plan / measured - 1"
    )
    if calibration := document["calibration"]:
        before, after = (f"{calibration[f'median_error_{when}']:.0%}" for when in ("before", "after"))
        notes.append(
            f"{calibration['file']}: {', '.join(calibration['free'])} fitted on {calibration['points']} points; median "
            f"error of the step {before} before, {after} after"
        )
    return notes
