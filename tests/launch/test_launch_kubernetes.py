"""Manifests: what the published schemas say of them, and what schemas do not know."""

import dataclasses
import io
import json
import re
import subprocess
import sys
from contextlib import redirect_stderr
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from fake_kubelet import expand
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet
from programs import ROOT

from launch import manifests, restarts, yaml_text
from launch.__main__ import _parser, main
from launch.job import LaunchError
from launch.targets import kubernetes

GOLDEN = ROOT / "tests" / "golden" / "launch"
VERSIONS = ("1.31", "1.34", "1.37")
TRAIN = ["mtx", "train", "configs/runs/gpt.gin", "--run-dir", "/data/runs/gpt"]
BUILD = ["mtx", "data", "build", "/data/text", "--tokenizer", "/data/t.model", "--out", "/data/store"]
BASE = ["--image", "registry.example/mtx:1", "--volume", "shared:/data"]
HOSTILE = (
    "a b'\"c\n$(JOB_COMPLETION_INDEX) $$(X) $ `id` ; - # : {} [] & * ! | > % @ \t\\ \x7f \x85 \u2028 \ufeff 😀 é yes"
)
OPTIONS = {
    "plain": ["--gpus-per-node", "8"],
    "cpu": ["--gpus-per-node", "0", "--devices-per-process", "2"],
    "all": [
        "--gpus-per-node", "8", "--processes-per-node", "8", "--namespace", "team-a", "--resource", "rdma/hca=8",
        "--resource", "cpu=32", "--resource", "memory=200Gi", "--shm-size", "64Gi", "--node-selector",
        "cloud.example/pool=h200", "--toleration", "nvidia.com/gpu:NoSchedule", "--toleration", "pool=train",
        "--label", "kueue.x-k8s.io/queue-name=research", "--secret-env", "TOKEN=hub:token", "--service-account",
        "trainer", "--priority-class", "high", "--host-network", "--port", "12345", "--volume", "shared:/code",
        "--volume", "scratch:/scratch", "--workdir", "/code/mtx", "--preflight", "--max-restarts", "9",
        "--termination-grace-s", "600", "--python", "/opt/venv/bin/python",
    ],
}  # fmt: skip


def render(*words, command=TRAIN):
    """Without the variables that are chosen by what this machine has."""
    args = _parser().parse_args(["kubernetes", *BASE, *words])
    return kubernetes.render(dataclasses.replace(kubernetes.make_job(args, command), environment=())) + "\n"


def documents(*words, command=TRAIN):
    return list(yaml.safe_load_all(render(*words, command=command)))


def refused(*words, command=TRAIN):
    out = io.StringIO()
    with redirect_stderr(out):
        assert main(["kubernetes", *BASE, *words, "--dry-run", "--", *command]) == 2
    return out.getvalue()


def validate(document, version):
    """Strictly; of a JobSet, the Jobs in it."""
    if document["kind"] != "JobSet":
        kubernetes_validate.validate(document, version, strict=True)
        return
    for job in document["spec"]["replicatedJobs"]:
        whole = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, **job["template"]}
        kubernetes_validate.validate(whole, version, strict=True)


def check_job_set(document):
    """Nothing is lost in the published models, so no field is unknown to them."""
    model = JobsetV1alpha2JobSet.from_dict(json.loads(json.dumps(document)))
    assert json.loads(model.to_json()) == document


