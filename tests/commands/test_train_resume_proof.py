"""A resumed run proves that it is the run that was saved, or is refused and leaves everything as it was."""

from __future__ import annotations

import json
import re
import signal

import jax
import jax.numpy as jnp
import pytest
from programs import run

from mtx.checkpoints import manifest
from mtx.checkpoints.run_directory import RunDirectory
from mtx.config.reader import load_text
from mtx.config.schema import Mesh
from mtx.mesh import make_mesh
from mtx.training.proof import PROGRAM
from mtx.training.state import Setup

EXACT = {"arrays": "equal", "batch": "equal", "step": "bit-equal"}
LEAF = "params/embedding/table"


def next_step(workplace, name, step):
    """What `metrics.jsonl` says of the step after a checkpoint."""
    (line,) = (line for line in workplace.records(name) if line["step"] == step + 1 and "eval" not in line)
    return {figure: line[figure] for figure in ("loss", "grad_norm")}


def assert_tells_all(meta, step):
    assert meta.keys() >= {"digests", "probe", "ledger", "data", "config", "config_digest", "tokens", *PROGRAM}
    assert meta["probe"].keys() == {"loss", "grad_norm", "batch"}
    assert re.fullmatch("[0-9a-f]{16}", meta["probe"]["batch"])
    assert load_text(meta["config"], "meta").run.model.d_model == 32
    assert meta["tokens"] == meta["ledger"]["tokens"] == 256 * step
    assert json.loads(meta["data"])["global_batch_size"] == 8


def set_meta(workplace, name, step, **changes):
    """Changes what a checkpoint says, and seals it again."""
    step_dir = workplace.folder / name / "checkpoints" / str(step)
    was = manifest.read(step_dir)
    (step_dir / manifest.NAME).unlink()
    manifest.write(step_dir, step=step, meta={**was.meta, **changes}, arrays=was.arrays, files=was.files)
    assert manifest.verify(step_dir) == []


def refuse(workplace, name, *settings, options=(), code=2):
    """Starts a run that must be refused and change nothing; its message, in one line."""
    before = workplace.content(name)
    process = workplace.train(name, *settings, options=options, check=False)
    assert process.returncode == code, process.stderr
    assert "Traceback" not in process.stderr
    after = workplace.content(name)
    assert after.keys() == before.keys()
    assert [path for path in after if after[path] != before[path]] == []
    assert workplace.events(name, "resumed") == []
    return re.sub(r"\s+", " ", process.stderr)


def test_checkpoints_tell_the_next_step(workplace, straight):
    for step in (4, 8, 12, 16):
        meta = workplace.meta(straight, step)
        assert_tells_all(meta, step)
        assert {name: meta["probe"][name] for name in ("loss", "grad_norm")} == next_step(workplace, straight, step)
        with RunDirectory.open(workplace.folder / straight).checkpoints(read_only=True) as checkpoints:
            arrays = manifest.read(checkpoints.directory / str(step)).arrays
        assert meta["digests"].keys() == arrays.keys()
    assert len({workplace.meta(straight, step)["probe"]["batch"] for step in (4, 8, 12, 16, 20)}) == 5
    assert len({workplace.meta(straight, step)["digests"][LEAF] for step in (4, 8, 12, 16, 20)}) == 5


