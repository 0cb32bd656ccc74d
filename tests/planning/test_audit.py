"""Each rule of the audit finds its fault in a small program, and only there."""

import dataclasses

import pytest
from rehearsals import make_case, make_step

from mtx.planning.audit import audit

WIDE = {"d_model": 1024, "num_heads": 8}
DATA4 = {"data": 4}
PIPE2 = {"pipe": 2, "data": 2}


def rules(step, *severities):
    return [finding.rule for finding in audit(step) if finding.severity in (severities or ("error", "warning"))]


def test_a_program_that_keeps_to_its_layout_is_not_blamed():
    assert rules(make_step(make_case(mesh=DATA4))) == []


def test_a_sum_over_replicas_in_a_loop_is_an_error():
    case = make_case(mesh=DATA4)
    step = make_step(case, inside="all-reduce", shape="f32[1024,1024]", groups="{{0,1,2,3}}")
    (finding,) = [f for f in audit(step) if f.rule == "reduction in a loop"]
    assert finding.severity == "error"
    assert finding.keys == ("Mesh.data",)
    assert "over data runs 5 times a step, 4.0 MiB each (mtx/nn/linear.py:40)" in finding.text


def test_small_sums_in_loops_and_sums_over_tensor_are_none():
    small = make_step(make_case(mesh=DATA4), inside="all-reduce", groups="{{0,1,2,3}}")
    tensor = make_step(
        make_case(mesh={"tensor": 4}), inside="all-reduce", shape="f32[1024,1024]", groups="{{0,1,2,3}}"
    )  # fmt: skip
    assert rules(small) == rules(tensor) == []


def test_zero_3_scatters_gradients_in_a_loop_and_does_not_sum_them():
    case = make_case(mesh={"fsdp": 4})
    shape = {"shape": "f32[1024,1024]", "groups": "{{0,1,2,3}}"}
    assert rules(make_step(case, inside="reduce-scatter", **shape)) == []
    assert rules(make_step(case, inside="all-reduce", **shape)) == ["reduction in a loop"]


@pytest.mark.parametrize(("shape", "expected"), [("f32[4096,1024]", 1), ("f32[512,1024]", 0)])
def test_over_stages_only_gradients_are_an_error(shape, expected):
    step = make_step(make_case(WIDE, mesh=PIPE2), inside="all-reduce", shape=shape, groups="{{0,2},{1,3}}")
    assert rules(step).count("reduction in a loop") == expected


def test_more_bytes_among_replicas_than_weights_and_gradients():
    case = make_case(mesh=DATA4)
    large = {"outside": "all-gather", "shape": "f32[64,1024,1024]", "groups": "{{0,1,2,3}}"}
    assert rules(make_step(case, **large)) == ["exchange among replicas"]
    assert rules(make_step(case, **{**large, "shape": "f32[1024]"})) == []


def test_what_layers_without_a_loop_exchange_is_theirs():
    large = {"outside": "all-gather", "shape": "f32[64,1024,1024]", "groups": "{{0,1,2,3}}"}
    routed = make_case({"num_experts": 4, "experts_per_token": 1}, mesh={"expert": 4})
    assert rules(make_step(routed, **{**large, "outside": "all-to-all"})).count("exchange among replicas") == 0
    assert rules(make_step(routed, **large)).count("exchange among replicas") == 1
    shards = make_case({"d_model": 1024, "num_layers": 2}, mesh={"fsdp": 4})
    own = {**large, "shape": "f32[32,1024,1024]"}  # 24 Mi weights, in 16 bits twice or in 32 bits
    assert rules(make_step(shards, **own)).count("exchange among replicas") == 0
    assert rules(make_step(shards, **own, inside="all-gather")).count("exchange among replicas") == 1


def test_arguments_are_the_shards_to_the_byte():
    step = make_step(make_case(mesh=DATA4))
    wrong = dataclasses.replace(step.compiled, argument_bytes=step.compiled.argument_bytes + 4)
    assert rules(dataclasses.replace(step, compiled=wrong)) == ["arguments"]


def test_the_state_is_overwritten_as_a_whole():
    step = make_step(make_case(mesh=DATA4))
    wrong = dataclasses.replace(step.compiled, alias_bytes=step.compiled.alias_bytes - 2**20)
    (finding,) = audit(dataclasses.replace(step, compiled=wrong))[:1]
    assert (finding.severity, finding.rule) == ("error", "donation")
    assert "1.0 MiB" in finding.text


