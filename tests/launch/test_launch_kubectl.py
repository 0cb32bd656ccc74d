"""What is asked of kubectl, with a small program in its place that keeps objects in files."""

import json
import signal
import sys

import pytest

from launch import registry
from launch.__main__ import main
from launch.targets import kubernetes

KUBECTL = """
import json, os, pathlib, sys
import yaml
folder = pathlib.Path(os.environ["FAKE_KUBECTL"])
words = sys.argv[1:]
given = sys.stdin.read()
with (folder / "calls.jsonl").open("a") as file:
    file.write(json.dumps(words) + "\\n")
if words[0] == "api-resources":
    print("jobsets.jobset.x-k8s.io" if (folder / "jobsets").exists() else "", end="")
elif words[0] == "apply":
    for document in yaml.safe_load_all(given):
        status = folder / f"status-{document['metadata']['name']}"
        document["status"] = json.loads(status.read_text()) if status.exists() else {}
        (folder / f"{document['kind'].lower()}-{document['metadata']['name']}").write_text(json.dumps(document))
elif words[:2] == ["get", "pods"]:
    pods = folder / "pods"
    print(pods.read_text() if pods.exists() else json.dumps({"items": []}))
elif words[0] == "get":
    path = folder / f"{words[1].split('.')[0].rstrip('s')}-{words[2]}"
    print(path.read_text() if path.exists() else "", end="")
elif words[0] == "logs":
    print("[0@pod] a line")
elif words[:2] == ["delete", "pods"]:
    pass
elif words[0] == "delete":
    for word in words[1:]:
        if "/" in word:
            kind, name = word.split("/")
            (folder / f"{kind.split('.')[0].rstrip('s')}-{name}").unlink(missing_ok=True)
else:
    sys.exit("error: unknown command")
"""
COMPLETE = {"conditions": [{"type": "Complete", "status": "True"}]}
FAILED = {"conditions": [{"type": "Failed", "status": "True", "reason": "FailedJobs", "message": "a job failed"}]}


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    program = tmp_path / "bin" / "kubectl"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\n{KUBECTL}")
    program.chmod(0o755)
    folder = tmp_path / "cluster"
    folder.mkdir()
    (folder / "jobsets").touch()
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    monkeypatch.setenv("FAKE_KUBECTL", str(folder))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(kubernetes, "POLL_S", 0.01)
    return folder


def submit(*words, command=("mtx", "train", "a.gin", "--run-dir", "/data/gpt")):
    given = ["--image", "i", "--volume", "c:/data", "--gpus-per-node", "0", "--namespace", "team", *words]
    return main(["kubernetes", *given, "--", *command])


def calls(cluster):
    return [json.loads(line) for line in (cluster / "calls.jsonl").read_text().splitlines()]


def give_pods(cluster, *statuses):
    (cluster / "pods").write_text(json.dumps({"items": [{"status": status} for status in statuses]}))


def ended(code):
    return {"phase": "Failed", "containerStatuses": [{"state": {"terminated": {"exitCode": code}}}]}


def set_status(cluster, name, status):
    document = json.loads((cluster / name).read_text())
    (cluster / name).write_text(json.dumps({**document, "status": status}))


def state():
    return registry.state(registry.find("gpt"))


