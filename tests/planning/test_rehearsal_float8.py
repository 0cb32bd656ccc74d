"""8-bit products as the compiler for an H200 makes them, and as plans reckon with them."""

import dataclasses

import pytest
from rehearsals import make_case

from mtx.errors import UserError
from mtx.planning import layers, rehearsal
from mtx.planning.case import Cluster
from mtx.planning.dissection import Dissection
from mtx.planning.hardware import GPUS
from mtx.planning.step_time import estimate_time

MODEL = {
    "vocab_size": 1024, "d_model": 256, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "d_ff": 512,
    "max_seq_len": 256, "activation": "swiglu", "position": "rotary", "use_bias": False,
}  # fmt: skip
LONG = {"seq_len": 256, "scan_layers": True}


def case_of(gpu="H200", compute="float8", **precision):
    precision = {"compute": compute, **precision}
    return make_case(MODEL, gpu, mesh={"data": 1}, precision=precision, train=LONG)


def has_compiler():
    try:
        rehearsal.find_compiler()
    except UserError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler(), reason="XLA's compiler for NVIDIA GPUs is not installed (mtx rehearse)")
def test_all_products_of_layers_are_8_bit_products_of_cublas():
    case = case_of()
    step = Dissection(case, rehearsal.compile_apart(case, gpus_per_host=1))
    assert step.forward_equivalents == pytest.approx(step.expected_forward_equivalents, rel=0.05)
    targets = {True: [], False: []}
    for line in step.compiled.program.splitlines():
        if 'custom_call_target="__cublas' in line:
            targets["matmul$f8" in line].append(line)
    # Forward 4: queries, keys and values in one, output, gate and up in one, down. Backward each input's on its own, 7,
    # and 4 of weights. In 16 bits: the three of the head.
    assert len(targets[True]) == 4 + 7 + 4
    assert len(targets[False]) == 3
    assert all("vd" in line for line in targets[False])  # the vocabulary, by the names of dims


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler(), reason="XLA's compiler for NVIDIA GPUs is not installed (mtx rehearse)")
def test_gpus_without_8_bits_are_refused():
    """By the run itself, too: a plan would not have gone that far."""
    case = dataclasses.replace(case_of(), cluster=Cluster.of(GPUS["A100-80"], 1))
    with pytest.raises(UserError, match=r"Precision.compute = 'float8' needs GPUs .* NVIDIA A100"):
        rehearsal.compile_apart(case, gpus_per_host=1)


def test_plans_have_8_bits_for_the_products_that_have():
    def products(case):
        work = layers.describe_layer(case, "layers")
        return sum(p.flops for p in work.products), sum(p.flops for p in work.wide)

    whole, none = products(case_of(compute="bfloat16"))
    assert none == 0
    assert products(case_of()) == (whole, 0)
    attention, mlp = products(case_of(float8_products="attention"))
    assert (mlp, attention) == products(case_of(float8_products="mlp"))
    assert attention + mlp == whole
    assert attention < mlp
    head = layers.describe_head(case_of(), shared=False)
    assert not head.products
    assert head.wide == layers.describe_head(case_of(compute="bfloat16"), shared=False).products


def test_8_bits_shorten_products_alone():
    big = {"d_model": 4096, "d_ff": 14336, "num_heads": 32, "num_kv_heads": 8, "max_seq_len": 4096}

    def parts(**precision):
        train = {"seq_len": 4096, "microbatch_size": 1, "global_batch_size": 1}
        return estimate_time(make_case({**MODEL, **big}, "H200", mesh={"data": 1}, precision=precision, train=train))

    wide, mlp, narrow = (
        parts(**p)
        for p in ({"compute": "bfloat16"}, {"compute": "float8", "float8_products": "mlp"}, {"compute": "float8"})
    )
    assert wide.seconds > mlp.seconds > narrow.seconds > 0.5 * wide.seconds