def test_arrays_that_xla_gathers_whole():
    step = make_step(make_case(mesh=DATA4), log="W [SPMD] Involuntary full rematerialization. The compiler ...")
    assert rules(step, "error") == ["resharding"]


def test_exchanges_between_stages_are_the_ticks():
    step = make_step(make_case(mesh=PIPE2))
    assert rules(step) == ["ticks"]  # the program has none
    permute = "{{0,2},{1,3},{2,0},{3,1}}"
    case = make_case(mesh=PIPE2, train={"global_batch_size": 16})
    step = make_step(case, inside="collective-permute", groups="{{0,2}}, source_target_pairs=" + permute)
    expected = sum(step.ticks.values()) + step.ticks["steady"]
    assert f"5 exchanges between stages, where the ticks of the schedule make {expected}" in audit(step)[0].text


def test_more_products_than_the_layout_implies():
    program = "f32[4096,4096]"
    step = make_step(make_case(mesh=DATA4), shape=program)
    dot = step.compiled.program.replace(
        f"{program} negate(%z)",
        f"{program} dot(%z, %z), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}",
    )
    assert dot != step.compiled.program
    step = dataclasses.replace(step, compiled=dataclasses.replace(step.compiled, program=dot))
    assert step.matmul_flops == 2 * 4096**3
    assert rules(step) == ["matrix products"]


def test_a_row_for_each_microbatch():
    case = make_case(mesh=DATA4, train={"global_batch_size": 4 * 1009})
    step = make_step(case, buffer="f32[1009,4096]", size=2**30)
    (finding,) = [f for f in audit(step) if f.rule == "buffers"]
    assert "a row for each of the 1,009 microbatches (mtx/nn/linear.py:40)" in finding.text
    assert rules(make_step(case, buffer="f32[1010,4096]", size=2**30)) == []


def test_tensor_stays_within_nvlink():
    program = {"inside": "all-gather", "shape": "f32[1024,1024]", "groups": "{{0,1,2,3}}"}
    mesh = {"tensor": 4}
    assert rules(make_step(make_case(mesh=mesh, domain=2), **program)) == ["links"]
    assert rules(make_step(make_case(mesh=mesh, domain=4), **program)) == []


def test_what_is_left_replicated():
    large = {"d_model": 4096, "num_heads": 32, "num_layers": 4}
    split, whole = (make_step(make_case(large, mesh=DATA4, rules={"zero": zero})) for zero in (2, 0))
    assert split.replicated == []
    found = [finding for finding in audit(whole) if finding.rule == "replicated"]
    assert [(f.severity, f.keys) for f in found] == [("note", ("Rules.zero",))] * 2
    assert "along data" in found[0].text
    odd = make_case({**large, "vocab_size": 4099}, mesh={"tensor": 4})
    found = [f for f in audit(make_step(odd)) if f.rule == "replicated"]
    assert {(f.severity, f.keys) for f in found} == {("note", ("Model.vocab_size", "Mesh.tensor"))}
    larger = make_case({**large, "vocab_size": 128001}, mesh={"tensor": 4})
    assert "warning" in [f.severity for f in audit(make_step(larger)) if f.rule == "replicated"]


def test_what_does_not_fit_says_by_how_much_and_what_would_help():
    step = make_step(make_case(mesh=DATA4), peak_bytes=100 * 2**30)
    finding = audit(step)[0]
    assert (finding.severity, finding.rule) == ("error", "memory")
    assert f"{-step.free_bytes / 2**30:.2f} GiB more than is safe to use (78.40 GiB)" in finding.text
    assert finding.keys


def test_attention_without_its_kernel_says_why():
    wide = {"d_model": 640, "num_heads": 4}  # heads of 160
    for gpu, keys in (("A100-80", ("Model.head_dim",)), ("H100", ())):
        case = make_case(wide, gpu, mesh=DATA4, precision={"compute": "bfloat16"})
        (finding,) = [f for f in audit(make_step(case)) if f.rule == "attention"]
        assert (finding.severity, finding.keys) == ("note", keys)


def test_a_plan_that_is_off_is_noted():
    step = make_step(make_case(mesh=DATA4))
    off = dataclasses.replace(step.compiled, peak_bytes=2 * step.compiled.peak_bytes)
    assert rules(dataclasses.replace(step, compiled=off), "note").count("plan") == 1


def test_the_gravest_come_first():
    step = make_step(make_case(mesh=PIPE2), peak_bytes=100 * 2**30)
    severities = [finding.severity for finding in audit(step)]
    assert severities == sorted(severities, key=("error", "warning", "note").index)
    assert len(set(severities)) == 3