def test_submit_state_and_stop(cluster, capfd):
    assert submit() == 0
    assert (cluster / "jobset-gpt").exists()
    assert state() == "pending (no pod yet)"
    give_pods(cluster, {"phase": "Pending", "conditions": [
        {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/9 nodes: Insufficient gpu"}
    ]})  # fmt: skip
    assert state() == "pending (Unschedulable: 0/9 nodes: Insufficient gpu)"
    waiting = {"reason": "ImagePullBackOff", "message": "no such image"}
    give_pods(cluster, {"phase": "Pending", "containerStatuses": [{"state": {"waiting": waiting}}]})
    assert state() == "pending (ImagePullBackOff no such image)"
    give_pods(cluster, {"phase": "Running"}, {"phase": "Running"})
    assert state() == "running (2 pods)"
    assert submit() == 2  # it runs
    kubernetes.stop(registry.find("gpt"), signal.SIGTERM)
    assert not (cluster / "jobset-gpt").exists()
    assert state().startswith("ended")
    assert all("--namespace=team" in call for call in calls(cluster) if call[0] != "api-resources")


def test_actions_by_name(cluster, capfd):
    assert submit() == 0
    give_pods(cluster, {"phase": "Running"})
    capfd.readouterr()
    assert main(["status"]) == 0
    assert "running" in capfd.readouterr().out
    assert main(["logs", "gpt"]) == 0
    assert "[0@pod] a line" in capfd.readouterr().out
    assert main(["stop", "gpt"]) in (0, 4)
    assert not (cluster / "jobset-gpt").exists()


def test_killing_removes_the_pods_at_once(cluster):
    assert submit() == 0
    kubernetes.stop(registry.find("gpt"), signal.SIGKILL)
    assert calls(cluster)[-1][:2] == ["delete", "pods"]
    assert {"--grace-period=0", "--force"} <= set(calls(cluster)[-1])


def test_without_job_sets_a_job_is_made(cluster, capfd):
    (cluster / "jobsets").unlink()
    assert submit() == 0
    assert (cluster / "job-gpt").exists()
    assert (cluster / "service-gpt").exists()
    assert "knows no JobSets" in capfd.readouterr().err
    kubernetes.stop(registry.find("gpt"), signal.SIGTERM)
    assert not (cluster / "job-gpt").exists()
    assert not (cluster / "service-gpt").exists()


@pytest.mark.parametrize(("status", "codes", "code"), [
    (COMPLETE, [0, 0], 0), (FAILED, [6, 7], 7), (FAILED, [2, 143], 2), (FAILED, [], 1),
])  # fmt: skip
def test_waiting_ends_with_the_exit_code_of_the_run(cluster, status, codes, code):
    (cluster / "status-gpt").write_text(json.dumps(status))
    give_pods(cluster, *map(ended, codes))
    assert submit("--wait") == code


def test_an_ended_job_of_the_name_is_replaced(cluster, capfd):
    (cluster / "status-gpt").write_text(json.dumps(FAILED))
    assert submit("--name", "gpt") == 0
    (cluster / "status-gpt").unlink()
    assert submit("--name", "gpt") == 0
    assert "has ended is deleted" in capfd.readouterr().err
    assert json.loads((cluster / "jobset-gpt").read_text())["status"] == {}


def test_a_job_that_another_user_runs_is_left_alone(cluster, capfd, tmp_path, monkeypatch):
    assert submit("--name", "gpt") == 0
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "other"))
    assert submit("--name", "gpt") == 2
    assert "has not ended" in capfd.readouterr().err


def test_array_without_job_sets_gives_the_merge_when_the_shards_are_done(cluster, capfd):
    (cluster / "status-store").write_text(json.dumps(COMPLETE))
    (cluster / "status-store-merge").write_text(json.dumps(COMPLETE))
    command = ("mtx", "data", "build", "/data/in", "--out", "/data/store")
    words = ["--kind", "job", "--array", "3", "--name", "store"]
    assert submit(*words, "--wait", command=command) == 0
    merge = json.loads((cluster / "job-store-merge").read_text())
    assert merge["spec"]["template"]["spec"]["containers"][0]["command"] == [*command, "--merge"]
    (cluster / "status-store").write_text(json.dumps(FAILED))
    give_pods(cluster, ended(2))
    assert submit(*words, "--wait", command=command) == 2
    assert not (cluster / "job-store-merge").exists()


def test_what_kubectl_says_is_told(cluster, capfd, monkeypatch):
    (cluster.parent / "bin" / "kubectl").write_text("#!/bin/sh\necho 'error: no configuration' >&2\nexit 1\n")
    assert submit() == 2
    assert "kubectl api-resources ended with 1: error: no configuration" in capfd.readouterr().err
    monkeypatch.setenv("PATH", "/nowhere")
    assert submit() == 2
    assert "install it, or put it on PATH" in capfd.readouterr().err


def test_no_value_of_a_variable_is_on_a_command_line(cluster):
    assert submit("--env", "TOKEN=very secret") == 0
    assert "very secret" in (cluster / "jobset-gpt").read_text()
    assert "very secret" not in (cluster / "calls.jsonl").read_text()
