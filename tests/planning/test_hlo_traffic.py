"""Bytes that operations move, of programs written by hand."""

import pytest
from rehearsals import make_case, make_step

from mtx.planning.hlo import read_program
from mtx.planning.hlo_traffic import count_traffic


def test_operands_and_results_count_as_often_as_they_are_used():
    step = make_step(make_case(mesh={"data": 4}), shape="f32[64]", inside="negate", outside="negate")
    # 256 bytes taken and 256 given, at each of 5 turns and once behind the loop; of the addends nothing.
    assert step.traffic == {"products": 0, "attention": 0, "other": 6 * 512}


@pytest.mark.parametrize(("target", "kind"), [("__cublas$gemm", "products"), ("__cudnn$fmhaSoftmax", "attention")])
def test_calls_of_libraries_are_told_apart(target, kind):
    step = make_step(make_case(mesh={"data": 4}), shape="f32[64]")
    negation, call = "negate(%z), channel_id=2", f'custom-call(%z), custom_call_target="{target}"'
    assert negation in step.compiled.program
    traffic = count_traffic(read_program(step.compiled.program.replace(negation, call)))
    assert traffic == {"products": 0, "attention": 0, "other": 5 * 512, kind: 512}
