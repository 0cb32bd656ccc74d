"""A full disk costs a checkpoint and nothing else: real saves on a small file system of their own."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from programs import environment

MOUNT = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", 'mount -t tmpfs -o size=20m none "$0" && "$@"']

PROGRAM = """
import json, sys
from pathlib import Path
import jax, jax.numpy as jnp
from mtx.checkpoints import steps
from mtx.checkpoints.store import Checkpoints
disk, told, lines = Path(sys.argv[1]), [], []
ballast = disk / "ballast"

def reach(phase, step):
    if step == 2 and phase == "write" or step == 3 and phase == "manifest":
        size_bytes = 1 << 20
        with ballast.open("ab", buffering=0) as out:  # what another program writes meanwhile
            while size_bytes:
                try:
                    out.write(bytes(size_bytes))
                except OSError:
                    size_bytes //= 2

def state(megabytes):  # in each of four arrays
    keys = jax.random.split(jax.random.key(0), 4)
    return {name: {"w": jax.random.normal(key, (megabytes * 1000, 250))} for name, key in zip("abcd", keys)}

with Checkpoints(disk / "run" / "checkpoints", reach=reach, report=lines.append,
                 on_failed=lambda step, cause: told.append([step, cause])) as checkpoints:
    answers, left = [], []
    for step, megabytes in ((1, 1), (2, 1), (3, 1), (4, 8), (5, 1)):
        began = checkpoints.save(step, state(megabytes), {})
        answers.append([began, checkpoints.wait()])
        left.append(sorted(path.name for path in checkpoints.directory.iterdir()))
        ballast.unlink(missing_ok=True)
    print(json.dumps({"answers": answers, "left": left, "told": told, "lines": lines,
                      "problems": [checkpoints.verify(step) for step in checkpoints.steps()],
                      "newest": checkpoints.latest_verified()}))
"""


def run_on_small_disk(folder: Path, program: str) -> dict[str, Any]:
    """What a program prints that is given the path of an empty file system of 20 MB."""
    if subprocess.run([*MOUNT, str(folder), "true"], capture_output=True).returncode != 0:
        pytest.skip("file systems cannot be mounted here (unshare --user --mount)")
    process = subprocess.run(
        [*MOUNT, str(folder), sys.executable, "-c", program, str(folder)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    answer: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return answer


def test_a_full_disk_costs_one_checkpoint(tmp_path: Path) -> None:
    answer = run_on_small_disk(tmp_path, PROGRAM)
    # 2: full while writing; 3: full before the manifest; 4: too large to begin; 5: there is room again.
    assert answer["answers"] == [[True, True], [True, False], [True, False], [False, False], [True, True]]
    assert answer["left"] == [["1"], ["1"], ["1"], ["1"], ["1", "5"]]
    assert [step for step, _ in answer["told"]] == [2, 3, 4]
    for step, cause in answer["told"]:
        needed = "32.0" if step == 4 else "4.0"
        assert cause.startswith(f"no space left on {tmp_path}/run/checkpoints (needs about {needed} MB, ")
        assert cause.endswith(" MB free)")
    assert len(answer["lines"]) == 3
    assert (answer["problems"], answer["newest"]) == ([[], []], 5)
