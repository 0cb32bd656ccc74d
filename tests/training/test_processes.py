"""Several real processes, over gloo: each kind of axis across the border between them, against one process."""

from __future__ import annotations

import json

import numpy as np
import pytest
from programs import ROOT, environment, run_json, run_processes

PROGRAM = "training/processes.py"
# fmt: off
LAUNCHES = {
    # processes, devices of each: cases
    (2, 1): ["pipe"],
    (2, 2): [
        "data", "fsdp", "tensor", "pipe interleaved", "pipe data", "context ring", "context all_to_all", "expert",
        "expert tensor",
    ],
    (4, 1): ["fsdp", "tensor", "pipe interleaved", "context ring", "expert tensor"],
    (4, 2): ["pipe context tensor", "data expert tensor", "fsdp context"],
}
# fmt: on


def launch(count: int, devices: int, cases: list[str]):
    """What the processes say, which must be the same."""
    env = environment(devices, MTX_COMPILATION_CACHE="")
    outputs = run_processes([str(ROOT / "tests" / PROGRAM), *cases], count=count, env=env, timeout_s=400)
    lines = [json.loads(output.splitlines()[-1]) for output in outputs]
    assert all(line == lines[0] for line in lines)
    return lines[0]


def check(count: int, devices: int, cases: list[str]) -> None:
    together = launch(count, devices, cases)
    alone = run_json(PROGRAM, *cases, devices=count * devices)
    assert len(together) == len(cases) == len(alone) // 2
    for case in cases:
        values = np.array(together[f"{case}: mesh"])
        assert values.shape == (3, 2)
        assert len(set(values[:, 0].tolist())) == 3  # it learns
        # gloo adds in another order than the simulated exchange within a process.
        np.testing.assert_allclose(values, alone[f"{case}: mesh"], rtol=1e-6, err_msg=case)
        np.testing.assert_allclose(values, alone[f"{case}: one device"], rtol=1e-5, err_msg=case)


def test_pipeline_over_two_processes():
    check(2, 1, LAUNCHES[2, 1])


@pytest.mark.slow
@pytest.mark.parametrize(("count", "devices"), [launched for launched in LAUNCHES if launched != (2, 1)])
def test_every_axis_crosses_the_border(count, devices):
    check(count, devices, LAUNCHES[count, devices])
