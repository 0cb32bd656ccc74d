"""What a cluster would do with a manifest, as far as a run can tell: pods, their environment, and what follows when
they end. After the documentation of Job (pod failure policy, back-off limits) and JobSet (failure policy, dependsOn).

A pod is a process in the network namespace of a host, with the pod's host name and all pods' DNS names. Its image is
this machine; a claim is mounted where it already is. No pause comes before a restart.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from network_hosts import Network

KILL_S = 30.0


def expand(text: str, variables: dict[str, str]) -> str:
    """`$(NAME)` of a known variable is replaced, and `$$` is `$`; anything else stays."""

    def replace(found: re.Match[str]) -> str:
        return "$" if found[0] == "$$" else variables.get(found[1], found[0])

    return re.sub(r"\$\$|\$\(([^)]*)\)", replace, text)


@dataclass
class Pod:
    job: str
    index: int
    process: subprocess.Popen[bytes]
    disrupted: bool = False


@dataclass
class FakeJob:
    """A Job and its pods."""

    name: str
    spec: dict[str, Any]
    pods: dict[int, Pod] = field(default_factory=dict)
    done: set[int] = field(default_factory=set)
    failures: int = 0
    by_index: dict[int, int] = field(default_factory=dict)
    ended: str | None = None
    """`Complete`, or the reason why it failed."""


class Cluster:
    """Runs manifests."""

    def __init__(self, network: Network | None, folder: Path, image: dict[str, str]) -> None:
        """Args: network: None: pods are not on hosts of their own. folder: For the lines of pods. image: The
        variables of the image."""
        self.network, self.folder, self.image = network, folder, image
        self.jobs: dict[str, FakeJob] = {}
        self.log: list[tuple[Any, ...]] = []
        """(what, job, index, ...) of all that happened."""
        self.restarts, self.ended = 0, ""
        self._set: dict[str, Any] | None = None

    def apply(self, text: str) -> None:
        """Takes manifests; Services are what the names below follow from."""
        services = []
        for document in yaml.safe_load_all(text):
            name = document["metadata"]["name"]
            if document["kind"] == "Service":
                services.append(name)
                assert document["spec"]["clusterIP"] == "None"
            elif document["kind"] == "Job":
                assert document["spec"]["template"]["spec"].get("subdomain", name) in (name, *services)
                self.jobs[name] = FakeJob(name, document["spec"])
            else:
                self._set = document
                self._create_jobs()
        if self.network is not None:
            self._publish(list(self.jobs.values()))

    def run(self, timeout_s: float, look: Any = lambda: None) -> str:
        """Until all has ended; how: `Complete` or `Failed ...`. Args: look: Called again and again."""
        deadline = time.monotonic() + timeout_s
        try:
            while not self.ended:
                assert time.monotonic() < deadline, self.told()
                for job in list(self.jobs.values()):
                    self._reconcile(job)
                self._judge()
                look()
                time.sleep(0.05)
            return self.ended
        finally:
            for job in self.jobs.values():
                self._terminate(job, 0.0)

    def told(self) -> str:
        """All lines of all pods, and what happened."""
        files = sorted(self.folder.glob("*.pod"))
        return "\n".join([str(self.log), *(f"--- {path.name}\n{path.read_text()}" for path in files)])

    def count(self, what: str) -> int:
        return sum(entry[0] == what for entry in self.log)

    def preempt(self, pod: Pod) -> None:
        """Takes a pod away, as a scheduler does for one that matters more."""
        pod.disrupted = True
        pod.process.send_signal(signal.SIGTERM)

    def _create_jobs(self) -> None:
        assert self._set is not None
        for item in self._set["spec"]["replicatedJobs"]:
            name = f"{self._set['metadata']['name']}-{item['name']}-0"
            waits = [
                d for d in item.get("dependsOn", [])
                if (other := self.jobs.get(f"{self._set['metadata']['name']}-{d['name']}-0")) is None
                or other.ended != d["status"]
            ]  # fmt: skip
            if name not in self.jobs and not waits:
                self.jobs[name] = FakeJob(name, item["template"]["spec"])
                self.log.append(("job", name, -1))

    def _publish(self, jobs: list[FakeJob]) -> None:
        """The names of all pods, in the /etc/hosts of every host."""
        assert self.network is not None
        addresses = list(self.network.addresses().values())
        lines = ["127.0.0.1 localhost"]
        for job in jobs:
            subdomain = job.spec["template"]["spec"].get("subdomain")
            for index in range(job.spec.get("completions", 1)):
                host = f"{job.name}-{index}"
                names = f"{host}.{subdomain} {host}" if subdomain else host
                lines.append(f"{addresses[index % len(addresses)]} {names}")
        self.network.hosts_file.write_text("\n".join(lines) + "\n")

    def _start(self, job: FakeJob, index: int) -> None:
        pod = job.spec["template"]["spec"]
        assert pod["restartPolicy"] == "Never"
        (container,) = pod["containers"]
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounts.keys() == {volume["name"] for volume in pod["volumes"]}
        assert all(Path(path).is_dir() for path in mounts.values())
        variables = {"JOB_COMPLETION_INDEX": str(index)} if job.spec.get("completionMode") == "Indexed" else {}
        for item in container.get("env", []):
            variables[item["name"]] = expand(item["value"], variables)
        words = [expand(word, variables) for word in container["command"]]
        if self.network is not None:
            host = self.network.names[index % len(self.network.names)]
            enter = self.network.inside(host)
            words = [*enter[:-2], f"{job.name}-{index}", enter[-1], *words]
        number = self.count("start")
        with (self.folder / f"{number}-{job.name}-{index}.pod").open("wb") as file:
            process = subprocess.Popen(
                words, env={**self.image, **variables}, stdin=subprocess.DEVNULL, stdout=file, stderr=file,
                cwd=container.get("workingDir"), start_new_session=True,
            )  # fmt: skip
        job.pods[index] = Pod(job.name, index, process)
        self.log.append(("start", job.name, index))

    def _reconcile(self, job: FakeJob) -> None:
        for index, pod in list(job.pods.items()):
            code = pod.process.poll()
            if code is not None and job.ended is None:
                del job.pods[index]
                self._pod_ended(job, pod, 128 - code if code < 0 else code)
        if job.ended is None and len(job.done) == job.spec.get("completions", 1):
            job.ended = "Complete"
        for index in range(job.spec.get("completions", 1)):
            room = len(job.pods) < job.spec.get("parallelism", 1)
            if job.ended is None and room and index not in job.pods and index not in job.done:
                self._start(job, index)
        if job.ended is not None and job.pods:
            self._terminate(job, KILL_S)

    def _pod_ended(self, job: FakeJob, pod: Pod, code: int) -> None:
        self.log.append(("end", job.name, pod.index, code))
        if code == 0:
            job.done.add(pod.index)
            return
        for rule in job.spec.get("podFailurePolicy", {}).get("rules", []):
            if _matches(rule, pod, code):
                if rule["action"] == "FailJob":
                    job.ended = "PodFailurePolicy"
                assert rule["action"] in ("FailJob", "Ignore")
                return
        job.failures += 1
        job.by_index[pod.index] = job.by_index.get(pod.index, 0) + 1
        per_index = job.spec.get("backoffLimitPerIndex")
        if per_index is not None:
            if job.by_index[pod.index] > per_index:
                assert job.spec["maxFailedIndexes"] == 0
                job.ended = "MaxFailedIndexesExceeded"
        elif job.failures > job.spec["backoffLimit"]:
            job.ended = "BackoffLimitExceeded"

    def _judge(self) -> None:
        """What follows for all when some job has ended."""
        failed = [job for job in self.jobs.values() if job.ended not in (None, "Complete")]
        if self._set is None:
            if failed:
                self.ended = f"Failed {failed[0].ended}"
            elif all(job.ended for job in self.jobs.values()):
                self.ended = "Complete"
            return
        if failed:
            policy = self._set["spec"]["failurePolicy"]
            rules = [r for r in policy["rules"] if failed[0].ended in r["onJobFailureReasons"]]
            action = rules[0]["action"] if rules else "RestartJobSet"
            assert action in ("FailJobSet", "RestartJobSet")
            self.restarts += action == "RestartJobSet"
            if action == "FailJobSet" or self.restarts > policy["maxRestarts"]:
                self.ended = f"Failed {failed[0].ended}"
                return
            self.log.append(("restart", self._set["metadata"]["name"], -1))
            for job in self.jobs.values():
                self._terminate(job, KILL_S)
            self.jobs = {}
        before = len(self.jobs)
        self._create_jobs()
        if self.network is not None and len(self.jobs) != before:
            self._publish(list(self.jobs.values()))
        if len(self.jobs) == len(self._set["spec"]["replicatedJobs"]) and all(j.ended for j in self.jobs.values()):
            self.ended = "Complete"

    def _terminate(self, job: FakeJob, grace_s: float) -> None:
        """SIGTERM to the first process of each pod, and SIGKILL to all of it when its grace is over."""
        for pod in job.pods.values():
            if pod.process.poll() is None and grace_s:
                pod.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + grace_s
        for pod in job.pods.values():
            try:
                pod.process.wait(timeout=max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                os.killpg(pod.process.pid, signal.SIGKILL)
                pod.process.wait()
            self.log.append(("deleted", job.name, pod.index, pod.process.returncode))
        job.pods = {}


def _matches(rule: dict[str, Any], pod: Pod, code: int) -> bool:
    if "onExitCodes" in rule:
        assert (rule["onExitCodes"]["containerName"], rule["onExitCodes"]["operator"]) == ("main", "In")
        return code in rule["onExitCodes"]["values"]
    (condition,) = rule["onPodConditions"]
    assert condition == {"type": "DisruptionTarget", "status": "True"}
    return pod.disrupted
