"""Fitting finds constants again, and what is shipped is what the script says of it."""

import csv
import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import pytest
from planning.test_step_time import plan_case

from mtx.planning.constants import SHIPPED, load_constants
from mtx.planning.fitting import LIMITS, fit
from mtx.planning.step_time import estimate_time

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "fit_planner.py"
CASES = [plan_case({"data": 8}, train={"microbatch_size": size, "global_batch_size": 64}) for size in (1, 4)] + [
    plan_case({"tensor": 8}),
    plan_case({"pipe": 4, "tensor": 2}),
    plan_case({"fsdp": 16}),
    plan_case(),
]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("fit_planner", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_constants_are_found_again():
    start = load_constants()
    truth = dataclasses.replace(
        start, nvlink_efficiency=0.5, quality={**start.quality, "mtx@hopper": 0.7, "typical@hopper": 0.9}
    )
    points = [(case, estimate_time(case, truth).seconds) for case in CASES]
    found = fit(points, start, ["nvlink_efficiency", "quality.mtx@hopper"], weights=[1e4] * len(points))
    assert found.nvlink_efficiency == pytest.approx(0.5, rel=0.01)
    assert found.quality_of("mtx", "hopper") == pytest.approx(0.7, rel=0.01)
    assert found.memory_efficiency == start.memory_efficiency


def test_a_misprint_does_not_bend_the_fit():
    start = load_constants()
    points = [(case, estimate_time(case, start).seconds) for case in CASES]
    points[0] = (points[0][0], 10 * points[0][1])
    found = fit(points, start, ["quality.mtx@hopper"], weights=[1e4] * len(points))
    assert found.quality_of("mtx", "hopper") == pytest.approx(start.quality_of("mtx", "hopper"), rel=0.05)


def test_what_is_shipped_is_inside_its_limits():
    constants = load_constants()
    for name, (low, high, _) in LIMITS.items():
        assert low <= getattr(constants, name) <= high, name
        assert name in {field.name for field in dataclasses.fields(constants)}


@pytest.mark.slow
def test_the_stored_errors_are_those_of_the_stored_constants(script):
    """And they are within what the project promises."""
    stored = json.loads(SHIPPED.read_text())["errors"]["in_sample"]
    points, _ = script.sort_runs(script.read_runs(script.RUNS))
    assert script.in_sample(points, load_constants()) == stored
    for group in ("bf16", "fp16"):
        assert stored[group]["median"] <= 0.06
        assert stored[group]["percentile_90"] <= 0.15


@pytest.mark.slow
def test_every_run_is_used_or_says_why_not(script):
    runs = script.read_runs(script.RUNS)
    points, excluded = script.sort_runs(runs)
    assert sorted([*(p.id for p in points), *excluded]) == sorted(run.id for run in runs)
    assert all(excluded.values())


ANCHORS = {
    "sc21_t1_1.7B": 0.06,
    "sc21_t1_7.5B": 0.06,
    "sc21_t2_ptd_174B_384": 0.06,
    "sc21_t2_ptd_529B_560": 0.06,
    "mlm_gpt3_example_1024": 0.06,
    "mlm_sep20_8B_A100_dp1": 0.06,
    "korthikanti_22B_full": 0.06,
    "korthikanti_22B_selective": 0.06,
    "korthikanti_175B_selective": 0.06,
    "dgxc_v25.04_llama3_8b_bf16_128": 0.06,
    "dgxc_v25.01.1_gpt3_175b_bf16_2048": 0.1,
    "dgxc_v25.02_nemotron4_15b_bf16_2048": 0.06,
    "titan_8b_8g_FSDP+compile": 0.06,
    "titan_a100_64_l2_13b_none": 0.06,
    "pax_new_5B_A100_bf16-TE": 0.1,
    "mcore_h100_weak_177B": 0.12,
}
"""Published runs that are known well, and what their seconds may be missed by."""


@pytest.fixture(scope="module")
def anchors(script, tmp_path_factory):
    """Read without the other rows, whose models would all have to be declared."""
    path = tmp_path_factory.mktemp("anchors") / "runs.csv"
    with open(script.RUNS, newline="") as source, open(path, "w", newline="") as target:
        rows = csv.DictReader(source)
        writer = csv.DictWriter(target, rows.fieldnames)
        writer.writeheader()
        writer.writerows(row for row in rows if row["id"] in ANCHORS)
    return {point.id: point for point in script.sort_runs(script.read_runs(path))[0]}


@pytest.mark.parametrize("name", ANCHORS)
def test_anchors(anchors, name):
    assert abs(anchors[name].error(load_constants())) < ANCHORS[name]
