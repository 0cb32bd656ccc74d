"""A real Slurm on this machine: munged, slurmctld and several slurmd on loopback, which all end with the test."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

CONFIG = """
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={root}/run/munge.sock,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=10
SlurmctldTimeout=30
SlurmdTimeout=20
MinJobAge=600
JobRequeue=1
AccountingStorageType=accounting_storage/none
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/slurmd.%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd.%n.log
GresTypes=gpu
NodeName=n[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port={first}-{last} CPUs=4 RealMemory=4000 Gres=gpu:4
NodeName=dead1 NodeHostname={host} NodeAddr=127.0.0.1 Port={dead} CPUs=4 RealMemory=4000 Gres=gpu:4
PartitionName=main Nodes=n[1-{nodes}] Default=YES MaxTime=INFINITE State=UP
PartitionName=broken Nodes=dead1 MaxTime=INFINITE State=UP
"""
"""cred_expire is what a job waits before it runs again. Nobody starts dead1."""


class Cluster:
    """A running Slurm with nodes n1, n2, ..., four false GPUs each."""

    def __init__(self, root: Path, nodes: int) -> None:
        self.root, self.nodes = root, nodes
        self.slurmd: dict[str, subprocess.Popen[bytes]] = {}
        self._others: list[subprocess.Popen[bytes]] = []
        self.environment = {
            "SLURM_CONF": str(root / "etc/slurm.conf"), "PATH": f"{os.environ['PATH']}:/usr/sbin:/usr/bin",
        }  # fmt: skip

    def start(self) -> None:
        for name in ("etc", "run", "log", "state", "spool", "munge", "dev"):
            (self.root / name).mkdir()
        self.root.chmod(0o711)  # munged: its socket must be reachable
        (self.root / "munge").chmod(0o700)
        (self.root / "munge/key").write_bytes(os.urandom(1024))
        (self.root / "munge/key").chmod(0o600)
        self._others.append(
            self._run(
                "munged", "--foreground", f"--key-file={self.root}/munge/key", f"--socket={self.root}/run/munge.sock",
                f"--pid-file={self.root}/run/munged.pid", f"--log-file={self.root}/log/munged.log",
                f"--seed-file={self.root}/munge/seed", "--num-threads=2",
            )
        )  # fmt: skip
        self.wait_for(lambda: self("munge", "-S", f"{self.root}/run/munge.sock", "-n", check=False).returncode == 0)
        port = _free_ports(self.nodes + 2)
        host = subprocess.run(["hostname", "-s"], capture_output=True, text=True, check=True).stdout.strip()
        (self.root / "etc/slurm.conf").write_text(
            CONFIG.format(
                host=host, root=self.root, port=port, nodes=self.nodes, first=port + 1, last=port + self.nodes,
                dead=port + self.nodes + 1,
            )
        )  # fmt: skip
        for number in range(4):
            os.mknod(self.root / f"dev/gpu{number}", 0o20666, os.makedev(1, 3))
        names = f"n[1-{self.nodes}],dead1"
        (self.root / "etc/gres.conf").write_text(f"NodeName={names} Name=gpu File={self.root}/dev/gpu[0-3]\n")
        self._others.append(self._run("slurmctld", "-D", "-f", self.environment["SLURM_CONF"]))
        for number in range(1, self.nodes + 1):
            self.start_node(f"n{number}")
        self.wait_for(lambda: self("sinfo", "-h", "-N", "-p", "main", "-o", "%T", check=False).stdout.split()
                      == ["idle"] * self.nodes)  # fmt: skip

    def start_node(self, name: str) -> None:
        (self.root / "spool" / name).mkdir(exist_ok=True)
        self.slurmd[name] = self._run("slurmd", "-D", "-N", name, "-f", self.environment["SLURM_CONF"])

    def stop(self) -> None:
        if self._others:
            self("scancel", "--user=root", check=False)
            deadline = time.monotonic() + 15
            while time.monotonic() < deadline and self("squeue", "-h", check=False).stdout.strip():
                time.sleep(0.2)
        for process in [*self.slurmd.values(), *reversed(self._others)]:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for pid in self._members():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def __call__(self, *words: str, check: bool = True, **more: str) -> subprocess.CompletedProcess[str]:
        env = {**_clean(), **self.environment, **more}
        done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=60)
        assert not check or done.returncode == 0, done.stderr
        return done

    def wait_for(self, condition, timeout_s: float = 60, what=lambda: "") -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"{what()}\n{self.logs()}"
            time.sleep(0.1)

    def job(self, number: str) -> dict[str, str]:
        """Fields of a job."""
        words = self("scontrol", "-o", "show", "job", number).stdout.split()
        return {name: value for name, _, value in (word.partition("=") for word in words)}

    def logs(self) -> str:
        return "\n".join(f"{path}: {path.read_text()[-1500:]}" for path in (self.root / "log").glob("*.log"))

    def _run(self, *words: str) -> subprocess.Popen[bytes]:
        quiet = subprocess.DEVNULL
        with (self.root / "log" / "start.log").open("ab") as log:
            return subprocess.Popen(
                words, env={**_clean(), **self.environment}, stdin=quiet, stdout=log, stderr=log, cwd=self.root
            )

    def _members(self) -> list[int]:
        """Processes that were started in this cluster and have outlived its daemons: its name is in their
        environment."""
        found, mark = [], f"SLURM_CONF={self.environment['SLURM_CONF']}".encode()
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if mark in (folder / "environ").read_bytes().split(b"\0") and int(folder.name) != os.getpid():
                    found.append(int(folder.name))
            except OSError:  # it has just ended
                pass
        return found


def _clean() -> dict[str, str]:
    """The environment without what another Slurm, or a launcher, has set."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "SRUN_", "MTX_", "JAX_"))}


def _free_ports(count: int) -> int:
    """The first of some ports in a row that nobody listens at."""
    for first in range(23000 + os.getpid() % 4000, 32000, count):
        try:
            for port in range(first, first + count):
                with socket.socket() as listener:
                    listener.bind(("", port))
            return first
        except OSError:
            continue
    raise AssertionError("no free ports")


def _missing() -> str | None:
    """Why Slurm cannot be started here; None: it can."""
    path = f"{os.environ['PATH']}:/usr/sbin:/usr/bin"
    names = [name for name in ("munged", "munge", "slurmctld", "slurmd", "sbatch") if not shutil.which(name, path=path)]
    if names:
        return f"not installed: {', '.join(names)} (apt-get install slurmctld slurmd slurm-client munge)"
    return None if os.geteuid() == 0 else "Slurm's daemons want root"


@contextmanager
def running_cluster(nodes: int) -> Iterator[Cluster]:
    """A cluster of its own; skips where there can be none, unless MTX_TEST_SERVICES says that there must."""
    reason = _missing()
    if reason is not None:
        if os.environ.get("MTX_TEST_SERVICES") == "required":
            pytest.fail(reason)
        pytest.skip(reason)
    cluster = Cluster(Path(tempfile.mkdtemp(prefix="mtx-slurm-")), nodes)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(cluster.root, ignore_errors=True)
