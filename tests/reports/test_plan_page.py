"""The page of a plan has the plan's numbers, its pictures, and every reason of a search."""

import dataclasses
import pathlib
import re

import pytest
from pages import Reader
from tiny import GPT, make_run

from mtx.planning.case import Case, Cluster
from mtx.planning.hardware import GPUS
from mtx.planning.plan import make_plan
from mtx.planning.scaling import scale
from mtx.planning.search import Candidate, Rejection, SearchResult
from mtx.reports.plan_page import render_plan_page, write_plan_page
from mtx.reports.plan_pictures import draw_documentation, draw_plan_timeline, draw_search_frontier, name_layout
from mtx.reports.units import format_gib, format_seconds

ROOT = pathlib.Path(__file__).parents[2]
HOSTILE = "</table><script>alert('x')</script>"


def make_case(gpus=8, **sections):
    sections = {"mesh": {"pipe": 2, "data": gpus // 4, "tensor": 2}, "precision": {"compute": "bfloat16"}, **sections}
    return Case.of(make_run(GPT, **sections), Cluster.of(GPUS["H100"], gpus))


@pytest.fixture(scope="module")
def plan():
    return make_plan(make_case(), price=2.5)


def make_search(plan, *rejected):
    def candidate(case, seconds):
        step = dataclasses.replace(plan.step, parts={**plan.step.parts, "matmul": seconds})
        return Candidate(case, plan.memory, step)

    ranked = tuple(candidate(plan.case, seconds) for seconds in (0.5, 0.75))
    return SearchResult(run=plan.case.run, ranked=ranked, rejected=rejected, closest=None, seconds=0.1)


def test_the_page_has_the_numbers_of_the_plan(plan):
    page = Reader(render_plan_page(plan))
    rows: dict[str, list[str]] = {}
    for name, *cells in page.rows:
        rows.setdefault(name, cells)  # memory comes before time, in which parts have the same names
    for part, size in plan.memory.parts.items():
        assert rows[part.replace("_", " ")][0] == format_gib(size)
    assert rows["total"][0] == format_gib(plan.memory.total)
    assert rows["step"][0] == format_seconds(plan.step_seconds)
    assert rows["mfu_model_full"][2] == f"{plan.mfu_model_full:.1%}"
    assert rows["mfu_model_causal"][2] == f"{plan.mfu_model_causal:.1%}"
    assert rows["hfu"][2] == f"{plan.hfu:.1%}"
    assert rows["steps"][0] == "4"
    assert rows["cost"] == [f"{plan.cost:,.0f}", "at 2.5 per GPU-hour"]
    for change in plan.sensitivity:
        assert rows[change.what] == [format_seconds(change.step_seconds), f"{change.relative:+.1%}"]
    assert rows["peak in bfloat16"][0] == "989 TFLOP/s"


def test_the_page_says_that_times_are_estimates(plan):
    assert plan.trust in render_plan_page(plan).replace("&#x27;", "'")
    measured = dataclasses.replace(plan, calibrated=True)
    assert measured.trust in render_plan_page(measured)
    assert measured.trust != plan.trust


def test_the_compiler_stands_beside_the_plan(plan):
    page = render_plan_page(plan, compiled={"arguments": 3 << 20, "temporaries": 1 << 20})
    assert "compiler: arguments 3 MiB, 75.0%" in page
    assert "compiler: arguments" not in render_plan_page(plan)


@pytest.mark.parametrize("mesh", [{"pipe": 2, "data": 2, "tensor": 2}, {"fsdp": 8}, {"data": 8}])
def test_the_timeline_is_as_long_as_the_step(mesh):
    plan = make_plan(make_case(mesh=mesh))
    picture = draw_plan_timeline(plan)
    units = {"s": 1.0, "ms": 1e-3, "\N{MICRO SIGN}s": 1e-6}
    forward, backward = (
        float(number) * units[unit]
        for number, unit in re.findall(r">(?:forward|backward) ([\d.]+) (\w+)(?: a unit)?</text>", picture)
    )
    case, parts = plan.case, plan.step.parts
    ticks = (case.num_microbatches + case.sizes["pipe"] - 1) * (forward + backward)
    tail = plan.step.seconds - ticks
    assert -0.01 * ticks <= tail <= parts["data"] + parts["optimizer"] + parts["launch"] + 0.01 * ticks
    assert forward + backward >= 0.99 * (plan.step.forward_s + plan.step.backward_s)
    assert backward / forward == pytest.approx(plan.step.backward_s / plan.step.forward_s, rel=0.03)


def test_the_search_names_its_best_and_every_reason(plan):
    too_much = Candidate(plan.case, plan.memory, dataclasses.replace(plan.step))
    search = make_search(
        plan,
        Rejection({"Mesh.tensor": 3}, "refused: Mesh.tensor", "3 does not divide 4 heads"),
        Rejection({"Mesh.tensor": 3, "Mesh.data": 2}, "refused: Mesh.tensor", "3 does not divide 4 heads"),
        Rejection({"Mesh.tensor": 5}, "refused: Mesh.tensor", "5 does not divide 4 heads"),
        Rejection({"Mesh.data": 8}, "does not fit", "needs 90 GiB", too_much),
    )
    page = render_plan_page(plan, search)
    rows = Reader(page).rows
    assert ["2", "3 does not divide 4 heads", "Mesh.tensor = 3"] in rows
    assert ["1", "5 does not divide 4 heads", "Mesh.tensor = 5"] in rows
    assert "Rejected: 3 layouts, refused: Mesh.tensor" in page
    best = search.ranked[0]
    assert [
        "1",
        format_seconds(best.step.seconds),
        format_gib(best.memory.total),
        name_layout(best.case),
    ] in rows
    picture = draw_search_frontier(search)
    assert "2 fit" in picture
    assert "1 do not" in picture
    assert "needs 90 GiB" in picture


def test_a_search_that_finds_nothing_says_what_came_closest(plan):
    closest = Rejection({"Mesh.data": 8}, "does not fit", "needs 90 GiB", make_search(plan).ranked[0])
    search = dataclasses.replace(make_search(plan, closest), ranked=(), closest=closest)
    page = render_plan_page(plan, search)
    assert "Closest: needs 90 GiB" in page
    assert "0 fit" in page
    nothing = dataclasses.replace(search, rejected=(Rejection({}, "refused", "no"),), closest=None)
    assert "frontier" not in render_plan_page(plan, nothing)


def test_scaling_has_its_curves_and_its_table(plan):
    scaling = scale(plan.case)
    page = render_plan_page(plan, scaling=scaling)
    rows = Reader(page).rows
    for kind, points in scaling.items():
        assert len(points) > 1
        found = [row for row in rows if row[0] == kind]
        assert [row[1] for row in found] == [f"{point.num_gpus:,}" for point in points]
    assert page.count("perfect scaling from the first point") == 2


def test_a_layout_in_a_few_words():
    case = make_case(train={"microbatch_size": 2, "recompute": "full"})
    assert name_layout(case) == "pipe 2, data 2, tensor 2, microbatch 2, full recompute"
    assert name_layout(make_case(mesh={"data": 8})) == "data 8, microbatch 1, no recompute"


def test_one_gpu_and_a_format_without_a_peak():
    plan = make_plan(make_case(1, mesh={}, precision={"compute": "float32"}))
    page = Reader(render_plan_page(plan, scaling=scale(plan.case)))
    assert {row[0]: row for row in page.rows}["hfu"][3] == "\N{EN DASH}"


def test_hostile_names_stay_text_and_the_page_loads_nothing(plan, tmp_path):
    gpu = dataclasses.replace(plan.case.cluster.gpu, name=HOSTILE)
    case = dataclasses.replace(plan.case, cluster=dataclasses.replace(plan.case.cluster, gpu=gpu))
    search = make_search(plan, Rejection({HOSTILE: HOSTILE}, HOSTILE, HOSTILE))
    write_plan_page(tmp_path / "plan.html", dataclasses.replace(plan, case=case), search)
    page = (tmp_path / "plan.html").read_text()
    assert "script" not in Reader(page).tags
    assert not re.search(r"(src|href)\s*=|url\((?!#)|@import", page)
    assert [path.name for path in tmp_path.iterdir()] == ["plan.html"]


@pytest.mark.slow
def test_documentation_shows_what_is_drawn():
    for file, picture in draw_documentation(ROOT).items():
        committed = (ROOT / "docs/pictures" / file).read_text()
        assert committed == picture, f"{file}: python -m mtx.reports.plan_pictures docs/pictures"
