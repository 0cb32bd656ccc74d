"""Permutations, blends and batch sizes: what they promise, against plain counting."""

import itertools
import math

import numpy as np
import pytest

from mtx.config.schema import BatchRamp
from mtx.data import blend
from mtx.data.blend import Blend
from mtx.data.ramp import BatchSizes
from mtx.data.shuffle import permute
from mtx.errors import UserError


@pytest.mark.parametrize("length", [1, 2, 3, 7, 16, 17, 1000, 4096, 100_003])
def test_a_permutation_is_one(length):
    seen = permute(np.arange(length), length, "key")
    assert seen.dtype == np.int64
    np.testing.assert_array_equal(np.sort(seen), np.arange(length))


def test_a_permutation_is_pointwise_and_keyed():
    length = 10**15 + 3
    indices = np.array([0, 1, 10**15, 123_456_789])
    whole = permute(indices, length, "7/0/0")
    assert whole.tolist() == [int(permute(indices[i : i + 1], length, "7/0/0")[0]) for i in range(4)]
    assert (whole >= 0).all()
    assert (whole < length).all()
    assert not (whole == permute(indices, length, "8/0/0")).any()


def test_the_permutation_never_changes():
    """A resumed run depends on it."""
    assert permute(np.arange(10), 10, "0/0/0").tolist() == [0, 2, 4, 1, 3, 9, 7, 8, 6, 5]
    assert permute(np.array([0, 1, 2, 10**12]), 10**12 + 1, "1/2/3").tolist() == [
        322667579048,
        244999407879,
        255262613203,
        945542113536,
    ]


def chi_square(observed, expected):
    """In standard deviations from its mean."""
    observed = np.asarray(observed, np.float64)
    freedom = observed.size - 1
    return (((observed - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom)


def test_permutations_look_random():
    keys = [str(key) for key in range(6000)]
    orders = [tuple(permute(np.arange(4), 4, key).tolist()) for key in keys]
    counts = [orders.count(order) for order in itertools.permutations(range(4))]
    assert chi_square(counts, len(keys) / 24) < 5
    # Where neighbours go, far apart and near, in a length that is no power of two.
    length = 20_011
    order = permute(np.arange(length), length, "x")
    for distance in (1, 2, 64, 128, 8192):
        steps = (order[distance:] - order[:-distance]) % length
        assert chi_square(np.histogram(steps, bins=50, range=(0, length))[0], (length - distance) / 50) < 5
    assert abs(np.corrcoef(np.arange(length), order)[0, 1]) < 0.03
    for block in np.array_split(order, 20):  # each stretch of an epoch sees all of the source
        assert chi_square(np.histogram(block, bins=20, range=(0, length))[0], len(block) / 20) < 5


@pytest.mark.parametrize("weights", [[1.0], [0.7, 0.3], [1, 1, 1], [5, 1e-3, 2, 0.4], list(range(1, 30))])
def test_a_blend_keeps_its_shares_all_along(weights):
    mix = Blend(weights)
    samples = np.arange(2 * blend.PERIOD + 1000)
    sources, positions = mix.locate(samples)
    shares = np.array(weights) / sum(weights)
    for source, share in enumerate(shares):
        mine = sources == source
        np.testing.assert_array_equal(positions[mine], np.arange(mine.sum()))  # each of its samples once, in order
        drawn = np.cumsum(mine) - (samples + 1) * share
        assert np.abs(drawn).max() <= (len(weights) + 1) / 2 + 2 * len(samples) / blend.PERIOD
    for sample in (0, 1, 100, blend.PERIOD, blend.PERIOD + 7):
        expected = np.bincount(sources[:sample], minlength=len(weights))
        np.testing.assert_array_equal(mix.counts(sample), expected)


def test_a_blend_is_found_anywhere():
    mix = Blend([0.5, 0.25, 0.25])
    sources, positions = mix.locate(np.array([10**14]))
    assert abs(int(positions[0]) - 10**14 * [0.5, 0.25, 0.25][int(sources[0])]) < 4


@pytest.mark.parametrize("weights", [[1, 0], [1, -1], [1, float("nan")], [1, float("inf")], [1, 1e-9]])
def test_weights_that_are_no_shares(weights):
    with pytest.raises(UserError, match=r"Data\.train: "):
        Blend(weights)


def count_megatron(start, increment, end, ramp_tokens, seq_len, steps):
    """Sizes by the rule itself, one step after the other."""
    seen, sizes = 0, []
    num_increments = (end - start) // increment
    for _ in range(steps):
        stage = min(num_increments, seen * seq_len * num_increments // ramp_tokens)
        sizes.append(start + increment * stage)
        seen += sizes[-1]
    return sizes


@pytest.mark.parametrize(
    ("start", "increment", "end", "tokens", "seq_len"),
    [(2, 2, 8, 4000, 16), (1, 1, 9, 77, 5), (4, 4, 64, 10, 3), (3, 5, 58, 99_991, 7), (8, 1, 8, 100, 4)],
)
def test_ramps_follow_the_rule(start, increment, end, tokens, seq_len):
    sizes = BatchSizes(
        global_batch_size=end, seq_len=seq_len, ramp=BatchRamp(start=start, increment=increment, tokens=tokens)
    )
    expected = count_megatron(start, increment, end, tokens, seq_len, 400)
    before = np.append(0, np.cumsum(expected)).tolist()
    assert [sizes.size(step) for step in range(400)] == expected
    assert [sizes.first_sample(step) for step in range(401)] == before
    assert sizes.tokens(37) == before[37] * seq_len
    assert sizes.max == end
    for wanted in range(0, before[100] * seq_len, 13):
        assert sizes.step_at_tokens(wanted) == next(i for i, n in enumerate(before) if n * seq_len >= wanted)


def test_the_ramp_of_mt_nlg():
    """32 to 1920 by 32 over 12e9 tokens, sequences of 2048."""
    sizes = BatchSizes(
        global_batch_size=1920, seq_len=2048, ramp=BatchRamp(start=32, increment=32, tokens=12_000_000_000)
    )
    end = sizes.step_at_tokens(12_000_000_000)
    assert (sizes.size(0), sizes.size(end), sizes.size(10 * end)) == (32, 1920, 1920)
    assert sizes.size(end - 1) == 1888
    assert 12e9 <= sizes.tokens(end) < 12e9 + 1888 * 2048
    stages = [step for step in range(1, end + 1) if sizes.size(step) != sizes.size(step - 1)]
    assert len(stages) == 59
    for i, step in enumerate(stages, start=1):
        assert sizes.size(step) == 32 + 32 * i
        assert sizes.tokens(step - 1) < 12e9 * i / 59 <= sizes.tokens(step)


def test_no_ramp():
    sizes = BatchSizes(global_batch_size=6, seq_len=10)
    assert (sizes.size(0), sizes.size(10**9), sizes.first_sample(7), sizes.tokens(7)) == (6, 6, 42, 420)
    assert [sizes.step_at_tokens(n) for n in (0, 1, 60, 61)] == [0, 1, 1, 2]
    with pytest.raises(ValueError, match="from 0"):
        sizes.size(-1)


@pytest.mark.parametrize(("start", "increment"), [(3, 2), (10, 2), (1, 4)])
def test_ramps_that_miss_the_batch_size(start, increment):
    with pytest.raises(UserError, match=r"BatchRamp\.start .* Train\.global_batch_size = 8"):
        BatchSizes(global_batch_size=8, seq_len=1, ramp=BatchRamp(start=start, increment=increment, tokens=100))
