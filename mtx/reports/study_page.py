"""The page of a study: the table of the field, plans against measurements, curves, and what failed. One HTML file.

Decides order and wording; every number is that of the document (`mtx.evaluation.study_document` has its keys).

Invariant: what ran on simulated devices says so at the head of the page, in its row and in its pictures' captions.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from mtx.reports.accuracy_picture import BAND, Comparison, draw_accuracy
from mtx.reports.canvas import HATCH_SHEET
from mtx.reports.elements import UNKNOWN, draw_facts, draw_figure, draw_table, fold, format_time, plural, show
from mtx.reports.memory_picture import MemoryBar, draw_memory
from mtx.reports.page import render_page, write_page
from mtx.reports.scaling_picture import Curve, Ideal, draw_scaling
from mtx.reports.svg import NUM_COLORS
from mtx.reports.timeline_picture import draw_parts
from mtx.reports.units import format_count, format_duration, format_flops, format_gib, format_seconds

Document = Mapping[str, Any]
_ERROR = "{:+.1%}".format


def write_study_page(path: Path, document: Document) -> None:
    """Writes the page of a study's document.

    Args:
        path: Of the file; its folder exists.
        document: As `mtx.evaluation.study_document` describes it.

    Raises:
        OSError: The file cannot be written.
    """
    write_page(path, render_study_page(document))


def render_study_page(document: Document) -> str:
    """The page as text."""
    points = document["points"]
    measured = [point for point in points if point["measured"]]
    body = [
        HATCH_SHEET,
        _draw_warning(document),
        _draw_facts(document, measured),
        f"<h2>Measured</h2>{_draw_table(points, _FIELD)}" if points else "",
        _draw_days(measured),
        _draw_accuracy(measured),
        _draw_curves(measured),
        _draw_plans(points),
        _draw_unmeasured(points),
        _draw_conventions(document),
    ]
    return render_page(f"Study {document['name']}", _subtitle(document), "".join(body))


def _subtitle(document: Document) -> str:
    machine = document["machine"]
    kind = f"{machine['num_devices']} x {machine['device_kind']}{' (simulated)' if machine['simulated'] else ''}"
    ended = "not ended" if document["ended"] is None else f"ended {format_time(document['ended'])} UTC"
    return " \N{MIDDLE DOT} ".join((str(document["config"]), kind, str(machine["host"]), ended))


def _draw_warning(document: Document) -> str:
    if not document["simulated"]:
        return ""
    simulated = sum(point["simulated"] for point in document["points"])
    return (
        f'<p class="loud">Simulated devices: {simulated} of {plural(len(document["points"]), "point")} on devices '
        "that are shares of one host's CPU. They check that everything works and how well the plan follows; "
        "their times say nothing about GPUs.</p>"
    )


def _draw_facts(document: Document, measured: Sequence[Document]) -> str:
    counts, calibration = document["counts"], document["calibration"]
    errors = [abs(error) for point in measured if (error := _error(point, "step_seconds")) is not None]
    facts = [
        ("points measured", f"{counts['measured']:,}", f"{counts['failed']:,} failed, {counts['waiting']:,} waiting"),
        ("plan off by", f"{statistics.median(errors):.1%}" if errors else UNKNOWN, "step time, median of the points"),
    ]
    peaks = dict.fromkeys(p["achieved"]["peak_kind"] for p in measured if p["achieved"] and p["achieved"]["peak_kind"])
    best = max((p["achieved"]["mfu_model_full"] or 0.0 for p in measured if p["achieved"]), default=0.0)
    facts.append(("best MFU", f"{best:.1%}" if best else UNKNOWN, f"of the {' or the '.join(peaks)}" if peaks else ""))
    if calibration:
        before, after = calibration["median_error_before"], calibration["median_error_after"]
        facts.append(("calibrated, off by", f"{after:.1%}", f"before {before:.1%}, on {calibration['points']} points"))
    return draw_facts(facts)


def _error(point: Document, key: str) -> float | None:
    return point["error"][key] if point["error"] else None


def _of(section: str, key: str, form: Callable[[Any], str]) -> Callable[[Document], str]:
    return lambda point: UNKNOWN if point[section] is None else show(point[section][key], form)


def _size(devices: int) -> str:
    """Of a mesh axis; that of what is left is unknown where the mesh was refused."""
    return str(devices) if devices > 0 else UNKNOWN


_Columns = Sequence[tuple[str, Callable[[Document], str]]]

_FIELD: _Columns = (
    ("params", lambda p: show(p["parameters"], format_count)),
    ("heads", lambda p: f"{p['heads']:,}"),
    ("hidden", lambda p: f"{p['hidden']:,}"),
    ("layers", lambda p: f"{p['layers']:,}"),
    ("TP", lambda p: _size(p["mesh"]["tensor"])),
    ("PP", lambda p: _size(p["mesh"]["pipe"])),
    ("devices", lambda p: f"{p['devices']:,}"),
    ("batch", lambda p: f"{p['batch']:,}"),
    ("a device", _of("achieved", "model_tflops_per_device", lambda tflops: format_flops(tflops * 1e12))),
    ("of peak", _of("achieved", "mfu_model_full", "{:.1%}".format)),
    ("HFU", _of("achieved", "hfu", "{:.1%}".format)),
    ("aggregate", _of("achieved", "aggregate_pflops", lambda pflops: format_flops(pflops * 1e15))),
)
"""The table that papers on scaling print."""

_AGAINST: _Columns = (
    ("step", _of("measured", "step_seconds", format_seconds)),
    ("least", _of("measured", "step_seconds_min", format_seconds)),
    ("most", _of("measured", "step_seconds_max", format_seconds)),
    ("planned", _of("plan", "step_seconds", format_seconds)),
    ("off by", _of("error", "step_seconds", _ERROR)),
    ("memory", _of("measured", "memory_bytes", format_gib)),
    ("says the", _of("measured", "memory_kind", str)),
    ("planned", lambda p: show(_planned_bytes(p), format_gib)),
    ("off by", _of("error", "memory_bytes", _ERROR)),
)


def _draw_table(points: Sequence[Document], columns: _Columns) -> str:
    rows = []
    for point in points:
        name = escape(point["name"])
        if point["simulated"]:
            name += ' <span class="simulated">simulated</span>'
        if point["status"] != "measured":
            name += f' <span class="{point["status"]}">{escape(point["failure"] or point["status"])}</span>'
        rows.append([name, *(escape(draw_cell(point)) for _, draw_cell in columns)])
    return draw_table(["point", *(name for name, _ in columns)], rows, "numbers tight")


def _draw_days(measured: Sequence[Document]) -> str:
    """Time to train on each number of tokens that the study asks for."""
    points = [point for point in measured if point["achieved"] and point["achieved"]["train_days"]]
    tokens = dict.fromkeys(entry["tokens"] for point in points for entry in point["achieved"]["train_days"])
    if not tokens:
        return ""
    rows = []
    for point in points:
        days = {entry["tokens"]: entry["days"] for entry in point["achieved"]["train_days"]}
        cells = [show(days.get(count), lambda value: format_duration(value * 86400)) for count in tokens]
        rows.append([escape(point["name"]), f"{point['devices']:,}", *cells])
    head = ["point", "devices", *(f"{format_count(count)} tokens" for count in tokens)]
    return f"<h2>Time to train, at the measured rate</h2>{draw_table(head, rows, 'numbers')}"


def _draw_accuracy(measured: Sequence[Document]) -> str:
    compared = [point for point in measured if point["plan"]]
    if not compared:
        return ""
    times = [
        Comparison(
            label=_label(point),
            group=str(point["size"]),
            measured=point["measured"]["step_seconds"],
            planned=point["plan"]["step_seconds"],
        )
        for point in compared
    ]
    parts = [
        f"<h2>Plan against measured</h2>{_draw_table(compared, _AGAINST)}",
        draw_figure(draw_accuracy(times, unit="seconds a step"), _caption("Step time", compared)),
    ]
    memory = [
        Comparison(
            label=_label(point),
            group=str(point["size"]),
            measured=point["measured"]["memory_bytes"] / 2**30,
            planned=planned / 2**30,
        )
        for point in compared
        if point["measured"]["memory_bytes"] and (planned := _planned_bytes(point))
    ]
    if memory:
        parts.append(draw_figure(draw_accuracy(memory, unit="GiB per device"), _caption("Memory per device", compared)))
    return "".join(parts)


def _planned_bytes(point: Document) -> float | None:
    """What the plan says of the memory that was measured."""
    if point["plan"] is None or point["measured"] is None or point["measured"]["memory_kind"] is None:
        return None
    kind = "memory_bytes" if point["measured"]["memory_kind"] == "device" else "memory_compiled_bytes"
    return float(point["plan"][kind])


def _draw_curves(measured: Sequence[Document]) -> str:
    """Throughput and MFU against devices, a colour for each size; planned as a line, measured as dots."""
    if not measured:
        return ""
    sizes = list(dict.fromkeys(str(point["size"]) for point in measured))

    def draw(
        value: Callable[[Document], float | None],
        plan: Callable[[Document], float | None],
        ideal: Ideal | None,
        **how: Any,
    ) -> str:
        curves, colors = [], []
        for index, size in enumerate(sizes):
            points = [point for point in measured if str(point["size"]) == size]
            for get, is_measured in ((value, True), (plan, False)):
                found = [(float(point["devices"]), y) for point in points if (y := get(point))]
                curves.append(
                    Curve(
                        label=size,
                        points=_best(found) if not is_measured else found,
                        is_measured=is_measured,
                        ideal=None if is_measured else ideal,
                    )
                )
                colors.append(f"s{index % NUM_COLORS}")
        kept = [(curve, color) for curve, color in zip(curves, colors) if curve.points]
        if not kept:
            return ""
        return draw_scaling(curves=[c for c, _ in kept], names=[color for _, color in kept], counted="devices", **how)

    throughput = draw(
        lambda p: p["measured"]["tokens_per_second"],
        lambda p: p["plan"] and p["batch"] * p["seq_len"] / p["plan"]["step_seconds"],
        "proportional",
        title="Throughput against devices",
        unit="tokens/s",
    )
    mfu = draw(
        lambda p: p["achieved"] and p["achieved"]["mfu_model_full"],
        _plan_mfu,
        None,
        title="MFU against devices",
        unit="MFU (model FLOPs, full attention)",
        is_log=False,
        format_y="{:.1%}".format,
    )
    parts = [draw_figure(throughput, _caption("Throughput", measured))]
    if mfu:
        parts.append(draw_figure(mfu, _caption("MFU by size", measured)))
    return f"<h2>Scaling</h2>{''.join(parts)}"


def _plan_mfu(point: Document) -> float | None:
    """The same model FLOPs in the planned time."""
    if not (point["plan"] and point["achieved"] and point["achieved"]["mfu_model_full"]):
        return None
    ratio = point["measured"]["step_seconds"] / point["plan"]["step_seconds"]
    return float(point["achieved"]["mfu_model_full"] * ratio)


def _best(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The highest value for each number of devices: layouts of one size share it."""
    best: dict[float, float] = {}
    for x, y in points:
        best[x] = max(y, best.get(x, y))
    return sorted(best.items())


