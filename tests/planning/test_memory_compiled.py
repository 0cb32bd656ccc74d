"""Planned memory against what XLA's compiler for GPUs says of the same step, of small runs of each kind."""

import importlib.util
import math

import pytest
from tiny import make_run

from mtx.planning.case import Case, Cluster
from mtx.planning.hardware import GPUS
from mtx.planning.memory import estimate_memory
from mtx.planning.rehearsal import FOLDER, compile_apart

HERE = importlib.util.find_spec("jax_plugins") is not None and importlib.util.find_spec("jax_plugins.xla_cuda13")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (HERE or FOLDER.is_dir()), reason="the compiler for NVIDIA GPUs is not installed"),
]

GPT = {
    "vocab_size": 50304, "d_model": 2048, "num_layers": 4, "num_heads": 16, "max_seq_len": 4096,
}  # fmt: skip
LLAMA = {
    **GPT, "vocab_size": 32000, "num_kv_heads": 8, "d_ff": 5632, "position": "rotary", "norm": "rmsnorm",
    "activation": "swiglu", "use_bias": False, "tie_embeddings": False,
}  # fmt: skip
EXPERTS = {**LLAMA, "num_layers": 2, "num_experts": 8, "experts_per_token": 2}
RUNS = {
    "in line": (LLAMA, {"data": 2, "tensor": 2}, {"recompute": "none"}),
    "in a loop": (GPT, {"fsdp": 8}, {"recompute": "none", "scan_layers": True}),
    "pipeline": (GPT, {"pipe": 4, "tensor": 2}, {"recompute": "selective", "microbatch_size": 2}),
    "experts": (EXPERTS, {"expert": 4, "data": 2}, {"recompute": "full"}),
}


@pytest.mark.parametrize("name", RUNS)
def test_the_plan_is_within_ten_percent_of_the_compiler(name):
    model, mesh, train = RUNS[name]
    num_gpus = math.prod(mesh.values())
    run = make_run(
        model,
        mesh=mesh,
        precision={"compute": "bfloat16"},
        train={"seq_len": 4096, "global_batch_size": 64, "microbatch_size": 1, "scan_layers": None, **train},
    )
    case = Case.of(run, Cluster.of(GPUS["H100"], num_gpus))
    planned = estimate_memory(case)
    compiled = compile_apart(case, gpus_per_host=num_gpus)
    # Arguments are the state, to the byte, but for the tokens of the step.
    tokens = 64 * 4097 * 4 / (num_gpus / case.sizes["pipe"] / case.sizes["tensor"])
    assert planned.state < compiled.argument_bytes <= planned.state + 2 * tokens + 1024
    assert planned.compiled == pytest.approx(compiled.argument_bytes + compiled.temp_bytes, rel=0.1)
