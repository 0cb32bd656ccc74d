"""`python -m launch.worker`: starts the processes of a run on one host, where a target has brought it.

Decides the environment of each process. What brought it here may be lost: with `--life-line` its standard input has a
line every second, and without one for that many seconds the processes are ended, so that none writes into a run that
has been started again elsewhere.

Invariant: its exit code tells what happened to the processes of this host (`launch.restarts.telling`).
"""

from __future__ import annotations

import argparse
import json
import os
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from launch import affinity, restarts
from launch.coordinates import address_towards, coordinates, find_gpus, free_port, visible_gpus
from launch.environment import past_proxy
from launch.job import Job, LaunchError, option
from launch.loop import PREFLIGHT, SIGNALS
from launch.nodes import Node, announce
from launch.processes import Attempt, Start
from launch.stream import say
from launch.unattended import Unattended


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the processes of this host to their ends, or with `--probe` tells what there is; the exit code."""
    forget_path(os.environ)
    words = list(sys.argv[1:] if argv is None else argv)
    split = words.index("--") if "--" in words else len(words)
    args, command = _parser().parse_args(words[:split]), words[split + 1 :]
    try:
        if args.probe is not None:
            print(json.dumps(probe(args.probe, args.alive)), flush=True)
            return 0
        return _run(args, command)
    except (LaunchError, OSError) as error:
        print(f"launch: host {socket.gethostname()}: {error}", file=sys.stderr, flush=True)
        # A file system that fails now may do so no more at the next attempt; a mistake stays one.
        return LaunchError.exit_code if isinstance(error, LaunchError) else 1


def arguments(job: Job, coordinator: str, *, where: Sequence[str], life_line_s: float | None = None) -> list[str]:
    """The words after `python`, without the command, that run this file on a host of a job.

    Args:
        coordinator: HOST:PORT where the processes meet.
        where: `--node I` or `--node-variable NAME`, and `--logs DIR` or `--run-dir DIR`.
        life_line_s: See above; None: without.
    """
    words = ["-m", "launch.worker", "--nodes", str(job.num_nodes), *where, "--coordinator", coordinator]
    words += ["--processes-per-node", str(job.processes_per_node), "--grace-s", f"{job.grace_s:g}"]
    if job.gpus_per_node is not None:
        words += ["--gpus-per-node", str(job.gpus_per_node)]
    if life_line_s is not None:
        words += ["--life-line", f"{life_line_s:g}"]
    return words


def unattended_arguments(job: Job) -> list[str]:
    """More of these words for a host where no loop counts the attempts (`launch.unattended`)."""
    words = ["--max-restarts", str(job.max_restarts), "--backoff-s", f"{job.backoff_s:g}"]
    return [*words, "--start-timeout-s", f"{job.start_timeout_s:g}", *(["--preflight"] if job.preflight else [])]


def probe(peers: Sequence[str], pid: int | None = None) -> dict[str, object]:
    """What this host says of itself: its name, the address by which `peers` reach it, a free port, GPUs, its clock, and
    whether the worker that had the process id `pid` still runs."""
    return {
        "host": socket.gethostname(),
        "alive": pid is not None and _is_worker(pid),
        "address": address_towards(peers),
        "port": free_port(""),
        "gpus": find_gpus(os.environ),
        "time": time.time(),
    }


def _is_worker(pid: int) -> bool:
    """Whether a process id is that of a worker; another process may have been given it since."""
    try:
        return b"launch.worker" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except (FileNotFoundError, ProcessLookupError):
        return False


def forget_path(environment: dict[str, str] | os._Environ[str]) -> None:
    """Takes the folder of this package, which a target put there, from PYTHONPATH: the processes shall not see it."""
    root = str(Path(__file__).resolve().parents[1])
    paths = environment.get("PYTHONPATH", "").split(os.pathsep)
    if paths[0] == root:
        environment["PYTHONPATH"] = os.pathsep.join(paths[1:])
        if not paths[1:]:
            del environment["PYTHONPATH"]


def _run(args: argparse.Namespace, command: Sequence[str]) -> int:
    job = Job(
        command=tuple(command),
        run_dir=args.run_dir or "",
        num_nodes=args.nodes,
        processes_per_node=args.processes_per_node,
        gpus_per_node=args.gpus_per_node,
        grace_s=args.grace_s,
        max_restarts=args.max_restarts,
        backoff_s=args.backoff_s,
        start_timeout_s=args.start_timeout_s,
    )
    index = args.node if args.node is not None else _read_index(args.node_variable, job.num_nodes)
    signals: list[int] = []
    line = _LifeLine(args.life_line, args.grace_s, signals) if args.life_line is not None else None
    for number in SIGNALS:
        signal.signal(number, lambda number, frame: _hear(number, frame, signals))
    environment = {**os.environ, **(line.greeting if line else {})}
    environment.update(past_proxy(environment, args.coordinator))
    host, pid = socket.gethostname(), os.getpid()
    ranks = [index * job.processes_per_node + local for local in range(job.processes_per_node)]
    gpus = find_gpus(environment)

    def starts(words: Sequence[str]) -> list[Start]:
        found = []
        visible = [visible_gpus(job, local, gpus) for local in range(job.processes_per_node)]
        shares = [own.get("CUDA_VISIBLE_DEVICES", "") for own in visible]
        for local, (rank, own) in enumerate(zip(ranks, visible)):
            found.append(
                Start(
                    words=words,
                    environment={**environment, **coordinates(job, rank, args.coordinator), **own},
                    name=str(rank),
                    label=f"{rank}@{host}" if job.num_nodes > 1 else str(rank) if job.num_processes > 1 else "",
                    cores=affinity.cores_near(shares, local),
                )
            )
        return found

    def attempt(starts: Sequence[Start], folder: Path) -> tuple[list[int], list[int]]:
        return Attempt(
            starts, folder, grace_s=job.grace_s, signals=signals, say=say, second_kills=False, collects=False,
            find_trouble=line.find_trouble if line else lambda: None,
        ).run()  # fmt: skip

    processes = starts(command)
    attempts = None if args.logs else Unattended(job, index)
    logs: Path | None = Path(args.logs or "")
    if attempts is not None:
        logs, code = attempts.join(lambda: bool(signals))
        if logs is None:
            return code
    assert logs is not None
    announce(logs, Node(node=index, host=host, pid=pid, time=time.time(), processes=ranks))
    codes = own_codes = [0]
    if args.preflight:
        simulated = option(command, "--cpu-devices")
        more = () if simulated is None else ("--cpu-devices", simulated)
        codes, own_codes = attempt(starts((*job.preflight_command, *more)), logs / PREFLIGHT)
    if args.preflight and signals and not any(codes):
        codes = own_codes = [restarts.PREEMPTED]
    elif not any(codes):
        codes, own_codes = attempt(processes, logs)
    announce(logs, Node(index, host, pid, time.time(), ranks, codes, own_codes))
    if attempts is not None:
        attempts.ended(codes, own_codes)
    return restarts.as_exit(restarts.telling(own_codes))


def _hear(number: int, frame: FrameType | None, signals: list[int]) -> None:
    """Passes on the first of a kind only: schedulers send a signal to several members of one family."""
    number = number if number == signal.SIGUSR1 else signal.SIGTERM
    if number not in signals:
        signals.append(number)


class _LifeLine:
    """Standard input: the environment in a line of JSON, then names of signals, and empty lines as signs of life."""

    def __init__(self, seconds: float, grace_s: float, signals: list[int]) -> None:
        """Waits for the first line.

        Args:
            seconds: Without a line, after which the processes are told to stop.
            grace_s: That they have then, and again after a second time.
            signals: To which the names of signals are added.

        Raises:
            LaunchError: It does not come, or is none.
        """
        self._seconds, self._signals, self._heard = seconds, signals, time.monotonic()
        self._grace_s = grace_s
        self._ended, self._rest = False, b""
        with selectors.DefaultSelector() as selector:
            selector.register(0, selectors.EVENT_READ)
            while b"\n" not in self._rest and not self._ended:
                if not selector.select(max(0.0, self._heard + seconds - time.monotonic())):
                    raise LaunchError(f"the launcher said nothing for {seconds:g} s")
                self._read()
        first, _, self._rest = self._rest.partition(b"\n")
        try:
            self.greeting: dict[str, str] = dict(json.loads(first)["environment"])
        except (ValueError, KeyError, TypeError):
            raise LaunchError("what came over the life line is no greeting of a launcher") from None
        threading.Thread(target=self._listen, daemon=True).start()
        threading.Thread(target=self._guard, daemon=True).start()

    def find_trouble(self) -> str | None:
        """Why the processes should end; None: they need not. They are told to stop, and save what they can."""
        trouble = self._find_trouble()
        if trouble is not None:
            _hear(signal.SIGTERM, None, self._signals)
        return trouble

    def _guard(self) -> None:
        """Ends this process, and with it the others, when it is too late: printing to a launcher that has gone may
        hold up what should have ended them."""
        while time.monotonic() < self._heard + self._seconds + 2 * self._grace_s + 3:
            time.sleep(1)
        os._exit(restarts.STALLED)

    def _find_trouble(self) -> str | None:
        if self._ended:
            return f"host {socket.gethostname()}: the launcher has gone; its processes are ended"
        if time.monotonic() > self._heard + self._seconds:
            return (
                f"host {socket.gethostname()}: no word of the launcher for {self._seconds:g} s; its processes are ended"
            )
        return None

    def _listen(self) -> None:
        while not self._ended:
            *lines, self._rest = self._rest.split(b"\n")
            for line in filter(None, lines):
                number = getattr(signal.Signals, line.decode("ascii", "replace"), None)
                if number is not None:
                    _hear(number, None, self._signals)
            self._read()

    def _read(self) -> None:
        data = os.read(0, 1 << 16)
        self._ended, self._heard = not data, time.monotonic()
        self._rest += data


def _read_index(variable: str, count: int) -> int:
    text = os.environ.get(variable, "")
    if not text.isdecimal() or int(text) >= count:
        raise LaunchError(f"{variable} = {text!r}: a number from 0 to {count - 1} says which of the hosts this is")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m launch.worker", allow_abbrev=False)
    add = parser.add_argument
    add(
        "--probe",
        nargs="*",
        metavar="HOST",
        help="tell what there is, and the address by which the hosts reach this one",
    )
    add("--alive", type=int, metavar="PID", help="with --probe: tell whether this worker still runs")
    add("--nodes", type=int, default=1, metavar="N", help="hosts of the run")
    add("--node", type=int, metavar="I", help="which of them this is, from 0")
    add("--node-variable", metavar="NAME", help="the variable that holds it")
    add("--coordinator", default="", metavar="HOST:PORT", help="where the processes meet")
    add("--processes-per-node", type=int, default=1, metavar="N")
    add("--gpus-per-node", type=int, metavar="N", help="that the processes here share; default: those there are")
    add("--logs", metavar="DIR", help="folder of the logs of this attempt")
    add(
        "--run-dir",
        metavar="DIR",
        help="where nobody counts attempts: they are counted in DIR, with logs in DIR/logs/N",
    )
    add("--max-restarts", type=int, default=Job.max_restarts, metavar="N", help="with --run-dir: as of the launcher")
    add("--backoff-s", type=float, default=Job.backoff_s, metavar="S", help="likewise")
    add("--start-timeout-s", type=float, default=Job.start_timeout_s, metavar="S", help="likewise")
    add("--preflight", action="store_true", help="examine the hosts before the command")
    add("--grace-s", type=float, default=Job.grace_s, metavar="S")
    add(
        "--life-line", type=float, metavar="S", help="end the processes S seconds after the last line of standard input"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
