"""Jobs that tests submit to a cluster (`slurm_cluster`), and a program that tells what it was started with."""

import json
import sys
import time
from pathlib import Path

from programs import ROOT

# Writes down what it was started with, then does what the word says: at the first attempt, or always.
PROGRAM = """
import json, os, pathlib, signal, sys, time
folder, word = pathlib.Path(sys.argv[2]), sys.argv[3]
names = ["MTX_PROCESS_ID", "MTX_NUM_PROCESSES", "MTX_COORDINATOR", "CUDA_VISIBLE_DEVICES", "SLURM_JOB_ID"]
names += ["SLURM_NODEID", "SLURMD_NODENAME", "SLURM_RESTART_COUNT"]
rank = os.environ.get("MTX_PROCESS_ID", "0")
first = not (folder / f"been-{rank}").exists()
(folder / f"been-{rank}").touch()
def end(number, frame):
    print("hears", signal.Signals(number).name, flush=True)
    if word == "slow":
        time.sleep(4)
    sys.exit(4)
signal.signal(signal.SIGTERM, end)
signal.signal(signal.SIGUSR1, end)
told = {**{name: os.environ.get(name) for name in names}, "pid": os.getpid(), "words": sys.argv[4:]}
with (folder / f"told-{rank}").open("a") as file:
    file.write(json.dumps(told) + "\\n")
if word in ("sleep", "slow") or (word == "once" and first):
    time.sleep(600)
"""


class Jobs:
    """Jobs whose run directories are in one folder."""

    def __init__(self, cluster, folder):
        self.cluster, self.folder = cluster, folder
        self.program = folder / "program.py"
        self.program.write_text(PROGRAM)
        self.environment = {"XDG_STATE_HOME": str(folder / "state"), "PYTHONPATH": str(ROOT)}

    def launch(self, *options, command, check=True, prefix=(), **more):
        words = [*prefix, sys.executable, "-m", "launch", *options, *(["--", *command] if command else [])]
        return self.cluster(*words, check=check, **{**self.environment, **more})

    def submit(self, name, word, *options, extra=()):
        """The number of a job that runs PROGRAM."""
        (self.folder / name).mkdir()
        command = [sys.executable, str(self.program), "--run-dir", str(self.folder / name), word, *extra]
        done = self.launch(
            "slurm", "--cpus-per-node", "1", "--backoff-s", "0.1", "--grace-s", "5", *options, command=command
        )
        return done.stderr.partition("is job ")[2].split()[0]

    def told(self, name, rank=0):
        path = self.folder / name / f"told-{rank}"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def wait_told(self, name, count=1, processes=2, timeout_s=60):
        self.cluster.wait_for(
            lambda: all(len(self.told(name, rank)) >= count for rank in range(processes)), timeout_s,
            lambda: self.log(name),
        )  # fmt: skip

    def wait_state(self, number, *states, timeout_s=60, name=None):
        self.cluster.wait_for(
            lambda: self.cluster.job(number)["JobState"] in states, timeout_s,
            lambda: f"{self.cluster.job(number)} {self.log(name) if name else ''}",
        )  # fmt: skip
        return self.cluster.job(number)

    def log(self, name):
        return "\n".join(path.read_text() for path in (self.folder / name / "logs").glob("slurm-*.log"))

    def records(self, name, event):
        lines = map(json.loads, (self.folder / name / "launch.jsonl").read_text().splitlines())
        return [line for line in lines if line["event"] == event]


def assert_gone(*pids, timeout_s=20):
    deadline = time.monotonic() + timeout_s
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.1)
