"""The page of a study says what was measured and planned, what failed, and loudly what was simulated."""

import copy
import re

import pytest
from pages import Reader

from mtx.reports.study_page import render_study_page, write_study_page

HOSTILE = "</table><script>alert('x')</script>"

POINT = {
    "name": "tiny, data 2", "size": "tiny", "layout": "data 2", "config_digest": "1f", "status": "measured",
    "failure": None, "reason": None, "run_dir": "points/a", "simulated": False, "parameters": 2_566_272, "heads": 6,
    "hidden": 192, "layers": 4, "vocab": 4096, "experts": 0, "seq_len": 128, "batch": 8, "microbatch": 2,
    "num_microbatches": 1, "recompute": "none", "precision": "float32", "devices": 2,
    "mesh": {"pipe": 1, "data": 2, "fsdp": 1, "expert": 1, "context": 1, "tensor": 1}, "virtual_stages": 1, "zero": 2,
    "plan": {
        "step_seconds": 0.275, "step_parts": {"matmul": 0.2, "data": 0.075}, "memory_bytes": 3 << 30,
        "memory_compiled_bytes": 2 << 30, "memory_parts": {"parameters": 1 << 30, "activations": 2 << 30},
        "fits": True, "bubble_fraction": 0.0, "hardware_flops": 1e12,
    },
    "measured": {
        "step_seconds": 0.25, "step_seconds_min": 0.24, "step_seconds_max": 0.29, "steps": 10,
        "tokens_per_second": 4096.0, "memory_bytes": 1 << 30, "memory_kind": "compiler", "compile_seconds": 2.5,
        "seconds": 12.0, "loss_first": 8.3, "loss_last": 8.1,
    },
    "achieved": {
        "model_tflops_per_device": 1.5, "model_tflops_per_device_causal": 1.2, "hardware_tflops_per_device": 1.6,
        "aggregate_pflops": 0.003, "peak_tflops": 4.0, "peak_kind": "measured matmul", "mfu_model_full": 0.375,
        "mfu_model_causal": 0.3, "hfu": 0.4, "train_days": [{"tokens": 3e11, "days": 847.0}],
    },
    "error": {"step_seconds": 0.1, "memory_bytes": 1.0},
}  # fmt: skip
NOTHING = {"plan": None, "measured": None, "achieved": None, "error": None}


def make_document(*points, **changes):
    return {
        "version": 1,
        "name": "laptop",
        "config": "configs/studies/laptop.gin",
        "ended": 1795416241.2,
        "machine": {
            "device_kind": "cpu", "num_devices": 4, "simulated": False, "host": "node1", "cores": 2,
            "memory_bytes": 8e9, "in_table": False,
        },
        "simulated": any(point["simulated"] for point in points),
        "conventions": {"flops": "Model FLOPs count once."},
        "settings": {"steps": 10, "warmup_steps": 2, "minutes": 5.0},
        "counts": {"measured": len(points), "failed": 0, "waiting": 0},
        "calibration": None,
        "points": list(points),
        **changes,
    }  # fmt: skip


def make_point(**changes):
    return {**copy.deepcopy(POINT), **changes}


def test_the_table_of_the_field_and_the_plan_against_it():
    rows = Reader(render_study_page(make_document(make_point()))).rows
    field = dict(zip(rows[0], rows[1]))
    assert field["point"] == "tiny, data 2"
    assert field["params"] == "2.57M"
    assert (field["heads"], field["hidden"], field["layers"], field["TP"], field["PP"]) == ("6", "192", "4", "1", "1")
    assert (field["devices"], field["batch"], field["a device"]) == ("2", "8", "1.5 TFLOP/s")
    assert (field["of peak"], field["HFU"], field["aggregate"]) == ("37.5%", "40.0%", "3 TFLOP/s")
    assert ["tiny, data 2", "2", "847d 00h"] in rows
    against = next(row for row in rows if "250 ms" in row)
    assert against[1:] == ["250 ms", "240 ms", "290 ms", "275 ms", "+10.0%", "1 GiB", "compiler", "2 GiB", "+100.0%"]


