"""Slurm: a batch job whose first host runs the loop (`launch.allocation`), or the loop right here inside `salloc`.

Decides what `sbatch` is told. Every option and name is an argument of its own or quoted, so that no value is read by a
shell; values of variables stand in the script, never on a command line.

Invariant: what a dry run prints is what is submitted.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch import arguments, array, registry
from launch.allocation import ASK_S, SlurmJob, ask, from_fields, package_path, run, srun_words, worker_words
from launch.hostlist import expand_hosts
from launch.job import LOGS, NAME, Job, LaunchError, read
from launch.registry import Record
from launch.restarts import MEANING, describe
from launch.stream import say

HELP = "a batch job of Slurm, queued again when its time is over; inside salloc: right here"

POLL_S = 2.0
"""Between two questions about a job that is waited for."""
_RUNNING = ("RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "STAGE_OUT", "SIGNALING")
_OPTIONS = ("partition", "account", "qos", "constraint", "exclude", "reservation", "mem")
"""That `sbatch` has under the same names."""
_TIME = re.compile(r"(?:(?P<d>\d+)-(?P<dh>\d+)(?::(?P<dm>\d+)(?::(?P<ds>\d+))?)?)|(?P<plain>\d+(?::\d+){0,2})")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_host_arguments(parser, nodes=True)
    add = parser.add_argument
    for name in _OPTIONS:
        add(f"--{name}", metavar=name.upper(), help=f"as of sbatch --{name}; default: the site's")
    add("--time", metavar="LIMIT", help="as of sbatch --time, for example 4:00:00; default: the partition's")
    text = "seconds before the time limit at which the run saves and is queued again; 0: never; default: %(default)s"
    add("--warn-s", type=int, default=SlurmJob.warn_s, metavar="S", help=text)
    add(
        "--cpus-per-node",
        type=int,
        metavar="C",
        help="cores of each host, which others may share; default: whole hosts, all their cores and memory",
    )
    text = "one more option of sbatch, for example --sbatch=--exclusive; may be repeated"
    add("--sbatch", action="append", default=[], metavar="OPTION", help=text)
    add("--wait", action="store_true", help="return when the job has ended, with its exit code")
    text = "seconds without a word of the first host after which another one ends its processes; default: %(default)s"
    add("--life-line-s", type=float, default=SlurmJob.life_line_s, metavar="S", help=text)


def make_job(args: argparse.Namespace, command: Sequence[str]) -> SlurmJob:
    """The job that the arguments describe.

    Raises:
        LaunchError: They contradict each other.
    """
    arguments.check_least(
        ("--warn-s", args.warn_s, 0), ("--cpus-per-node", args.cpus_per_node, 1), ("--life-line-s", args.life_line_s, 5)
    )
    for word in args.sbatch:
        if not re.match(r"--?[A-Za-z]", word):
            raise LaunchError(f"--sbatch={word}: an option of sbatch in one word, for example --sbatch=--exclusive")
        if re.match(r"(-[oeJ]|--output|--error|--job-name|--array|--open-mode)", word):
            raise LaunchError(f"--sbatch={word}: this launcher finds the job and its log by its own; leave it out")
    if args.time is not None and args.array is None:
        limit = _seconds(args.time)
        if limit is not None and limit <= args.warn_s:
            raise LaunchError(
                f"--time {args.time} is {limit} s, and --warn-s {args.warn_s} would stop the run before it has begun; "
                "give more time, or a shorter warning"
            )
    fields = {**arguments.common_fields(args, command), **arguments.host_fields(args, command, args.nodes)}
    if re.search(r"[\\\n\r]", os.path.join(fields["working_directory"], fields["run_dir"])):
        raise LaunchError("a run directory on Slurm must have neither backslashes nor line breaks in its path")
    return SlurmJob(
        **fields,
        **{name: getattr(args, name) for name in _OPTIONS},
        time_limit=args.time,
        cpus_per_node=args.cpus_per_node,
        warn_s=args.warn_s,
        sbatch_options=tuple(args.sbatch),
        wait=args.wait,
        life_line_s=args.life_line_s,
    )


def render(job: Job) -> str:
    """The command that submits the job, with the script that it reads; of an array two, of which the second one waits
    for job ARRAY."""
    assert isinstance(job, SlurmJob)
    if job.tasks is None:
        step = [
            *srun_words(job, "STEP", hosts=job.num_nodes),
            *worker_words(job, "ADDRESS:PORT", f"{job.run_dir}/{LOGS}/ATTEMPT", job.process_command),
        ]
        note = shlex.join(step).replace("\n", "\n#   ")
        text = _render(sbatch(job), script(job, str(Path(job.run_dir, NAME))))
        return f"{text}\n# each attempt, on the first host:\n#   {note}"
    texts = [_render(sbatch(job), array_script(job)), _render(merge_sbatch(job, "ARRAY"), merge_script(job))]
    return "\n".join(texts)


def sbatch(job: SlurmJob) -> list[str]:
    """The command that submits the job."""
    if job.tasks is None:
        layout = [f"--nodes={job.num_nodes}", "--ntasks-per-node=1"]
        warning = [f"--signal=B:USR1@{job.warn_s}"] if job.warn_s else []
        return _sbatch(job, job.name, "%j", [*layout, *warning])
    limit = "" if job.parallel is None else f"%{job.parallel}"
    return _sbatch(job, job.name, "%A_%a", ["--nodes=1", "--ntasks=1", f"--array=0-{job.tasks - 1}{limit}"])


def merge_sbatch(job: SlurmJob, number: str) -> list[str]:
    """The command that submits what comes after all tasks of array job `number`."""
    layout = ["--nodes=1", "--ntasks=1", f"--dependency=afterok:{number}", "--kill-on-invalid-dep=yes"]
    return _sbatch(job, f"{job.name}-merge", "%j", layout)


def _sbatch(job: SlurmJob, name: str, log: str, layout: Sequence[str]) -> list[str]:
    logs = os.path.join(job.working_directory, job.run_dir, LOGS).replace("%", "%%")
    words = ["sbatch", "--parsable", f"--job-name={name}", f"--output={logs}/slurm-{log}.log", "--open-mode=append"]
    words += ["--requeue", "--export=ALL", *layout]
    if job.gpus_per_node:
        words.append(f"--gpus-per-node={job.gpus_per_node}")
    if job.cpus_per_node is not None:
        words.append(f"--cpus-per-task={job.cpus_per_node}")
    elif job.tasks is None:  # many sites give a task one core, which eight processes would share
        words += ["--exclusive", *(["--mem=0"] if job.mem is None else [])]
    if job.time_limit is not None:
        words.append(f"--time={job.time_limit}")
    words += [f"--{name}={getattr(job, name)}" for name in _OPTIONS if getattr(job, name) is not None]
    return [*words, *job.sbatch_options]


def script(job: SlurmJob, path: str) -> str:
    """What the first host runs; `path` is the file of the job."""
    loop = shlex.join([job.python, "-m", "launch.allocation", os.path.join(job.working_directory, path)])
    root = shlex.quote(package_path({}))
    return _script(job, f'exec env PYTHONPATH={root}"${{PYTHONPATH:+:$PYTHONPATH}}" {loop}')


def array_script(job: SlurmJob) -> str:
    """What a task of an array runs."""
    return _script(job, f'exec {shlex.join(job.command)} --shard "${{SLURM_ARRAY_TASK_ID:?}}/{job.tasks}"')


def merge_script(job: SlurmJob) -> str:
    """What runs after all tasks."""
    return _script(job, f"exec {shlex.join(array.merge_command(job))}")


def _script(job: SlurmJob, last: str) -> str:
    for name, _ in job.environment:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise LaunchError(f"{name!r} is no name of a variable: letters, digits and '_'")
    exports = [f"export {name}={shlex.quote(value)}" for name, value in job.environment]
    return "\n".join(["#!/bin/bash", f"cd -- {shlex.quote(job.working_directory)} || exit 2", *exports, last, ""])


def _render(words: Sequence[str], text: str) -> str:
    end = "END"
    while end in text.splitlines():
        end += "_"
    return f"{shlex.join(words)} <<'{end}'\n{text}{end}"


def submit(job: Job) -> int:
    """Submits the job, and tells its number and what can be done with it; 0, or with `--wait` its exit code. Inside an
    allocation it runs there, as `launch.allocation.run` does.

    Raises:
        LaunchError: Slurm is not here, or does not take it.
    """
    assert isinstance(job, SlurmJob)
    if "SLURM_JOB_ID" in os.environ:
        return _run_here(job)
    if shutil.which("sbatch") is None:
        raise LaunchError("sbatch: no such program; run this on a login node of the Slurm cluster")
    registry.refuse_taken(job.name)
    Path(job.run_dir, LOGS).mkdir(parents=True, exist_ok=True)
    text = script(job, _find(job)) if job.tasks is None else array_script(job)
    words = sbatch(job)
    _submit([words[0], "--test-only", *words[1:]], text)
    number = _submit(words, text)
    handle = {"job": number}
    if job.tasks is not None:
        try:
            handle["merge"] = _submit(merge_sbatch(job, number), merge_script(job))
        except LaunchError:
            ask("scancel", number)
            raise
    try:
        registry.register(job, "slurm", handle)
    except LaunchError:
        ask("scancel", *handle.values())
        raise
    python = "python -m launch"
    after = f", and job {handle['merge']} merges" if "merge" in handle else ""
    say(f"{job.name} is job {number} of Slurm{after}; logs are in {Path(job.run_dir, LOGS)}")
    say(f"{python} status {job.name} | {python} logs {job.name} | {python} stop {job.name}")
    return _wait(handle.get("merge", number)) if job.wait else 0


def state(record: Record) -> str:
    """What Slurm says of a job.

    Raises:
        LaunchError: Slurm is not here.
    """
    if registry.PID in record.handle:
        return registry.process_state(record)
    found = [(number, _look(number)) for number in record.handle.values()]
    if len(found) == 1:
        return found[0][1].text
    return "; ".join(f"{role} {number}: {seen.text}" for role, (number, seen) in zip(record.handle, found))


def stop(record: Record, signal_number: int) -> None:
    """Asks the loop of a running job to stop, so that the run saves; a job that waits, an array, or one that shall be
    killed is cancelled.

    Raises:
        LaunchError: Slurm is not here, or refuses.
    """
    if registry.PID in record.handle:
        return registry.stop_process(record, signal_number)
    numbers = list(record.handle.values())
    gently = signal_number != signal.SIGKILL and len(numbers) == 1 and _look(numbers[0]).word == "running"
    how = [f"--signal={signal.Signals(signal_number).name[3:]}", "--batch"] if gently else []
    if gently:  # the warning of the time limit may have come just now
        ask("scontrol", "update", f"JobId={numbers[0]}", "Requeue=0")
    answer = ask("scancel", *how, *numbers)
    if answer.returncode:
        raise LaunchError(f"scancel: {_short(answer.stderr)}")
    if gently and _look(numbers[0]).word == "pending":  # it was queued again before that
        ask("scancel", *numbers)


def log_command(record: Record) -> list[str] | None:
    """What prints the logs of an array; of a run None: its own logs are in its run directory."""
    if "merge" not in record.handle:
        return None
    files = sorted(Path(record.run_dir, LOGS).glob("slurm-*.log"))
    return ["tail", "-n", "+1", "--", *map(str, files)] if files else ["true"]


@dataclass(frozen=True)
class _Seen:
    """What Slurm says of a job: in a word, in full, and its exit code where it has ended."""

    word: str
    text: str
    code: int | None = None


def _look(number: str) -> _Seen:
    """What Slurm says of a job; of an array, of all of its tasks together."""
    answer = ask("scontrol", "--oneliner", "show", "job", number)
    if answer.returncode:
        return _look_back(number)
    tasks = [_fields(line) for line in answer.stdout.splitlines() if line.strip()]
    states = [task["JobState"] for task in tasks]
    if any(name in _RUNNING for name in states):
        text = f"running on {tasks[0].get('NodeList', '?')}"
        word = "ending" if states == ["COMPLETING"] else "running"
    elif "PENDING" in states:
        task = tasks[states.index("PENDING")]
        reason = task.get("Reason", "None")
        word, text = "pending", "pending" if reason == "None" else f"pending ({reason})"
        if task.get("Restarts", "0") != "0":
            text += f", restarted {task['Restarts']} times"
    else:
        worst = max(tasks, key=lambda task: (task["JobState"] != "COMPLETED", task["ExitCode"] != "0:0"))
        return _ended(worst["JobState"], worst["ExitCode"])
    if len(tasks) > 1:
        counts = sorted(Counter(states).items())
        text += f"; {', '.join(f'{count} {name.lower()}' for name, count in counts)}"
    return _Seen(word, text)


def _look_back(number: str) -> _Seen:
    """What Slurm's accounting, where there is one, says of a job that the controller has forgotten."""
    answer = ask("sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={number}", "--format=State,ExitCode")
    lines = [line.split("|") for line in answer.stdout.splitlines() if line.count("|") == 1]
    if answer.returncode or not lines:
        return _Seen("lost", f"lost: Slurm knows no job {number} any more, and has no accounting of it")
    return _ended(lines[-1][0].split()[0], lines[-1][1])


