"""What steps compiled for GPUs cost stays what it was; UPDATE_GOLDEN=1 takes the new figures (see `budgets`)."""

import budgets
import pytest
from rehearsals import make_case, make_step
from test_rehearsal import needs_compiler
from training.counted_steps import count_program

from mtx.planning import rehearsal
from mtx.planning.dissection import Dissection, count_turns

GPT2 = {
    "vocab_size": 50304, "d_model": 768, "num_layers": 2, "num_heads": 12, "max_seq_len": 1024,
}  # fmt: skip
LLAMA = {
    "vocab_size": 32000, "d_model": 1024, "num_layers": 2, "num_heads": 8, "num_kv_heads": 4, "d_ff": 2816,
    "max_seq_len": 2048, "position": "rotary", "norm": "rmsnorm", "activation": "swiglu", "use_bias": False,
    "tie_embeddings": False,
}  # fmt: skip
BF16 = {"compute": "bfloat16"}
H200 = {
    "H200, GPT-2": (GPT2, {"mesh": {"data": 1}, "train": {"seq_len": 1024, "microbatch_size": 8}}),
    "8 H200, Llama": (LLAMA, {"mesh": {"fsdp": 4, "tensor": 2}, "train": {"seq_len": 2048, "microbatch_size": 1}}),
}


def test_an_exchange_more_is_caught():
    case = make_case(mesh={"data": 4})
    quiet, loud = (make_step(case, shape="f32[64]", inside=what) for what in ("negate", "all-gather"))
    before, after = (count_program(step.compiled.program, case.sizes) for step in (quiet, loud))
    assert budgets.compare(before, after) == [
        "bytes of all-gather over data: 0 -> 1,280 has grown",  # 256 bytes at each of 5 turns
        "count of all-gather over data: 0 -> 5 has grown",
    ]


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("name", H200)
def test_steps_on_gpus_cost_what_they_did(name):
    model, sections = H200[name]
    case = make_case(model, "H200", precision=BF16, **sections)
    compiled = rehearsal.compile_apart(case, gpus_per_host=case.cluster.num_gpus)
    step = Dissection(case, compiled)
    found = count_program(compiled.program, case.sizes, count_turns(case))
    attention = {"count of attention forward": 0, "count of attention backward": 0}
    for call in step.attention:
        attention[f"count of attention {'backward' if call.is_backward else 'forward'}"] += call.executions
    assert attention["count of attention backward"] > 0  # in cuDNN's kernel, at these shapes
    found |= attention | {
        "forward passes that the products make": round(step.forward_equivalents, 4),
        "bytes of arguments": compiled.argument_bytes,
        "bytes of arguments kept for results": compiled.alias_bytes,
        "bytes between": compiled.temp_bytes,
    }
    budgets.check(name, found)
