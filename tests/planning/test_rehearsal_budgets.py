"""The shipped runs, compiled for the clusters that they name: each within its budget, without an error or a warning."""

import json
import pathlib

import programs
import pytest
from planning.test_rehearsal import needs_compiler

ROOT = pathlib.Path(__file__).parents[2]
BUDGETS = ROOT / "tests" / "golden" / "budgets"
RUNS = sorted(path.stem for path in BUDGETS.glob("*.json"))
GIB = 2**30

# A process of its own, since what the tests before had as children would count as well.
WITH_PEAK = """
import json, resource, subprocess, sys
done = subprocess.run([sys.executable, *sys.argv[1:]], stdout=subprocess.PIPE, text=True, timeout=850)
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
print(json.dumps({**json.loads(done.stdout), "host_peak_bytes": peak}) if done.returncode == 0 else done.stdout)
sys.exit(done.returncode)
"""


def rehearse(name, *arguments):
    budget = ["--budget", str(BUDGETS / f"{name}.json")]
    command = ["-m", "mtx", "rehearse", f"configs/runs/{name}.gin", *budget, "--json", *arguments]
    done = programs.run(["-c", WITH_PEAK, *command], check=False, timeout_s=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(done.stdout)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_shipped_runs_are_within_their_budgets(name):
    answer = rehearse(name)
    assert answer["fits"]
    assert answer["grown"] == []
    assert [finding for finding in answer["findings"] if finding["severity"] != "note"] == []
    assert answer["argument_bytes"] == answer["plan"]["state_bytes"] + answer["plan"]["batch_bytes"]
    assert answer["alias_bytes"] == answer["plan"]["state_bytes"]
    if name == "mt_nlg_530b":
        assert answer["gpus"] == 2240
        assert answer["peak_bytes"] <= 40 * GIB
        assert answer["compiler_memory_bytes"] < 2 * GIB
        assert answer["host_peak_bytes"] < 2 * GIB


def test_every_shipped_run_of_a_cluster_has_a_budget():
    shipped = {path.stem for path in (ROOT / "configs" / "runs").glob("*.gin") if "clusters/" in path.read_text()}
    assert shipped == set(RUNS)
