"""Names and retention of the directories below `checkpoints/`."""

from pathlib import Path
from typing import Any

import pytest

from mtx.checkpoints import manifest, steps
from mtx.checkpoints.steps import Retention
from mtx.checkpoints.store import Checkpoints
from mtx.errors import CheckpointError


def save(directory: Path, step: int, **meta: Any) -> Path:
    """A complete step of one small file."""
    partial = steps.saving_dir(directory, step)
    partial.mkdir(parents=True)
    (partial / "data").write_bytes(b"abc")
    files = manifest.digest_files(partial, ["data"])
    manifest.write(partial, step=step, meta=meta, arrays={}, files=files)
    steps.publish(directory, step)
    return directory / str(step)


def test_unfinished_and_set_aside_directories_are_no_steps(tmp_path: Path) -> None:
    assert steps.list_steps(tmp_path / "absent") == []
    for step in (100, 9):
        save(tmp_path, step)
    for name in ("11.saving", "11.saving.orbax-checkpoint-tmp", "12.bad-1", "7.deleting"):
        (tmp_path / name).mkdir()
    (tmp_path / "13").write_text("a file")
    assert steps.list_steps(tmp_path) == [9, 100]


def delete(directory: Path, **retention: Any) -> list[int]:
    return steps.delete_old_steps(directory, Retention(**retention))


def test_retention(tmp_path: Path) -> None:
    for step in range(10, 80, 10):
        save(tmp_path, step)
    (tmp_path / "5.deleting" / "d").mkdir(parents=True)
    (tmp_path / "20.bad-1").mkdir()
    (tmp_path / "30.superseded-1").mkdir()
    (tmp_path / "25").mkdir()  # without a manifest: not for the retention to judge
    assert delete(tmp_path, keep_last=2, keep_every=30) == [10, 20, 40, 50]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["20.bad-1", "25", "30", "30.superseded-1", "60", "70"]
    assert delete(tmp_path) == []
    assert delete(tmp_path, keep_last=1) == [30, 60]


def test_the_best_step_stays(tmp_path: Path) -> None:
    losses = {10: 3.0, 20: 2.0, 30: 2.0, 40: float("nan"), 50: None, 60: 2.5, 70: 2.75}
    for step, loss in losses.items():
        save(tmp_path, step, validation={"books": loss, "web": 100 - step})
    save(tmp_path, 80)  # not evaluated
    assert steps.find_best(tmp_path, "books") == 20  # the older of equals
    assert steps.find_best(tmp_path, "web") == 70
    assert steps.find_best(tmp_path, "code") is None
    assert delete(tmp_path, keep_last=2, keep_best="books", keep_every=40) == [10, 30, 50, 60]
    assert steps.list_steps(tmp_path) == [20, 40, 70, 80]
    save(tmp_path, 90, validation={"books": 1.5})
    assert delete(tmp_path, keep_last=1, keep_best="books") == [20, 40, 70, 80]
    save(tmp_path, 100, validation={"books": 1.6})
    assert delete(tmp_path, keep_last=1, keep_best="books") == []
    (tmp_path / "90" / "manifest.json").write_text("{}")  # what cannot be read is not the best
    assert steps.find_best(tmp_path, "books") == 100


def test_dead_saves_are_deleted(tmp_path: Path) -> None:
    save(tmp_path, 10)
    for name in ("20.saving", "30.saving.orbax-checkpoint-tmp"):
        (tmp_path / name / "d").mkdir(parents=True)
    steps.delete_dead_saves(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["10"]


def test_bad_steps_are_set_aside_and_the_next_older_is_taken(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save(tmp_path, step)
    (tmp_path / "20.bad-1").mkdir()
    (tmp_path / "20" / "data").write_bytes(b"abd")
    (tmp_path / "30" / "manifest.json").unlink()
    said: list[str] = []
    assert Checkpoints(tmp_path, report=said.append).latest_verified() == 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "20.bad-1", "20.bad-2", "30.bad-1"]
    assert (tmp_path / "20.bad-2" / "data").read_bytes() == b"abd"
    assert [line.split(":")[0] for line in said] == [
        "checkpoint 30 does not verify",
        f"checkpoint 30 is set aside as {tmp_path}/30.bad-1",
        "checkpoint 20 does not verify",
        f"checkpoint 20 is set aside as {tmp_path}/20.bad-2",
    ]


def test_looking_changes_nothing(tmp_path: Path) -> None:
    for step in (10, 20):
        save(tmp_path, step)
    (tmp_path / "20" / "data").unlink()
    assert Checkpoints(tmp_path, report=lambda line: None, read_only=True).latest_verified() == 10
    assert steps.list_steps(tmp_path) == [10, 20]


def test_none_that_verifies_is_not_the_same_as_none(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, report=lambda line: None)
    assert checkpoints.latest_verified() is None
    (save(tmp_path, 10) / "data").unlink()
    with pytest.raises(CheckpointError, match="no checkpoint verifies"):
        checkpoints.latest_verified()
    assert steps.list_steps(tmp_path) == []
    with pytest.raises(CheckpointError, match="no checkpoint verifies"):
        checkpoints.latest_verified()  # set aside or not: the run had checkpoints and must not begin again at step 0


def test_only_a_first_save_that_was_killed_begins_anew(tmp_path: Path) -> None:
    looking = Checkpoints(tmp_path, read_only=True)
    for name in ("10.saving", "10.saving.orbax-checkpoint-tmp", "10.saving.digests"):
        (tmp_path / name).mkdir()
    assert looking.latest_verified() is None
    for name in ("10.deleting", "10.superseded-1", "10.bad-12"):  # of steps that were complete once
        (tmp_path / name).mkdir()
        with pytest.raises(CheckpointError, match="no checkpoint verifies"):
            looking.latest_verified()
        (tmp_path / name).rmdir()