def check_rules(parts):
    """What no schema finds."""
    services = [part["metadata"]["name"] for part in parts if part["kind"] == "Service"]
    jobs = []
    for part in parts:
        name, spec = part["metadata"]["name"], part["spec"]
        if part["kind"] == "JobSet":
            services.append(spec["network"]["subdomain"])
            ready = []
            for item in spec["replicatedJobs"]:
                assert all(wait == {"name": ready[-1], "status": "Complete"} for wait in item.get("dependsOn", []))
                ready.append(item["name"])
                jobs.append((f"{name}-{item['name']}-{item['replicas'] - 1}", item["template"]["spec"]))
            assert {rule["action"] for rule in spec["failurePolicy"]["rules"]} <= {"FailJobSet", "RestartJobSet"}
            assert spec["failurePolicy"].keys() == {"maxRestarts", "rules"}
        elif part["kind"] == "Job":
            jobs.append((name, spec))
    for name, spec in jobs:
        pod = spec["template"]["spec"]
        (container,) = pod["containers"]
        assert pod["restartPolicy"] == "Never"  # as a pod failure policy demands
        assert spec.get("completionMode") == ("Indexed" if "completions" in spec else None)
        host = f"{name}-{spec.get('completions', 1) - 1}"
        assert re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", host)
        assert len(host) + len("-xxxxx") <= 63
        assert ("backoffLimitPerIndex" in spec) != ("backoffLimit" in spec)
        final = [r["onExitCodes"]["values"] for r in spec["podFailurePolicy"]["rules"] if r["action"] == "FailJob"]
        assert final == [sorted(restarts.FINAL)]
        assert all(r["action"] in ("FailJob", "Ignore") for r in spec["podFailurePolicy"]["rules"])
        assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
        paths = [mount["mountPath"] for mount in container["volumeMounts"]]
        assert len(set(paths)) == len(paths)
        if "launch.worker" in container["command"]:
            words = container["command"]
            assert spec["completions"] == spec["parallelism"] == int(words[words.index("--nodes") + 1])
            assert words[words.index("--node-variable") + 1] == "JOB_COMPLETION_INDEX"
            assert pod["subdomain"] in services
            assert words[words.index("--coordinator") + 1].split(":")[0] == f"{name}-0.{pod['subdomain']}"
    assert jobs


@pytest.mark.parametrize("kind", ["jobset", "job"])
@pytest.mark.parametrize("nodes", ["1", "2", "280"])
@pytest.mark.parametrize("options", OPTIONS)
def test_manifests_of_runs_fit_the_schemas(kind, nodes, options):
    parts = documents("--kind", kind, "--nodes", nodes, *OPTIONS[options])
    for part in parts:
        for version in VERSIONS:
            validate(part, version)
        if part["kind"] == "JobSet":
            check_job_set(part)
    check_rules(parts)


@pytest.mark.parametrize("kind", ["jobset", "job"])
@pytest.mark.parametrize("parallel", [[], ["--parallel", "3"]])
def test_manifests_of_arrays_fit_the_schemas(kind, parallel):
    parts = documents("--kind", kind, "--array", "7", *parallel, "--gpus-per-node", "0", command=BUILD)
    for part in parts:
        for version in VERSIONS:
            validate(part, version)
        if part["kind"] == "JobSet":
            check_job_set(part)
    check_rules(parts)
    shards = parts[0]["spec"]["replicatedJobs"][0]["template"]["spec"] if kind == "jobset" else parts[0]["spec"]
    assert (shards["completions"], shards["parallelism"]) == (7, 3 if parallel else 7)
    assert shards["template"]["spec"]["containers"][0]["command"][-2:] == ["--shard", "$(JOB_COMPLETION_INDEX)/7"]
    merge = parts[0]["spec"]["replicatedJobs"][1]["template"]["spec"] if kind == "jobset" else parts[1]["spec"]
    assert merge["template"]["spec"]["containers"][0]["command"] == [*BUILD, "--merge"]


def test_the_schemas_and_models_do_find_mistakes():
    service, job = documents("--kind", "job", "--gpus-per-node", "8")
    job["spec"]["template"]["spec"]["hostNetwrok"] = True
    with pytest.raises(kubernetes_validate.ValidationError):
        validate(job, VERSIONS[-1])
    service["spec"]["ports"][0]["port"] = "x"
    with pytest.raises(kubernetes_validate.ValidationError):
        validate(service, VERSIONS[-1])
    (job_set,) = documents("--kind", "jobset", "--gpus-per-node", "8")
    job_set["spec"]["failurePolicy"]["maxRestart"] = 1
    with pytest.raises(AssertionError):
        check_job_set(job_set)


@pytest.mark.parametrize("nodes", [1, 2, 280])
@pytest.mark.parametrize("kind", ["jobset", "job"])
def test_golden(kind, nodes):
    words = ["--kind", kind, "--nodes", str(nodes), "--gpus-per-node", "8", "--resource", "rdma/hca=8"]
    path = GOLDEN / f"kubernetes_{kind}_{nodes}.yaml"
    assert render(*words) == path.read_text(), f"python -m launch kubernetes {' '.join(BASE + words)}"


@pytest.mark.parametrize("kind", ["jobset", "job"])
def test_golden_array(kind):
    words = ["--kind", kind, "--array", "100", "--parallel", "20", "--gpus-per-node", "0", "--resource", "cpu=8"]
    assert render(*words, command=BUILD) == (GOLDEN / f"kubernetes_{kind}_array.yaml").read_text()


