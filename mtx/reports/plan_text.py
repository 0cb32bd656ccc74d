"""A plan in the terminal: the numbers of `mtx.planning`, in words and tables. On stdout.

Decides order and wording; every number is the plan's.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from mtx.planning.accuracy import Comparison, Errors, Summary
from mtx.planning.layers import uses_fused_attention
from mtx.planning.plan import DAY_S, Plan, describe_mesh, usable_bytes
from mtx.planning.scaling import OptimalSize
from mtx.planning.search import MARGIN, SearchResult
from mtx.planning.sizing import Sizing
from mtx.reports.tables import print_table
from mtx.reports.units import format_count, format_gib, format_seconds

SHOWN = 10
"""Layouts of a search that are printed."""


def print_plan(plan: Plan) -> None:
    """Everything about one layout."""
    for paragraph in (_describe_run(plan), ""):
        print(paragraph)
    _print_memory(plan)
    print()
    _print_step(plan)
    print()
    _print_rates(plan)
    print()
    _print_course(plan)
    print("\nwhat if")
    changes = [[c.what, format_seconds(c.step_seconds), f"{c.relative:+.1%}"] for c in plan.sensitivity]
    print_table(["machines with", "step", "change"], changes)
    print(f"\nEstimates. {plan.trust}")


def _describe_run(plan: Plan) -> str:
    case, cluster = plan.case, plan.case.cluster
    run, model = case.run, case.run.model
    active = "" if plan.active_parameters == plan.parameters else f", {plan.active_parameters:,} of them for each token"
    chunks = f", {run.pipeline.virtual_stages} virtual stages" if run.pipeline.virtual_stages > 1 else ""
    return "\n".join(
        (
            f"{plan.parameters:,} parameters{active}, {plan.matmul_parameters:,} in matrix products of a token",
            f"{model.num_layers} layers of width {model.d_model}, batch of {run.train.global_batch_size} x "
            f"{run.train.seq_len} tokens",
            f"{cluster.num_gpus} {cluster.gpu.name}, NVLink domains of {cluster.domain}, network "
            f"{cluster.nic_bandwidth * 8 / 1e9:g} Gb/s a GPU"
            + ("" if case.software == "mtx" else f", with the habits of {case.software}"),
            f"mesh: {describe_mesh(case.sizes)}{chunks}; {case.num_microbatches} microbatches of "
            f"{case.microbatch_size}, recompute {run.train.recompute}, zero {run.rules.zero}, attention "
            + ("in one kernel" if uses_fused_attention(case) else "in separate products"),
        )
    )


def _print_memory(plan: Plan) -> None:
    gpu = plan.case.cluster.gpu
    total = plan.memory.total
    rows = [
        [part.replace("_", " "), format_gib(size), f"{size / total:.1%}"] for part, size in plan.memory.parts.items()
    ]
    print_table(["memory per GPU", "", "share"], [*rows, ["total", format_gib(total), ""]])
    usable = format_gib(usable_bytes(gpu, plan.case.software))
    card = f"{gpu.name} has {format_gib(gpu.memory_bytes)}, of which {usable} are safe to use"
    if plan.fits:
        print(f"fits: {card}, {format_gib(-plan.excess_bytes)} stay free")
        return
    largest = max(plan.memory.parts, key=lambda part: plan.memory.parts[part])
    print(
        f"DOES NOT FIT: {card}, {format_gib(plan.excess_bytes)} too few; the largest part is "
        f"{largest.replace('_', ' ')}, {format_gib(plan.memory.parts[largest])}"
    )


def _print_step(plan: Plan) -> None:
    step = plan.step
    rows = [
        [part.replace("_", " "), format_seconds(seconds), f"{seconds / step.seconds:.1%}"]
        for part, seconds in step.parts.items()
        if seconds > 0
    ]
    print_table(["step, what nothing else hides", "", "share"], [*rows, ["total", format_seconds(step.seconds), ""]])
    print(f"bubble {step.bubble_fraction:.1%} of the stages' work")


def _print_rates(plan: Plan) -> None:
    def row(name: str, what: str, flops: float, share: float | None) -> list[str]:
        return [name, what, f"{flops / 1e12:.1f}", "-" if share is None else f"{share:.1%}"]

    peak = "no peak" if plan.peak_flops is None else f"of {plan.peak_flops / 1e12:g}"
    rows = [
        row("mfu_model_full", "attention to all places", plan.model_flops_per_gpu("full"), plan.mfu_model_full),
        row(
            "mfu_model_causal", "attention to earlier places", plan.model_flops_per_gpu("causal"), plan.mfu_model_causal
        ),
        row("hfu", "all that is computed", plan.hardware_flops_per_gpu, plan.hfu),
    ]
    print_table(["", "FLOPs that count", "TFLOP/s a GPU", peak], rows, words=(0, 1))
    rate = plan.tokens_per_second
    print(f"{rate:,.0f} tokens/s, {rate / plan.num_gpus:,.1f} a GPU")


def _print_course(plan: Plan) -> None:
    if plan.steps is None or plan.tokens is None or plan.days is None or plan.gpu_hours is None:
        print("how long the run takes follows from --tokens, Train.tokens or Train.steps")
        return
    ramp = ", the ramp of its batch included" if len(plan.timetable.spans) > 1 else ""
    print(
        f"{plan.tokens:,} tokens are {plan.steps:,} steps{ramp}: {plan.days:.2f} days, {plan.gpu_hours:,.0f} GPU-hours"
    )
    if plan.energy_kwh is not None:
        watts = plan.case.cluster.gpu.watts
        print(
            f"energy {plan.energy_kwh / 1e3:,.1f} MWh at most: GPUs at {watts:g} W all the time, nothing else counted"
        )
    if plan.cost is not None:
        print(f"cost {plan.cost:,.0f} at {plan.price:g} for a GPU and hour")


def print_deadline(plan: Plan, days: float) -> None:
    """What a run has done after some days."""
    print(f"\nafter {days:g} days: {format_count(plan.tokens_within(days))} tokens")


def print_search(search: SearchResult) -> None:
    """The best layouts, how many others there are by reason, and the best one's lines."""
    print(
        f"the {len(search.ranked)} fastest layouts that fit with {MARGIN:.0%} of the memory to spare; "
        f"{len(search.rejected)} were rejected; {search.seconds:.1f} s"
    )
    rows = []
    for rank, candidate in enumerate(search.ranked[:SHOWN], 1):
        run, case = candidate.case.run, candidate.case
        rows.append(
            [
                str(rank),
                describe_mesh(case.sizes),
                str(case.microbatch_size),
                str(run.pipeline.virtual_stages),
                run.train.recompute,
                format_seconds(candidate.step.seconds),
                f"{candidate.step.bubble_fraction:.1%}",
                format_gib(candidate.memory.total),
            ]
        )
    head = ["", "mesh", "microbatch", "virtual stages", "recompute", "step", "bubble", "memory"]
    print_table(head, rows, words=(1, 4))
    print()
    examples = {r.kind: r.reason for r in reversed(search.rejected)}
    print_table(
        ["rejected", "", "for example"],
        [[kind, str(count), textwrap.shorten(examples[kind], 120)] for kind, count in search.counts.items()],
        words=(0, 2),
    )
    if search.ranked:
        print("\nthe first one, as lines of the config:")
        print("\n".join(search.lines(search.ranked[0])) or "(the config has it already)")
        print()


