"""SIGKILL at any moment of a save costs the work since the last complete checkpoint and nothing else."""

import random
import subprocess
import sys
import time
from pathlib import Path

from mtx.checkpoints import steps

PROGRAM = """
import sys, itertools
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from mtx.checkpoints.store import Checkpoints
with Checkpoints(Path(sys.argv[1]), keep_last=2) as checkpoints:
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


def test_kills_cost_no_complete_checkpoint(tmp_path: Path) -> None:
    chance = random.Random(1)
    reached = 0
    for _ in range(3):
        arguments = [sys.executable, "-c", PROGRAM, str(tmp_path)]
        with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
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
