"""Saving and restoring real sharded states through Orbax, with everything that can go wrong around it."""

import errno
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mtx.checkpoints import disk, manifest, steps, store
from mtx.checkpoints.run_directory import RunDirectory, save_initial
from mtx.checkpoints.store import Checkpoints
from mtx.errors import CheckpointError, UserError


def make_mesh(data: int, tensor: int) -> Mesh:
    return Mesh(np.array(jax.devices()[: data * tensor]).reshape(data, tensor), ("data", "tensor"))


def shard(tree: Any, mesh: Mesh, spec: PartitionSpec) -> Any:
    """Abstract arrays like those of `tree`: matrices by `spec`, the rest replicated."""

    def place(x: jax.Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(mesh, spec if x.ndim == 2 else PartitionSpec())
        )

    return jax.tree.map(place, tree)


@pytest.fixture(scope="module")
def state() -> dict[str, Any]:
    """Parameters, a real Optax state and the step, on a 2 x 2 mesh; float32, bfloat16, integers and an empty leaf."""
    spec = PartitionSpec("data", "tensor")
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "embed": {"w": jax.random.normal(keys[0], (64, 32))},
        "layers": {"0": {"w": jax.random.normal(keys[1], (32, 16), jnp.bfloat16), "b": jnp.zeros((16,))}},
        "scale": jnp.float32(0.3),
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)).init(params)
    state = {"params": params, "optimizer": optimizer, "step": jnp.int32(7)}
    state["optimizer"] = jax.tree.map(lambda x: x + jax.random.normal(keys[2], x.shape).astype(x.dtype), optimizer)
    abstract = shard(state, make_mesh(2, 2), spec)
    return jax.tree.map(lambda x, a: jax.device_put(x, a.sharding), state, abstract)


def assert_equal(left: Any, right: Any) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b), strict=True), left, right)


def save_all(directory: Path, state: dict[str, Any], *saved_steps: int, **options: Any) -> Checkpoints:
    checkpoints = Checkpoints(directory, **options)
    for step in saved_steps:
        checkpoints.save(step, state | {"step": jnp.int32(step)}, {"tokens": step * 100})
    checkpoints.wait()
    return checkpoints


def test_another_mesh_is_no_special_case(tmp_path: Path, state: dict[str, Any]) -> None:
    with save_all(tmp_path / "checkpoints", state, 7) as checkpoints:
        assert (checkpoints.steps(), checkpoints.latest_verified()) == ([7], 7)
        assert checkpoints.meta(7) == {"tokens": 700}
        for mesh, spec in [
            (make_mesh(2, 2), PartitionSpec("data", "tensor")),
            (make_mesh(1, 4), PartitionSpec("tensor", None)),
            (make_mesh(1, 1), PartitionSpec()),
        ]:
            abstract = shard(state, mesh, spec)
            restored = checkpoints.restore(7, abstract)
            assert_equal(restored, state)
            assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(lambda x: x.sharding, abstract)


def test_parameters_alone_need_no_other_file(tmp_path: Path, state: dict[str, Any]) -> None:
    with save_all(tmp_path, state, 7) as checkpoints:
        for path in (tmp_path / "7" / "optimizer").rglob("*"):
            if path.is_file():
                path.write_bytes(b"")
        abstract = shard(state["params"], make_mesh(1, 2), PartitionSpec(None, "tensor"))
        assert_equal(checkpoints.restore(7, {"params": abstract})["params"], state["params"])


def test_saved_arrays_may_be_donated_at_once(tmp_path: Path) -> None:
    advance = jax.jit(lambda x: x + 1, donate_argnums=0)
    with Checkpoints(tmp_path) as checkpoints:
        x = jnp.zeros((1000, 2500))
        for step in range(1, 13):
            x = advance(x)
            if step % 4 == 0:
                checkpoints.save(step, {"x": x}, {})
        checkpoints.wait()
        abstract = {"x": jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)}
        for step in (4, 8, 12):
            np.testing.assert_array_equal(checkpoints.restore(step, abstract)["x"], np.full(x.shape, step, np.float32))


