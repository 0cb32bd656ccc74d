"""Several real processes, over gloo: each kind of axis across the border between them, against one process."""

from __future__ import annotations

import json

import numpy as np
import pytest
from programs import ROOT, environment, run_json, run_processes

PROGRAM = "training/processes.py"
LAUNCHES = (
    # processes, devices of each, cases
    (2, 2, ["data", "fsdp", "tensor", "pipe of 4", "pipe interleaved"]),
    (2, 2, ["context ring", "context all_to_all", "expert", "expert tensor"]),
    (4, 1, ["fsdp", "tensor", "pipe of 4", "context ring", "expert"]),
    (4, 2, ["pipe context tensor", "data expert tensor", "fsdp context"]),
)


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
    check(2, 1, ["pipe"])


@pytest.mark.slow
@pytest.mark.parametrize(("count", "devices", "cases"), LAUNCHES)
def test_every_axis_crosses_the_border(count, devices, cases):
    check(count, devices, cases)
