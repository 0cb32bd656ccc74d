"""Hosts that ssh reaches, with the run directory and the program at the same place on each: one ssh a host.

Decides what is a host. The loop runs where the user is; how it speaks to hosts is in `launch.remote`.

Invariant: what a user calls a host is never taken for an option.
"""

from __future__ import annotations

import argparse
import ipaddress
import re
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

from launch import arguments, array, registry
from launch.detach import detach
from launch.hostlist import expand_hosts
from launch.job import LOGS, LaunchError
from launch.loop import Loop
from launch.remote import Hosts, SshJob, ssh_words, worker_command
from launch.slot import slot_words

HELP = "hosts that ssh reaches, started again when they fail"

_HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.$-]*")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    hosts = parser.add_mutually_exclusive_group(required=True)
    hosts.add_argument("--hosts", metavar="LIST", help="names with commas, or with brackets: 'gpu[01-16],big3'")
    hosts.add_argument("--host-file", metavar="FILE", help="a host a line: [USER@]HOST [slots=N] [# comment]")
    arguments.add_host_arguments(parser, nodes=False)
    add("--ssh-option", action="append", default=[], metavar="NAME=VALUE", help="as `ssh -o`; can be repeated")
    add("--ssh-config", metavar="FILE", help="as `ssh -F`; default: your own ~/.ssh/config")
    text = "seconds without a word of this launcher after which a host ends its processes; default: %(default)s"
    add("--life-line-s", type=float, default=SshJob.life_line_s, metavar="S", help=text)
    add("--detach", action="store_true", help="go on when this terminal is closed")


