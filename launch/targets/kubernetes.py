"""A Kubernetes cluster: a pod per host, started again by the cluster. Talks to it through kubectl alone.

Decides what of a job a cluster could misunderstand, and reads what the cluster says of it. What the cluster is told is
in `launch.manifests`.

Invariant: nothing of a job reaches a shell, and no variable's value a command line.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

from launch import arguments, manifests, registry, restarts, yaml_text
from launch.coordinates import is_simulated
from launch.job import LaunchError, option
from launch.manifests import INSTANCE, MERGE, KubernetesJob, name_of
from launch.stream import say

HELP = "pods of a Kubernetes cluster, started again by JobSet, or by Jobs where there is none"
RUN_DIR_IS_HERE = False
"""The run directory is a path in pods: nothing is written to it from here."""

POLL_S = 5.0
GROUP = "jobset.x-k8s.io"

_WORD = r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?"
_DNS = r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?"
_KEY = rf"({_DNS}/)?{_WORD}"
_PATH = r"/[^:\x00-\x1f]*"
_QUANTITY = r"[0-9]+(\.[0-9]+)?(m|k|[KMGTPE]i|[MGTPE])?"
_VARIABLE = r"[A-Za-z_][A-Za-z0-9_]*"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    arguments.add_host_arguments(parser, nodes=True)
    add("--image", required=True, metavar="IMAGE", help="of the containers; holds Python 3.9 or newer, and mtx")
    add("--namespace", default="", metavar="NAME", help="default: that of kubectl's context")
    text = "auto: a JobSet where the cluster has them, else an Indexed Job; default: %(default)s"
    add("--kind", choices=("auto", "jobset", "job"), default="auto", help=text)
    text = "a persistent volume claim and where it is mounted; repeatable; the run directory is below one"
    add("--volume", action="append", default=[], metavar="CLAIM:/PATH", help=text)
    add("--workdir", default="", metavar="/PATH", help="where the command is started; default: as the image says")
    text = "by which the cluster knows GPUs; default: %(default)s"
    add("--gpu-resource", default=KubernetesJob.gpu_resource, metavar="NAME", help=text)
    text = "what each pod needs besides: cpu=32, memory=200Gi, rdma/hca=8; repeatable"
    add("--resource", action="append", default=[], metavar="NAME=QUANTITY", help=text)
    add("--shm-size", default="", metavar="SIZE", help="of /dev/shm, as 16Gi; default: as large as the pod's memory")
    text = "a label that the machines have; repeatable"
    add("--node-selector", action="append", default=[], metavar="LABEL=VALUE", help=text)
    text = "a taint of the machines that pods may ignore; repeatable"
    add("--toleration", action="append", default=[], metavar="KEY[=VALUE][:EFFECT]", help=text)
    text = "of all that is made, as queues want it; repeatable"
    add("--label", action="append", default=[], metavar="LABEL=VALUE", help=text)
    text = "a variable whose value is in a secret of the namespace; repeatable"
    add("--secret-env", action="append", default=[], metavar="NAME=SECRET:KEY", help=text)
    add("--service-account", default="", metavar="NAME")
    add("--priority-class", default="", metavar="NAME")
    add("--host-network", action="store_true", help="pods use the network of their machine (RDMA, some fabrics)")
    text = "where process 0 listens; with --host-network one that is free; default: %(default)s"
    add("--port", type=int, default=KubernetesJob.port, metavar="PORT", help=text)
    text = "seconds from SIGTERM to SIGKILL when a pod must go, in which the run saves; default: %(default)s"
    add("--termination-grace-s", type=int, default=KubernetesJob.termination_grace_s, metavar="S", help=text)
    add("--wait", action="store_true", help="stay until the job has ended, and end with its exit code")


def make_job(args: argparse.Namespace, command: Sequence[str]) -> KubernetesJob:
    """The job that the arguments describe.

    Raises:
        LaunchError: They contradict each other, or a cluster would not take them.
    """
    arguments.check_least(("--port", args.port, 1), ("--termination-grace-s", args.termination_grace_s, 0))
    args.python = args.python or "python3"
    fields = {**arguments.common_fields(args, command), **arguments.host_fields(args, command, args.nodes)}
    fields["working_directory"] = _fit("--workdir", args.workdir, _PATH, "an absolute path") if args.workdir else ""
    job = KubernetesJob(
        **fields,
        image=_fit("--image", args.image, r"[A-Za-z0-9][A-Za-z0-9._:/@-]*", "the name of an image"),
        namespace=_name("--namespace", args.namespace),
        kind=args.kind,
        port=args.port,
        gpu_resource=_fit("--gpu-resource", args.gpu_resource, _KEY, "nvidia.com/gpu, say"),
        resources=tuple(_pair("--resource", text, "=", _KEY, _QUANTITY) for text in args.resource),
        volumes=tuple(_pair("--volume", text, ":", _DNS, _PATH) for text in args.volume),
        shm_size=_fit("--shm-size", args.shm_size, _QUANTITY, "16Gi, say") if args.shm_size else "",
        node_selector=tuple(_pair("--node-selector", text, "=", _KEY, rf"({_WORD})?") for text in args.node_selector),
        tolerations=tuple(_toleration(text) for text in args.toleration),
        labels=tuple(_pair("--label", text, "=", _KEY, rf"({_WORD})?") for text in args.label),
        secrets=tuple(_secret(text) for text in args.secret_env),
        service_account=_name("--service-account", args.service_account),
        priority_class=_name("--priority-class", args.priority_class),
        host_network=args.host_network,
        termination_grace_s=args.termination_grace_s,
        wait=args.wait,
    )
    _check(job)
    return job


def render(job: KubernetesJob) -> str:
    """The manifests. Of kind `auto`, those of a JobSet."""
    kind = "job" if job.kind == "job" else "jobset"
    text = yaml_text.dump_all(manifests.manifests(job, kind))
    if job.kind == "auto":
        text = "# Where the cluster knows no JobSets, Indexed Jobs are made instead: see them with --kind job.\n" + text
    if kind == "job" and job.tasks is not None:
        text += "---\n# Applied when the job above is complete.\n" + yaml_text.dump(manifests.merge_manifest(job))
    return text.rstrip("\n")


def submit(job: KubernetesJob) -> int:
    """Gives the job to the cluster; 0, or with `--wait` its exit code.

    Raises:
        LaunchError: The cluster does not take it, or it has a job of that name.
    """
    kind = _find_kind(job)
    handle = {"kind": kind, "name": name_of(job), "namespace": job.namespace}
    record = registry.Record(job.name, "kubernetes", job.run_dir, handle, time.time())
    parts, merge = manifests.manifests(job, kind), None
    if kind == "job" and job.tasks is not None:
        merge = yaml_text.dump(manifests.merge_manifest(job))
        handle["merge"] = f"{name_of(job)}-{MERGE}"
    text = yaml_text.dump_all(parts)
    registry.refuse_taken(job.name)
    found = _get(record, kind, handle["name"])
    if found is not None:
        if _outcome(found) is None:
            raise LaunchError(
                f"--name {job.name}: the cluster has a {kind} {handle['name']} that has not ended; stop it "
                f"(`python -m launch stop {job.name}`, or kubectl delete {kind} {handle['name']}), or give another name"
            )
        say(f"the {kind} {handle['name']} that has ended is deleted")
        _delete(record, wait=True)
    _kubectl("apply", *_space(record), "--filename=-", given=text)
    registry.register(job, "kubernetes", handle)
    say(
        f"{kind} {handle['name']} is with the cluster; logs: {job.run_dir}/logs, and `python -m launch logs {job.name}`"
    )
    if merge is not None:
        say("waits for the shards, since a Job cannot: then the merge is given to the cluster as well")
        code = _wait(record, final=handle["name"])
        if code:
            return code
        _kubectl("apply", *_space(record), "--filename=-", given=merge)
    return _wait(record) if job.wait else 0


def state(record: registry.Record) -> str:
    """What the cluster says of a job: "pending ...", "running ...", "ended ..."."""
    return _state(record)[0]


def stop(record: registry.Record, number: int) -> None:
    """Deletes a job: its pods get SIGTERM and, after their grace, SIGKILL, which is also sent at once if `number` says
    so. A cluster sends no other signals."""
    _delete(record, wait=False)
    if number == signal.SIGKILL:
        words = [*_space(record), _selector(record), "--grace-period=0", "--force", "--ignore-not-found"]
        _kubectl("delete", "pods", *words)


def log_command(record: registry.Record) -> list[str] | None:
    """What prints the lines of all pods that there are now."""
    return ["kubectl", "logs", *_space(record), _selector(record), "--container=main", "--tail=-1"]


def _check(job: KubernetesJob) -> None:
    if job.port > 65535:
        raise LaunchError(f"--port {job.port}: 65535 or less")
    if job.gpus_per_node is None and not is_simulated(job):
        raise LaunchError("how many GPUs does each pod get? Give --gpus-per-node G; 0: it runs on CPUs")
    places = [job.run_dir, *filter(None, [option(job.command, "--out")])]
    for place in places:
        mounts = [PurePosixPath(path) for _, path in job.volumes]
        path = PurePosixPath(place)
        if ".." in path.parts or not any(mount == path or mount in path.parents for mount in mounts):
            shown = ", ".join(map(str, mounts)) or "none"
            raise LaunchError(
                f"{place} is not below a volume ({shown}), so it would be lost with its pod: give an absolute path "
                "below a `--volume CLAIM:/PATH` that all pods share"
            )
    for name, _ in (*job.environment, *((name, "") for name, _, _ in job.secrets)):
        _fit("variable", name, _VARIABLE, "letters, digits and '_', with no digit first")
    for kind in ("jobset", "job") if job.kind == "auto" else (job.kind,):
        manifests.check_name(job, kind)


def _fit(what: str, text: str, pattern: str, allowed: str) -> str:
    if not re.fullmatch(pattern, text):
        raise LaunchError(f"{what} {text!r}: {allowed}")
    return text


def _name(what: str, text: str) -> str:
    return _fit(what, text, _DNS, "small letters, digits, '-' and '.'") if text else ""


def _pair(what: str, text: str, separator: str, first: str, second: str) -> tuple[str, str]:
    left, found, right = text.partition(separator)
    if not found or not re.fullmatch(first, left) or not re.fullmatch(second, right):
        raise LaunchError(f"{what} {text!r}: see its form with `python -m launch kubernetes --help`")
    return left, right


def _toleration(text: str) -> tuple[str, str, str]:
    rest, _, effect = text.partition(":")
    key, _, value = rest.partition("=")
    if not re.fullmatch(_KEY, key) or not re.fullmatch(rf"({_WORD})?", value):
        raise LaunchError(f"--toleration {text!r}: KEY, KEY=VALUE, KEY:EFFECT or KEY=VALUE:EFFECT")
    return key, value, _fit("the effect of --toleration", effect, "(NoSchedule|PreferNoSchedule|NoExecute)?",
                            "NoSchedule, PreferNoSchedule or NoExecute")  # fmt: skip


def _secret(text: str) -> tuple[str, str, str]:
    name, place = _pair("--secret-env", text, "=", _VARIABLE, r"[^:]+:[^:]+")
    return (name, *_pair("--secret-env", place, ":", _DNS, r"[A-Za-z0-9._-]+"))


def _find_kind(job: KubernetesJob) -> str:
    if job.kind != "auto":
        return job.kind
    if _kubectl("api-resources", f"--api-group={GROUP}", "--output=name").strip():
        return "jobset"
    say("the cluster knows no JobSets: an Indexed Job is made, which starts pods again one by one")
    return "job"


def _wait(record: registry.Record, final: str | None = None) -> int:
    """Tells what becomes of a job until it has ended; its exit code. Args: final: Name of the object to wait for."""
    told = ""
    while True:
        text, code = _state(record, final)
        if text != told:
            say(f"{record.name}: {text}")
            told = text
        if code is not None:
            return code
        time.sleep(POLL_S)


def _state(record: registry.Record, final: str | None = None) -> tuple[str, int | None]:
    """In words, and the exit code of what has ended."""
    handle = record.handle
    found = _get(record, handle["kind"], handle["name"])
    if found is None:
        return "ended (the cluster has it no more: it was deleted)", restarts.PREEMPTED
    if handle.get("merge") and _outcome(found) == "complete" and final is None:
        found = _get(record, "job", handle["merge"])
        if found is None:
            return "pending (the shards are done, the merge has not been given to the cluster)", None
    outcome = _outcome(found)
    if outcome == "complete":
        return "ended (done)", 0
    pods = json.loads(_kubectl("get", "pods", *_space(record), _selector(record), "--output=json"))["items"]
    if outcome is not None:
        codes = [code for code in map(_exit_code, pods) if code]
        code = restarts.telling(codes) if codes else 1
        return f"ended ({restarts.describe(code) if codes else outcome})", code
    running = sum(pod.get("status", {}).get("phase") == "Running" for pod in pods)
    if running:
        return f"running ({running} pods)", None
    reasons = sorted(set(filter(None, map(_reason, pods))))
    return f"pending ({'; '.join(reasons[:3]) or 'no pod yet'})", None


def _outcome(found: dict[str, Any]) -> str | None:
    """`complete`, or why it failed; None: it has not ended."""
    for condition in found.get("status", {}).get("conditions", []):
        if condition.get("status") == "True":
            if condition["type"] in ("Complete", "Completed"):
                return "complete"
            if condition["type"] == "Failed":
                return f"failed: {condition.get('message') or condition.get('reason', '')}"
    return None


def _exit_code(pod: dict[str, Any]) -> int | None:
    for status in pod.get("status", {}).get("containerStatuses", []):
        terminated = status.get("state", {}).get("terminated")
        if terminated:
            return int(terminated["exitCode"])
    return None


def _reason(pod: dict[str, Any]) -> str:
    """Why a pod does not run."""
    status = pod.get("status", {})
    for container in status.get("containerStatuses", []):
        waiting = container.get("state", {}).get("waiting")
        if waiting:
            return f"{waiting.get('reason', 'waiting')} {waiting.get('message', '')}".strip()
    for condition in status.get("conditions", []):
        if condition.get("type") == "PodScheduled" and condition.get("status") == "False":
            return f"{condition.get('reason', '')}: {condition.get('message', '')}"
    return ""


def _get(record: registry.Record, kind: str, name: str) -> dict[str, Any] | None:
    text = _kubectl("get", _resource(kind), name, *_space(record), "--ignore-not-found", "--output=json")
    found: dict[str, Any] | None = json.loads(text) if text.strip() else None
    return found


def _delete(record: registry.Record, *, wait: bool) -> None:
    handle = record.handle
    names = [f"{_resource(handle['kind'])}/{handle['name']}"]
    names += [f"job.batch/{handle['name']}-{MERGE}", f"service/{handle['name']}"] if handle["kind"] == "job" else []
    _kubectl("delete", *names, *_space(record), "--ignore-not-found", f"--wait={str(wait).lower()}")


def _resource(kind: str) -> str:
    return f"jobsets.{GROUP}" if kind == "jobset" else "job.batch"


def _space(record: registry.Record) -> list[str]:
    return [f"--namespace={record.handle['namespace']}"] if record.handle["namespace"] else []


def _selector(record: registry.Record) -> str:
    return f"--selector={INSTANCE}={record.handle['name']}"


def _kubectl(*words: str, given: str = "") -> str:
    """What kubectl prints. Raises: LaunchError: It is not there, or fails."""
    try:
        done = subprocess.run(["kubectl", *words], input=given.encode(), capture_output=True, check=False)
    except OSError as error:
        raise LaunchError(f"kubectl: {error.strerror}; install it, or put it on PATH") from None
    if done.returncode:
        problem = done.stderr.decode("utf-8", "replace").strip()
        raise LaunchError(f"kubectl {words[0]} ended with {done.returncode}: {problem}")
    return done.stdout.decode("utf-8", "replace")
