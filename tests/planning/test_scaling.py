"""Scaling curves, and the size of model that a number of GPUs and days calls for."""

import dataclasses

import pytest
import tiny

from mtx.config import reader
from mtx.planning.case import Case, Cluster
from mtx.planning.constants import Constants
from mtx.planning.hardware import GPUS
from mtx.planning.plan import count_parameters
from mtx.planning.scaling import HOFFMANN, LAW, TEMPLATE, compute_optimal, resize, scale, strong, weak
from mtx.planning.step_time import estimate_time

CONSTANTS = Constants()
MODEL = {"vocab_size": 8192, "d_model": 1024, "num_layers": 4, "num_heads": 8, "max_seq_len": 1024}


def make_case(**train):
    train = {"seq_len": 1024, "global_batch_size": 64, **train}
    mesh = {"pipe": 2, "data": 4, "tensor": 2}
    run = tiny.make_run(MODEL, mesh=mesh, precision={"compute": "bfloat16"}, train={"scan_layers": None, **train})
    return Case.of(run, Cluster.of(GPUS["H100"], 16))


def test_strong_scaling_keeps_the_batch():
    points = strong(make_case(), constants=CONSTANTS)
    assert [point.num_gpus for point in points] == [4, 8, 16, 32, 64, 128]
    assert {point.global_batch_size for point in points} == {64}
    assert points[0].efficiency == 1
    efficiencies = [point.efficiency for point in points]
    assert efficiencies == sorted(efficiencies, reverse=True)
    assert points[2].step_seconds == pytest.approx(estimate_time(make_case(), CONSTANTS).seconds)
    assert points[2].tokens_per_second == pytest.approx(64 * 1024 / points[2].step_seconds)


def test_strong_scaling_ends_where_the_batch_does():
    counts = [point.num_gpus for point in strong(make_case(global_batch_size=12), constants=CONSTANTS)]
    assert counts == [4, 8, 16]


def test_weak_scaling_keeps_the_share_of_a_replica():
    points = weak(make_case(), constants=CONSTANTS)
    assert [point.global_batch_size / point.num_gpus for point in points] == [4] * len(points)
    assert points[-1].efficiency > strong(make_case(), constants=CONSTANTS)[-1].efficiency
    ratio = points[0].mfu / points[0].tokens_per_second * points[0].num_gpus
    assert points[-1].mfu == pytest.approx(ratio * points[-1].tokens_per_second / points[-1].num_gpus)


def test_numbers_of_gpus_can_be_chosen():
    points = strong(make_case(), [8, 15, 48, 64], CONSTANTS)
    assert [point.num_gpus for point in points] == [8, 64]  # 48 GPUs have 12 replicas, which do not divide 64
    assert set(scale(make_case(), CONSTANTS)) == {"strong", "weak"}


@pytest.mark.parametrize("law", [LAW, HOFFMANN])
def test_the_optimum_of_a_law_has_the_least_loss(law):
    for flops in (1e20, 1e24):
        best = law.optimal_parameters(flops)
        losses = [law.loss(factor * best, flops / 6 / best / factor) for factor in (0.9, 1.0, 1.1)]
        assert min(losses) == losses[1]


def test_the_law_agrees_with_what_its_paper_is_known_for():
    """70B parameters and 1.4T tokens at the budget of Gopher, 5.76e23 FLOPs."""
    assert LAW.optimal_parameters(5.76e23) == pytest.approx(70e9, rel=0.05)


@pytest.mark.parametrize("parameters", [1e8, 3e9, 1e11])
def test_a_model_is_resized_in_proportion(parameters):
    template = reader.load_text(TEMPLATE, "template").run
    model = resize(template, parameters).model
    assert count_parameters(resize(template, parameters))[1] == pytest.approx(parameters, rel=0.25)
    assert model.head_width == 128
    assert model.num_heads % 8 == 0
    if parameters > 1e9:
        assert model.d_model / model.num_layers == pytest.approx(128, rel=0.2)


def test_grouped_heads_and_the_width_of_the_mlp_keep_their_ratio():
    llama = {**tiny.LLAMA, "d_model": 1024, "num_heads": 8, "num_kv_heads": 2, "d_ff": 2816, "num_layers": 8}
    model = resize(tiny.make_run(llama), 2e9).model
    assert model.num_heads == 4 * model.num_kv_heads
    assert model.d_ff / model.d_model == pytest.approx(2.75, rel=0.05)


def test_the_compute_optimal_size_suits_the_flops_that_its_layout_gets():
    template = reader.load_text(TEMPLATE, "template", ["Train.global_batch_size = 64"]).run
    found = compute_optimal(template, Cluster.of(GPUS["H100"], 8), 10, constants=CONSTANTS)
    plan = found.plan
    assert plan.days == pytest.approx(10, rel=1e-3)
    assert plan.tokens / plan.active_parameters == pytest.approx(20, rel=0.4)
    assert plan.active_parameters == pytest.approx(LAW.optimal_parameters(found.flops), rel=0.2)
    assert plan.fits
    first, *others = found.alternatives()
    assert first.parameters == plan.active_parameters
    assert all(other.loss > first.loss - 0.01 for other in others)
    assert others[-1].tokens == pytest.approx(20 * others[-1].parameters)


def test_no_layout_no_size():
    template = reader.load_text(TEMPLATE, "template").run
    small = dataclasses.replace(GPUS["H100"], memory_bytes=2 * 2**30)
    assert compute_optimal(template, Cluster.of(small, 2), 100, constants=CONSTANTS) is None
