"""A study without devices: its points, what is run again, its rows, its table, and what it tells the planner."""

import dataclasses
import json
import math

import pytest
from programs import ROOT
from tiny import GPT

from mtx.config.study import load_study
from mtx.errors import UserError
from mtx.evaluation import study
from mtx.evaluation.study_calibration import calibrate
from mtx.evaluation.study_probe import Machine
from mtx.evaluation.study_run import Limits, make_partial
from mtx.evaluation.study_table import format_study
from mtx.planning.constants import Constants
from mtx.planning.step_time import estimate_time
from mtx.reports.study_page import render_study_page

BASE = "".join(f"Model.{name} = {value!r}\n" for name, value in GPT.items() if name not in ("d_model", "num_heads"))
STUDY = f"""
{BASE}
Train.seq_len = 16
Train.global_batch_size = 8
Train.steps = 100
Train.eval_batches = 3
Data.train = {{'no/store': 1.0}}
Data.validation = {{'v': 'no/store'}}
Study.simulated = True
Study.tokens = [1e6]
Study.sizes = {{'a': {{'Model.d_model': 32, 'Model.num_heads': 4}}, 'b': {{'Model.d_model': 24, 'Model.num_heads': 2}}}}
Study.layouts = {{'alone': {{'Mesh.data': 1}}, 'tensor': {{'Mesh.tensor': 2, 'Mesh.data': 1}}}}
"""


def make_machine(count, simulated=True):
    rate = 1e11 / count
    return Machine(
        device_kind="cpu", num_devices=count, simulated=simulated, host="h", cores=2, memory_bytes=2**34 // count,
        matmul_flops={"float32": rate, "bfloat16": rate}, memory_bandwidth=1e10 / count, jax="0", time=0.0,
    )  # fmt: skip


@pytest.fixture
def place(tmp_path):
    machines = {count: make_machine(count) for count in (1, 2, 4)}
    return study.Place(tmp_path / "study", lambda count: {}, None, {**machines, None: make_machine(1, False)})


def load(tmp_path, *overrides, text=STUDY):
    path = tmp_path / "study.gin"
    path.write_text(text)
    return load_study(path, overrides)


def record(task, **values):
    measured = {
        "step_seconds": 0.5, "step_seconds_min": 0.4, "step_seconds_max": 0.6, "steps": 3, "tokens_per_second": 256.0,
        "memory_bytes": 10**6, "memory_kind": "compiler", "compile_seconds": 1.0, "seconds": 9.0, "loss_first": 2.0,
        "loss_last": 1.0,
    }  # fmt: skip
    line = {
        "time": 5.0, "config_digest": task.digest, "name": task.point.name, "devices": task.plan.num_gpus,
        "run_dir": "points/x/run", "machine": dataclasses.asdict(task.machine), "measured": measured, "failure": None,
        "reason": None, **values,
    }  # fmt: skip
    return line


def test_points_are_sizes_times_layouts(tmp_path):
    plan = load(tmp_path)
    assert [point.name for point in plan.points] == ["a, alone", "a, tensor", "b, alone", "b, tensor"]
    run = plan.points[3].config.run
    assert (run.model.d_model, run.mesh.tensor, run.train.seq_len) == (24, 2, 16)
    assert plan.points[0].config.provenance["Model.d_model"].place.endswith("study.gin:15")


def test_pairs_files_and_the_command_line(tmp_path):
    (tmp_path / "sizes").mkdir()
    (tmp_path / "sizes/large.gin").write_text("Model.d_model = 64\nModel.num_heads = 4\n")
    text = STUDY + "Study.points = [('large', 'data 2'), ('large', 'data 2')]\n"
    sizes = "Study.sizes = {'large': 'sizes/large.gin'}"
    text = "\n".join(sizes if line.startswith("Study.sizes") else line for line in text.splitlines())
    text = text.replace(
        "{'alone': {'Mesh.data': 1}, 'tensor': {'Mesh.tensor': 2, 'Mesh.data': 1}}", "[{'Mesh.data': 2}]"
    )
    plan = load(tmp_path, "Model.d_model = 128", "Study.steps = 7", text=text)
    (point,) = plan.points
    assert (point.name, plan.study.steps) == ("large, data 2", 7)
    assert (point.config.run.model.d_model, point.config.run.mesh.data) == (128, 2)


