"""Two real processes save one sharded state together; one process restores it."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from mtx.checkpoints.store import Checkpoints

PROGRAM = """
import sys
from pathlib import Path
import jax
port, index, directory = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{port}", 2, index, cluster_detection_method="deactivate")
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from mtx.checkpoints.store import Checkpoints
sharding = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data"))
whole = np.arange(64, dtype=np.float32).reshape(8, 8)
x = jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])
checkpoints = Checkpoints(directory, keep_last=2, report=lambda line: print("BAD", line))
assert checkpoints.latest_verified() is None
for step in (1, 2, 3):
    checkpoints.save(step, {"x": x + step}, {"processes": jax.process_count()})
checkpoints.wait()
assert checkpoints.steps() == [2, 3], checkpoints.steps()
if index == 0:
    data = max((path for path in (directory / "3").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    data.write_bytes(data.read_bytes()[:-1])
step = checkpoints.latest_verified()
abstract = {"x": jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)}
mine = checkpoints.restore(step, abstract)["x"].addressable_shards[0]
assert (np.asarray(mine.data) == whole[mine.index] + 2).all()
checkpoints.close()
print("DONE", index, step)
"""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def test_two_processes_save_what_one_restores(tmp_path: Path) -> None:
    port = free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(port), str(index), str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={name: value for name, value in os.environ.items() if name != "XLA_FLAGS"},
        )
        for index in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=100) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for index, (process, (out, error)) in enumerate(zip(processes, outputs)):
        assert process.returncode == 0, error
        assert f"DONE {index} 2" in out
    assert outputs[0][0].count("BAD") == 2  # the problem, and what became of the step; process 1 says nothing
    assert outputs[1][0].count("BAD") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3.bad-1"]

    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.meta(2) == {"processes": 2}
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        abstract = {"x": jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=sharding)}
        restored = checkpoints.restore(2, abstract)["x"]
        np.testing.assert_array_equal(restored, np.arange(64, dtype=np.float32).reshape(8, 8) + 2)
