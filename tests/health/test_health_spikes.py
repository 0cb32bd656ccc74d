"""Spikes are found at once, falling curves raise no alarm, and a restored detector decides like the first one."""

import json
import math
import random

import pytest

from mtx.health.spikes import Skipped, Spike, SpikeDetector


def make_detector(**options):
    return SpikeDetector(**{"score": 8.0, "window": 128, "patience": 1, "max_nonfinite": 3, **options})


def curve(steps, seed, noise=0.1):
    """Losses as a small model's: from 8.3 down to 4.6 in 800 steps, steep first, with the noise of small batches."""
    rng = random.Random(seed)
    return [
        4.4 + 3.9 * math.exp(-step / 90) + 0.4 * (1 + step / 100) ** -0.7 + rng.gauss(0, noise) for step in range(steps)
    ]


def watch(detector, losses, first=1):
    """The verdicts other than None, by step."""
    verdicts = {}
    for step, loss in enumerate(losses, first):
        if (verdict := detector.observe(step, loss, 1.0, skipped=False)) is not None:
            verdicts[step] = verdict
    return verdicts


@pytest.mark.parametrize("noise", [0.0, 0.02, 0.1, 0.3])
@pytest.mark.parametrize("window", [32, 128])
def test_a_falling_curve_raises_no_alarm(noise, window):
    for seed in range(10):
        assert watch(make_detector(window=window), curve(800, seed, noise)) == {}


@pytest.mark.parametrize("at", [100, 200, 400, 799])
def test_a_spike_is_found_at_once(at):
    for seed in range(10):
        losses = curve(800, seed)
        losses[at:] = [loss + 3.5 for loss in losses[at:]]
        verdicts = watch(make_detector(), losses[: at + 1])
        assert list(verdicts) == [at + 1]
        verdict = verdicts[at + 1]
        assert isinstance(verdict, Spike)
        assert verdict.first_step == at + 1
        assert "robust standard deviations (8 are allowed)" in verdict.cause


def test_only_upward_and_only_with_half_a_window():
    drop = watch(make_detector(), [5.0 + 0.01 * (step % 7) for step in range(200)] + [1.0] * 10)
    assert drop == {}
    flat = [5.0 + 0.01 * (step % 7) for step in range(63)]
    assert watch(make_detector(), [*flat, 50.0]) == {}
    assert list(watch(make_detector(), [*flat, 5.0, 50.0])) == [65]


def test_a_flat_loss_is_no_reason_for_an_alarm():
    flat = [2.0] * 128
    assert watch(make_detector(), [*flat, 2.0001, 2.05]) == {}
    assert list(watch(make_detector(), [*flat, 2.09])) == [129]
    assert list(watch(make_detector(), [0.0] * 128 + [1e-3])) == [129]


def test_patience_tells_a_spike_from_a_blip():
    calm = [3.0 + 0.01 * (step % 5) for step in range(128)]
    detector = make_detector(patience=3)
    assert watch(detector, [*calm, 9.0, 9.0, 3.0, 9.0, 9.0]) == {}
    verdict = detector.observe(134, 9.0, 1.0, skipped=False)
    assert isinstance(verdict, Spike)
    assert verdict.first_step == 132
    assert "3 steps in a row" in verdict.cause


def test_high_losses_do_not_move_the_median_before_they_are_judged():
    calm = [3.0 + 0.01 * (step % 5) for step in range(16)]
    detector = make_detector(window=16, patience=20)
    assert watch(detector, calm + [9.0] * 19) == {}
    assert 9.0 not in detector.state()["losses"]
    assert isinstance(detector.observe(36, 9.0, 1.0, skipped=False), Spike)


def test_skipped_updates_are_borne_some_times_in_a_row():
    detector = make_detector(max_nonfinite=2)
    for step in (1, 2):
        verdict = detector.observe(step, math.nan, math.inf, skipped=True)
        assert verdict == Skipped("loss nan, gradient norm inf")
    assert detector.observe(3, 5.0, 1.0, skipped=False) is None
    assert [type(detector.observe(step, 5.0, math.nan, skipped=True)) for step in (4, 5)] == [Skipped, Skipped]
    verdict = detector.observe(6, 5.0, math.nan, skipped=True)
    assert verdict == Spike(4, "loss 5, gradient norm nan: not finite 3 times in a row")
    never = make_detector(score=None, max_nonfinite=0)
    assert never.observe(1, 5.0, math.inf, skipped=True) == Spike(1, "loss 5, gradient norm inf: not finite")


def test_numbers_that_are_not_finite_and_were_used_are_a_spike():
    verdict = make_detector(score=None).observe(7, math.nan, 1.0, skipped=False)
    assert verdict == Spike(7, "loss nan, gradient norm 1: not finite, and the parameters were updated")


def test_without_a_score_no_loss_is_high():
    assert watch(make_detector(score=None), [3.0] * 200 + [1e9]) == {}


def test_a_restored_detector_decides_like_the_first():
    rng = random.Random(0)
    losses = curve(500, 0)
    for _ in range(40):
        losses[rng.randrange(500)] += rng.choice([1.0, 3.0, 30.0])
    skips = {rng.randrange(500) for _ in range(60)}
    skips |= {step + 1 for step in skips}

    def decide(restarts):
        detector, verdicts = make_detector(patience=2, window=32), []
        for step, loss in enumerate(losses):
            if step in restarts:
                text = json.dumps(detector.state())
                detector = make_detector(patience=2, window=32)
                detector.restore(json.loads(text))
            verdict = detector.observe(step, loss, 1.0, skipped=step in skips)
            verdicts.append(verdict)
        return verdicts

    undisturbed = decide(set())
    assert {type(verdict) for verdict in undisturbed} == {Skipped, Spike, type(None)}
    assert decide(set(range(500))) == undisturbed
    assert decide({100, 250, 251}) == undisturbed
