"""From exit codes and progress to a decision."""

import json

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


def record(folder, *events):
    path = folder / "launch.jsonl"
    path.write_text("".join(event if isinstance(event, str) else json.dumps(event) + "\n" for event in events))
    return path


BEGUN = {"event": "started"}


def ended(failures, newest=None):
    return {"event": "ended", "failures": failures, "newest_step": newest}


@pytest.mark.parametrize(("events", "newest", "failures"), [
    ([], None, 0),
    ([BEGUN], None, 1),  # its launcher was lost as well
    ([BEGUN, BEGUN, BEGUN], None, 3),
    ([BEGUN, ended(1)], None, 1),
    ([BEGUN, ended(1), BEGUN, ended(2), BEGUN], None, 3),
    ([BEGUN, ended(4, 8), BEGUN], 8, 5),
    ([BEGUN, ended(4, 8), BEGUN], 12, 0),  # it has saved since
    ([BEGUN, ended(4)], 4, 0),
    ([{"event": "preflight"}, BEGUN, ended(2), '{"event": "sta\n', "\n"], None, 2),
])  # fmt: skip
def test_failures_by_the_record(tmp_path, events, newest, failures):
    assert restarts.failures_recorded(record(tmp_path, *events), newest) == failures


def test_no_record_is_no_failure(tmp_path):
    assert restarts.failures_recorded(tmp_path / "launch.jsonl", None) == 0


def test_backoff_of_no_and_of_many_failures():
    assert [restarts.backoff(n, 3.0) for n in (-5, -1, 0, 1, 2)] == [0, 0, 3, 6, 12]
    assert restarts.backoff(10**9, 1e-9) <= restarts.LONGEST_BACKOFF_S


@pytest.mark.parametrize(("code", "words"), [
    (0, "exit code 0 (done)"), (-9, "killed by signal 9"), (137, "exit code 137 (signal 9)"), (17, "exit code 17"),
])  # fmt: skip
def test_codes_in_words(code, words):
    assert restarts.describe(code) == words


def test_given_up_is_final():
    assert (decide(restarts.GIVEN_UP).restart, decide(restarts.GIVEN_UP).code) == (False, 7)
    assert restarts.telling([1, -9, restarts.GIVEN_UP, 6]) == restarts.GIVEN_UP
