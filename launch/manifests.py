"""What Kubernetes is told of a job: a JobSet, or a Service and Indexed Jobs where there are no JobSets. Pure.

Decides names, failure policies and how a pod finds the first one. What a pod does is decided in `launch.worker` and
`launch.unattended`.

Sources: Job and pod failure policy, kubernetes.io/docs/concepts/workloads/controllers/job; JobSet v1alpha2,
jobset.sigs.k8s.io; expansion of `$(NAME)`, kubernetes.io/docs/tasks/inject-data-application.

Invariant: every pod of a run is one of its hosts, and its completion index is that host's number.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from launch import array, restarts, worker
from launch.coordinates import join_address
from launch.job import Job, LaunchError

Manifest = dict[str, Any]

MAIN, NODE, SHARD, MERGE = "main", "node", "shard", "merge"
"""Names of the container, and of the jobs in a JobSet."""
INDEX = "JOB_COMPLETION_INDEX"
INSTANCE = "app.kubernetes.io/instance"
"""Label of all that belongs to a job."""
LONGEST_LABEL = 63
RANDOM_SUFFIX = len("-xxxxx")
"""What a Job's controller puts behind the name of a pod."""
MANY = 1000
"""Restarts that the cluster allows of a run: the run counts those without progress itself, so this is only a bound."""

_LABEL = re.compile(r"[a-z]([a-z0-9-]*[a-z0-9])?")


@dataclass(frozen=True)
class KubernetesJob(Job):
    """A job and where in a cluster it runs.

    Attributes:
        image: Of every container; holds Python, mtx and the program.
        namespace: Of all that is made; empty: that of kubectl's context.
        kind: `jobset`, `job`, or `auto`: a JobSet where the cluster knows them.
        port: Where process 0 listens.
        gpu_resource: By which the cluster knows GPUs.
        resources: Others, (name, quantity) of each pod; requested and limited alike.
        volumes: (claim, path) pairs.
        shm_size: Most that /dev/shm may take, as a quantity; empty: as much as the pod's memory.
        node_selector: (label, value) pairs that a node must have.
        tolerations: (key, value, effect) triples; an empty value or effect fits all.
        labels: (label, value) pairs of everything, for queues and the like.
        secrets: (variable, secret, key) triples.
        service_account: Empty: the namespace's default.
        priority_class: Empty: none.
        host_network: Whether pods use the network of their node.
        termination_grace_s: Seconds from SIGTERM to SIGKILL when a pod is to go: in these the run saves.
        wait: Whether `submit` stays until the end.
    """

    image: str = ""
    namespace: str = ""
    kind: str = "auto"
    port: int = 8476
    gpu_resource: str = "nvidia.com/gpu"
    resources: tuple[tuple[str, str], ...] = ()
    volumes: tuple[tuple[str, str], ...] = ()
    shm_size: str = ""
    node_selector: tuple[tuple[str, str], ...] = ()
    tolerations: tuple[tuple[str, str, str], ...] = ()
    labels: tuple[tuple[str, str], ...] = ()
    secrets: tuple[tuple[str, str, str], ...] = ()
    service_account: str = ""
    priority_class: str = ""
    host_network: bool = False
    termination_grace_s: int = 300
    wait: bool = False


def manifests(job: KubernetesJob, kind: str) -> list[Manifest]:
    """What is applied at once, in this order.

    Args:
        kind: `jobset` or `job`.

    Raises:
        LaunchError: The name is too long.
    """
    check_name(job, kind)
    if kind == "jobset":
        return [_job_set(job)]
    if job.tasks is not None:
        return [{"apiVersion": "batch/v1", "kind": "Job", "metadata": _metadata(job), "spec": _shards(job)}]
    return [
        _service(job),
        {"apiVersion": "batch/v1", "kind": "Job", "metadata": _metadata(job), "spec": _run(job, "job")},
    ]


def merge_manifest(job: KubernetesJob) -> Manifest:
    """Without JobSets: the Job that is applied when all shards are done."""
    metadata = _metadata(job, f"{name_of(job)}-{MERGE}")
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": _merge(job)}


