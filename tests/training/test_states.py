"""Where the state lies and what the compiled step exchanges, on eight devices."""

from __future__ import annotations

import math

import pytest
from programs import run_json

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results():
    return run_json("training/states.py", devices=8)


def test_every_leaf_lies_where_its_spec_says_before_and_after_a_step(results):
    # The program itself compares each leaf's sharding with the declared one.
    for name, result in results.items():
        assert result["same shares after a step"], name
        assert result["donated"], name


def test_nothing_depends_on_the_layout(results):
    one = results["one"]
    for name, result in results.items():
        assert result["same initial parameters"], name
        assert result["loss"] == pytest.approx(one["loss"], rel=1e-6), name
        assert result["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5), name


@pytest.mark.parametrize(
    ("name", "weight", "moment"),
    [
        # Shares of w_up [1, 32, 128] that one device holds.
        ("one", 1, 1),
        ("data8 zero0", 1, 1),
        ("data8 zero1", 1, 1 / 8),
        ("data8 zero2", 1 / 8, 1 / 8),
        ("fsdp4 data2 zero2", 1 / 8, 1 / 8),
        ("tensor4 data2 zero1", 1 / 4, 1 / 8),
        ("fsdp2 tensor2 data2 zero2", 1 / 8, 1 / 8),
    ],
)
def test_moments_and_weights_are_really_sharded(results, name, weight, moment):
    shares = {path: share for path, share in results[name]["shares"].items() if path.endswith("feedforward/up/weight")}
    assert shares.pop("params/layers/feedforward/up/weight") == weight
    assert len(shares) == 2  # the two moments of Adam
    assert set(shares.values()) == {moment}


def exchanged(result, *kinds, least=2):
    """Sizes of what is exchanged, loss and norms left out."""
    return sorted(
        math.prod(shape)
        for collective in result["collectives"]
        if collective["kind"] in kinds
        for shape in collective["shapes"]
        if math.prod(shape) >= least
    )


def test_one_device_exchanges_nothing(results):
    assert results["one"]["collectives"] == []


def test_no_exchange_within_a_device(results):
    for name, result in results.items():
        assert all(collective["group"] > 1 for collective in result["collectives"]), name


@pytest.mark.parametrize("zero", [0, 1, 2])
def test_data_parallel_reduces_each_gradient_once_a_step(results, zero):
    """Once, not once a microbatch: nothing is exchanged inside the loop over the four microbatches."""
    result = results[f"data8 zero{zero}"]
    assert not any(collective["looped"] for collective in result["collectives"])
    gradients = sorted(math.prod(shape) for shape in result["parameter shapes"])
    scattered, reduced = exchanged(result, "reduce-scatter"), exchanged(result, "all-reduce")
    assert bool(scattered) == (zero == 2)
    assert sorted([*reduced, *(8 * size for size in scattered)]) == gradients


def test_tensor_parallel_gathers_and_scatters_the_sequence(results):
    result = results["tensor4 data2 zero1"]
    for kind in ("all-gather", "reduce-scatter"):
        assert any(c["kind"] == kind and c["group"] == 4 for c in result["collectives"]), kind