def test_retention_and_no_overwriting(tmp_path: Path, state: dict[str, Any]) -> None:
    with save_all(tmp_path, state, 10, 20, 30, 40, keep_last=1, keep_every=20) as checkpoints:
        assert checkpoints.steps() == [20, 40]
        with pytest.raises(FileExistsError, match="never overwritten"):
            checkpoints.save(40, state, {})
        assert checkpoints.latest_verified() == 40


def test_a_flipped_byte_falls_back_to_the_step_before(tmp_path: Path, state: dict[str, Any]) -> None:
    said: list[str] = []
    with save_all(tmp_path, state, 1, 2, report=said.append) as checkpoints:
        data = max(
            (path for path in (tmp_path / "2").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
        )
        content = bytearray(data.read_bytes())
        content[len(content) // 2] ^= 1
        data.write_bytes(content)
        assert checkpoints.verify(2) == [f"{data}: its content changed (SHA-256 differs)"]
        assert checkpoints.latest_verified() == 1
        assert len(said) == 2
        assert str(data) in said[0]
        assert checkpoints.steps() == [1]
        checkpoints.save(2, state, {})  # the name is free again
        assert checkpoints.latest_verified() == 2
        assert (tmp_path / "2.bad-1").is_dir()
    (tmp_path / "1" / "manifest.json").unlink()
    (tmp_path / "2" / "manifest.json").unlink()
    looking = Checkpoints(tmp_path, read_only=True, report=said.append)
    with pytest.raises(CheckpointError, match="no checkpoint verifies"):
        looking.latest_verified()
    assert looking.steps() == [1, 2]
    looking.close()


def test_what_a_killed_process_left_is_no_checkpoint(tmp_path: Path, state: dict[str, Any]) -> None:
    for name in ("3.saving", "3.saving.orbax-checkpoint-tmp", "2.saving"):
        (tmp_path / name / "params").mkdir(parents=True)
        (tmp_path / name / "params" / "rest").write_bytes(b"torn")
    with Checkpoints(tmp_path, keep_last=2) as checkpoints:
        assert checkpoints.latest_verified() is None
        checkpoints.save(3, state, {})
        assert checkpoints.latest_verified() == 3
        assert [path.name for path in tmp_path.iterdir()] == ["3"]
        assert not [name for name in manifest.read(tmp_path / "3").files if "rest" in name]


class Told:
    """What a run is told of its saves."""

    def __init__(self) -> None:
        self.stored: list[tuple[int, float, int]] = []
        self.failed: list[tuple[int, str]] = []
        self.lines: list[str] = []
        self.options: dict[str, Any] = {
            "report": self.lines.append,
            "on_stored": lambda *event: self.stored.append(event),
            "on_failed": lambda *event: self.failed.append(event),
        }


def fail(error: Exception) -> Any:
    def raise_error(*args: Any, **kwargs: Any) -> None:
        raise error

    return raise_error


@pytest.mark.parametrize("place", ["manifest.write", "manifest.digest_files", "steps.publish", "orbax", "reach"])
@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (OSError(errno.EIO, "Input/output error"), "[Errno 5] Input/output error"),
        (ValueError("RESOURCE_EXHAUSTED: Error writing [os_error_code='28']"), "no space left on DIR (needs about 0.0"),
        (OSError(errno.EDQUOT, "Quota"), "the disk quota on DIR is used up (needs about 0.0 MB)"),
    ],
)
def test_a_save_that_fails_does_not_end_the_run(
    tmp_path: Path, state: dict[str, Any], monkeypatch: Any, place: str, error: Exception, cause: str
) -> None:
    told = Told()
    reach = fail(error) if place == "reach" else lambda phase, step: None
    with save_all(tmp_path, state, 1, **told.options) as good, monkeypatch.context() as patch:
        checkpoints = Checkpoints(tmp_path, **told.options, reach=reach)
        if place == "orbax":
            patch.setattr(checkpoints._orbax, "save", fail(error))
        elif place != "reach":
            module, name = place.split(".")
            patch.setattr({"manifest": manifest, "steps": steps}[module], name, fail(error))
        assert checkpoints.save(2, state, {})
        assert not checkpoints.wait()
        assert not checkpoints.wait()
        checkpoints.close()
        cause = cause.replace("DIR", str(tmp_path))
        assert [path.name for path in tmp_path.iterdir()] == ["1"]
        assert [step for step, _ in told.failed] == [2]
        assert told.failed[0][1].startswith(cause)
        line = f"checkpoint 2 could not be saved: {told.failed[0][1]}; the run goes on, earlier checkpoints are kept"
        assert told.lines == [line]
        patch.undo()
        assert good.save(2, state, {})  # there is room again
        assert good.wait()
        assert good.latest_verified() == 2
        assert [(step, size) for step, _, size in told.stored] == [
            (step, manifest.read(tmp_path / str(step)).size_bytes) for step in (1, 2)
        ]
        assert all(0 < seconds < 60 for _, seconds, _ in told.stored)


