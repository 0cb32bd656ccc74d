"""Processes digest a step together through files: threads stand for them here."""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from mtx.checkpoints import manifest, parts


@pytest.fixture
def step_dir(tmp_path: Path) -> Path:
    path = tmp_path / "5.saving"
    for i in range(10):
        (path / f"d{i % 3}").mkdir(parents=True, exist_ok=True)
        (path / f"d{i % 3}" / f"{i}").write_bytes(b"x" * i * 1000)
    (tmp_path / "5.saving.digests").mkdir()
    return path


def start(
    pool: ThreadPoolExecutor, step_dir: Path, process: int, *, timeout_s: float = 30
) -> Future[dict[str, manifest.FileEntry]]:
    folder = step_dir.with_name("5.saving.digests")
    return pool.submit(parts.digest_together, step_dir, folder, process=process, num_processes=3, timeout_s=timeout_s)


def test_process_0_gets_all_digests(step_dir: Path) -> None:
    alone = parts.digest_together(step_dir, step_dir, process=0, num_processes=1, timeout_s=0)
    with ThreadPoolExecutor() as pool:
        late = [start(pool, step_dir, process) for process in (2, 1)]
        time.sleep(0.2)
        assert not any(future.done() for future in late)  # they wait for the list of process 0
        first = start(pool, step_dir, 0)
        shares = [first.result(), *(future.result() for future in late)]
    assert shares[0] == alone
    assert len(alone) == 10
    assert not shares[1].keys() & shares[2].keys()
    assert all(2 <= len(share) <= 5 for share in shares[1:])


def test_a_process_that_cannot_says_why(step_dir: Path) -> None:
    with ThreadPoolExecutor() as pool:
        futures = [start(pool, step_dir, process) for process in (0, 1)]
        parts.tell_failure(step_dir.with_name("5.saving.digests"), 2, "process 2 on h: no space left")
        with pytest.raises(OSError, match="process 2 on h: no space left"):
            futures[0].result()
        assert futures[1].result()


def test_a_process_that_cannot_even_say_so_takes_the_folder_away(step_dir: Path) -> None:
    folder = step_dir.with_name("5.saving.digests")
    (folder / "2.new").mkdir()  # nothing can be written there
    with ThreadPoolExecutor() as pool:
        first = start(pool, step_dir, 0)
        parts.tell_failure(folder, 2, "no space left")
        assert not folder.exists()
        with pytest.raises(OSError, match=r"another process could not write|No such file"):
            first.result()
        with pytest.raises(OSError, match="another process could not write"):
            start(pool, step_dir, 1).result()


def test_nobody_waits_for_ever(step_dir: Path) -> None:
    with ThreadPoolExecutor() as pool:
        with pytest.raises(TimeoutError, match=r"files\.json of another process did not come"):
            start(pool, step_dir, 1, timeout_s=0.2).result()
        first = start(pool, step_dir, 0, timeout_s=0.2)
        start(pool, step_dir, 1)
        with pytest.raises(TimeoutError, match=r"[12]\.json of another process did not come within"):
            first.result()