def name_of(job: Job) -> str:
    """The name of a job as the DNS wants it: small letters, digits and '-', with a letter first.

    Raises:
        LaunchError: Nothing of it is left.
    """
    name = re.sub(r"[^a-z0-9]+", "-", job.name.lower()).strip("-")
    name = name if name[:1].isalpha() else f"run-{name}".rstrip("-")
    if not _LABEL.fullmatch(name):
        raise LaunchError(f"--name {job.name!r}: small letters, digits and '-', a letter first, for Kubernetes")
    return name


def check_name(job: KubernetesJob, kind: str) -> None:
    """Raises: LaunchError: The name of some pod would be longer than the DNS allows."""
    name, count = name_of(job), job.num_nodes if job.tasks is None else job.tasks
    last = "" if job.tasks is None else f"-{MERGE}"
    longest = f"-{SHARD if job.tasks is not None else NODE}-0-{count - 1}" if kind == "jobset" else f"-{count - 1}"
    room = LONGEST_LABEL - RANDOM_SUFFIX - max(len(longest), len(last))
    if len(name) > room:
        raise LaunchError(
            f"--name {job.name}: {name!r} has {len(name)} letters, and {room} are allowed, since the names of pods "
            f"begin with it and the DNS allows {LONGEST_LABEL}"
        )


def coordinator(job: KubernetesJob, kind: str) -> str:
    """HOST:PORT of process 0, by the name that the cluster's DNS gives the first pod."""
    name = name_of(job)
    return join_address(f"{name}-{NODE}-0-0.{name}" if kind == "jobset" else f"{name}-0.{name}", job.port)


def escape(text: str) -> str:
    """A word that Kubernetes leaves as it is: `$$` stands for `$`, and `$(NAME)` for a variable."""
    return text.replace("$", "$$")


def _metadata(job: KubernetesJob, name: str | None = None) -> Manifest:
    namespace = {"namespace": job.namespace} if job.namespace else {}
    return {"name": name or name_of(job), **namespace, "labels": _labels(job)}


def _labels(job: KubernetesJob) -> dict[str, str]:
    return {"app.kubernetes.io/name": "mtx", INSTANCE: name_of(job), **dict(job.labels)}


def _service(job: KubernetesJob) -> Manifest:
    """Gives pods names in the DNS; it has no address of its own."""
    spec = {
        "clusterIP": "None",
        "publishNotReadyAddresses": True,
        "selector": {"app.kubernetes.io/name": "mtx", INSTANCE: name_of(job)},
        "ports": [{"name": "coordinator", "port": job.port}],
    }
    return {"apiVersion": "v1", "kind": "Service", "metadata": _metadata(job), "spec": spec}