def make_job(args: argparse.Namespace, command: Sequence[str]) -> SshJob:
    """The job that the arguments describe.

    Raises:
        LaunchError: They contradict each other, or a host cannot be one.
    """
    arguments.check_least(("--life-line-s", args.life_line_s, 5))  # a line comes every second
    if args.host_file is not None:
        try:
            text = Path(args.host_file).read_text(encoding="utf-8")
        except OSError as error:
            raise LaunchError(f"--host-file {args.host_file}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise LaunchError(f"--host-file {args.host_file}: no text: {error}") from None
        hosts, slots = read_hosts(text, f"--host-file {args.host_file}")
    else:
        hosts = parse_hosts(args.hosts, "--hosts")
        slots = [1] * len(hosts)
    fields = arguments.host_fields(args, command, len(hosts))
    if fields["processes_per_node"] == 1 and args.processes_per_node is None and args.array is None and max(slots) > 1:
        if len(set(slots)) > 1:
            raise LaunchError(
                f"--host-file {args.host_file}: {min(slots)} to {max(slots)} slots; a run has the same number of "
                "processes on each host: make them equal, or give --processes-per-node"
            )
        fields["processes_per_node"] = slots[0]
    return SshJob(
        **arguments.common_fields(args, command),
        **fields,
        hosts=tuple(hosts),
        slots=tuple(slots),
        ssh_options=tuple(args.ssh_option),
        ssh_config=args.ssh_config,
        life_line_s=args.life_line_s,
        detach=args.detach,
    )


def read_hosts(text: str, where: str) -> tuple[list[str], list[int]]:
    """The hosts of a file and their slots: a host, or a list of hosts, a line.

    Raises:
        LaunchError: A line is no host, or a host is there twice.
    """
    hosts: list[str] = []
    slots: list[int] = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        count = 1
        for word in words[1:]:
            match = re.fullmatch(r"slots=([1-9][0-9]{0,3})", word)
            if match is None:
                raise LaunchError(f"{where}, line {number}: {word!r}; a line is `[USER@]HOST [slots=N] [# comment]`")
            count = int(match[1])
        found = parse_hosts(words[0], f"{where}, line {number}")
        hosts += found
        slots += [count] * len(found)
    if not hosts:
        raise LaunchError(f"{where}: it names no host")
    _refuse_twice(hosts, where)
    return hosts, slots


def parse_hosts(text: str, where: str) -> list[str]:
    """The hosts of a list.

    Raises:
        LaunchError: One of them is none, or is there twice.
    """
    hosts = []
    for word in _split(text):
        user, at, name = word.rpartition("@")
        if at and not _USER.fullmatch(user):
            raise LaunchError(f"{where}: {word!r}: {user!r} is no name of a user")
        literal = _address(name)
        if literal is not None:
            hosts.append(f"{user}{at}{literal}")
            continue
        for host in expand_hosts(name):
            if not _HOST.fullmatch(host):
                raise LaunchError(f"{where}: {host!r}: a host is a name or an address, and begins with no '-'")
            hosts.append(f"{user}{at}{host}")
    if not hosts:
        raise LaunchError(f"{where}: it names no host")
    _refuse_twice(hosts, where)
    return hosts


def _split(text: str) -> list[str]:
    """At the commas that are in no brackets."""
    return [word.strip() for word in re.split(r",(?![^\[]*\])", text) if word.strip()]


def _address(text: str) -> str | None:
    """An IPv6 address as ssh wants it, without brackets; None: it is none."""
    bare = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    try:
        ipaddress.IPv6Address(bare.partition("%")[0])
    except ValueError:
        return None
    return bare if re.fullmatch(r"[0-9A-Fa-f:.]+(%[A-Za-z0-9._-]+)?", bare) else None


def _refuse_twice(hosts: Sequence[str], where: str) -> None:
    twice = sorted({host for host in hosts if hosts.count(host) > 1})
    if twice:
        raise LaunchError(f"{where}: {', '.join(twice)}: there twice; more processes on a host: --processes-per-node")


def render(job: SshJob) -> str:
    """How much is started, and what for each host, a shell line each; ADDRESS:PORT and ATTEMPT are known only later."""
    if job.tasks is not None:
        places = ", ".join(f"{count} on {host}" for host, count in zip(job.hosts, job.slots))
        return f"# tasks at a time: {places}\n{array.render(job)}"
    logs = f"{job.run_dir}/{LOGS}/ATTEMPT"
    lines = [f"# hosts: {job.num_nodes}, processes on each: {job.processes_per_node}"]
    for index, host in enumerate(job.hosts):
        remote = worker_command(job, index, "ADDRESS:PORT", logs, job.process_command)
        lines.append(shlex.join([*ssh_words(job, host), remote]))
    if job.environment:
        lines.append("# over the standard input of each: " + " ".join(name for name, _ in job.environment))
    return "\n".join(lines)


def submit(job: SshJob) -> int:
    """Runs the job, again and again, until it is done or not worth another attempt; its exit code.

    Raises:
        LaunchError: It cannot be started.
    """
    if shutil.which("ssh") is None:
        raise LaunchError("ssh: no such program; install an OpenSSH client")
    if job.detach:
        away = detach(job.run_dir)
        if away is not None:
            print(f"launch: {job.name} goes on as process {away[0]}, its output in {away[1]}")
            print(f"launch: follow: python -m launch logs {job.name} --follow")
            print(f"launch: stop: python -m launch stop {job.name}", flush=True)
            return 0
    return registry.run_registered(job, "ssh", lambda: _run(job))


def _run(job: SshJob) -> int:
    hosts = Hosts(job)
    if job.tasks is None:
        return Loop(job, hosts).run()
    hosts.wait_until_ready(lambda: False)
    return array.run(job, slots(job))


def slots(job: SshJob) -> list[list[str]]:
    """Of an array: one for each place where a task can run, the hosts in turn."""
    turns = range(max(job.slots))
    words = [slot_words(job, host) for turn in turns for host, count in zip(job.hosts, job.slots) if turn < count]
    return words[: job.parallel]


def state(record: registry.Record) -> str:
    """What a job does."""
    return registry.process_state(record)


def stop(record: registry.Record, signal_number: int) -> None:
    """Stops a job.

    Raises:
        LaunchError: It was started on another machine.
    """
    registry.stop_process(record, signal_number)


def log_command(record: registry.Record) -> list[str] | None:
    """None: its log is in the run directory."""
    return None
