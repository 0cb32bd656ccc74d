"""No damage to the files of a checkpoint goes unnoticed, whichever file and whichever byte it is."""

import random
import secrets
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from mtx.checkpoints import manifest
from mtx.checkpoints.store import Checkpoints

NUM_FLIPS = 500


@pytest.fixture(scope="module")
def step_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint as Orbax writes it."""
    directory = tmp_path_factory.mktemp("checkpoints")
    params = {f"w{i}": jax.random.normal(jax.random.key(i), (8, 4)) for i in range(3)}
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(4, {"params": params, "step": jnp.int32(4)}, {"tokens": 1000, "config": "Model.d_model = 8\n"})
    return directory / "4"


def list_paths(step_dir: Path) -> list[Path]:
    paths = sorted(path for path in step_dir.rglob("*") if path.is_file())
    assert len(paths) > 10
    assert step_dir / "manifest.json" in paths
    return paths


def test_no_flipped_byte_goes_unnoticed(step_dir: Path) -> None:
    seed = secrets.randbits(32)
    print(f"seed {seed}")  # seen where the test fails
    chance = random.Random(seed)
    paths = [path for path in list_paths(step_dir) if path.stat().st_size]
    flipped = set()
    for _ in range(NUM_FLIPS):
        path = chance.choice(paths)
        whole = path.read_bytes()
        changed = bytearray(whole)
        place, difference = chance.randrange(len(whole)), chance.randrange(1, 256)
        changed[place] ^= difference
        path.write_bytes(changed)
        problems = manifest.verify(step_dir)
        path.write_bytes(whole)
        assert problems, f"byte {place} of {path} changed unnoticed by {difference}"
        assert str(path) in problems[0]
        flipped.add(path)
    assert flipped == set(paths)
    assert manifest.verify(step_dir) == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda path, whole: path.unlink(),
        lambda path, whole: path.write_bytes(whole[:-1]),
        lambda path, whole: path.write_bytes(b""),
        lambda path, whole: path.write_bytes(whole + b"\0"),
        lambda path, whole: (path.unlink(), path.mkdir()),
    ],
    ids=["deleted", "truncated", "emptied", "extended", "a directory"],
)
def test_every_file_is_needed_as_it_was(step_dir: Path, damage: Callable[[Path, bytes], object]) -> None:
    for path in list_paths(step_dir):
        whole = path.read_bytes()
        damage(path, whole)
        changed = not path.is_file() or path.read_bytes() != whole
        assert bool(manifest.verify(step_dir)) == changed, path
        if path.is_dir():
            path.rmdir()
        path.write_bytes(whole)
    assert manifest.verify(step_dir) == []