def test_preempted_and_resumed(workplace, straight):
    """Regular, preempted and last checkpoints, at steps where the run that nothing interrupted has none."""
    name = "preempted"
    assert workplace.interrupt(name, 2, signal.SIGTERM) == 4
    (event,) = workplace.events(name, "preempted")
    step = event["step"]
    assert 2 <= step < 18
    meta = workplace.meta(name, step)
    assert_tells_all(meta, step)
    assert {name: meta["probe"][name] for name in ("loss", "grad_norm")} == next_step(workplace, straight, step)

    workplace.train(name, f"Train.steps = {step + 2}")
    (event,) = workplace.events(name, "resumed")
    assert (event["step"], event["proof"]) == (step, EXACT)
    last = workplace.meta(name, step + 2)
    assert_tells_all(last, step + 2)
    assert {name: last["probe"][name] for name in ("loss", "grad_norm")} == next_step(workplace, straight, step + 2)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("by tensor", ["Mesh.tensor = 2"]),
        pytest.param("by stages", ["Mesh.pipe = 2", "Train.microbatch_size = 2"], marks=pytest.mark.slow),
    ],
)
def test_another_mesh(workplace, straight, name, settings):
    workplace.copy(straight, name)
    workplace.train(name, "Train.steps = 17", *settings, options=["--resume", "16"], devices=4)
    (event,) = workplace.events(name, "resumed")
    assert event["step"] == 16
    assert (event["proof"]["arrays"], event["proof"]["batch"]) == ("equal", "equal")
    assert re.fullmatch(r"bit-equal|within \de-0[678] of 1e-0[45]", event["proof"]["step"])  # its sums may round alike


def test_a_parameter_that_is_not_what_was_saved(workplace, straight):
    """The files are whole; one float of the state is another than that which was digested."""
    name, directory = "another float", RunDirectory.open(workplace.copy(straight, "another float"))
    setup = Setup(directory.config().run, make_mesh(Mesh(data=1), jax.devices()[:1]))
    with directory.checkpoints() as checkpoints:
        state, meta = checkpoints.restore(20, setup.canonical.abstract_state), checkpoints.meta(20)
        changed = jax.tree_util.tree_map_with_path(
            lambda path, x: x.at[3, 5].set(jnp.nextafter(x[3, 5], 9.0)) if _name(path) == LEAF else x, state
        )
        checkpoints.save(21, changed, meta)
    assert workplace.meta(name, 21)["probe"] == meta["probe"]
    message = refuse(workplace, name, "Train.steps = 22", code=5)
    assert f"checkpoint 21: 1 of {len(meta['digests'])} arrays {LEAF} differs from what was saved: digest" in message
    assert f"saved {meta['digests'][LEAF]}" in message
    assert message.count("differs") == 1


def _name(path):
    return jax.tree_util.keystr(path, simple=True, separator="/")


def test_a_step_that_is_not_what_was_computed(workplace, straight):
    name = "another loss"
    workplace.copy(straight, name)
    probe = workplace.meta(name, 12)["probe"]
    set_meta(workplace, name, 12, probe={**probe, "loss": probe["loss"] + 1e-6})
    message = refuse(workplace, name, options=["--resume", "12"])
    assert "step 13 does not repeat what the run computed after checkpoint 12" in message
    assert f"loss {probe['loss']!r}, saved {probe['loss'] + 1e-6!r}" in message
    assert "grad_norm" not in message
    assert "The program is the same" in message


@pytest.mark.slow
def test_a_batch_that_is_not_what_was_read(workplace, straight):
    name = "another batch"
    workplace.copy(straight, name)
    probe = workplace.meta(name, 12)["probe"]
    set_meta(workplace, name, 12, probe={**probe, "batch": "0123456789abcdef"})
    message = refuse(workplace, name, "Checkpoint.every_steps = 5", options=["--resume", "12"])
    assert "step 13 would train on another batch than the run did after checkpoint 12" in message
    assert f"digest {probe['batch']}, then 0123456789abcdef" in message


@pytest.mark.slow
def test_without_probes(workplace, straight):
    name = "without probes"
    workplace.train(name, "Train.steps = 2", "Checkpoint.probe = False")
    assert not workplace.meta(name, 2).keys() & {"digests", "probe", "program"}
    aloud = [part for part in workplace.command(name, "Train.steps = 3") if part != "--quiet"]
    process = run(aloud, env=workplace.environment())
    assert "goes on from step 2" in process.stderr
    assert "proven:" not in process.stdout + process.stderr
    (event,) = workplace.events(name, "resumed")
    assert (event["step"], event["proof"]) == (2, {})
    assert next_step(workplace, name, 2) == next_step(workplace, straight, 2)
