"""The time of a step: its limits, what makes it longer, and published runs that are known well."""

import dataclasses
import math

import pytest
from tiny import make_run

from mtx.errors import UserError
from mtx.planning.case import Case, Cluster
from mtx.planning.constants import Constants, load_constants, read_constants
from mtx.planning.flops import model_flops_per_token
from mtx.planning.hardware import GPUS
from mtx.planning.hlo_products import Product
from mtx.planning.products import fastest_flops, product_seconds
from mtx.planning.step_time import PARTS, estimate_time

GPT = {"vocab_size": 51200, "d_model": 4096, "num_layers": 32, "num_heads": 32, "max_seq_len": 2048}
EXPERTS = {**GPT, "num_experts": 8, "experts_per_token": 2}
PERFECT = Constants(
    matmul_efficiency=1.0, matmul_fill=0.0, attention_efficiency=1.0, memory_efficiency=1e9, nvlink_efficiency=1e9,
    network_efficiency=1e9, nvlink_latency_s=0.0, network_latency_s=0.0, layer_launch_s=0.0, step_launch_s=0.0,
)  # fmt: skip


def plan_case(mesh=None, *, model=GPT, gpu="H100", software="mtx", cluster=None, **sections):
    mesh = mesh or {"data": 1}
    sections.setdefault("precision", {})
    sections["precision"] = {"compute": "bfloat16", **sections["precision"]}
    train = {"seq_len": 2048, "global_batch_size": 64, "microbatch_size": 1, **sections.pop("train", {})}
    run = make_run(model, mesh=mesh, train=train, **sections)
    return Case.of(run, Cluster.of(GPUS[gpu], math.prod(mesh.values()), **(cluster or {})), software, check=False)


def seconds(*args, constants=None, **kwargs):
    return estimate_time(plan_case(*args, **kwargs), constants).seconds


def model_flops(case, attention="full"):
    whole = case.declared.definition.whole
    per_token = model_flops_per_token(case.run.model, whole.params, whole.axes, case.run.train.seq_len, attention)
    return per_token * case.tokens_per_step


def test_without_losses_it_is_the_roofline():
    """Products in whole tiles at the fastest rate; the attention kernel does 3.5 of 3 causal passes."""
    case = plan_case()
    time = estimate_time(case, PERFECT)
    attention = 12.0 * 2048 * 4096 * 32 * case.tokens_per_step
    rate = fastest_flops(GPUS["H100"], "bfloat16")
    least = ((model_flops(case) - attention) + attention / 2 * 3.5 / 3) / rate
    # Of 132 multiprocessors the last wave leaves some idle: at most a third here.
    assert least <= time.seconds <= 1.15 * least
    assert time.parts["attention"] == pytest.approx(attention / 2 * 3.5 / 3 / rate)


@pytest.mark.parametrize("software", ["mtx", "megatron-2021", "torchtitan"])
@pytest.mark.parametrize(
    "mesh", [{"data": 8}, {"fsdp": 8}, {"pipe": 4, "tensor": 2}, {"context": 4, "data": 2}], ids=str
)
def test_the_parts_sum_to_the_seconds_and_none_is_negative(mesh, software):
    time = estimate_time(plan_case(mesh, software=software))
    assert set(time.parts) == set(PARTS)
    assert min(time.parts.values()) >= 0
    assert time.seconds == pytest.approx(sum(time.parts.values()))


def test_hardware_flops_are_those_of_the_papers():
    """72 B s L h^2 (1 + s/6h + V/12Lh), and 96 B s L h^2 (1 + s/6h + V/16Lh) with full recomputation: 2104.04473."""
    B, s, L, h, V = 64, 2048, 32, 4096, 51200
    for recompute, flops in {
        "none": 72 * B * s * L * h**2 * (1 + s / (6 * h) + V / (12 * L * h)),
        "full": 96 * B * s * L * h**2 * (1 + s / (6 * h) + V / (16 * L * h)),
        "selective": 72 * B * s * L * h**2 * (1 + 2 * s / (9 * h) + V / (12 * L * h)),
    }.items():
        case = plan_case({"data": 4}, train={"recompute": recompute, "attention": "xla"})
        assert estimate_time(case).hardware_flops == pytest.approx(flops / 4, rel=1e-9)
    fused = plan_case({"data": 4}, train={"recompute": "selective"})  # cuDNN's attention is kept, not repeated
    for case in (fused, plan_case({"data": 4})):
        assert estimate_time(case).hardware_flops == pytest.approx(model_flops(plan_case()) / 4)


@pytest.mark.parametrize(
    "mesh", [{"data": 16}, {"fsdp": 16}, {"pipe": 2, "data": 8}, {"tensor": 16}, {"context": 16}], ids=str
)
def test_a_slower_network_never_helps(mesh):
    times = [seconds(mesh, cluster={"nic_bandwidth": b}) for b in (1e9, 1e10, 1e11)]
    assert times == sorted(times, reverse=True)
    assert times[0] > times[-1]