def _job_set(job: KubernetesJob) -> Manifest:
    if job.tasks is None:
        jobs = [_replicated(NODE, _run(job, "jobset"))]
    else:
        after = {"dependsOn": [{"name": SHARD, "status": "Complete"}]}
        jobs = [_replicated(SHARD, _shards(job)), {**_replicated(MERGE, _merge(job)), **after}]
    failed_for_good = {
        "name": "final",
        "action": "FailJobSet",
        "onJobFailureReasons": ["PodFailurePolicy"],
    }
    spec = {
        "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True, "subdomain": name_of(job)},
        # Any other failure of a run, exit code 4 too, starts all its pods again. Shards start again one by one.
        "failurePolicy": {"maxRestarts": MANY if job.tasks is None else 0, "rules": [failed_for_good]},
        "replicatedJobs": jobs,
    }
    return {"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "metadata": _metadata(job), "spec": spec}


def _replicated(name: str, spec: Manifest) -> Manifest:
    return {"name": name, "replicas": 1, "template": {"spec": spec}}


def _run(job: KubernetesJob, kind: str) -> Manifest:
    """Of a run: a pod per host. In a JobSet the first failure ends the job, and the set starts all pods again, at once;
    alone, the job starts each pod again when it has ended."""
    where = ["--node-variable", INDEX, "--run-dir", job.run_dir]
    words = [job.python, *worker.arguments(job, coordinator(job, kind), where=where), *worker.unattended_arguments(job)]
    command = [escape(word) for word in (*words, "--", *job.process_command)]
    rules = [_final()] if kind == "jobset" else [_final(), _disrupted(), _preempted()]
    return {
        "completionMode": "Indexed",
        "completions": job.num_nodes,
        "parallelism": job.num_nodes,
        "backoffLimit": 0 if kind == "jobset" else MANY * job.num_nodes,
        "podFailurePolicy": {"rules": rules},
        "template": _pod(job, command, subdomain=name_of(job), gpus=job.gpus_per_node or 0),
    }


def _shards(job: KubernetesJob) -> Manifest:
    """Of an array: a pod per shard, started again by itself."""
    command = [*(escape(word) for word in job.command), "--shard", f"$({INDEX})/{job.tasks}"]
    return {
        "completionMode": "Indexed",
        "completions": job.tasks,
        "parallelism": min(job.parallel or job.tasks or 1, job.tasks or 1),
        "backoffLimitPerIndex": job.max_restarts,
        "maxFailedIndexes": 0,
        "podFailurePolicy": {"rules": [_final(), _disrupted(), _preempted()]},
        "template": _pod(job, command, gpus=job.gpus_per_node or 0),
    }


def _merge(job: KubernetesJob) -> Manifest:
    command = [escape(word) for word in array.merge_command(job)]
    return {
        "backoffLimit": job.max_restarts,
        "podFailurePolicy": {"rules": [_final(), _disrupted(), _preempted()]},
        "template": _pod(job, command, gpus=job.gpus_per_node or 0),
    }


def _final() -> Manifest:
    """Exit codes that a restart would only repeat."""
    codes = {"containerName": MAIN, "operator": "In", "values": sorted(restarts.FINAL)}
    return {"action": "FailJob", "onExitCodes": codes}


def _disrupted() -> Manifest:
    """A pod that the cluster took away does not count."""
    return {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}


def _preempted() -> Manifest:
    """A pod that saved and went does not count either."""
    codes = {"containerName": MAIN, "operator": "In", "values": [restarts.PREEMPTED]}
    return {"action": "Ignore", "onExitCodes": codes}


def _pod(job: KubernetesJob, command: list[str], *, gpus: int, subdomain: str = "") -> Manifest:
    resources = {**({job.gpu_resource: str(gpus)} if gpus else {}), **dict(job.resources)}
    mounts = [{"name": "shm", "mountPath": "/dev/shm"}]
    memory = {"medium": "Memory", **({"sizeLimit": job.shm_size} if job.shm_size else {})}
    volumes: list[Manifest] = [{"name": "shm", "emptyDir": memory}]
    for number, claim in enumerate(dict.fromkeys(claim for claim, _ in job.volumes)):
        volumes.append({"name": f"volume-{number}", "persistentVolumeClaim": {"claimName": claim}})
        mounts += [{"name": f"volume-{number}", "mountPath": path} for other, path in job.volumes if other == claim]
    variables: list[Manifest] = [{"name": name, "value": escape(value)} for name, value in job.environment]
    for name, secret, key in job.secrets:
        variables.append({"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}})
    container: Manifest = {"name": MAIN, "image": job.image, "command": command}
    container.update({"workingDir": job.working_directory} if job.working_directory else {})
    container.update({"env": variables} if variables else {})
    container.update({"resources": {"requests": resources, "limits": resources}} if resources else {})
    container["volumeMounts"] = mounts
    spec: Manifest = {"restartPolicy": "Never", "terminationGracePeriodSeconds": job.termination_grace_s}
    spec.update({"subdomain": subdomain} if subdomain else {})
    spec.update({"serviceAccountName": job.service_account} if job.service_account else {})
    spec.update({"priorityClassName": job.priority_class} if job.priority_class else {})
    spec.update({"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"} if job.host_network else {})
    spec.update({"nodeSelector": dict(job.node_selector)} if job.node_selector else {})
    spec.update({"tolerations": [_toleration(*item) for item in job.tolerations]} if job.tolerations else {})
    spec.update({"containers": [container], "volumes": volumes})
    return {"metadata": {"labels": _labels(job)}, "spec": spec}


def _toleration(key: str, value: str, effect: str) -> Manifest:
    how = {"operator": "Equal", "value": value} if value else {"operator": "Exists"}
    return {"key": key, **how, **({"effect": effect} if effect else {})}
