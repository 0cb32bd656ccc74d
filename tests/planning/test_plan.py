"""Plans: the accounting from estimates to MFU, days, energy and costs."""

import dataclasses
import json

import pytest
import tiny

from mtx.config import reader, schema
from mtx.planning.case import Case, Cluster
from mtx.planning.constants import Constants
from mtx.planning.hardware import GPUS
from mtx.planning.memory import PARTS
from mtx.planning.plan import GROUPS, USABLE, count_parameters, make_plan
from mtx.planning.timetable import make_timetable

CONTRACT = {
    "parameters", "memory_per_gpu_bytes", "gpu_memory_bytes", "fits", "step_seconds", "tokens_per_second",
    "model_tflops_per_gpu", "hardware_tflops_per_gpu", "mfu", "bubble_fraction", "days", "gpu_hours",
    "step_breakdown_seconds",
}  # fmt: skip


def make_case(gpus=8, **sections):
    sections = {"precision": {"compute": "bfloat16"}, "mesh": {"data": -1}, **sections}
    return Case.of(tiny.make_run(tiny.GPT, **sections), Cluster.of(GPUS["H100"], gpus))


@pytest.fixture(scope="module")
def flagship():
    run = reader.load("configs/runs/mt_nlg_530b.gin").run
    return make_plan(Case.of(run, Cluster.of(GPUS["H100"], 2240)), Constants(), price=2.0)


def test_the_flagship_has_its_published_parameters(flagship):
    assert flagship.parameters == flagship.active_parameters == 529_600_819_200


def test_groups_are_the_parts(flagship):
    assert sorted(part for parts in GROUPS.values() for part in parts) == sorted(PARTS)
    assert sum(flagship.memory_groups.values()) == flagship.memory.total == sum(flagship.memory.parts.values())


def test_rates_follow_from_the_step(flagship):
    tokens = 1920 * 2048
    flops_per_token = 6 * flagship.matmul_parameters + 12 * 2048 * 20480 * 105  # attention to all places
    assert flagship.tokens_per_second == pytest.approx(tokens / flagship.step_seconds)
    model = flops_per_token * tokens / flagship.step_seconds / 2240
    assert flagship.model_flops_per_gpu("full") == pytest.approx(model)
    assert flagship.mfu_model_full == pytest.approx(model / 989e12)
    assert flagship.hfu == pytest.approx(flagship.step.hardware_flops / flagship.step_seconds / 989e12)
    assert flagship.mfu_model_causal < flagship.mfu_model_full


def test_the_json_has_what_the_contract_names(flagship):
    document = json.loads(json.dumps(flagship.as_json(), allow_nan=False))
    assert document.keys() >= CONTRACT
    memory = document["memory_per_gpu_bytes"]
    assert set(memory) == {"parameters", "gradients", "optimizer", "activations", "other", "total"}
    assert sum(size for name, size in memory.items() if name != "total") == memory["total"]
    assert sum(document["step_breakdown_seconds"].values()) == pytest.approx(document["step_seconds"])


def test_the_whole_run_adds_up(flagship):
    assert 270e9 <= flagship.tokens < 270e9 + 1920 * 2048
    assert flagship.gpu_hours == pytest.approx(flagship.days * 24 * 2240)
    assert flagship.cost == pytest.approx(2 * flagship.gpu_hours)
    assert flagship.energy_kwh == pytest.approx(flagship.gpu_hours * 0.7)
    assert flagship.tokens_within(flagship.days) == pytest.approx(flagship.tokens, abs=2 * 1920 * 2048)


def test_small_batches_of_a_ramp_take_longer_per_token(flagship):
    without = flagship.steps * flagship.step_seconds * flagship.tokens / (flagship.steps * 1920 * 2048)
    assert flagship.days * 86400 > 1.001 * without


def test_a_timetable_sums_its_spans():
    ramp = schema.BatchRamp(start=2, increment=2, tokens=4 * 16 * 9)
    case = make_case(1, train={"batch_ramp": ramp, "global_batch_size": 8})
    timetable = make_timetable(case, lambda other: float(other.run.train.global_batch_size))
    sizes = [timetable.sizes.size(step) for step in range(40)]
    assert set(sizes) == {2, 4, 6, 8}
    for steps in (0, 1, 7, 40):
        assert timetable.seconds(steps) == pytest.approx(sum(sizes[:steps]))
        assert timetable.tokens_of(steps) == 16 * sum(sizes[:steps])
    for steps in range(40):
        assert timetable.steps_within(timetable.seconds(steps) + 0.5) == steps


@pytest.mark.parametrize(
    ("train", "tokens", "steps"),
    [
        ({"steps": 40, "tokens": None}, None, 40),
        ({"steps": None, "tokens": 1281}, None, 11),
        ({"steps": 40, "tokens": None}, 256, 2),
        ({"steps": None, "tokens": None}, None, None),
    ],
)
def test_how_long_a_run_is(train, tokens, steps):
    plan = make_plan(make_case(train=train), Constants(), tokens=tokens)
    assert plan.steps == steps
    assert plan.tokens == (None if steps is None else steps * 128)
    assert (plan.days is None) == (plan.as_json()["gpu_hours"] is None) == (steps is None)


def test_what_fits():
    case = make_case()
    total = make_plan(case, Constants()).memory.total
    for spare in (-1, 1):
        gpu = dataclasses.replace(GPUS["H100"], memory_bytes=round((total + spare * 1000) / USABLE))
        plan = make_plan(dataclasses.replace(case, cluster=Cluster.of(gpu, 8)), Constants())
        assert plan.fits == (spare > 0)
        assert plan.excess_bytes == pytest.approx(-1000 * spare, abs=2)


def test_active_parameters_are_those_of_a_tokens_own_experts():
    experts = {**tiny.GPT, "num_experts": 4, "experts_per_token": 1}
    total, active = count_parameters(tiny.make_run(experts))
    dense, _ = count_parameters(tiny.make_run(tiny.GPT))
    routers = tiny.GPT["num_layers"] * 4 * tiny.GPT["d_model"]
    assert active == dense + routers
    matrices = 8 * 32**2 * tiny.GPT["num_layers"]
    assert total - active == pytest.approx(3 * matrices, rel=0.05)  # biases of experts besides


def test_without_a_peak_there_is_no_mfu():
    plan = make_plan(make_case(precision={"compute": "float32"}), Constants())
    assert plan.peak_flops is plan.mfu_model_full is plan.hfu is None
    assert plan.model_flops_per_gpu("full") > 0


def test_slower_machines_take_longer(flagship):
    changes = {change.what: change for change in flagship.sensitivity}
    assert changes["network half as fast"].relative > 0 > changes["network twice as fast"].relative
    assert changes["matmul rate -10 %"].relative > 0.03
    for change in changes.values():
        assert change.step_seconds == pytest.approx(flagship.step_seconds * (1 + change.relative))


def test_trust_says_whose_measurements(flagship):
    assert "mtx itself has not been timed" in flagship.trust
    assert 0 < flagship.expected_error["median"] < flagship.expected_error["percentile_90"] < 1
    assert f"{flagship.expected_error['median']:.1%}" in flagship.trust
    assert "your own machine" in dataclasses.replace(flagship, calibrated=True).trust
    other = dataclasses.replace(flagship.case, software="megatron-core")
    assert "mtx itself" not in dataclasses.replace(flagship, case=other).trust