@pytest.mark.parametrize(("line", "said"), [
    ("Study.step = 3", "Study has no field 'step'; did you mean steps"),
    ("Study.steps = 0", "Study.steps must be an integer >= 1, not 0"),
    ("Study.steps = %N", "Study.steps takes a literal, not %N"),
    ("Study.points = [('a', 'alne')]", "'alne' is not in Study.layouts; did you mean alone?"),
    ("Study.points = ['a']", "Study.points must be [('size', 'layout'), ...]"),
    ("Study.sizes = {'a': 'no.gin'}", "no file"),
    ("Study.sizes = {'a': 3}", "'a' must be a 'file.gin' or {'Class.field': value}, not 3"),
    ("Study.sizes = {'a': {'d_model': 3}}", "'a': 'd_model' is no 'Class.field'"),
    ("Study.sizes = []", "Study.sizes must be {'name':"),
    ("Study.layouts = {'x': {'Mesh.tensr': 2}}", "Mesh has no field 'tensr'; did you mean tensor?"),
    ("Study.layouts = {'x': {'Mesh.tensor': 'two'}}", "Mesh.tensor must be an integer >= -1, not 'two'"),
])  # fmt: skip
def test_mistakes_name_their_line(tmp_path, line, said):
    name = line.split(" =")[0]
    kept = [kept for kept in STUDY.splitlines() if not kept.startswith(name + " ")]
    text = "\n".join([*kept, line]) + "\n"
    with pytest.raises(UserError) as caught:
        load(tmp_path, text=text)
    assert said in str(caught.value)
    assert f"study.gin:{len(text.splitlines())}: " in str(caught.value)
    assert str(caught.value).count(said) == 1


def test_contradictions_are_a_point_that_fails_unless_all_do(tmp_path, place):
    entries = "{'a': {'Model.d_model': 32, 'Model.num_heads': 4}, 'odd': {'Model.d_model': 32, 'Model.num_heads': 5}}"
    sizes = f"Study.sizes = {entries}"
    plan = load(tmp_path, sizes)
    document = study.make_document(plan, study.make_tasks(plan, place), place, name="n", config="c")
    statuses = [(row["name"], row["status"], row["failure"]) for row in document["points"]]
    assert statuses[2] == ("odd, alone", "failed", "misfit")
    assert statuses[0] == ("a, alone", "waiting", None)
    assert "does not divide by Model.num_heads = 5" in document["points"][2]["reason"]
    assert "odd, alone" in render_study_page(document)
    with pytest.raises(UserError, match="does not divide"):
        load(tmp_path, "Model.num_heads = 5")


def test_misfits_are_found_before_anything_runs(tmp_path, place):
    plan = load(tmp_path, "Study.layouts = {'four': {'Mesh.tensor': 4, 'Mesh.data': 1}}")
    fits, misfit = study.make_tasks(plan, place)
    assert fits.runs
    assert not misfit.runs
    assert "Model.num_heads" in misfit.reason
    place.machines[1] = dataclasses.replace(make_machine(1), memory_bytes=2**20)
    too_large = study.make_tasks(load(tmp_path), place)[0]
    assert not too_large.runs
    assert too_large.reason.startswith("by its plan it takes ")


def test_points_wait_for_devices_that_are_not_there(tmp_path, place):
    plan = load(tmp_path, "Study.simulated = False", "Cluster.gpu = 'H100'")
    alone, tensor = study.make_tasks(plan, place)[:2]
    assert alone.runs
    assert (tensor.runs, tensor.waits, tensor.reason) == (False, True, "needs 2 devices, and here are 1")
    assert tensor.plan.case.cluster.gpu.name == "H100"
    planned = study.make_tasks(plan, study.Place(place.folder, place.environment), only_plan=True)  # probes nothing
    assert {task.plan.case.cluster.gpu.name for task in planned} == {"H100"}
    with pytest.raises(UserError, match="H1OO"):
        study.make_tasks(load(tmp_path, "Study.simulated = False", "Cluster.gpu = 'H1OO'"), place, only_plan=True)