def _draw_plans(points: Sequence[Document]) -> str:
    """What the plan says each point's memory and time are made of, to be opened."""
    planned = [point for point in points if point["plan"]]
    if not planned:
        return ""
    bars = [MemoryBar(_label(point), point["plan"]["memory_parts"]) for point in planned]
    steps = [
        draw_figure(draw_parts(point["plan"]["step_parts"]), f"{_label(point)}, planned step") for point in planned
    ]
    memory = draw_figure(draw_memory(bars, None), "Planned memory per device")
    return fold("What the plans are made of", f"{memory}{''.join(steps)}")


def _draw_unmeasured(points: Sequence[Document]) -> str:
    """What was not measured, and why."""
    rows = [
        [
            escape(point["name"]),
            f'<span class="{point["status"]}">{escape(point["failure"] or point["status"])}</span>',
            escape(point["reason"] or ""),
        ]
        for point in points
        if point["status"] != "measured"
    ]
    return f"<h2>Not measured</h2>{draw_table(['point', 'what happened', 'reason'], rows, '')}" if rows else ""


def _draw_conventions(document: Document) -> str:
    settings = document["settings"]
    said = [
        *document["conventions"].values(),
        f"Each point: {settings['warmup_steps']} steps to warm up, then up to {settings['steps']} measured ones within "
        f"{settings['minutes']:g} minutes; its step time is their median.",
        f"Dotted lines in the plots of plans against measurements are {BAND:.0%} off.",
    ]
    items = "".join(f"<li>{escape(str(text))}</li>" for text in said)
    return f'<h2>How to read this</h2><ul class="note">{items}</ul>'


def _label(point: Document) -> str:
    return f"{point['name']}{' (simulated)' if point['simulated'] else ''}"


def _caption(text: str, points: Sequence[Document]) -> str:
    return f"{text}{' - on simulated devices' if any(point['simulated'] for point in points) else ''}"
