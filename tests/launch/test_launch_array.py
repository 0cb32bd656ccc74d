"""A pool works off the tasks of an array, small programs in place of the work; and real shards of a token store."""

import gzip
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from programs import ROOT

from launch import array
from launch.job import Job

# Other tests of this process may have started JAX, which warns of every fork; what is forked here becomes another
# program at once.
pytestmark = pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")

# Does what the n-th word of its script says at the n-th try of its task: an exit code, or something below.
TASK = """
import json, os, pathlib, signal, sys, time
folder, scripts = pathlib.Path(sys.argv[2]), json.loads(sys.argv[3])
task = "merge" if sys.argv[-1] == "--merge" else sys.argv[-1].partition("/")[0]
if task != "merge":
    assert sys.argv[-2] == "--shard", sys.argv
tries = folder / f"tries-{task}"
with tries.open("a") as file:
    file.write("x")
words = scripts.get(task, "0").split(",")
word = words[min(tries.stat().st_size, len(words)) - 1]
print("task", task, "does", word, *sys.argv[4:], flush=True)
if word == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if word in ("listen", "deaf"):
    signal.signal(signal.SIGTERM, (lambda *_: sys.exit(4)) if word == "listen" else signal.SIG_IGN)
    (folder / f"pid-{task}").write_text(str(os.getpid()))
    time.sleep(60)
if word == "others":
    while len(list(folder.glob("pid-*"))) < 2:
        time.sleep(0.01)
    sys.exit(2)
(folder / "cores").open("a").write(json.dumps(sorted(os.sched_getaffinity(0))) + "\\n")
sys.exit(int(word))
"""


def words(folder, tasks, scripts, *more, **options):
    flags = {"array": tasks, "backoff-s": 0.01, "grace-s": 0.3, "run-dir": folder / "run", **options}
    given = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, "-c", TASK, "--out", str(folder), json.dumps(scripts), *more]
    return [sys.executable, "-m", "launch", "local", *given, "--", *command]


@pytest.fixture
def environment(tmp_path):
    return {**os.environ, "XDG_STATE_HOME": str(tmp_path / "state")}


@pytest.fixture
def launch(environment, tmp_path):
    def call(tasks, scripts, *more, **options):
        (tmp_path / "w").mkdir(exist_ok=True)
        done = subprocess.run(
            words(tmp_path / "w", tasks, scripts, *more, **options),
            capture_output=True, text=True, timeout=50, cwd=ROOT, env=environment,
        )  # fmt: skip
        assert "Traceback" not in done.stderr, done.stderr
        return done

    return call


def tries(folder):
    return {path.name.partition("-")[2]: path.stat().st_size for path in (folder / "w").glob("tries-*")}


def records(folder, event):
    lines = map(json.loads, (folder / "w/run/launch.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == event]


def test_all_tasks_then_the_merge(launch, tmp_path):
    done = launch(5, {}, "$(touch x) 'y'\n", parallel=2)
    assert done.returncode == 0, done.stderr
    assert tries(tmp_path) == dict.fromkeys(["0", "1", "2", "3", "4", "merge"], 1)
    assert [line["task"] for line in records(tmp_path, "task")][-1] == "merge"
    assert "launch: 5 of 5 done" in done.stderr
    assert "[3] task 3 does 0 $(touch x) 'y'" in done.stdout
    logs = tmp_path / "w/run/logs/1"
    assert {path.name for path in logs.iterdir()} == {"all.log", "merge.log", *(f"{n}.log" for n in range(5))}
    assert (logs / "4.log").read_text().startswith("task 4 does 0 $(touch x)")
    again = launch(5, {})
    assert again.returncode == 0
    assert (tmp_path / "w/run/logs/2/merge.log").exists()


def test_slots_share_the_cores(launch, tmp_path):
    cores = sorted(os.sched_getaffinity(0))
    launch(6, {}, parallel=len(cores))
    seen = [json.loads(line) for line in (tmp_path / "w/cores").read_text().splitlines()]
    assert len(seen) == 7
    assert all(len(share) == 1 for share in seen)


def test_a_failed_task_is_tried_again(launch, tmp_path):
    done = launch(3, {"1": "1,kill,4,6,0", "merge": "kill,0"})
    assert done.returncode == 0, done.stderr
    assert tries(tmp_path) == {"0": 1, "1": 5, "2": 1, "merge": 2}
    assert "task 1: killed by signal 9; tried again in" in done.stderr
    assert (tmp_path / "w/run/logs/1/1-5.log").exists()


def test_gives_up_after_so_many_failures(launch, tmp_path):
    done = launch(2, {"1": "9", "0": "0"}, **{"max-restarts": 2})
    assert done.returncode == 9
    assert tries(tmp_path) == {"0": 1, "1": 3}
    assert "task 1: exit code 9; given up: it failed 3 times" in done.stderr
    assert records(tmp_path, "ended")[-1]["codes"] == [9]


def test_a_final_code_ends_the_others(launch, tmp_path):
    done = launch(4, {"0": "listen", "1": "deaf", "2": "others", "3": "0"}, parallel=3)
    assert done.returncode == 2
    assert "task 2: exit code 2 (the user's mistake or bad input); the others are ended" in done.stderr
    codes = {line["task"]: line["code"] for line in records(tmp_path, "task")}
    assert codes == {"0": 4, "1": -signal.SIGKILL, "2": 2}
    assert "3" not in tries(tmp_path)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 4), (signal.SIGINT, 4)])
