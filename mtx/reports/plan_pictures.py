"""The pictures of a plan, a search and a scaling; and those of the documentation.

    python -m mtx.reports.plan_pictures docs/pictures    draws the pictures of the documentation again

Decides what of a plan is drawn; the pictures know plain numbers only.

Invariant: nothing is computed here that the plan does not know.
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Iterable, Mapping, Sequence

from mtx.config import reader
from mtx.planning import accuracy
from mtx.planning.case import Case, Cluster
from mtx.planning.hardware import GPUS
from mtx.planning.plan import Plan, describe_mesh, make_plan
from mtx.planning.published import read_runs
from mtx.planning.scaling import ScalingPoint, scale
from mtx.planning.search import Candidate, SearchResult, search_layouts
from mtx.reports import frontier_picture
from mtx.reports.accuracy_picture import Comparison, draw_accuracy
from mtx.reports.canvas import format_tick, stand_alone
from mtx.reports.frontier_picture import draw_frontier
from mtx.reports.memory_picture import GIB, MemoryBar, draw_memory
from mtx.reports.scaling_picture import Curve, draw_scaling
from mtx.reports.timeline_picture import draw_lanes, draw_parts

RUN, GPU, NUM_GPUS = "configs/runs/mt_nlg_530b.gin", "H100", 2240
PUBLISHED = "benchmarks/data/published_runs.csv"
"""What the documentation's pictures are of."""

Scaling = Mapping[str, Sequence[ScalingPoint]]
"""'strong', 'weak' -> points (`mtx.planning.scaling`)."""


def draw_plan_memory(plan: Plan, compiled: Mapping[str, float] | None = None) -> str:
    """The memory stack of a plan, with the compiler's figures under it."""
    bars = [MemoryBar("plan", plan.memory.parts)]
    if compiled is not None:
        bars.append(MemoryBar("compiler", compiled))
    return draw_memory(bars, plan.case.cluster.gpu.memory_bytes)


def draw_plan_timeline(plan: Plan) -> str:
    """The lanes of a plan's step.

    What the schedule does not place, transfers between stages above all, is spread over its units.
    """
    case, step = plan.case, plan.step
    stages = case.sizes["pipe"]
    chunks = case.run.pipeline.virtual_stages if stages > 1 else 1
    placed = (case.num_microbatches * chunks + stages - 1) * (step.forward_s + step.backward_s)
    left, tail = step.seconds - placed, {}
    for part in ("data", "optimizer", "launch"):
        tail[part] = max(0.0, min(step.parts[part], left))
        left -= tail[part]
    stretch = (placed + left) / placed
    return draw_lanes(
        stages,
        chunks,
        case.num_microbatches,
        forward_s=step.forward_s * stretch,
        backward_s=step.backward_s * stretch,
        tail=tail,
        schedule=case.run.pipeline.schedule,
    )


def draw_search_frontier(search: SearchResult) -> str | None:
    """The layouts of a search that were estimated: those that fit, and those that only memory forbids; None: none."""

    def place(candidate: Candidate, reason: str = "") -> frontier_picture.Candidate:
        return frontier_picture.Candidate(
            label=name_layout(candidate.case),
            memory_bytes=candidate.memory.total,
            seconds=candidate.step.seconds,
            fits=not reason,
            reason=reason,
        )

    candidates = [place(candidate) for candidate in search.ranked]
    candidates += [place(rejection.candidate, rejection.reason) for rejection in search.rejected if rejection.candidate]
    estimated = [*search.ranked, *(rejection.candidate for rejection in search.rejected if rejection.candidate)]
    return draw_frontier(candidates, estimated[0].case.cluster.gpu.memory_bytes) if estimated else None


