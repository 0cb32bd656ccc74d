"""The planner's memory of other software against what was measured and published.

    python benchmarks/check_memory.py [--runs FILE] [--json]

For each family of programs: the errors with the constants that are shipped, with constants fitted on the rows at hand,
and with constants fitted on all rows but those of the same model size. Rows whose recomputation was not published are
left out of the errors. Besides: rows that ran out of memory, and whether the planner says so; rows that ran, and how
many of them it calls too large.
"""

from __future__ import annotations

import argparse
import collections
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from mtx.errors import UserError
from mtx.planning.other_memory import ALLOCATORS, Allocator, estimate_parts, family, fit_allocator, live_bytes
from mtx.planning.plan import usable_bytes
from mtx.planning.published import PublishedRun, read_runs

RUNS = Path(__file__).parent / "data" / "published_runs.csv"


def main() -> int:
    """Prints a report, as Markdown or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=RUNS, help="table of published runs (CSV)")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    arguments = parser.parse_args()
    try:
        report = make_report(read_runs(arguments.runs))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps(report, indent=2) if arguments.json else as_markdown(report))
    return 0


def make_report(runs: list[PublishedRun]) -> dict[str, Any]:
    """Errors by family, rows that are far off, and who is said to fit."""
    measured = collections.defaultdict(list)
    for run in runs:
        if run.case is not None and run.memory_bytes is not None and "recompute" not in run.inferred:
            measured[family(run.case)].append(run)
    return {
        "families": {name: _errors_of(name, rows) for name, rows in sorted(measured.items())},
        "out_of_memory": [_fit_of(run) for run in runs if run.case is not None and run.out_of_memory],
        "ran_but_called_too_large": [
            _fit_of(run) for run in runs if run.case is not None and not run.out_of_memory and not _fit_of(run)["fits"]
        ],
        "ran": sum(run.case is not None and not run.out_of_memory for run in runs),
    }


def _errors_of(name: str, rows: list[PublishedRun]) -> dict[str, Any]:
    live = np.array([live_bytes(run.case) for run in rows if run.case])
    measured = np.array([run.memory_bytes for run in rows], dtype=float)
    sizes = [(run.case.run.model.num_layers, run.case.run.model.d_model) for run in rows if run.case]
    fitted = fit_allocator(list(live), list(measured))
    apart = np.empty(len(rows))
    for size in set(sizes):
        inside = np.array([other == size for other in sizes])
        rest = fit_allocator(list(live[~inside]), list(measured[~inside])) if not inside.all() else None
        apart[inside] = np.nan if rest is None else _errors(rest, live[inside], measured[inside])
    shipped = _errors(ALLOCATORS[name], live, measured)
    return {
        "shipped": vars(ALLOCATORS[name]),
        "fitted": vars(fitted),
        "errors": _summary(shipped),
        "errors_fitted": _summary(_errors(fitted, live, measured)),
        "errors_leaving_a_size_out": _summary(apart[~np.isnan(apart)]),
        "rows": [
            {"id": run.id, "measured_gib": mine / 2**30, "error": float(error)}
            for run, mine, error in zip(rows, measured, shipped, strict=True)
        ],
    }


def _errors(allocator: Allocator, live: np.ndarray, measured: np.ndarray) -> np.ndarray:
    return (allocator.fixed + allocator.factor * live) / measured - 1


def _summary(errors: np.ndarray) -> dict[str, float] | None:
    if not errors.size:
        return None
    size = np.abs(errors)
    return {
        "rows": len(errors),
        "median": float(np.median(size)),
        "p90": float(np.quantile(size, 0.9)),
        "worst": float(size.max()),
        "above_10_percent": int((size > 0.1).sum()),
    }


def _fit_of(run: PublishedRun) -> dict[str, Any]:
    assert run.case is not None
    gpu = run.case.cluster.gpu
    total, usable = sum(estimate_parts(run.case).values()), usable_bytes(gpu)
    return {
        "id": run.id,
        "gib": total / 2**30,
        "share_of_usable": total / usable,
        "fits": total <= usable_bytes(gpu, run.case.software),
        "inferred": run.inferred,
    }


def as_markdown(report: dict[str, Any]) -> str:
    """Tables of the report."""
    lines = [
        "| family | constants | rows | median | p90 | worst | above 10 % |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, found in report["families"].items():
        for key, what in (
            ("errors", "shipped"),
            ("errors_fitted", "fitted on these rows"),
            ("errors_leaving_a_size_out", "fitted without the row's size"),
        ):
            if one := found[key]:
                figures = " | ".join(f"{100 * one[part]:.1f} %" for part in ("median", "p90", "worst"))
                lines.append(f"| {name} | {what} | {one['rows']} | {figures} | {one['above_10_percent']} |")
    lines += ["", "| family | constants | fixed, GiB | factor |", "| --- | --- | --- | --- |"]
    for name, found in report["families"].items():
        for key in ("shipped", "fitted"):
            lines.append(f"| {name} | {key} | {found[key]['fixed'] / 2**30:.2f} | {found[key]['factor']:.3f} |")
    far = [
        (name, row) for name, found in report["families"].items() for row in found["rows"] if abs(row["error"]) > 0.1
    ]
    lines += ["", "Rows that are more than 10 % off:", ""]
    lines += [
        f"- {row['id']} ({name}): measured {row['measured_gib']:.1f} GiB, {row['error']:+.1%}" for name, row in far
    ]
    lines += ["", "Rows that ran out of memory:", ""]
    for row in report["out_of_memory"]:
        verdict = "CALLED FITTING" if row["fits"] else "does not fit"
        lines.append(f"- {row['id']}: {row['gib']:.1f} GiB, {row['share_of_usable']:.0%} of what is usable: {verdict}")
    wrong = report["ran_but_called_too_large"]
    lines += ["", f"Of {report['ran']} rows that ran, {len(wrong)} are called too large."]
    lines += [f"- {row['id']}: {row['share_of_usable']:.0%}" for row in sorted(wrong, key=lambda r: -r["gib"])[:12]]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