def test_hostile_words_arrive_as_they_are():
    (part,) = documents("--kind", "jobset", "--gpus-per-node", "1", command=[*TRAIN, HOSTILE, "--set", "-n", "", "1e3"])
    command = part["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]["command"]
    assert [expand(word, {"JOB_COMPLETION_INDEX": "5"}) for word in command[-5:]] == [HOSTILE, "--set", "-n", "", "1e3"]


@pytest.mark.parametrize(
    "value", [HOSTILE, "yes", "0x1f", "1_000", "2020-01-01", "~", "", "null", " x ", "---", "a: b"]
)
def test_yaml_reads_back(value):
    document = {
        "a": value,
        "on": [value, [value, {}], {"b c": value, "d": [], "e": {value: 3}}],
        "n": None,
        "t": [True],
    }
    assert yaml.safe_load(yaml_text.dump(document)) == document
    assert yaml.load(yaml_text.dump(document), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)) == document


@pytest.mark.parametrize("value", ["a\0b", "a\udc80b"])
def test_yaml_refuses_what_is_no_text(value):
    with pytest.raises(LaunchError, match="not text"):
        yaml_text.dump({"a": value})


def test_environment_is_in_the_manifest_only():
    job = manifests.KubernetesJob(
        command=("true",), run_dir="/d", image="i", environment=(("A", HOSTILE),), secrets=(("B", "s", "k"),)
    )
    (part,) = yaml.safe_load_all(kubernetes.render(job))
    container = part["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]
    first, second = container["env"]
    assert expand(first["value"], {"JOB_COMPLETION_INDEX": "5"}) == HOSTILE
    assert second == {"name": "B", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}
    assert HOSTILE not in str(container["command"])


@pytest.mark.parametrize(("words", "message"), [
    ([], "how many GPUs does each pod get"),
    (["--gpus-per-node", "1", "--volume", "x"], "--volume 'x'"),
    (["--gpus-per-node", "1", "--volume", "A_B:/x"], "--volume"),
    (["--gpus-per-node", "1", "--namespace", "a b"], "--namespace 'a b'"),
    (["--gpus-per-node", "1", "--namespace=--x"], "--namespace"),
    (["--gpus-per-node", "1", "--image=-x"], "--image"),
    (["--gpus-per-node", "1", "--resource", "cpu=many"], "--resource"),
    (["--gpus-per-node", "1", "--toleration", "a:Never"], "NoSchedule"),
    (["--gpus-per-node", "1", "--secret-env", "1A=s:k"], "--secret-env"),
    (["--gpus-per-node", "1", "--label", "a b=c"], "--label"),
    (["--gpus-per-node", "1", "--port", "70000"], "65535"),
    (["--gpus-per-node", "1", "--workdir", "here"], "an absolute path"),
    (["--gpus-per-node", "1", "--name", "x" * 60], "letters, and"),
    (["--gpus-per-node", "3", "--processes-per-node", "2"], "evenly"),
])  # fmt: skip
def test_mistakes_are_refused(words, message):
    assert message in refused(*words)


@pytest.mark.parametrize("run_dir", ["runs/gpt", "/elsewhere/gpt", "/data/../gpt", "/database/gpt"])
def test_run_directory_must_be_on_a_volume(run_dir):
    assert "not below a volume" in refused(
        "--gpus-per-node", "1", command=["mtx", "train", "a.gin", "--run-dir", run_dir]
    )


@pytest.mark.parametrize(("given", "name"), [("Gpt_1.3B", "gpt-1-3b"), ("7b", "run-7b"), ("a--b", "a-b")])
def test_names(given, name):
    (part,) = documents("--kind", "jobset", "--gpus-per-node", "1", "--name", given)
    assert part["metadata"]["name"] == name


def test_runs_on_python_3_9_as_well():
    old = Path.home() / ".pyenv/versions/3.9.18/bin/python"
    python = str(old) if old.exists() else sys.executable
    words = ["--kind", "jobset", "--nodes", "2", "--gpus-per-node", "8", "--resource", "rdma/hca=8"]
    command = [python, "-m", "launch", "kubernetes", *BASE, *words, "--dry-run", "--", *TRAIN]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    golden = (GOLDEN / "kubernetes_jobset_2.yaml").read_text()
    assert set(golden.splitlines()) <= set(done.stdout.splitlines())
