"""A manifest notices every change of a checkpoint's files, of its own bytes too."""

import json
import random
from pathlib import Path

import pytest

from mtx.checkpoints import manifest
from mtx.errors import CheckpointError


@pytest.fixture
def step_dir(tmp_path: Path) -> Path:
    """A step with three files and its manifest."""
    path = tmp_path / "20"
    (path / "params" / "d").mkdir(parents=True)
    (path / "params" / "d" / "data").write_bytes(bytes(range(256)) * 40)
    (path / "params" / "index").write_bytes(b"index")
    (path / "commit").write_bytes(b"")
    arrays = {"params/w": manifest.ArrayEntry(shape=(4, 5), dtype="float32")}
    files = manifest.digest_files(path, manifest.list_files(path))
    meta = {"tokens": 5120, "mesh": {"data": 2}, "loss": 0.1}
    manifest.write(path, step=20, meta=meta, arrays=arrays, files=files)
    return path


def test_manifest_reads_back(step_dir: Path) -> None:
    read = manifest.read(step_dir)
    assert manifest.verify(step_dir) == []
    assert (read.step, read.meta) == (20, {"tokens": 5120, "mesh": {"data": 2}, "loss": 0.1})
    assert read.arrays == {"params/w": manifest.ArrayEntry(shape=(4, 5), dtype="float32")}
    assert set(read.files) == {"params/d/data", "params/index", "commit"}
    assert read.size_bytes == 256 * 40 + 5


def test_files_that_nobody_digested_are_no_checkpoint(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"abc")
    files = manifest.digest_files(tmp_path, ["a"])
    with pytest.raises(OSError, match="other files than those that were digested"):
        manifest.write(tmp_path, step=1, meta={}, arrays={}, files=files)
    assert not (tmp_path / "manifest.json").exists()


def test_shares_are_whole_balanced_and_the_same_everywhere() -> None:
    chance = random.Random(3)
    sizes_bytes = {f"file{i}": chance.choice([0, 10, 5000, chance.randrange(100_000)]) for i in range(300)}
    for num_processes in (1, 2, 7, 280, 400):
        shares = manifest.divide(sizes_bytes, num_processes)
        assert len(shares) == num_processes
        assert sorted(name for share in shares for name in share) == sorted(sizes_bytes)
        assert shares == manifest.divide(dict(reversed(sizes_bytes.items())), num_processes)
        loads = [sum(sizes_bytes[name] for name in share) for share in shares]
        assert max(loads) - min(loads) <= max(sizes_bytes.values())
        if num_processes <= 7:
            assert max(loads) <= 1.02 * sum(loads) / num_processes


def test_processes_find_together_what_is_wrong(step_dir: Path) -> None:
    def verify() -> list[list[str]]:
        return [manifest.verify(step_dir, process=i, num_processes=3) for i in range(3)]

    assert verify() == [[], [], []]
    for name in ("params/d/data", "params/index", "commit"):
        (step_dir / name).write_bytes(b"other")
    found = verify()
    assert [len(problems) for problems in found] == [1, 1, 1]
    assert sorted(line for problems in found for line in problems) == sorted(manifest.verify(step_dir))


def test_every_kind_of_damage_is_named(step_dir: Path) -> None:
    data, index = step_dir / "params" / "d" / "data", step_dir / "params" / "index"
    data.write_bytes(data.read_bytes()[:-1])
    index.unlink()
    assert sorted(manifest.verify(step_dir)) == [
        f"{data}: 10239 bytes instead of 10240",
        f"{index}: missing",
    ]
    data.write_bytes(b"\0" * 10240)
    assert f"{data}: its content changed (SHA-256 differs)" in manifest.verify(step_dir)


def test_step_under_another_name_does_not_verify(step_dir: Path) -> None:
    moved = step_dir.rename(step_dir.with_name("30"))
    assert manifest.verify(moved) == [f"{moved / 'manifest.json'}: of step 20, not of step 30"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"files": 3}', '{"step": 20', "\x00"])
def test_manifest_that_is_none_is_refused(step_dir: Path, text: str) -> None:
    (step_dir / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match="damaged"):
        manifest.read(step_dir)


def test_edited_manifest_is_refused(step_dir: Path) -> None:
    path = step_dir / "manifest.json"
    content = json.loads(path.read_text())
    content["meta"]["tokens"] = 1
    path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    with pytest.raises(CheckpointError, match="its own digest does not fit"):
        manifest.read(step_dir)
    path.unlink()
    assert manifest.verify(step_dir) == [f"{path}: missing"]