def draw_scaling_curves(scaling: Scaling) -> list[tuple[str, str]]:
    """(caption, picture) for each kind of scaling: what a step takes, what all GPUs do, how well each is used."""
    pictures = []
    if strong := scaling.get("strong"):
        batch = f"{strong[0].global_batch_size:,} sequences"
        times = Curve(label=f"step of {batch}", points=[(p.num_gpus, p.step_seconds) for p in strong], ideal="inverse")
        picture = draw_scaling("Strong scaling", [times], unit="seconds a step", format_y=format_tick)
        pictures.append((f"Strong scaling: the same batch of {batch} on more GPUs", picture))
    rates = [
        Curve(
            label=f"{kind} scaling",
            points=[(p.num_gpus, p.tokens_per_second) for p in points],
            ideal="proportional" if kind == "weak" else None,
        )
        for kind, points in scaling.items()
        if points
    ]
    shares = [
        Curve(label=f"{kind} scaling", points=[(p.num_gpus, p.mfu) for p in points if p.mfu is not None])
        for kind, points in scaling.items()
    ]
    if rates:
        picture = draw_scaling("Throughput against GPUs", rates, unit="tokens/s of all GPUs")
        pictures.append(("Throughput; weak scaling: each replica keeps its share of the batch", picture))
    if any(curve.points for curve in shares):
        unit, title = "MFU (model FLOPs, full attention)", "MFU against GPUs"
        pictures.append((title, draw_scaling(title, shares, unit=unit, is_log=False, format_y="{:.0%}".format)))
    return pictures


def name_layout(case: Case) -> str:
    """'pipe 35, data 8, tensor 8, microbatch 1, selective recompute'."""
    run = case.run
    said = [describe_mesh(case.sizes), f"microbatch {case.microbatch_size}"]
    if case.sizes["pipe"] > 1 and run.pipeline.virtual_stages > 1:
        said.append(f"{run.pipeline.virtual_stages} virtual stages")
    said.append(f"{run.train.recompute} recompute" if run.train.recompute != "none" else "no recompute")
    return ", ".join(said)


def draw_accuracies(comparisons: Iterable[accuracy.Comparison]) -> dict[str, str]:
    """'time', 'memory' -> published runs against their predictions, a colour for each model of GPU."""
    times, memory = [], []
    for row in comparisons:
        if row.run.case is None:
            continue
        label, group = row.run.id, row.run.case.cluster.gpu.name
        if row.step_seconds and row.run.step_seconds:
            times.append(Comparison(label=label, group=group, measured=row.run.step_seconds, planned=row.step_seconds))
        if row.memory_bytes and row.run.memory_bytes:
            measured, planned = row.run.memory_bytes / GIB, row.memory_bytes / GIB
            memory.append(Comparison(label=label, group=group, measured=measured, planned=planned))
    pictures = {}
    if times:
        pictures["time"] = draw_accuracy(times, unit="seconds a step", title="Step times of published runs")
    if memory:
        pictures["memory"] = draw_accuracy(memory, unit="GiB per GPU", title="Memory of published runs")
    return pictures


def draw_documentation(root: pathlib.Path) -> dict[str, str]:
    """File -> picture, of the plan of RUN and of the published runs.

    Args:
        root: The checkout.
    """
    run, cluster = reader.load(root / RUN).run, Cluster.of(GPUS[GPU], NUM_GPUS)
    case = Case.of(run, cluster)
    plan = make_plan(case)
    (_, strong), (_, throughput), (_, mfu) = draw_scaling_curves(scale(case))
    accuracies = draw_accuracies(accuracy.compare_runs(read_runs(root / PUBLISHED)))
    pictures = {
        "plan_memory.svg": draw_plan_memory(plan),
        "plan_step.svg": draw_parts(plan.step.parts),
        "plan_timeline.svg": draw_plan_timeline(plan),
        "plan_strong_scaling.svg": strong,
        "plan_throughput.svg": throughput,
        "plan_mfu.svg": mfu,
        "plan_frontier.svg": draw_search_frontier(search_layouts(run, cluster)),
        "plan_time_accuracy.svg": accuracies["time"],
        "plan_memory_accuracy.svg": accuracies["memory"],
    }
    return {file: stand_alone(picture) for file, picture in pictures.items() if picture}


def main(folder: str) -> None:
    """Draws them into a folder; from the checkout."""
    for file, picture in draw_documentation(pathlib.Path()).items():
        (pathlib.Path(folder) / file).write_text(picture)


if __name__ == "__main__":
    main(sys.argv[1])