def test_shipped_studies(place):
    laptop = load_study(ROOT / "configs/studies/laptop.gin")
    assert [task.point.name for task in study.make_tasks(laptop, place) if task.reason] == ["small, tensor 4"]
    sc21 = load_study(ROOT / "configs/studies/sc21_weak_scaling.gin")
    tasks = study.make_tasks(sc21, place, only_plan=True)
    gpus = [32, 64, 128, 256, 512, 1024, 1536, 1920, 2520, 3072]
    assert [(task.plan.num_gpus, task.plan.fits, task.reason) for task in tasks] == [(n, True, None) for n in gpus]
    sizes = [task.plan.parameters / 1e9 for task in tasks]
    assert [f"{size:.1f}B" for size in sizes[:-1]] == [task.point.size for task in tasks[:-1]]


def test_what_has_a_line_is_not_run_again(tmp_path, place):
    plan = load(tmp_path)
    first, second, *_ = study.make_tasks(plan, place)
    place.folder.mkdir()
    lines = [record(first), record(second, measured=None, failure="crash", reason="it broke")]
    torn = json.dumps(record(first))[:40]
    (place.folder / study.RECORDS).write_text("".join(json.dumps(line) + "\n" for line in lines) + torn)
    assert [task.runs for task in study.make_tasks(plan, place)] == [False, False, True, True]
    assert [task.runs for task in study.make_tasks(plan, place, retry=True)] == [False, True, True, True]
    other = load(tmp_path, "Train.global_batch_size = 16")
    assert [task.runs for task in study.make_tasks(other, place)] == [True] * 4
    longer = load(tmp_path, "Study.steps = 50")
    assert [task.runs for task in study.make_tasks(longer, place)] == [False, False, True, True]


def test_rows_are_what_was_measured(tmp_path, place):
    plan = load(tmp_path)
    tasks = study.make_tasks(plan, place)
    tasks[1].record = record(tasks[1])
    document = study.make_document(plan, tasks, place, name="n", config="c")
    json.dumps(document, allow_nan=False)
    assert document["counts"] == {"measured": 1, "failed": 0, "waiting": 3}
    row = document["points"][1]
    achieved, plan_of_point = row["achieved"], tasks[1].plan
    flops = plan_of_point.flops_per_token["full"] * 256.0 / 2
    assert math.isclose(achieved["model_tflops_per_device"] * 1e12, flops)
    assert math.isclose(achieved["mfu_model_full"], flops / 5e10)
    assert math.isclose(achieved["aggregate_pflops"] * 1e15, 2 * flops)
    assert achieved["peak_kind"] == "measured matmul"
    assert math.isclose(achieved["hfu"], plan_of_point.step.hardware_flops / 0.5 / 5e10)
    assert [entry["tokens"] for entry in achieved["train_days"]] == [1e6, 100 * 8 * 16]
    assert math.isclose(achieved["train_days"][0]["days"], 1e6 / 256.0 / 86400)
    assert math.isclose(row["error"]["step_seconds"], plan_of_point.step.seconds / 0.5 - 1)
    assert math.isclose(row["error"]["memory_bytes"], plan_of_point.memory.compiled / 10**6 - 1)
    text = format_study(document)
    assert "simulated" in text.splitlines()[0]
    assert "2*" in text
    assert "a, tensor" in render_study_page(document)


def test_partial_runs_evaluate_and_save_nothing(tmp_path):
    run = load(tmp_path).points[0].config.run
    partial = make_partial(run, Limits(warmup_steps=2, steps=3, seconds=1))
    assert (partial.train.steps, partial.train.log_every, partial.data.validation) == (100, 1, {})
    assert make_partial(run, Limits(warmup_steps=50, steps=50, seconds=1)).train.steps == 210
    assert partial.model == run.model


def test_calibration_finds_the_machine_that_the_points_come_from(tmp_path, place):
    plan = load(tmp_path)
    tasks = study.make_tasks(plan, place)
    with pytest.raises(UserError, match="nothing to write"):
        calibrate(tasks, tmp_path / "c.json")
    start = Constants(step_launch_s=0.0)  # which a slower machine would not take longer for
    for task in tasks:
        seconds = 1.7 * estimate_time(task.plan.case, start).seconds
        task.record = record(task)
        task.record["measured"]["step_seconds"] = seconds
    calibration, summary = calibrate(tasks, tmp_path / "c.json", start)
    assert summary["points"] == 4
    assert len(summary["free"]) == 1
    assert math.isclose(summary["median_error_before"], 1 - 1 / 1.7)
    assert summary["median_error_after"] < 0.02
    assert calibration.gpu.name == "cpu (2 simulated devices)"
    assert [point["name"] for point in calibration.points] == [task.point.name for task in tasks]