def test_memory_of_a_device_is_held_against_the_whole_plan():
    point = make_point()
    point["measured"]["memory_kind"] = "device"
    page = render_study_page(make_document(point))
    assert "measured 1, planned 3 (+200.0%)" in page


def test_plans_and_measurements_share_curves():
    bigger = make_point(name="tiny, data 4", devices=4)
    bigger["measured"]["tokens_per_second"] = 7000.0
    page = render_study_page(make_document(make_point(), bigger))
    assert "tiny, measured: 7k tokens/s on 4 devices" in page
    assert f"tiny: {8 * 128 / 0.275 / 1000:.2f}k tokens/s on 2 devices" in page
    assert "tiny: 34.1% MFU (model FLOPs, full attention) on 2 devices" in page
    assert "tiny, data 2: measured 0.25, planned 0.275 (+10.0%)" in page


def test_what_was_not_measured_says_why():
    failed = make_point(
        name="huge", status="failed", failure="out of memory", reason="2 GB were there, 3 needed", **NOTHING
    )
    refused = make_point(name="bad", status="failed", failure="misfit", reason="6 heads over 4", **NOTHING)
    refused["mesh"]["tensor"], refused["parameters"], refused["microbatch"] = -1, None, None
    waiting = make_point(name="later", status="waiting", reason="needs 8 devices", **NOTHING)
    rows = Reader(render_study_page(make_document(failed, refused, waiting))).rows
    assert ["huge", "out of memory", "2 GB were there, 3 needed"] in rows
    assert ["bad", "misfit", "6 heads over 4"] in rows
    assert ["later", "waiting", "needs 8 devices"] in rows
    (row,) = (row for row in rows if row[0] == "bad misfit")
    assert row[1] == row[5] == "\N{EN DASH}"


def test_simulated_devices_are_said_loudly_and_only_then():
    point = make_point(simulated=True)
    page = render_study_page(make_document(point))
    assert re.search(r'class="loud">Simulated devices: 1 of 1 point', page)
    assert page.count("on simulated devices</figcaption>") == 4
    assert "simulated" in next(row for row in Reader(page).rows if row[0].startswith("tiny"))[0]
    assert "imulated" not in render_study_page(make_document(make_point())).split("</style>")[1]


def test_calibration_says_what_it_gained():
    calibration = {"file": "c", "free": [], "points": 5, "median_error_before": 0.31, "median_error_after": 0.04}
    page = render_study_page(make_document(make_point(), calibration=calibration))
    assert "before 31.0%, on 5 points" in page
    assert "<dd>4.0%</dd>" in page


@pytest.mark.parametrize("points", [[], [make_point(**NOTHING, status="waiting")]])
def test_a_study_that_has_not_begun(points):
    page = render_study_page(make_document(*points, ended=None))
    Reader(page)
    assert "not ended" in page


def test_unknown_peaks_memory_and_plans_leave_dashes():
    point = make_point(plan=None, error=None)
    point["achieved"] |= dict.fromkeys(("peak_tflops", "peak_kind", "mfu_model_full", "hfu"))
    point["measured"] |= {"memory_bytes": None, "memory_kind": None}
    page = render_study_page(make_document(point))
    field = dict(zip(*Reader(page).rows[:2]))
    assert field["of peak"] == field["HFU"] == "\N{EN DASH}"
    assert "Plan against measured" not in page


def test_hostile_names_stay_text_and_the_page_loads_nothing(tmp_path):
    point = make_point(name=HOSTILE, size=HOSTILE)
    failed = make_point(name=HOSTILE, status="failed", failure="crash", reason=HOSTILE, **NOTHING)
    machine = make_document()["machine"] | {"device_kind": HOSTILE, "host": HOSTILE}
    document = make_document(point, failed, name=HOSTILE, config=HOSTILE, machine=machine, conventions={"x": HOSTILE})
    write_study_page(tmp_path / "study.html", document)
    page = (tmp_path / "study.html").read_text()
    assert "script" not in Reader(page).tags
    assert not re.search(r"(src|href)\s*=|url\((?!#)|@import", page)
    assert [path.name for path in tmp_path.iterdir()] == ["study.html"]
