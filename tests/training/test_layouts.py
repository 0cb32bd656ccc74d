"""Loss and gradients do not depend on the layout."""

import pytest
from programs import run_json
from training.layouts import MODELS


@pytest.mark.parametrize("name", ["gpt", *(pytest.param(name, marks=pytest.mark.slow) for name in list(MODELS)[1:])])
def test_layouts_equal_one_device(name):
    results = run_json("training/layouts.py", name, devices=8)
    assert list(results) == MODELS[name][2]
    for layout, (loss_error, worst, gradient_error) in results.items():
        # float32 sums in another order: a few units in the last place of a loss of 5, and 1e-5 of a gradient's largest
        # value (sums of 128 terms through three layers). A wrong collective is off by 2 or by a half.
        assert loss_error <= 2e-6, layout
        assert gradient_error <= 1e-5, (layout, worst)
