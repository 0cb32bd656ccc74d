"""The report of one run, or of several compared: one HTML file without scripts, fonts or anything else to load.

Decides what the page says and in which order; `svg` draws, `page` has the style sheet, `history` knows the numbers.

Invariant: every text that comes from a run directory is escaped.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from mtx.reports.history import History, Record, find_differences, points, read_history
from mtx.reports.page import STYLE
from mtx.reports.svg import NUM_COLORS, Series, draw_bar, draw_chart
from mtx.reports.units import format_count, format_duration

_UNKNOWN = "\N{EN DASH}"
_LOSS, _SHORT = "{:.4f}".format, "{:.4g}".format
_WIDE, _NARROW = (1080, 340), (530, 230)


def write_report(run_dirs: Sequence[Path], out: Path) -> list[dict[str, Any]]:
    """Writes the report of the runs and returns their key figures.

    Raises:
        UserError: One of them is no run directory.
    """
    histories = [read_history(run_dir) for run_dir in run_dirs]
    partial = out.with_name(out.name + ".partial")
    partial.write_text(render_report(histories), encoding="utf-8")
    os.replace(partial, out)
    return [history.summarize() for history in histories]


def render_report(histories: Sequence[History]) -> str:
    """The whole page."""
    single = len(histories) == 1
    title = histories[0].name if single else f"{len(histories)} runs compared"
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)} - mtx</title><style>{STYLE}</style></head><body><main>",
        f"<header><h1>{escape(title)}</h1><p>{escape(_subtitle(histories))}</p></header>",
        _draw_facts(histories[0]) if single else _draw_comparison(histories),
        _draw_curves(histories),
    ]
    if single:
        parts += [_draw_validation(histories[0]), _draw_time(histories[0])]
    for history in histories:
        parts += [_draw_incidents(history, named=not single), _draw_samples(history, named=not single)]
    for history in histories:
        name = "" if single else f" of {history.name}"
        parts.append(f"<details><summary>Resolved config{escape(name)}</summary>")
        parts.append(f"<pre>{escape(history.config_text)}</pre></details>")
    return "".join(parts) + "</main></body></html>\n"


def _subtitle(histories: Sequence[History]) -> str:
    if len(histories) > 1:
        return ", ".join(history.name for history in histories)
    history = histories[0]
    said = [describe_model(history)]
    start = history.start
    if start.get("device_kind"):
        said.append(f"{start.get('devices', 1)} x {start['device_kind']}")
    if start.get("mesh"):
        sizes = [f"{axis} {size}" for axis, size in start["mesh"].items() if size != 1]
        said.append(f"mesh {' x '.join(sizes) or 'of one device'}")
    if start.get("git_revision"):
        said.append(f"revision {start['git_revision'][:10]}")
    if history.journal:
        said.append(f"started {_format_time(history.journal[0]['time'])}")
    return " \N{MIDDLE DOT} ".join(part for part in said if part)


def describe_model(history: History) -> str:
    """The shape of the model in a few words."""
    config = history.config
    layers, width, heads = (config.get(f"Model.{key}") for key in ("num_layers", "d_model", "num_heads"))
    return f"{layers} layers, width {width}, {heads} heads" if layers and width else ""


def _draw_facts(history: History) -> str:
    figures = history.summarize()
    facts = [
        ("parameters", _show(figures["parameters"], format_count), ""),
        ("tokens", _show(figures["tokens"], format_count), f"{figures['step']:,} steps"),
        ("training loss", _show(figures["loss"], _LOSS), "latest"),
    ]
    for name, loss in figures["validation"].items():
        best = figures["best_validation"][name]
        facts.append((f"{name} loss", _show(loss, _LOSS), f"best {_show(best, _LOSS)}"))
    mfu = f"MFU {figures['mfu']:.1%}" if figures["mfu"] is not None else "median"
    facts += [
        ("tokens / s", _show(figures["tokens_per_second"], format_count), mfu),
        (
            "wall time",
            _show(figures["wall_seconds"] or None, format_duration),
            "finished" if figures["finished"] else "not finished",
        ),
        (
            "goodput",
            _show(figures["goodput"], "{:.1%}".format),
            f"{figures['attempts']} attempt{'s' if figures['attempts'] != 1 else ''}",
        ),
    ]
    cells = (
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd><dd class=note>{escape(note)}</dd></div>"
        for name, value, note in facts
    )
    return f'<dl class="facts">{"".join(cells)}</dl>'


def _draw_comparison(histories: Sequence[History]) -> str:
    figures = [history.summarize() for history in histories]
    sets = list(dict.fromkeys(name for history in histories for name in history.evaluations))
    columns: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("parameters", lambda f: _show(f["parameters"], format_count)),
        ("step", lambda f: f"{f['step']:,}"),
        ("tokens", lambda f: _show(f["tokens"], format_count)),
        ("training loss", lambda f: _show(f["loss"], _LOSS)),
        *((f"{name} loss", lambda f, name=name: _show(f["validation"].get(name), _LOSS)) for name in sets),
        ("tokens / s", lambda f: _show(f["tokens_per_second"], format_count)),
        ("MFU", lambda f: _show(f["mfu"], "{:.1%}".format)),
        ("wall time", lambda f: _show(f["wall_seconds"] or None, format_duration)),
        ("goodput", lambda f: _show(f["goodput"], "{:.1%}".format)),
    ]
    rows = []
    for index, entry in enumerate(figures):
        name = f'<i class="swatch s{index % NUM_COLORS}"></i>{escape(entry["name"])}'
        rows.append([name, *(escape(show(entry)) for _, show in columns)])
    parts = [_draw_table(["run", *(name for name, _ in columns)], rows, "numbers")]
    differences = find_differences(histories)
    if differences:
        rows = [[f"<code>{escape(key)}</code>", *map(escape, values)] for key, values in differences.items()]
        parts.append("<h2>What differs in the config</h2>")
        parts.append(_draw_table(["key", *(history.name for history in histories)], rows, ""))
    return "".join(parts)


def _draw_curves(histories: Sequence[History]) -> str:
    """Loss and validation in one chart for a single run, in a chart each where curves of runs lie over each other."""
    single = len(histories) == 1

    def gather(records: Iterable[Sequence[Record]], key: str, **options: Any) -> list[Series]:
        return [
            Series(label="" if single else history.name, points=points(lines, key), color=index, **options)
            for index, (history, lines) in enumerate(zip(histories, records))
        ]

    training = [history.training for history in histories]
    losses = gather(training, "loss", smooth=True)
    sets = list(dict.fromkeys(name for history in histories for name in history.evaluations))
    validation = [gather([h.evaluations.get(name, []) for h in histories], "loss", dashed=True) for name in sets]
    charts = []
    if single:
        losses = [dataclasses.replace(losses[0], label="training")]
        for number, (name, (curve,)) in enumerate(zip(sets, validation)):
            losses.append(dataclasses.replace(curve, label=name, color=1 + number))
    else:
        for name, curves in zip(sets, validation):
            charts.append(_draw_figure(f"{name} loss", curves, _NARROW, format_y=_SHORT))
    charts.insert(0, _draw_figure("Loss, nats per token", losses, _WIDE, clip_quantile=0.97, format_y=_SHORT))
    for title, key, smooth, quantile, format_y in _SMALL_CHARTS:
        curves = gather(training, key, smooth=smooth)
        if any(curve.points for curve in curves):
            options = {"from_zero": True, "clip_quantile": quantile, "format_y": format_y}
            charts.append(_draw_figure(title, curves, _NARROW, **options))
    return f'<section class="charts"><h2>Curves</h2>{"".join(charts)}</section>'


def _draw_figure(title: str, curves: Sequence[Series], size: tuple[int, int], **options: Any) -> str:
    width, height = size
    legend = _draw_legend(curves) if size == _WIDE else ""
    chart = draw_chart(title, curves, width=width, height=height, **options)
    name = "wide" if size == _WIDE else "narrow"
    return f'<figure class="{name}"><figcaption>{escape(title)}</figcaption>{legend}{chart}</figure>'


def _format_milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.3g} ms"


# Title, key, whether smoothed, share of the values that must be in view, text of a value.
_SMALL_CHARTS: list[tuple[str, str, bool, float, Callable[[float], str]]] = [
    ("Tokens per second", "tokens_per_second", False, 1.0, format_count),
    ("Gradient norm", "grad_norm", True, 0.98, _SHORT),
    ("Learning rate", "learning_rate", False, 1.0, _SHORT),
    ("Waiting for data, per step", "data_wait_seconds", True, 0.98, _format_milliseconds),
]


def _draw_legend(series: Sequence[Series]) -> str:
    entries = []
    for curve in series:
        if curve.points:
            swatch = f'<i class="swatch s{curve.color % NUM_COLORS}{" ring" if curve.dashed else ""}"></i>'
            entries.append(f"<li>{swatch}{escape(curve.label)}</li>")
    return f'<ul class="legend">{"".join(entries)}</ul>'


def _draw_validation(history: History) -> str:
    if not history.evaluations:
        return ""
    names = list(history.evaluations)
    steps = sorted({line["step"] for lines in history.evaluations.values() for line in lines})
    by_step = {name: {line["step"]: line["loss"] for line in lines} for name, lines in history.evaluations.items()}
    best = {name: min(losses.values(), key=lambda loss: (loss is None, loss)) for name, losses in by_step.items()}
    rows = []
    for step in steps:
        row = [f"{step:,}"]
        for name in names:
            loss = by_step[name].get(step)
            text = escape(_show(loss, _LOSS))
            row.append(f"<b>{text}</b>" if loss is not None and loss == best[name] else text)
        rows.append(row)
    table = _draw_table(["step", *names], rows, "numbers")
    if len(rows) > 12:
        table = f"<details><summary>All {len(rows)} evaluations</summary>{table}</details>"
    return f"<h2>Validation</h2>{table}"


def _draw_time(history: History) -> str:
    goodput = history.goodput
    if not goodput.wall_seconds:
        return ""
    segments = [
        (name, seconds, color)
        for name, seconds, color in [
            ("training", goodput.productive_seconds, "t0"),
            ("compiling", goodput.compile_seconds, "t1"),
            ("saving", goodput.save_seconds, "t2"),
            ("lost work", goodput.lost_seconds, "t3"),
            ("other", goodput.other_seconds, "t4"),
        ]
        if seconds > 0
    ]
    labelled = [
        (f"{name} {format_duration(seconds)} ({seconds / goodput.wall_seconds:.1%})", seconds, color)
        for name, seconds, color in segments
    ]
    legend = "".join(f'<li><i class="swatch {color}"></i>{escape(label)}</li>' for label, _, color in labelled)
    return f'<h2>Where the time went</h2>{draw_bar(labelled)}<ul class="legend">{legend}</ul>'


_ORIGIN = {"event", "time", "time_utc", "host", "process", "config_digest", "git_revision"}


def _draw_incidents(history: History, *, named: bool) -> str:
    """The journal without the checkpoints that were saved as they should, which are counted."""
    saved = [event for event in history.journal if event["event"] == "saved"]
    rows = []
    for event in history.journal:
        if event["event"] != "saved":
            fields = ", ".join(f"{k} {_show_field(v)}" for k, v in event.items() if k not in _ORIGIN)
            mark = f'<span class="event {escape(event["event"])}">{escape(event["event"])}</span>'
            rows.append([escape(_format_time(event["time"])), mark, escape(str(event["host"])), escape(fields)])
    if not rows:
        return ""
    heading = f"Journal of {history.name}" if named else "Journal"
    note = f"{len(saved)} checkpoint{'s' if len(saved) != 1 else ''} saved" if saved else "No checkpoint saved yet"
    table = _draw_table(["time (UTC)", "event", "host", "what"], rows, "journal")
    return f"<h2>{escape(heading)}</h2>{table}<p class=note>{escape(note)}.</p>"


def _draw_samples(history: History, *, named: bool) -> str:
    if not history.samples:
        return ""
    heading = f"Written by {history.name}" if named else "Written by the model"
    quotes = []
    for sample in history.samples:
        step = f"<footer>step {sample['step']:,}</footer>" if sample.get("step") is not None else ""
        quotes.append(
            f"<blockquote><b>{escape(str(sample.get('prompt', '')))}</b>{escape(str(sample.get('text', '')))}"
            f"{step}</blockquote>"
        )
    return f"<h2>{escape(heading)}</h2>{''.join(quotes)}"


def _draw_table(head: Iterable[str], rows: Iterable[Sequence[str]], name: str) -> str:
    """A table of cells that are HTML already, under headings that are text."""
    top = "".join(f"<th>{escape(text)}</th>" for text in head)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table class="{name}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _show(value: float | None, format_value: Callable[[float], str]) -> str:
    return _UNKNOWN if value is None else format_value(value)


def _show_field(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{key} {_show_field(item)}" for key, item in value.items())
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value)


def _format_time(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")