def _ended(name: str, exit_code: str) -> _Seen:
    """Args: exit_code: As Slurm writes it, CODE:SIGNAL."""
    code, number = (int(part) for part in exit_code.split(":"))
    code = code or (128 + number if number else 0)
    what = "" if name == "FAILED" and code in MEANING else f" {name.lower()},"  # Slurm calls every code but 0 that
    return _Seen("ended", f"ended{what} {describe(code)}", code)


def _fields(line: str) -> dict[str, str]:
    """NAME=VALUE words; of a name that comes twice the first."""
    fields: dict[str, str] = {}
    for word in line.split():
        name, _, value = word.partition("=")
        fields.setdefault(name, value)
    return fields


def _wait(number: str) -> int:
    """The exit code of a job, when it has ended."""
    while True:
        seen = _look(number)
        if seen.word in ("ended", "lost"):
            say(f"job {number}: {seen.text}")
            return 1 if seen.code is None else seen.code
        time.sleep(POLL_S)


def _submit(words: Sequence[str], text: str) -> str:
    """The number of the job that a script becomes.

    Raises:
        LaunchError: Slurm does not take it.
    """
    try:
        done = subprocess.run(words, input=text, capture_output=True, text=True, errors="replace", timeout=ASK_S)
    except subprocess.TimeoutExpired:
        raise LaunchError(f"sbatch has not answered for {ASK_S:.0f} s: is slurmctld well? (scontrol ping)") from None
    if done.returncode:
        raise LaunchError(f"Slurm does not take the job: {_short(done.stderr)}")
    return done.stdout.strip().partition(";")[0]  # NUMBER;CLUSTER where there are several


