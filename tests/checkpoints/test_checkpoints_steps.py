"""Names and retention of the directories below `checkpoints/`."""

from pathlib import Path

import pytest

from mtx.checkpoints import manifest, steps
from mtx.errors import CheckpointError


def save(directory: Path, step: int) -> Path:
    """A complete step of one small file."""
    partial = steps.saving_dir(directory, step)
    partial.mkdir(parents=True)
    (partial / "data").write_bytes(b"abc")
    manifest.write(partial, step=step, meta={}, arrays={})
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


def test_retention(tmp_path: Path) -> None:
    for step in range(10, 80, 10):
        save(tmp_path, step)
    (tmp_path / "5.deleting" / "d").mkdir(parents=True)
    (tmp_path / "20.bad-1").mkdir()
    (tmp_path / "25").mkdir()  # without a manifest: not for the retention to judge
    assert steps.delete_old_steps(tmp_path, keep_last=2, keep_every=30) == [10, 20, 40, 50]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["20.bad-1", "25", "30", "60", "70"]
    assert steps.delete_old_steps(tmp_path, keep_last=None, keep_every=None) == []
    assert steps.delete_old_steps(tmp_path, keep_last=1, keep_every=None) == [30, 60]


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
    assert steps.find_newest_verified(tmp_path, report=said.append, set_bad_aside=True) == 10
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
    assert steps.find_newest_verified(tmp_path, report=lambda line: None, set_bad_aside=False) == 10
    assert steps.list_steps(tmp_path) == [10, 20]


def test_none_that_verifies_is_not_the_same_as_none(tmp_path: Path) -> None:
    def find() -> int | None:
        return steps.find_newest_verified(tmp_path, report=lambda line: None, set_bad_aside=True)

    assert find() is None
    (save(tmp_path, 10) / "data").unlink()
    with pytest.raises(CheckpointError, match="no checkpoint verifies"):
        find()
    assert steps.list_steps(tmp_path) == []
    with pytest.raises(CheckpointError, match="no checkpoint verifies"):
        find()  # set aside or not: the run had checkpoints and must not begin again at step 0