def test_a_signal_ends_all(environment, tmp_path, number, code):
    folder = tmp_path / "w"
    folder.mkdir()
    command = words(folder, 3, {"0": "listen", "1": "deaf"}, parallel=2, **{"grace-s": 1})
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment) as process:
        try:
            deadline = time.monotonic() + 30
            while not all((folder / f"pid-{n}").exists() and (folder / f"pid-{n}").read_text() for n in (0, 1)):
                assert time.monotonic() < deadline
                time.sleep(0.02)
            process.send_signal(number)
            _, errors = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == code, errors
    assert "the same command goes on" in errors
    assert {line["task"]: line["code"] for line in records(tmp_path, "task")} == {"0": 4, "1": -signal.SIGKILL}
    assert not any(pathlib.Path("/proc", (folder / f"pid-{n}").read_text()).exists() for n in (0, 1))


HOST = """
import os, pathlib, subprocess, sys
name, mark = sys.argv[1], pathlib.Path(sys.argv[2])
with mark.open("a") as file:
    file.write(f"{name} {sys.argv[-1]}\\n")
sys.exit(6 if name == "lost" else subprocess.run(sys.argv[3:]).returncode)
"""


def hosts(folder, *names):
    return [[sys.executable, "-c", HOST, name, str(folder / "mark")] for name in names]


def make_job(folder, scripts, tasks, **fields):
    command = (sys.executable, "-c", TASK, "--out", str(folder), json.dumps(scripts))
    return Job(command=command, run_dir=str(folder / "run"), tasks=tasks, backoff_s=0.01, grace_s=1, **fields)


def marks(folder):
    return [line.split() for line in (folder / "mark").read_text().splitlines()]


def test_a_lost_host_gives_its_tasks_back(tmp_path, capfd):
    # Its tasks fail at once elsewhere never: the losses count for the host, not for them.
    job = make_job(tmp_path, {}, 8, max_restarts=1)
    assert array.run(job, hosts(tmp_path, "lost", "good")) == 0
    assert len([name for name, _ in marks(tmp_path) if name == "lost"]) == 2
    assert sorted(task for name, task in marks(tmp_path) if name == "good") == sorted(
        [*(f"{n}/8" for n in range(8)), "--merge"]
    )
    assert "goes back, its host is given up" in capfd.readouterr().err


def test_no_host_is_left(tmp_path, capfd):
    assert array.run(make_job(tmp_path, {}, 3, max_restarts=1), hosts(tmp_path, "lost", "lost")) == 6
    assert "no host is left" in capfd.readouterr().err


def test_a_failed_task_is_tried_elsewhere(tmp_path):
    job = make_job(tmp_path, {"0": "1,1,1,0"}, 1)
    assert array.run(job, hosts(tmp_path, "a", "b")) == 0
    names = [name for name, task in marks(tmp_path) if task == "0/1"]
    assert names in (["a", "b", "a", "b"], ["b", "a", "b", "a"])


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_token_store(tmp_path, environment):
    """Shards of `mtx data build`, one of them killed in mid-work, make the store that a build without shards makes."""
    with gzip.open(ROOT / "texts/austen.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = file.readlines()[:40]
    (tmp_path / "in").mkdir()
    for i in range(8):
        (tmp_path / f"in/{i}.jsonl").write_text("".join(rows[i * 5 : i * 5 + 5]))
    environment["PYTHONPATH"] = str(ROOT)
    mtx = [sys.executable, "-m", "mtx"]

    def call(*more):
        done = subprocess.run(more, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        return done

    call(*mtx, "tokenizer", "train", "in/0.jsonl", "--vocab-size", "400", "--out", "t.model", "--quiet")
    build = [*mtx, "data", "build", "in", "--tokenizer", "t.model", "--out"]
    call(*build, "plain")
    killer = tmp_path / "killer.py"  # shard 1 dies once, when its part is there and its end is not told
    killer.write_text(
        "import os, pathlib, sys\n"
        "from mtx.cli import main\n"
        "from mtx.data import shards\n"
        "if '1/4' in sys.argv and not pathlib.Path('died').exists():\n"
        "    shards._write_done = lambda *_: (pathlib.Path('died').touch(), os.kill(os.getpid(), 9))\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    launch = [sys.executable, "-m", "launch", "local", "--array", "4", "--parallel", "2", "--backoff-s", "0.01", "--"]
    done = call(*launch, sys.executable, str(killer), *build[3:], "store")
    assert "task 1: killed by signal 9; tried again" in done.stderr
    assert "1 parts (1 of them were there)" in done.stdout
    assert contents(tmp_path / "store") == contents(tmp_path / "plain")
    assert not (tmp_path / "store.building").exists()
    again = call(*launch, *build, "store")  # says that it is there
    assert "nothing is left to merge" in again.stdout
    assert contents(tmp_path / "store") == contents(tmp_path / "plain")