def _short(text: str) -> str:
    """The last words of Slurm without its program's name."""
    lines = [re.sub(r"^(sbatch|scancel|allocation failure)(: error)?: ", "", line) for line in text.splitlines()]
    return (
        "; ".join(dict.fromkeys(re.sub(r"^allocation failure: ", "", line) for line in lines if line)) or "it is silent"
    )


def _find(job: SlurmJob) -> str:
    """The file in its run directory that holds the job."""
    for path in sorted(Path(job.run_dir).glob("job*.json")):
        target, fields = read(path)
        if target == "slurm" and from_fields(fields) == job:
            return str(path)
    raise LaunchError(f"{job.run_dir} holds no file of the job")


def _run_here(job: SlurmJob) -> int:
    """Inside an allocation there is nothing to wait for."""
    say(f"runs in the allocation of job {os.environ['SLURM_JOB_ID']}")
    return registry.run_registered(job, "slurm", lambda: _run_all(job))


def _run_all(job: SlurmJob) -> int:
    if job.tasks is None:
        return run(job)
    nodes = len(expand_hosts(os.environ.get("SLURM_JOB_NODELIST") or os.environ["SLURM_NODELIST"]))
    one = ["srun", "--nodes=1", "--ntasks=1", "--export=ALL", "--cpu-bind=none", "--mpi=none", "--overlap"]
    slots = [[*one, f"--relative={slot % nodes}"] for slot in range(job.parallel or nodes)]
    return array.run(job, slots)


def _seconds(text: str) -> int | None:
    """A time limit of sbatch: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S; None: there is none.

    Raises:
        LaunchError: It is not one of these.
    """
    if text in ("UNLIMITED", "INFINITE"):
        return None
    match = _TIME.fullmatch(text)
    if not match:
        raise LaunchError(
            f"--time {text}: minutes, minutes:seconds, hours:minutes:seconds, days-hours or so, as sbatch"
        )
    if match["plain"]:
        parts = [int(part) for part in match["plain"].split(":")]
        hours, minutes, seconds = {1: [0, *parts, 0], 2: [0, *parts], 3: parts}[len(parts)]
        return 3600 * hours + 60 * minutes + seconds
    days, hours, minutes, seconds = (int(match[name] or 0) for name in ("d", "dh", "dm", "ds"))
    return 86400 * days + 3600 * hours + 60 * minutes + seconds
