"""Fits the constants of the time model on published runs, and shows the errors that they leave.

    python benchmarks/fit_planner.py                     fits, cross-validates, prints
    python benchmarks/fit_planner.py --write             and stores mtx/planning/fitted.json
    python benchmarks/fit_planner.py --check FILE.csv    holds the stored constants against a table, row by row
    python benchmarks/fit_planner.py --sc21              the rows of arXiv 2104.04473, tables 1 and 2, one by one

A population is the runs of one software on one generation of GPUs: each has a quality of its own, all share the other
constants. A population of n rows counts like the square root of n, so that large ones do not decide alone. Errors are
predicted over published seconds, less one; medians and 90th percentiles are of their absolute values.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import math
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mtx.planning.case import Case
from mtx.planning.constants import SHIPPED, TYPICAL, Constants, load_constants
from mtx.planning.conventions import FORMATS, case_to_time, product_format
from mtx.planning.fitting import fit
from mtx.planning.published import PublishedRun, read_runs
from mtx.planning.step_time import estimate_time

RUNS = Path(__file__).parent / "data" / "published_runs.csv"
SHARED = (
    "matmul_efficiency", "matmul_fill", "attention_efficiency", "first_flash", "older_instructions",
    "memory_efficiency", "unfused_traffic", "nvlink_efficiency", "network_efficiency", "overlap", "tensor_overlap",
    "layer_launch_s", "step_launch_s",
)  # fmt: skip
BEFOREHAND = Constants(quality={TYPICAL: 0.9})
FOLDS = 5


@dataclasses.dataclass(frozen=True)
class Point:
    """A published run that has a case and a time."""

    id: str
    case: Case
    seconds: float
    group: str

    @property
    def generation(self) -> str:
        return self.case.cluster.gpu.generation

    @property
    def population(self) -> str:
        return f"{self.case.software}@{self.generation}"

    @property
    def size(self) -> tuple[str, int, int]:
        """Runs of one population and model."""
        return self.population, self.case.run.model.num_layers, self.case.run.model.d_model

    def error(self, constants: Constants) -> float:
        return estimate_time(self.case, constants).seconds / self.seconds - 1


def sort_runs(runs: Iterable[PublishedRun]) -> tuple[list[Point], dict[str, str]]:
    """The points, and for all other runs why they are none, by id."""
    points, excluded = [], {}
    for run in runs:
        if run.case is None:
            excluded[run.id] = f"no case: {run.skipped}"
        elif run.step_seconds is None:
            excluded[run.id] = "no time that can be converted to seconds was published"
        elif run.out_of_memory:
            excluded[run.id] = "ran out of memory"
        elif run.case.run.train.global_batch_size < run.case.shards("batch"):
            excluded[run.id] = "its parallel sizes do not multiply to its GPUs: fewer sequences than data shards"
        elif "nvfp4" in run.precision:
            excluded[run.id] = "products of 4-bit numbers, which no table of peaks here has"
        elif "heads" in run.inferred and run.case.software.startswith("megatron"):
            excluded[run.id] = "heads not published: attention in several kernels depends on their width (up to 35 %)"
        else:
            group, case = product_format(run.precision), case_to_time(run.case, run.precision)
            if group is None or case is None:
                excluded[run.id] = f"products in {run.precision}"
            else:
                points.append(Point(run.id, case, run.step_seconds, group))
    return points, excluded


def fit_all(points: Sequence[Point], begin: Constants | None = None) -> Constants:
    """Shared constants and qualities on runs in 16 bits; then, with these, what only those in 8 bits show."""
    wide = [p for p in points if p.group != "fp8"]
    narrow = [p for p in points if p.group == "fp8"]
    constants = _fit(wide, BEFOREHAND, (*SHARED, *_qualities(wide)), begin)
    constants = dataclasses.replace(constants, quality={**constants.quality, **_typical(constants)})
    if narrow:
        unseen = [name for name in _qualities(narrow) if name not in _qualities(wide)]
        constants = _fit(narrow, constants, ("float8_efficiency", *unseen), begin)
        constants = dataclasses.replace(constants, quality={**constants.quality, **_typical(constants)})
    return constants


def _fit(points: Sequence[Point], start: Constants, free: Sequence[str], begin: Constants | None) -> Constants:
    counts = Counter(p.population for p in points)
    weights = [1 / math.sqrt(counts[p.population]) for p in points]
    return fit([(p.case, p.seconds) for p in points], start, free, weights, begin)


def _qualities(points: Iterable[Point]) -> list[str]:
    return [f"quality.{name}" for name in sorted({p.population for p in points})]


def _typical(constants: Constants) -> dict[str, float]:
    """Medians over the software of each generation, and over all."""
    by_generation = defaultdict(list)
    for name, value in constants.quality.items():
        software, _, generation = name.partition("@")
        if software != TYPICAL:
            by_generation[generation].append(value)
    everything = [value for values in by_generation.values() for value in values]
    medians = {f"{TYPICAL}@{name}": statistics.median(values) for name, values in by_generation.items()}
    return {TYPICAL: statistics.median(everything), **medians}


def hold_out(points: Sequence[Point], key: Callable[[Point], Any], begin: Constants, folds: int | None) -> list[float]:
    """Errors of runs by constants that were fitted without them: of whole groups, which share a key."""
    keys = sorted({key(p) for p in points})
    number = len(keys) if folds is None else folds
    errors = []
    for fold in range(number):
        left_out = set(keys[fold::number])
        constants = fit_all([p for p in points if key(p) not in left_out], begin)
        errors += [p.error(constants) for p in points if key(p) in left_out]
        print(f"  held out {fold + 1} of {number}", file=sys.stderr)
    return errors


def summarize(errors: Iterable[float]) -> dict[str, float | int]:
    sizes = [abs(error) for error in errors]
    return {
        "rows": len(sizes),
        "median": round(float(np.median(sizes)), 4),
        "percentile_90": round(float(np.percentile(sizes, 90)), 4),
    }


def tabulate(points: Sequence[Point], constants: Constants) -> list[dict[str, Any]]:
    """Errors by population."""
    table = []
    for group in FORMATS:
        populations = sorted({p.population for p in points if p.group == group})
        for name in populations:
            errors = [(p.error(constants), p.id) for p in points if p.population == name and p.group == group]
            worst = max(errors, key=lambda pair: abs(pair[0]))
            bias = round(statistics.median(error for error, _ in errors), 4)
            table.append(
                {
                    "population": name,
                    "group": group,
                    **summarize(error for error, _ in errors),
                    "bias": bias,
                    "worst": round(worst[0], 4),
                    "worst_id": worst[1],
                }
            )
    return table


def in_sample(points: Sequence[Point], constants: Constants) -> dict[str, Any]:
    """The summary that is stored, and that a test computes again."""
    return {group: summarize(p.error(constants) for p in points if p.group == group) for group in FORMATS}


def _percent(value: float) -> str:
    return f"{100 * value:+.1f} %"


def _print_table(table: list[dict[str, Any]]) -> None:
    print(f"\n{'population':38} {'group':7} {'rows':>4} {'median':>7} {'p90':>7} {'bias':>7}  worst")
    for row in table:
        numbers = " ".join(f"{100 * row[name]:6.1f}%" for name in ("median", "percentile_90", "bias"))
        print(
            f"{row['population']:38} {row['group']:7} {row['rows']:4} {numbers}  "
            f"{_percent(row['worst'])} {row['worst_id']}"
        )


def _print_summary(title: str, summary: dict[str, float | int]) -> None:
    print(
        f"{title}: {summary['rows']} rows, median {100 * summary['median']:.1f} %, "
        f"90th percentile {100 * summary['percentile_90']:.1f} %"
    )


def check(path: Path, constants: Constants) -> dict[str, Any]:
    """Every row of a table by the stored constants."""
    points, excluded = sort_runs(read_runs(path))
    rows = [
        {
            "id": p.id,
            "population": p.population,
            "group": p.group,
            "published_s": p.seconds,
            "predicted_s": p.seconds * (1 + p.error(constants)),
            "error": p.error(constants),
            "own_quality": p.population in constants.quality,
        }
        for p in points
    ]
    return {
        "rows": rows,
        "excluded": excluded,
        "summary": {g: summarize(r["error"] for r in rows if r["group"] == g) for g in {r["group"] for r in rows}},
    }


def _print_check(report: dict[str, Any], only: tuple[str, ...] = ("",)) -> None:
    print(f"{'run':58} {'published s':>12} {'predicted s':>12} {'error':>8}")
    for row in report["rows"]:
        if row["id"].startswith(only):
            note = "" if row["own_quality"] else f"  no quality of its own: {row['population']}"
            seconds = f"{row['published_s']:12.3f} {row['predicted_s']:12.3f}"
            print(f"{row['id']:58} {seconds} {_percent(row['error']):>8}{note}")


def _print_excluded(excluded: dict[str, str], limit: int | None = None) -> None:
    reasons = defaultdict(list)
    for name, reason in excluded.items():
        reasons[reason].append(name)
    print(f"\n{len(excluded)} rows are not used:")
    for reason, names in sorted(reasons.items(), key=lambda item: -len(item[1])):
        print(
            f"  {len(names):4}  {reason}: {', '.join(names[:limit])}{', ...' if limit and len(names) > limit else ''}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=RUNS, help="table of published runs to fit on")
    parser.add_argument("--write", action="store_true", help="store the constants with their errors")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--check", type=Path, metavar="FILE", help="hold the stored constants against a table")
    parser.add_argument("--sc21", action="store_true", help="the rows of arXiv 2104.04473 by the stored constants")
    parser.add_argument("--no-cross-validation", action="store_true", help="fit only")
    args = parser.parse_args()

    if args.check or args.sc21:
        report = check(args.check or args.runs, load_constants())
        if args.json:
            print(json.dumps(report, indent=1))
            return
        _print_check(report, ("sc21_t1", "sc21_t2") if args.sc21 else ("",))
        if not args.sc21:
            _print_excluded(report["excluded"])
            print()
            for group, summary in report["summary"].items():
                _print_summary(group, summary)
        return

    points, excluded = sort_runs(read_runs(args.runs))
    constants = fit_all(points)
    errors: dict[str, Any] = {"in_sample": in_sample(points, constants), "held_out": {}}
    wide = [p for p in points if p.group != "fp8"]
    if not args.no_cross_validation:
        errors["held_out"] = {
            "model": summarize(hold_out(wide, lambda p: p.size, constants, FOLDS)),
            "population": summarize(hold_out(wide, lambda p: p.population, constants, None)),
            "generation": summarize(hold_out(wide, lambda p: p.generation, constants, None)),
        }
    table = tabulate(points, constants)
    stored = {
        "version": 1,
        "provenance": {
            "command": "python benchmarks/fit_planner.py --write",
            "runs": args.runs.name,
            "rows": len(points),
            "date": datetime.date.today().isoformat(),
        },
        "errors": errors,
        "constants": dataclasses.asdict(constants),
    }
    if args.json:
        print(json.dumps({**stored, "populations": table, "excluded": excluded}, indent=1))
    else:
        _print_table(table)
        print()
        for group, summary in errors["in_sample"].items():
            _print_summary(f"fitted, {group}", summary)
        for name, summary in errors["held_out"].items():
            _print_summary(f"held out by {name}", summary)
        _print_excluded(excluded, 3)
        print()
        for name, value in dataclasses.asdict(constants).items():
            print(f"{name:24} {value if isinstance(value, dict) else format(value, '.4g')}")
    if args.write:
        SHIPPED.write_text(json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__":
    main()