def print_sizing(sizing: Sizing, price: float | None) -> None:
    """The numbers of GPUs that were looked at."""
    rows = []
    for point in sizing.points:
        mark = "chosen" if point is sizing.chosen else ""
        if point.run_seconds is None:
            rows.append([str(point.num_gpus), "nothing fits", "", "", "", mark])
            continue
        cost = "" if price is None else f"{point.gpu_hours * price:,.0f}"
        best = point.search.ranked[0].case
        days = f"{point.run_seconds / DAY_S:.1f}"
        rows.append([str(point.num_gpus), days, f"{point.gpu_hours:,.0f}", cost, describe_mesh(best.sizes), mark])
    print_table(["GPUs", "days", "GPU-hours", "cost", "fastest mesh", ""], rows, words=(4, 5))
    print()


def print_optimal(optimal: OptimalSize, days: float) -> None:
    """The size of a model for a number of GPUs and days."""
    model, plan = optimal.plan.case.run.model, optimal.plan
    print(
        f"{plan.num_gpus} GPUs do {optimal.flops:.3g} FLOPs in {days:g} days: {model.num_layers} layers of width "
        f"{model.d_model}, {format_count(plan.active_parameters)} parameters, {format_count(optimal.tokens)} tokens"
    )
    rows = [
        [
            a.source,
            format_count(a.parameters),
            format_count(a.tokens),
            f"{a.tokens / a.parameters:.1f}",
            f"{a.loss:.4f}",
        ]
        for a in optimal.alternatives()
    ]
    print_table(["for as many FLOPs", "parameters", "tokens", "ratio", "loss, by the first"], rows)
    print()


def print_comparisons(comparisons: Sequence[Comparison], summary: Summary) -> None:
    """Published runs beside what the plan says of them."""

    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    def gib(value: float | None) -> str:
        return "-" if value is None else f"{value / 2**30:.1f}"

    rows = []
    for row in comparisons:
        if row.memory_bytes is None:
            continue
        run = row.run
        memory = "out of memory" if run.out_of_memory else gib(run.memory_bytes)
        rows.append(
            [
                run.id,
                run.precision,
                number(run.step_seconds, ".3f"),
                number(row.step_seconds, ".3f"),
                number(row.time_error, "+.1%"),
                memory,
                gib(row.memory_bytes) + ("" if row.fits else " (does not fit)"),
                number(row.memory_error, "+.1%"),
            ]
        )
    head = ["run", "precision", "published s", "planned s", "error", "published GiB", "planned GiB", "error"]
    print_table(head, rows, words=(0, 1))
    print()
    for name, errors in (
        ("step time", summary.time),
        ("step time, dense, bf16", summary.time_dense_bf16),
        ("memory", summary.memory),
    ):
        print(f"{name}: {_describe_errors(errors)}")
    called = f": {', '.join(summary.called_fitting)}" if summary.called_fitting else ""
    print(f"out of memory, and called fitting: {len(summary.called_fitting)}{called}")
    for reason, count in summary.skipped.items():
        print(f"no plan of {count}: {reason}")


def _describe_errors(errors: Errors) -> str:
    if errors.median is None or errors.percentile_90 is None:
        return "no rows"
    return f"{errors.count} rows, median error {errors.median:.1%}, 90th percentile {errors.percentile_90:.1%}"


def describe_failure(search: SearchResult) -> str:
    """Why nothing was found."""
    counts = ", ".join(f"{kind} ({count})" for kind, count in search.counts.items())
    if search.closest is None:
        return f"no layout is possible: {counts}"
    settings = ", ".join(f"{key} = {value}" for key, value in search.closest.settings.items())
    return f"no layout fits: {counts}; the closest is {settings}: {search.closest.reason}"
