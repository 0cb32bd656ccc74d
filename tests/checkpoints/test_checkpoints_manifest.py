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
    manifest.write(path, step=20, meta={"tokens": 5120, "mesh": {"data": 2}, "loss": 0.1}, arrays=arrays)
    return path


def test_manifest_reads_back(step_dir: Path) -> None:
    read = manifest.read(step_dir)
    assert manifest.verify(step_dir) == []
    assert (read.step, read.meta) == (20, {"tokens": 5120, "mesh": {"data": 2}, "loss": 0.1})
    assert read.arrays == {"params/w": manifest.ArrayEntry(shape=(4, 5), dtype="float32")}
    assert set(read.files) == {"params/d/data", "params/index", "commit"}
    assert read.size_bytes == 256 * 40 + 5


def test_no_flipped_bit_goes_unnoticed(step_dir: Path) -> None:
    chance = random.Random(0)
    files = [path for path in step_dir.rglob("*") if path.is_file() and path.stat().st_size]
    assert len(files) == 3
    for _ in range(300):
        path = chance.choice(files)
        whole = path.read_bytes()
        changed = bytearray(whole)
        changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
        path.write_bytes(changed)
        assert manifest.verify(step_dir), f"{path} changed unnoticed"
        path.write_bytes(whole)
    assert manifest.verify(step_dir) == []


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
