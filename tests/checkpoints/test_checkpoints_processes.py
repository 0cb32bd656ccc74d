"""Real processes save one sharded state together, and see together what goes wrong; one process restores it."""

import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from programs import ROOT, environment, free_port

from mtx.checkpoints.store import Checkpoints

PRELUDE = """
import os, signal, sys, threading
from pathlib import Path
import jax
from mtx.mesh import start_process
start_process()
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from mtx.checkpoints import manifest
from mtx.checkpoints.exchange import exchange
from mtx.checkpoints.store import Checkpoints
directory, index = Path(sys.argv[1]), jax.process_index()
sharding = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data"))
whole = np.arange(64, dtype=np.float32).reshape(8, 8)
x = jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])
digested = []
digest_files = manifest.digest_files
manifest.digest_files = lambda step_dir, names: digested.extend(names) or digest_files(step_dir, names)
"""

TOGETHER = """
checkpoints = Checkpoints(directory, keep_last=2, report=lambda line: print("BAD", line))
assert checkpoints.latest_verified() is None
for step in (1, 2, 3):
    assert checkpoints.save(step, {"x": x + step}, {"processes": jax.process_count()})
    if step == 2:
        checkpoints.amend({"loss": 0.5 + index})
assert checkpoints.wait()
assert checkpoints.steps() == [2, 3], checkpoints.steps()
files = manifest.read(directory / "3").files
assert 3 < len(digested) < 2 * len(files), (digested, files)  # a share of each of three steps
if index == 0:
    for name in sorted(files, key=lambda name: files[name].size_bytes)[-4:]:
        (directory / "3" / name).write_bytes(b"short")
exchange(None)
mine = manifest.verify(directory / "3", process=index, num_processes=2)
problems = checkpoints.verify(3)
assert len(problems) == 4 and 0 < len(mine) < 4 and set(mine) < set(problems), (mine, problems)
step = checkpoints.latest_verified()
abstract = {"x": jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)}
mine = checkpoints.restore(step, abstract)["x"].addressable_shards[0]
assert (np.asarray(mine.data) == whole[mine.index] + 2).all()
checkpoints.close()
print("DONE", index, step)
"""

ONE_CANNOT_WRITE = """
def reach(phase, step):
    if (index, phase, step) in {(1, "write", 2), (0, "write", 4)}:
        raise OSError(28, "No space left on device")

failed = []
checkpoints = Checkpoints(directory, reach=reach, on_failed=lambda step, cause: failed.append(step), timeout_s=60,
                          report=lambda line: print("TOLD", line))
ends = []
for step in range(1, 6):
    assert checkpoints.save(step, {"x": x + step}, {})
    ends.append(checkpoints.wait())
    assert not list(directory.glob("*.saving*")) or index
assert ends == [True, False, True, False, True], ends
assert failed == ([2, 4] if index == 0 else []), failed
found = checkpoints.latest_verified()
checkpoints.close()
print("DONE", index, found, checkpoints.steps())
"""

ONE_IS_KILLED = """
failed = threading.Event()
checkpoints = Checkpoints(directory, timeout_s=3, report=lambda line: print("TOLD", line, flush=True),
                          on_failed=lambda step, cause: failed.set())
assert checkpoints.save(1, {"x": x}, {}) and checkpoints.wait()
if index == 1:
    manifest.digest_files = lambda step_dir, names: os.kill(os.getpid(), signal.SIGKILL)
assert checkpoints.save(2, {"x": x}, {})
assert failed.wait(60)
print("DONE", index, checkpoints.steps(), flush=True)
os._exit(0)
"""


def launch(program: str, directory: Path) -> list[tuple[int, str]]:
    """Exit code and output of two processes with two devices each."""
    address = {"MTX_COORDINATOR": f"127.0.0.1:{free_port()}", "MTX_NUM_PROCESSES": "2"}
    with ExitStack() as stack:
        processes = []
        for index in range(2):
            process = subprocess.Popen(
                [sys.executable, "-c", PRELUDE + program, str(directory)],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                cwd=ROOT,
                env=environment(2, MTX_PROCESS_ID=str(index), MTX_COMPILATION_CACHE="", **address),
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            processes.append(process)
        return [(process.wait(100), process.communicate(timeout=100)[0]) for process in processes]


def test_two_processes_save_what_one_restores(tmp_path: Path) -> None:
    (code0, out0), (code1, out1) = launch(TOGETHER, tmp_path)
    assert (code0, code1) == (0, 0), out0 + out1
    assert "DONE 0 2" in out0
    assert "DONE 1 2" in out1
    assert out0.count("BAD") == 5  # the problems, and what became of the step; process 1 says nothing
    assert out1.count("BAD") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3.bad-1"]

    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.meta(2) == {"processes": 2, "loss": 0.5}
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        abstract = {"x": jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=sharding)}
        restored = checkpoints.restore(2, abstract)["x"]
        np.testing.assert_array_equal(restored, np.arange(64, dtype=np.float32).reshape(8, 8) + 2)


def test_a_process_that_cannot_write_keeps_nobody_waiting(tmp_path: Path) -> None:
    (code0, out0), (code1, out1) = launch(ONE_CANNOT_WRITE, tmp_path)
    assert (code0, code1) == (0, 0), out0 + out1
    assert "DONE 0 5 [1, 3, 5]" in out0, out0
    assert "DONE 1 5 [1, 3, 5]" in out1, out1
    told = [line for line in out0.splitlines() if line.startswith("TOLD")]
    assert [line.split()[2] for line in told] == ["2", "4"]
    assert f"process 1 on {os.uname().nodename}: no space left on {tmp_path}" in told[0]
    assert "TOLD" not in out1


def test_a_process_killed_while_it_digests_costs_that_checkpoint(tmp_path: Path) -> None:
    (code0, out0), (code1, out1) = launch(ONE_IS_KILLED, tmp_path)
    assert (code0, code1) == (0, -signal.SIGKILL), out0 + out1
    assert "DONE 0 [1]" in out0
    assert "checkpoint 2 could not be saved: 1.json of another process did not come within 3 s" in out0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1"]
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_verified() == 1
