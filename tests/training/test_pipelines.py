"""A pipeline computes what one device does."""

import pytest
from programs import run_json
from training.pipelines import DEVICES, GROUPS


@pytest.mark.parametrize("group", ["four", *(pytest.param(name, marks=pytest.mark.slow) for name in list(GROUPS)[1:])])
def test_pipelines_equal_one_device(group):
    results = run_json("training/pipelines.py", group, devices=DEVICES.get(group, 8), timeout_s=500)
    assert set(results) >= set(GROUPS[group][2])
    for layout, (loss_error, worst, gradient_error) in results.items():
        # float32 sums in another order, through up to seven layers; a wrong unit of the schedule is off by 0.1 or more.
        assert loss_error <= 1e-6, layout
        assert gradient_error <= 1e-5, (layout, worst)
