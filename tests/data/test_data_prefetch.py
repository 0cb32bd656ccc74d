"""Batches come in order, ahead of time; errors where they are asked for; no thread stays behind."""

import threading
import time
import traceback

import pytest

from mtx.data.prefetch import Prefetcher


def test_in_order_and_ahead():
    made = []

    def make(step):
        made.append(step)
        return step * 10

    with Prefetcher(make, first_step=5, depth=3) as batches:
        deadline = time.monotonic() + 10
        while len(made) < 4:  # three are ready, one waits for room
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(0.02)
        assert made == [5, 6, 7, 8]
        assert [batches.get(step) for step in range(5, 25)] == list(range(50, 250, 10))
        with pytest.raises(ValueError, match="step 25 is next, not 24"):
            batches.get(24)
    assert "prefetch" not in {thread.name for thread in threading.enumerate()}
    with pytest.raises(ValueError, match="closed"):
        batches.get(25)


def test_waiting_is_measured():
    gate = threading.Semaphore(0)
    with Prefetcher(lambda step: gate.acquire(timeout=10), first_step=0, depth=1) as batches:
        threading.Timer(0.5, gate.release).start()
        batches.get(0)
        assert 0.3 < batches.wait_seconds < 10
        gate.release()
        while not batches._ready.full():
            time.sleep(0.001)
        before = batches.wait_seconds
        batches.get(1)
        assert batches.wait_seconds - before < 0.3
        gate.release(5)


def test_errors_keep_their_traceback():
    def fail_at_two(step):
        if step == 2:
            raise RuntimeError("the disk is gone")
        return step

    with Prefetcher(fail_at_two, first_step=0, depth=4) as batches:
        assert [batches.get(0), batches.get(1)] == [0, 1]
        for _ in range(2):
            with pytest.raises(RuntimeError, match="the disk is gone") as caught:
                batches.get(2)
            assert "fail_at_two" in "".join(traceback.format_tb(caught.tb))


def test_closing_does_not_wait_for_a_full_queue():
    batches = Prefetcher(lambda step: step, first_step=0, depth=1)
    begin = time.monotonic()
    batches.close()
    batches.close()
    assert time.monotonic() - begin < 5
    assert not batches._thread.is_alive()
