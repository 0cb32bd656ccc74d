"""From exit codes and progress to a decision."""

import pytest

from launch import restarts


def decide(*codes, stopping=False, failures=1, max_restarts=5, backoff_s=2.0):
    return restarts.decide(codes, stopping=stopping, failures=failures, max_restarts=max_restarts, backoff_s=backoff_s)


@pytest.mark.parametrize("code", [0, 2, 3, 5])
def test_codes_that_end_the_run(code):
    assert (decide(code).restart, decide(code).code) == (False, code)


@pytest.mark.parametrize(("code", "waits"), [
    (4, [0, 0, 0, 0]),
    (6, [0, 2, 4, 8]),
    (-9, [0, 2, 4, 8]),
    (134, [0, 2, 4, 8]),
    (1, [2, 4, 8, 16]),
    (17, [2, 4, 8, 16]),
])  # fmt: skip
def test_codes_that_start_again(code, waits):
    decisions = [decide(code, failures=n) for n in (1, 2, 3, 4)]
    assert all(decision.restart for decision in decisions)
    assert [decision.wait_s for decision in decisions] == waits


def test_backoff_has_a_limit():
    assert decide(1, failures=50, max_restarts=100).wait_s == restarts.LONGEST_BACKOFF_S


@pytest.mark.parametrize(("code", "exit_code"), [(1, 1), (4, 4), (6, 6), (-9, 137)])
def test_gives_up_without_progress(code, exit_code):
    assert decide(code, failures=5).restart
    last = decide(code, failures=6)
    assert (last.restart, last.code) == (False, exit_code)
    assert "given up: 6 attempts in a row" in last.reason


def test_no_restarts_where_none_are_allowed():
    assert not decide(6, max_restarts=0).restart


@pytest.mark.parametrize(("codes", "exit_code"), [
    ((4,), 4), ((4, 4), 4), ((0,), 0), ((-15,), 4), ((4, -15), 4), ((3,), 3), ((1, 4), 1), ((-9,), 137),
])  # fmt: skip
def test_asked_to_stop(codes, exit_code):
    assert (decide(*codes, stopping=True).restart, decide(*codes, stopping=True).code) == (False, exit_code)


@pytest.mark.parametrize(("codes", "telling"), [
    ((6, 2), 2), ((1, 3), 3), ((134, 5, -9), 5), ((-6, 6), 6), ((1, -9), -9), ((0, 1), 1), ((4, 0), 4), ((0, 0), 0),
])  # fmt: skip
def test_telling_code(codes, telling):
    assert restarts.telling(codes) == telling


def test_newest_step_is_of_complete_checkpoints(tmp_path):
    assert restarts.newest_step(str(tmp_path)) is None
    for name in ("4", "12", "20.saving", "30.bad-1", "16"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        if name != "16":
            (tmp_path / "checkpoints" / name / "manifest.json").touch()
    assert restarts.newest_step(str(tmp_path)) == 12
