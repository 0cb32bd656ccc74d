"""SIGKILL at any moment of a save costs the work since the last complete checkpoint and nothing else."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mtx.checkpoints import manifest, steps

PROGRAM = """
import itertools, os, signal, sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from mtx.checkpoints.store import Checkpoints
kill_phase, kill_step = sys.argv[2], int(sys.argv[3])
def reach(phase, step):
    if (phase, step) == (kill_phase, kill_step):
        os.kill(os.getpid(), signal.SIGKILL)
with Checkpoints(Path(sys.argv[1]), keep_last=2, reach=reach) as checkpoints:
    step = checkpoints.latest_verified()
    x = jnp.zeros((500, 1000)) if step is None else None
    if step is not None:
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        x = checkpoints.restore(step, {"x": jax.ShapeDtypeStruct((500, 1000), "float32", sharding=sharding)})["x"]
        assert (np.asarray(x) == step).all()
    for step in itertools.count((step or 0) + 1):
        x = x + 1
        checkpoints.save(step, {"x": x}, {})
        checkpoints.wait()
        print(step, flush=True)
"""


def run(directory: Path, phase: str = "none", step: int = 0) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-c", PROGRAM, str(directory), phase, str(step)]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_kills_cost_no_complete_checkpoint(tmp_path: Path) -> None:
    chance = random.Random(1)
    reached = 0
    for _ in range(3):
        with run(tmp_path) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            said = [process.stdout.readline()]
            time.sleep(chance.random() * 0.5)
            process.kill()
            said += process.stdout.read().splitlines()
            assert process.stderr.read() == ""  # no checkpoint was found bad
        complete = [int(line) for line in said if line.strip()]
        assert complete[0] == reached + 1 or complete[0] == reached + 2  # a kill may come before the word of a save
        reached = complete[-1]
        assert steps.list_steps(tmp_path)[-1] in (reached, reached + 1)
    assert not list(tmp_path.glob("*.bad-*"))


@pytest.mark.parametrize("phase", ["write", "manifest"])
def test_a_kill_in_each_phase_costs_that_save(tmp_path: Path, phase: str) -> None:
    for step, before in ((1, []), (3, [1, 2])):  # the first save of all, and the second of a run that goes on
        out, error = run(tmp_path, phase, step).communicate(timeout=100)
        assert error == ""
        assert out.split() == ([] if step == 1 else ["1", "2"])
        assert steps.list_steps(tmp_path) == before
        assert {path.name.split(".")[0] for path in steps.list_dead_saves(tmp_path)} == {str(step)}
        assert all(manifest.verify(tmp_path / str(step)) == [] for step in before)
    with run(tmp_path, phase, 5) as process:
        out, error = process.communicate(timeout=100)
        assert (out.split(), error, process.returncode) == (["3", "4"], "", -signal.SIGKILL)
    assert steps.list_steps(tmp_path) == [3, 4]
    assert not list(tmp_path.glob("3.saving*"))
