"""The report of one run, or of several compared: one HTML file without scripts, fonts or anything else to load.

Decides the order of the page, and what it says of the run as such; `survival` and `incidents` say how it went through
its failures, `svg` draws, `page` has the style sheet, `history` knows the numbers.

Invariant: every text that comes from a run directory is escaped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from mtx.reports.elements import draw_facts, draw_legend, draw_table, fold, format_time, plural, show
from mtx.reports.history import History, Record, find_differences, points, read_history
from mtx.reports.incidents import draw_journal
from mtx.reports.page import render_page, write_page
from mtx.reports.survival import draw_survival
from mtx.reports.svg import NUM_COLORS, Mark, Series, draw_chart
from mtx.reports.units import format_count, format_duration

_LOSS, _SHORT = "{:.4f}".format, "{:.4g}".format
_WIDE, _NARROW = (1080, 340), (530, 230)


def write_report(run_dirs: Sequence[Path], out: Path) -> list[dict[str, Any]]:
    """Writes the report of the runs and returns their key figures.

    Raises:
        UserError: One of them is no run directory.
    """
    histories = [read_history(run_dir) for run_dir in run_dirs]
    write_page(out, render_report(histories))
    return [history.summarize() for history in histories]


def render_report(histories: Sequence[History]) -> str:
    """The whole page."""
    single = len(histories) == 1
    title = histories[0].name if single else f"{len(histories)} runs compared"
    parts = [
        _draw_facts(histories[0]) if single else _draw_comparison(histories),
        _draw_curves(histories),
    ]
    if single:
        parts += [_draw_validation(histories[0]), draw_survival(histories[0])]
    for history in histories:
        parts += [draw_journal(history.journal, "Journal" if single else f"Journal of {history.name}")]
        parts += [_draw_samples(history, named=not single)]
    for history in histories:
        name = "" if single else f" of {history.name}"
        parts.append(fold(f"Resolved config{name}", f"<pre>{escape(history.config_text)}</pre>"))
    return render_page(title, _subtitle(histories), "".join(parts))


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
        said.append(f"started {format_time(history.journal[0]['time'])}")
    return " \N{MIDDLE DOT} ".join(part for part in said if part)


def describe_model(history: History) -> str:
    """The shape of the model in a few words."""
    config = history.config
    layers, width, heads = (config.get(f"Model.{key}") for key in ("num_layers", "d_model", "num_heads"))
    return f"{layers} layers, width {width}, {heads} heads" if layers and width else ""


def _draw_facts(history: History) -> str:
    figures = history.summarize()
    facts = [
        ("parameters", show(figures["parameters"], format_count), ""),
        ("tokens", show(figures["tokens"], format_count), f"{figures['step']:,} steps"),
        ("training loss", show(figures["loss"], _LOSS), "latest"),
    ]
    for name, loss in figures["validation"].items():
        best = figures["best_validation"][name]
        facts.append((f"{name} loss", show(loss, _LOSS), f"best {show(best, _LOSS)}"))
    mfu = f"MFU {figures['mfu']:.1%}" if figures["mfu"] is not None else "median"
    facts += [
        ("tokens / s", show(figures["tokens_per_second"], format_count), mfu),
        (
            "wall time",
            show(figures["wall_seconds"] or None, format_duration),
            "finished" if figures["finished"] else "not finished",
        ),
        (
            "goodput",
            show(figures["goodput"], "{:.1%}".format),
            plural(figures["attempts"], "attempt"),
        ),
    ]
    return draw_facts(facts)


def _draw_comparison(histories: Sequence[History]) -> str:
    figures = [history.summarize() for history in histories]
    sets = list(dict.fromkeys(name for history in histories for name in history.evaluations))
    columns: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("parameters", lambda f: show(f["parameters"], format_count)),
        ("step", lambda f: f"{f['step']:,}"),
        ("tokens", lambda f: show(f["tokens"], format_count)),
        ("training loss", lambda f: show(f["loss"], _LOSS)),
        *((f"{name} loss", lambda f, name=name: show(f["validation"].get(name), _LOSS)) for name in sets),
        ("tokens / s", lambda f: show(f["tokens_per_second"], format_count)),
        ("MFU", lambda f: show(f["mfu"], "{:.1%}".format)),
        ("wall time", lambda f: show(f["wall_seconds"] or None, format_duration)),
        ("goodput", lambda f: show(f["goodput"], "{:.1%}".format)),
    ]
    rows = []
    for index, entry in enumerate(figures):
        name = f'<i class="swatch s{index % NUM_COLORS}"></i>{escape(entry["name"])}'
        rows.append([name, *(escape(show(entry)) for _, show in columns)])
    parts = [draw_table(["run", *(name for name, _ in columns)], rows, "numbers")]
    differences = find_differences(histories)
    if differences:
        rows = [[f"<code>{escape(key)}</code>", *map(escape, values)] for key, values in differences.items()]
        parts.append("<h2>What differs in the config</h2>")
        parts.append(draw_table(["key", *(history.name for history in histories)], rows, ""))
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
        losses += [Series(label="", points=points(lines, "loss"), color=6, faint=True) for lines in histories[0].undone]
    else:
        for name, curves in zip(sets, validation):
            charts.append(_draw_figure(f"{name} loss", curves, _NARROW, format_y=_SHORT))
    options = {"clip_quantile": 0.97, "format_y": _SHORT, "marks": _find_marks(histories[0]) if single else []}
    charts.insert(0, _draw_figure("Loss, nats per token", losses, _WIDE, **options))
    for title, key, smooth, quantile, format_y in _SMALL_CHARTS:
        curves = gather(training, key, smooth=smooth)
        if any(curve.points for curve in curves):
            options = {"from_zero": True, "clip_quantile": quantile, "format_y": format_y}
            charts.append(_draw_figure(title, curves, _NARROW, **options))
    return f'<section class="charts"><h2>Curves</h2>{"".join(charts)}</section>'


def _draw_figure(title: str, curves: Sequence[Series], size: tuple[int, int], **options: Any) -> str:
    width, height = size
    legend = ""
    if size == _WIDE:
        drawn = [curve for curve in curves if curve.points and curve.label]
        entries = [(f"s{curve.color % NUM_COLORS}{' ring' if curve.dashed else ''}", curve.label) for curve in drawn]
        marks = {mark.name: mark.label.split(" ")[0] for mark in options.get("marks", ())}
        legend = draw_legend([*entries, *((f"stroke {name}", label) for name, label in marks.items())])
    chart = draw_chart(title, curves, width=width, height=height, **options)
    name = "wide" if size == _WIDE else "narrow"
    return f'<figure class="{name}"><figcaption>{escape(title)}</figcaption>{legend}{chart}</figure>'


def _find_marks(history: History) -> list[Mark]:
    """Where a run went back or on: in the journal, and in the chart of the loss."""
    marks = []
    for event in history.journal:
        step = event.get("from_step" if event["event"] == "rollback" else "step")
        if event["event"] in ("resumed", "spike", "rollback") and step is not None:
            marks.append(Mark(x=step, label=f"{event['event']} at {step:,}", name=event["event"]))
    return marks


def _format_milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.3g} ms"


# Title, key, whether smoothed, share of the values that must be in view, text of a value.
_SMALL_CHARTS: list[tuple[str, str, bool, float, Callable[[float], str]]] = [
    ("Tokens per second", "tokens_per_second", False, 1.0, format_count),
    ("Gradient norm", "grad_norm", True, 0.98, _SHORT),
    ("Learning rate", "learning_rate", False, 1.0, _SHORT),
    ("Waiting for data, per step", "data_wait_seconds", True, 0.98, _format_milliseconds),
]


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
            text = escape(show(loss, _LOSS))
            row.append(f"<b>{text}</b>" if loss is not None and loss == best[name] else text)
        rows.append(row)
    table = draw_table(["step", *names], rows, "numbers")
    if len(rows) > 12:
        table = fold(f"All {len(rows)} evaluations", table)
    return f"<h2>Validation</h2>{table}"


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