@pytest.mark.parametrize("worse", ["matmul_efficiency", "memory_efficiency", "attention_efficiency"])
def test_less_efficient_is_slower(worse):
    constants = load_constants()
    less = dataclasses.replace(constants, **{worse: getattr(constants, worse) / 2})
    assert seconds(constants=less) > 1.02 * seconds(constants=constants)


def test_bubbles_grow_with_fewer_microbatches_and_shrink_with_chunks():
    def plan(batch, chunks=1):
        pipeline = {"virtual_stages": chunks}
        return estimate_time(plan_case({"pipe": 4}, train={"global_batch_size": batch}, pipeline=pipeline))

    assert plan(8).bubble_fraction == 3 / 8
    assert plan(8, 2).bubble_fraction == 3 / 16
    assert plan(8).seconds / 8 > 1.1 * plan(32).seconds / 32
    assert plan(8, 2).parts["bubble"] < 0.7 * plan(8).parts["bubble"]


def test_in_lockstep_everybody_waits_for_the_longest_stage():
    even = seconds({"pipe": 4})
    uneven = seconds({"pipe": 4}, model={**GPT, "num_layers": 33})
    assert uneven == pytest.approx(even * 9 / 8, rel=0.03)


@pytest.mark.parametrize(
    ("recompute", "share"),
    [("full", (0.17, 0.22)), ("selective", (0.02, 0.1)), ("none", (0, 0))],  # full: but for a layer's last product
)
def test_recomputation_costs_what_it_repeats(recompute, share):
    time = estimate_time(plan_case(train={"recompute": recompute}))
    assert share[0] <= time.parts["recompute"] / time.seconds <= share[1]


def test_attention_that_cudnn_refuses_goes_through_memory():
    fused = estimate_time(plan_case(gpu="A100-80"))
    heads = estimate_time(plan_case(gpu="A100-80", model={**GPT, "num_heads": 16}))  # head_dim 256: Hopper only
    assert heads.parts["attention"] > 1.5 * fused.parts["attention"]
    assert seconds(model={**GPT, "num_heads": 16}) == pytest.approx(seconds(), rel=0.02)


def test_experts_cost_their_tokens_products_and_exchanges():
    dense, routed = (estimate_time(plan_case({"expert": 8}, model=model)) for model in (GPT, EXPERTS))
    assert dense.parts["expert"] == 0 < routed.parts["expert"]
    layers = dense.parts["matmul"]
    assert 1.4 * layers < routed.parts["matmul"] < 1.9 * layers  # two of two thirds of a layer
    capacity = estimate_time(plan_case({"expert": 8}, model={**EXPERTS, "expert_capacity_factor": 1.0}))
    assert capacity.parts["expert"] < routed.parts["expert"]  # dropless has room for the worst case


def test_more_experts_than_tokens():
    case = plan_case(model={**EXPERTS, "num_experts": 4096}, train={"seq_len": 128, "global_batch_size": 1})
    assert 0 < estimate_time(case).seconds < math.inf


def test_zero_shares_the_optimizers_step():
    whole, shared = (estimate_time(plan_case({"data": 8}, rules={"zero": zero})) for zero in (0, 2))
    assert shared.parts["optimizer"] == pytest.approx(whole.parts["optimizer"] / 8)


def test_a_product_in_whole_waves_takes_its_flops():
    """132 tiles of 256 x 128."""
    gpu = GPUS["H100"]
    full = Product(1, 256 * 12, 4096, 128 * 11, 1)
    assert product_seconds(full, gpu, "bfloat16", PERFECT) == pytest.approx(full.flops / 794.5e12)
    longer = dataclasses.replace(full, rows=256 * 12 + 1)
    assert product_seconds(longer, gpu, "bfloat16", PERFECT) > 1.05 * product_seconds(full, gpu, "bfloat16", PERFECT)


def test_a_thin_product_takes_the_way_through_memory():
    constants = dataclasses.replace(PERFECT, memory_efficiency=1.0)
    thin = Product(1, 1, 8192, 8192, 1)
    moved = 2 * (8192 * 8192 + 2 * 8192)
    assert product_seconds(thin, GPUS["H100"], "bfloat16", constants) == pytest.approx(moved / 3.35e12)


def test_software_without_a_quality_is_typical_of_its_generation():
    constants = Constants(
        quality={"a@hopper": 0.8, "b@ampere": 0.9, "typical@hopper": 0.7, "typical@ampere": 1.0, "typical": 0.6}
    )
    assert constants.quality_of("a", "hopper") == 0.8
    assert constants.quality_of("x", "hopper") == 0.7
    assert constants.quality_of("x", "blackwell") == 0.6
    assert constants.quality_of("b", "hopper") == pytest.approx(0.9 * 0.7)  # as far from typical as where it is known


@pytest.mark.parametrize(
    ("values", "message"),
    [({"speed": 1}, "unknown speed"), ({"overlap": "x"}, "overlap = 'x'"), ({"quality": {"mtx": -1}}, "mtx = -1")],
)
def test_wrong_constants_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        read_constants(values)


def test_a_file_that_is_none_is_refused(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("{}")
    with pytest.raises(UserError, match="not a file of constants"):
        load_constants(path)