def test_a_bug_is_raised(tmp_path: Path, state: dict[str, Any], monkeypatch: Any) -> None:
    told = Told()
    checkpoints = save_all(tmp_path, state, 1, **told.options)
    monkeypatch.setattr(manifest, "write", fail(KeyError("bug")))
    checkpoints.save(2, state, {})
    with pytest.raises(KeyError, match="bug"):
        checkpoints.wait()
    assert (told.failed, told.lines) == ([], [])
    assert [path.name for path in tmp_path.iterdir()] == ["1"]

    def stop() -> None:
        with checkpoints:
            checkpoints.save(2, state, {})
            raise ZeroDivisionError  # is not hidden by what goes wrong at the end

    with pytest.raises(ZeroDivisionError):
        stop()
    assert told.lines == ["checkpoint 2 failed: KeyError('bug')"]


def test_no_save_begins_where_there_is_no_room(tmp_path: Path, state: dict[str, Any], monkeypatch: Any) -> None:
    told = Told()
    with save_all(tmp_path, state, 1, **told.options) as checkpoints:
        size_bytes = sum(x.nbytes for x in jax.tree.leaves(state))
        usage = shutil.disk_usage(tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr(disk.shutil, "disk_usage", lambda path: usage._replace(free=size_bytes - 1))
            assert not checkpoints.save(2, state, {})
            checkpoints.amend({"probe": 1})
            assert not checkpoints.wait()
            assert [path.name for path in tmp_path.iterdir()] == ["1"]
            assert told.failed == [(2, f"no space left on {tmp_path} (needs about 0.0 MB, 0.0 MB free)")]
            patch.setattr(disk.shutil, "disk_usage", lambda path: usage._replace(free=size_bytes))
            assert checkpoints.save(2, state, {})
            patch.setattr(disk.shutil, "disk_usage", lambda path: usage._replace(total=0, free=0))
            assert checkpoints.save(3, state, {})  # a file system that does not say what it has
        assert checkpoints.wait()
        assert checkpoints.latest_verified() == 3


def test_a_directory_that_cannot_be_made_is_told(tmp_path: Path, state: dict[str, Any]) -> None:
    told = Told()
    (tmp_path / "run").write_text("a file")
    with Checkpoints(tmp_path / "run" / "checkpoints", **told.options) as checkpoints:
        assert not checkpoints.save(1, state, {})
        assert not checkpoints.wait()
    assert [step for step, _ in told.failed] == [1]
    assert "Not a directory" in told.failed[0][1]


def test_weights_that_cannot_be_saved_are_no_import(tmp_path: Path, state: dict[str, Any]) -> None:
    directory = RunDirectory.create(tmp_path / "run", "", {})
    (directory.path / "checkpoints").write_text("a file")
    with pytest.raises(UserError, match="the weights could not be saved to"):
        save_initial(directory, state["params"], {})


def test_a_step_is_complete_when_it_is_amended(tmp_path: Path, state: dict[str, Any]) -> None:
    reached: list[tuple[str, int]] = []
    written, told = threading.Event(), Told()

    def reach(phase: str, step: int) -> None:
        reached.append((phase, step))
        written.set()

    with Checkpoints(tmp_path, reach=reach, keep_last=3, **told.options) as checkpoints:
        meta = {"tokens": 1}
        assert checkpoints.save(1, state, meta)
        meta["tokens"] = 2  # too late
        assert written.wait(60)
        time.sleep(0.5)
        assert reached == [("write", 1)]
        assert not (tmp_path / "1").exists()
        checkpoints.amend({"probe": {"loss": 0.1}})
        with pytest.raises(ValueError, match="amended already"):
            checkpoints.amend({})
        assert checkpoints.wait()
        assert checkpoints.meta(1) == {"tokens": 1, "probe": {"loss": 0.1}}
        assert reached == [("write", 1), ("manifest", 1)]
        checkpoints.save(2, state, {"tokens": 2})
        checkpoints.save(3, state, {"tokens": 3})  # the next save does not wait for an amendment
        assert checkpoints.meta(2) == {"tokens": 2}
    assert manifest.read(tmp_path / "3").meta == {"tokens": 3}
    assert [step for step, _, _ in told.stored] == [1, 2, 3]


def test_the_best_checkpoint_stays(tmp_path: Path, state: dict[str, Any]) -> None:
    with Checkpoints(tmp_path, keep_last=1, keep_best="books") as checkpoints:
        for step, loss in enumerate([3.0, 2.0, 2.5, 2.2]):
            checkpoints.save(step, state, {"validation": {"books": loss}})
        checkpoints.wait()
        assert checkpoints.steps() == [1, 3]


def test_old_steps_that_cannot_be_deleted_are_told(tmp_path: Path, state: dict[str, Any], monkeypatch: Any) -> None:
    told = Told()
    with monkeypatch.context() as patch:
        patch.setattr(steps, "delete_old_steps", fail(OSError("busy")))
        save_all(tmp_path, state, 1, 2, keep_last=1, **told.options).close()
    assert told.lines == ["old checkpoints cannot be deleted: busy"] * 2
    assert ([step for step, _, _ in told.stored], told.failed) == ([1, 2], [])


def test_copies_of_arrays_on_the_host_are_compiled_once(tmp_path: Path) -> None:
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
    store._make_copy.cache_clear()
    save_all(tmp_path, {"x": jax.device_put(jnp.arange(8.0), sharding)}, 1, 2, 3).close()
    assert store._make_copy(sharding)._cache_size() == 1


def test_going_on_from_an_older_step_keeps_the_newer_ones(tmp_path: Path, state: dict[str, Any]) -> None:
    with save_all(tmp_path, state, 1, 2, 3, report=lambda line: None) as checkpoints:
        assert checkpoints.set_aside_after(1) == [2, 3]
        checkpoints.save(2, state, {})
        assert checkpoints.latest_verified() == 2
    assert {path.name for path in tmp_path.iterdir()} == {"1", "2", "2.superseded-1", "3.superseded-1"}


def test_a_state_that_does_not_fit_is_refused(tmp_path: Path, state: dict[str, Any]) -> None:
    with save_all(tmp_path, state, 7) as checkpoints:
        abstract = shard({"params": state["params"]}, make_mesh(1, 1), PartitionSpec())
        embed = abstract["params"]["embed"]["w"]
        for wrong, message in [
            (embed.update(shape=(64, 33)), r"params/embed/w: saved float32\[64, 32\], wanted float32\[64, 33\]"),
            (embed.update(dtype=jnp.bfloat16), r"wanted bfloat16\[64, 32\]"),
        ]:
            with pytest.raises(UserError, match=message):
                checkpoints.restore(7, {"params": abstract["params"] | {"embed": {"w": wrong}}})
        with pytest.raises(UserError, match=r"1 arrays differ.*params/head: saved nothing"):
            checkpoints.restore(7, {"params": abstract["params"] | {"head": embed}})
        del abstract["params"]["embed"]
        with pytest.raises(UserError, match="wanted nothing"):
            checkpoints.restore(7, abstract)


def test_metadata_must_be_json(tmp_path: Path, state: dict[str, Any]) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(TypeError, match="not JSON serializable"):
            checkpoints.save(1, state, {"path": tmp_path})
        assert checkpoints.latest_verified() is None


def test_saving_returns_before_the_checkpoint_is_complete(tmp_path: Path) -> None:
    state = {"x": jax.block_until_ready(jax.random.normal(jax.random.key(0), (25, 1000, 1000)))}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        begin = time.perf_counter()
        checkpoints.wait()
        waited = time.perf_counter() - begin
        begin = time.perf_counter()
        checkpoints.save(2, state, {})
        stalled = time.perf_counter() - begin
        assert not (tmp_path / "2").exists()
        assert stalled < waited
