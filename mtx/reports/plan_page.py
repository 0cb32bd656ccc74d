"""The page of a plan: what a run takes, why, how sure that is, and what else was considered. One HTML file.

Decides order and wording; every number is the plan's, the search's or the scaling's.

Invariant: an estimate is called one, and what it assumes stands on the same page.
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path

from mtx.planning.plan import Plan, usable_bytes
from mtx.planning.search import MARGIN, SearchResult
from mtx.planning.software import SOFTWARE
from mtx.reports.canvas import HATCH_SHEET
from mtx.reports.elements import draw_facts, draw_figure, draw_table, fold, plural, show
from mtx.reports.page import render_page, write_page
from mtx.reports.plan_pictures import (
    Scaling,
    draw_plan_memory,
    draw_plan_timeline,
    draw_scaling_curves,
    draw_search_frontier,
    name_layout,
)
from mtx.reports.timeline_picture import draw_parts
from mtx.reports.units import format_count, format_gib, format_seconds

_SHOWN = 25  # layouts of a search in its table; the picture has all
_PERCENT = "{:.1%}".format


def write_plan_page(
    path: Path,
    plan: Plan,
    search: SearchResult | None = None,
    scaling: Scaling | None = None,
    *,
    compiled: Mapping[str, float] | None = None,
) -> None:
    """Writes the page.

    Args:
        path: Of the file; its folder exists.
        plan: Of the run.
        search: Of its layouts.
        scaling: Of the run over numbers of GPUs.
        compiled: What the compiler reports of the same step: {'arguments': bytes, 'temporaries': bytes}.

    Raises:
        OSError: The file cannot be written.
    """
    write_page(path, render_plan_page(plan, search, scaling, compiled=compiled))


def render_plan_page(
    plan: Plan,
    search: SearchResult | None = None,
    scaling: Scaling | None = None,
    *,
    compiled: Mapping[str, float] | None = None,
) -> str:
    """The page as text; arguments as for `write_plan_page`."""
    cluster = plan.case.cluster
    body = [
        HATCH_SHEET,
        _draw_facts(plan),
        f'<p class="advice bad">{escape(f"Estimates. {plan.trust}")}</p>',
        _draw_memory(plan, compiled),
        _draw_time(plan),
        _draw_work(plan),
        _draw_run(plan),
        _draw_sensitivity(plan),
        _draw_search(search) if search else "",
        _draw_scaling(scaling) if scaling else "",
        _draw_assumptions(plan),
    ]
    title = f"{format_count(plan.parameters)} parameters on {cluster.num_gpus:,} {cluster.gpu.name}"
    return render_page(title, _subtitle(plan), "".join(body))


def _subtitle(plan: Plan) -> str:
    model, train = plan.case.run.model, plan.case.run.train
    said = [
        f"{model.num_layers} layers, width {model.d_model:,}, {model.num_heads} heads",
        f"batch {train.global_batch_size:,} x {train.seq_len:,} tokens",
        name_layout(plan.case),
    ]
    return " \N{MIDDLE DOT} ".join(said)


def _draw_facts(plan: Plan) -> str:
    free = -plan.excess_bytes
    fit = f"fits, {format_gib(free)} free" if plan.fits else f"too much by {format_gib(-free)}"
    active = "" if plan.active_parameters == plan.parameters else f"{format_count(plan.active_parameters)} active"
    facts = [
        ("parameters", format_count(plan.parameters), active),
        ("memory per GPU", format_gib(plan.memory.total), fit),
        ("step", format_seconds(plan.step_seconds), f"{plan.step.bubble_fraction:.1%} bubble"),
        (
            "tokens / s",
            format_count(plan.tokens_per_second),
            f"{format_count(plan.tokens_per_second / plan.num_gpus)} a GPU",
        ),
        ("MFU", show(plan.mfu_model_full, _PERCENT), "full attention"),
        (
            "days",
            show(plan.days, "{:,.1f}".format),
            "" if plan.tokens is None else f"{format_count(plan.tokens)} tokens",
        ),
        ("GPU-hours", show(plan.gpu_hours, format_count), "" if plan.cost is None else f"cost {plan.cost:,.0f}"),
    ]
    return draw_facts(facts)


def _draw_memory(plan: Plan, compiled: Mapping[str, float] | None) -> str:
    total = plan.memory.total
    rows = [[_name(part), format_gib(size), _PERCENT(size / total)] for part, size in plan.memory.parts.items()]
    rows.append(["<b>total</b>", f"<b>{format_gib(total)}</b>", ""])
    gpu = plan.case.cluster.gpu
    rows.append([f"{escape(gpu.name)}, safe to use", format_gib(usable_bytes(gpu, plan.case.software)), ""])
    table = draw_table(["part", "of the GPU that holds most", "share"], rows, "numbers compact")
    return f"<h2>Memory per GPU</h2>{draw_figure(draw_plan_memory(plan, compiled))}{table}"


def _draw_time(plan: Plan) -> str:
    parts, total = plan.step.parts, plan.step.seconds
    rows = [[_name(part), format_seconds(s), _PERCENT(s / total)] for part, s in parts.items() if s > 0]
    stages = plan.case.sizes["pipe"]
    when = "What each pipeline stage does when" if stages > 1 else "Microbatches, and what follows them"
    rows.append(["<b>step</b>", f"<b>{format_seconds(total)}</b>", ""])
    return (
        f"<h2>One step</h2>{draw_figure(draw_parts(parts), 'What the seconds go to')}"
        f"{draw_figure(draw_plan_timeline(plan), when)}"
        + draw_table(["part", "not hidden by anything else", "share"], rows, "numbers compact")
    )


def _draw_work(plan: Plan) -> str:
    """One rate, by each convention in which people state it."""
    peak = show(plan.peak_flops, lambda flops: f"{flops / 1e12:,.0f} TFLOP/s")
    kinds = [
        (
            "mfu_model_full",
            "model FLOPs, attention to all positions",
            plan.model_flops_per_gpu("full"),
            plan.mfu_model_full,
        ),
        (
            "mfu_model_causal",
            "model FLOPs, causal attention",
            plan.model_flops_per_gpu("causal"),
            plan.mfu_model_causal,
        ),
        ("hfu", "what the GPU computes, recomputation included", plan.hardware_flops_per_gpu, plan.hfu),
    ]
    rows = [
        [f"<code>{name}</code>", escape(what), f"{flops / 1e12:,.1f}", show(share, _PERCENT)]
        for name, what, flops, share in kinds
    ]
    head = ["", "what counts", "TFLOP/s per GPU", f"of {peak}"]
    return f"<h2>Work</h2>{draw_table(head, rows, 'numbers worded')}"


def _draw_run(plan: Plan) -> str:
    gpu = plan.case.cluster.gpu
    facts = [
        (
            "steps",
            show(plan.steps, "{:,}".format),
            "with the ramp of the batch" if len(plan.timetable.spans) > 1 else "",
        ),
        ("tokens", show(plan.tokens, format_count), ""),
        ("days", show(plan.days, "{:,.1f}".format), "of steps; no restarts, saves, evaluations"),
        ("GPU-hours", show(plan.gpu_hours, "{:,.0f}".format), ""),
        (
            "energy of the GPUs",
            show(plan.energy_kwh, lambda kwh: f"{kwh / 1e3:,.0f} MWh"),
            f"at most: {show(gpu.watts, '{:,.0f} W all the time'.format)}",
        ),
        (
            "cost",
            show(plan.cost, "{:,.0f}".format),
            "no price given" if plan.price is None else f"at {plan.price:g} per GPU-hour",
        ),
    ]
    rows = [[escape(name), value, escape(note)] for name, value, note in facts]
    return f"<h2>The whole run</h2>{draw_table(['', 'estimate', ''], rows, 'estimates')}"


def _draw_sensitivity(plan: Plan) -> str:
    if not plan.sensitivity:
        return ""
    rows = [
        [escape(change.what), format_seconds(change.step_seconds), f"{change.relative:+.1%}"]
        for change in plan.sensitivity
    ]
    return f"<h2>What if</h2>{draw_table(['machines with', 'step', 'change'], rows, 'numbers')}"


def _draw_search(search: SearchResult) -> str:
    parts = [f"<h2>Layouts</h2><p class=note>{escape(_describe_search(search))}</p>"]
    if picture := draw_search_frontier(search):
        parts.append(draw_figure(picture, "Layouts that fit, and those that only memory forbids"))
    if search.ranked:
        rows = []
        for rank, candidate in enumerate(search.ranked[:_SHOWN], 1):
            time, memory = format_seconds(candidate.step.seconds), format_gib(candidate.memory.total)
            rows.append([str(rank), time, memory, escape(name_layout(candidate.case))])
        parts.append(draw_table(["", "step", "memory per GPU", "layout"], rows, "numbers ranked"))
        lines = "\n".join(search.lines(search.ranked[0]))
        if lines:
            parts.append(fold("The fastest one as lines of a config", f"<pre>{escape(lines)}</pre>"))
    elif search.closest:
        parts.append(f"<p>Closest: {escape(search.closest.reason)}</p>")
    return "".join(parts) + _draw_rejected(search)


def _draw_rejected(search: SearchResult) -> str:
    """Every reason with the number of layouts that have it, and one of those."""
    reasons: dict[tuple[str, str], list[Mapping[str, object]]] = {}
    for rejection in search.rejected:
        reasons.setdefault((rejection.kind, rejection.reason), []).append(rejection.settings)
    parts = []
    for kind, count in search.counts.items():
        rows = [
            [f"{len(settings):,}", escape(reason), f"<code>{escape(_list_settings(settings[0]))}</code>"]
            for (of, reason), settings in reasons.items()
            if of == kind
        ]
        table = draw_table(["layouts", "why not", "one of them"], rows, "reasons")
        parts.append(fold(f"Rejected: {plural(count, 'layout')}, {kind}", table))
    return "".join(parts)


def _list_settings(settings: Mapping[str, object]) -> str:
    return ", ".join(f"{key} = {value}" for key, value in settings.items()) or "one GPU"


def _describe_search(search: SearchResult) -> str:
    return (
        f"{plural(len(search.ranked), 'layout')} ranked, {len(search.rejected):,} rejected, in "
        f"{format_seconds(search.seconds)}. A layout fits that leaves {MARGIN:.0%} of the memory free: estimates are "
        "not exact."
    )


def _name(part: str) -> str:
    return escape(part.replace("_", " "))


def _draw_scaling(scaling: Scaling) -> str:
    figures = "".join(draw_figure(picture, caption) for caption, picture in draw_scaling_curves(scaling))
    rows = [
        [
            escape(kind),
            f"{point.num_gpus:,}",
            f"{point.global_batch_size:,}",
            format_seconds(point.step_seconds),
            format_count(point.tokens_per_second),
            show(point.mfu, _PERCENT),
            _PERCENT(point.efficiency),
        ]
        for kind, points in scaling.items()
        for point in points
    ]
    head = ["scaling", "GPUs", "batch", "step", "tokens / s", "MFU", "tokens / s / GPU of the first"]
    return f"<h2>Scaling</h2>{figures}{draw_table(head, rows, 'numbers')}"


def _draw_assumptions(plan: Plan) -> str:
    cluster = plan.case.cluster
    gpu, dtype = cluster.gpu, plan.case.run.precision.compute
    rows = [
        ["GPU", escape(gpu.name), "data sheet"],
        [
            f"peak in {escape(dtype)}",
            show(plan.peak_flops, lambda flops: f"{flops / 1e12:,.0f} TFLOP/s"),
            "dense; what MFU is measured against",
        ],
        [
            "fastest product measured",
            show(gpu.measured_flops.get(dtype), lambda flops: f"{flops / 1e12:,.0f} TFLOP/s"),
            "what efficiencies of products are relative to",
        ],
        [
            "memory",
            format_gib(gpu.memory_bytes),
            f"{format_gib(usable_bytes(gpu, plan.case.software))} of it safe to use",
        ],
        ["memory bandwidth", f"{gpu.memory_bandwidth / 1e12:.3g} TB/s", ""],
        ["NVLink", f"{gpu.nvlink_bandwidth / 1e9:,.0f} GB/s", f"per direction, among {cluster.domain} GPUs"],
        ["network", f"{cluster.nic_bandwidth / 1e9:,.3g} GB/s", "per GPU and direction, between such groups"],
        ["software", escape(plan.case.software), escape(SOFTWARE[plan.case.software].doc)],
    ]
    table = draw_table(["", "value", ""], rows, "estimates")
    notes = (
        "Steps alone: no compilation, evaluations, checkpoints, restarts or slow machines.",
        "Exchanges count as far as nothing hides them. A bubble is the time that stages wait for each other.",
        "Memory is that of the GPU that holds most; of it the training state is exact, the rest is estimated.",
    )
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return f'<h2>What this assumes</h2>{table}<ul class="note">{items}</ul>'
