"""Rules of a run's own, where the checks accept them, change where things are computed and not what."""

import pytest
from programs import run_json
from training.overrides import LAYOUTS


@pytest.mark.slow
def test_layouts_with_overrides_equal_one_device():
    results = run_json("training/overrides.py", devices=8)
    assert list(results) == list(LAYOUTS)
    for layout, (loss_error, worst, gradient_error) in results.items():
        assert loss_error <= 2e-6, layout  # as in test_layouts.py
        assert gradient_error <= 1e-5, (layout, worst)
