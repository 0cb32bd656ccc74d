"""What the processes get: against the installed jaxlib, which knows best what it knows."""

import importlib.metadata
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from programs import ROOT

from launch import environment, flags, nccl
from launch.job import LaunchError
from mtx.training import proof

VERSION = importlib.metadata.version("jaxlib")
VALUES = {  # those that take no number
    "xla_gpu_enable_command_buffer": "FUSION",
    "xla_gpu_disable_async_collectives": "allreduce",
    "xla_gpu_pipeline_all_gather": "on",
}
PROXY = "http://127.0.0.1:9"


def choose(*given, gpu="h100", jaxlib="0.11.2", inherited=None, **more):
    return environment.choose(gpu=gpu, jaxlib=jaxlib, given=given, inherited=inherited or {}, **more)


def value(chosen, name="XLA_FLAGS"):
    return dict(chosen.pairs).get(name)


def launch(*words, command=("mtx", "train", "a.gin"), **variables):
    return subprocess.run(
        [sys.executable, "-m", "launch", "local", *words, "--", *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        env={**{k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}, **variables},
    )


def test_the_table_is_what_this_jaxlib_knows():
    names = [flag.name for flag in flags.FLAGS] + list(flags.GONE)
    text = " ".join(f"--{name}={VALUES.get(name, 1)}" for name in names)
    done = subprocess.run(
        [sys.executable, "-c", "import jax; jax.devices()"],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": text},
        capture_output=True,
        text=True,
    )
    said = environment._UNKNOWN.search(done.stderr)
    assert said is not None, done.stderr[:2000]
    unknown = [word.lstrip("-").partition("=")[0] for word in said[1].split()]
    expected = [flag.name for flag in flags.FLAGS if not flags.knows(VERSION, flag)] + list(flags.GONE)
    assert sorted(unknown) == sorted(expected)


@pytest.mark.parametrize("profile", flags.PROFILES)
def test_what_a_profile_sets_is_accepted(profile):
    chosen = environment.choose(profile=profile, gpu="b200", python=sys.executable, inherited={})
    assert value(chosen)
    assert chosen.python == sys.executable
    assert environment.check(chosen) is None


def test_an_unknown_flag_is_named_before_anything_starts(tmp_path):
    flag = "--xla_gpu_enable_latency_hiding_schedular=true"
    done = launch("--run-dir", str(tmp_path / "run"), "--gpu", "h100", "--env", f"XLA_FLAGS={flag}",
                  command=(sys.executable, "-c", "print('began')"))  # fmt: skip
    assert done.returncode == 2
    assert "began" not in done.stdout
    assert "Traceback" not in done.stderr
    assert "_schedular" in done.stderr
    assert "near: xla_gpu_enable_latency_hiding_scheduler" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_gone_flag_and_a_bad_value_are_explained():
    chosen = choose("XLA_FLAGS=--xla_gpu_graph_level=0", python=sys.executable)
    with pytest.raises(LaunchError, match="instead: xla_gpu_enable_command_buffer"):
        environment.check(chosen)
    chosen = choose("XLA_FLAGS=--xla_gpu_autotune_level=high", python=sys.executable)
    with pytest.raises(LaunchError, match="xla_gpu_autotune_level does not take"):
        environment.check(chosen)


def test_flags_that_cannot_be_tried_are_told(tmp_path):
    assert "not on this machine" in environment.check(choose())
    empty = tmp_path / "python"
    empty.write_text("#!/bin/sh\necho no module named jax >&2\nexit 1\n")
    empty.chmod(0o755)
    assert "no module named jax" in environment.check(choose(python=str(empty)))
    assert "not tried" in environment.check(choose(python=str(tmp_path / "none")))


def test_the_users_flags_come_last_and_replace_ours():
    ours = "--xla_gpu_enable_latency_hiding_scheduler"
    shell = {"XLA_FLAGS": "--xla_gpu_autotune_level=0", "NCCL_DEBUG": "TRACE"}
    chosen = choose(f"XLA_FLAGS={ours}=false --xla_dump_to=d", inherited=shell)
    assert value(chosen) == f"--xla_gpu_autotune_level=0 {ours}=false --xla_dump_to=d"
    assert any(ours in note and "yours, in place of 'true'" in note for note in chosen.notes)
    assert value(chosen, "NCCL_DEBUG") == "TRACE"
    assert "NCCL_DEBUG: yours, in place of WARN" in chosen.notes
    untouched = choose(gpu=None, root=Path("/no/such/place"), inherited=shell)
    assert untouched.pairs == ()
    assert any("XLA_FLAGS of this shell" in note for note in untouched.notes)
    assert value(choose(inherited=shell)) == f"{ours}=true --xla_gpu_autotune_level=0"


def test_generations_and_versions_differ():
    assert "command_buffer" not in value(choose())
    assert "FUSION,CUSTOM_CALL" in value(choose(gpu="gb200"))
    assert value(choose(), "CUDA_DEVICE_MAX_CONNECTIONS") == "1"
    assert value(choose(gpu="b200"), "CUDA_DEVICE_MAX_CONNECTIONS") is None
    for version in ("0.9.1", None):
        chosen = choose(jaxlib=version)
        assert value(chosen) is None
        assert any("no XLA flags" in note for note in chosen.notes)
    assert proof.is_deterministic("gpu", value(choose(profile="deterministic")))  # as `mtx` reads it
    late = flags.Flag("xla_late", "", "", first="0.11.2")
    early = flags.Flag("xla_early", "", "", last="0.10.2")
    known = {v: (flags.knows(v, late), flags.knows(v, early)) for v in ("0.10.2", "0.11.0", "0.11.2", "0.13")}
    assert list(known.values()) == [(False, True), (False, False), (True, False), (True, False)]


def test_cpu_devices_get_nothing_but_the_users():
    for more in ({"simulated": True}, {"inherited": {"JAX_PLATFORMS": "cpu"}}):
        chosen = choose("A=1", **more)
        assert chosen.pairs == (("A", "1"),)
        assert "CPU devices: no GPU settings" in chosen.notes
    assert choose("JAX_PLATFORMS=cpu").pairs == (("JAX_PLATFORMS", "cpu"),)
    done = launch("--gpu", "h100", "--dry-run", command=("mtx", "train", "a.gin", "--cpu-devices", "2"))
    assert "NCCL" not in done.stdout
    assert "# CPU devices: no GPU settings" in done.stdout


def test_the_gpu_of_this_machine(tmp_path):
    assert choose(gpu=None, root=tmp_path).pairs == ()
    for number, model in enumerate(["NVIDIA H100 80GB HBM3", "NVIDIA H200"]):
        folder = tmp_path / f"proc/driver/nvidia/gpus/0000:0{number}:00.0"
        folder.mkdir(parents=True)
        (folder / "information").write_text(f"Model: \t\t {model}\nIRQ:   \t\t 5\n")
    assert "GPUs of this machine: NVIDIA H100 80GB HBM3, NVIDIA H200" in choose(gpu=None, root=tmp_path).notes
    (folder / "information").write_text("Model: \t\t Tesla T4\n")
    chosen = choose(gpu=None, root=tmp_path)
    assert chosen.pairs == ()
    assert "Tesla T4" in chosen.notes[0]


@pytest.mark.parametrize(
    "given", ["=1", "1A=2", "A B=1", "A;touch x=1", "-x", "MTX_PROCESS_ID=1", "CUDA_VISIBLE_DEVICES=0", "A=\0", "UNSET"]
)
def test_what_cannot_be_a_variable(given):
    with pytest.raises(LaunchError, match="--env"):
        choose(given)


def test_other_mistakes():
    with pytest.raises(LaunchError, match="h100, h200"):
        choose(gpu="h1000")
    with pytest.raises(LaunchError, match="same"):
        choose("MTX_COMPILATION_CACHE=a", cache="b")
    with pytest.raises(LaunchError, match="--jaxlib new"):
        choose(jaxlib="new")
    assert value(choose(cache="c"), "MTX_COMPILATION_CACHE") == os.path.abspath("c")
    assert value(choose(cache="gs://b/c"), "MTX_COMPILATION_CACHE") == "gs://b/c"


def test_values_reach_the_process_as_they_are_and_stay_out_of_the_notes():
    hostile = "a b\"'$(touch x)`id`\n# c\\"
    program = "import os; print(ascii(os.environ['A']))"
    done = launch("--run-dir", "r", "--env", "A", "--dry-run", command=(sys.executable, "-c", program), A=hostile)
    notes = [line for line in done.stdout.splitlines() if line.startswith("# ") and "yours" in line]
    assert notes == ["# A: yours"]
    ran = subprocess.run(["sh", "-c", done.stdout], capture_output=True, text=True)
    assert ran.stdout == ascii(hostile) + "\n", ran.stderr


def test_the_first_line_of_a_script_stays_the_first():
    chosen = choose(profile="debug")
    assert environment.with_notes(chosen, "#!/bin/sh\necho\n").splitlines()[:2] == ["#!/bin/sh", "# " + chosen.notes[0]]
    assert environment.with_notes(chosen, "echo").splitlines()[-1] == "echo"
    lines = environment.describe(chosen)
    assert all(line.startswith("# ") for line in lines)
    shown = "\n".join(lines)
    assert "NCCL_DEBUG=INFO" in shown
    assert flags.XLA in shown
    assert nccl.NCCL in shown


def test_the_interpreter_of_a_program(tmp_path):
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("mtx", "python"):
        (folder / name).write_text("#!/bin/sh\n")
        (folder / name).chmod(0o755)
    (tmp_path / "link").symlink_to(folder / "mtx")
    for program in ("mtx", "python"):
        assert environment.find_program_python(str(folder / program)) == str(folder / "python")
    assert environment.find_program_python(str(tmp_path / "link")) == str(folder / "python")
    assert environment.find_program_python("no-such-program") is None


def test_processes_meet_in_spite_of_a_proxy(tmp_path):
    program = (
        "import os, jax; e = os.environ; jax.distributed.initialize(e['MTX_COORDINATOR'], int(e['MTX_NUM_PROCESSES']),"
        "int(e['MTX_PROCESS_ID']), initialization_timeout=20, cluster_detection_method='deactivate'); print('met')"
    )
    variables = {"http_proxy": PROXY, "https_proxy": PROXY, "no_proxy": "", "JAX_PLATFORMS": "cpu"}
    began = time.monotonic()
    done = launch("--processes", "2", "--max-restarts", "0", "--run-dir", str(tmp_path),
                  command=(sys.executable, "-c", program), **variables)  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:]
    assert done.stdout.count("met") == 2
    assert time.monotonic() - began < 60  # without the exception it is over after 20 s, and fails


def test_exceptions_from_the_proxy_are_kept():
    assert environment.past_proxy({}, "h:1") == {} == environment.past_proxy({"http_proxy": PROXY}, "")
    assert environment.past_proxy({"http_proxy": PROXY, "no_proxy": "a,b"}, "[fd00::1]:5") == {
        "no_grpc_proxy": "a,b,fd00::1"
    }


def test_the_documentation_has_the_tables():
    done = subprocess.run([sys.executable, "-m", "launch.environment"], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout
    assert done.stdout in (ROOT / "docs/launch/environment.md").read_text()
