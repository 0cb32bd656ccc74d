"""The process that compiles: what becomes of whatever can happen to it; and small steps that it compiles for GPUs."""

import json
import os
import signal
import sys
import textwrap
from importlib import metadata

import pytest
from rehearsals import make_case

from mtx.errors import UserError
from mtx.planning import rehearsal
from mtx.planning.audit import audit
from mtx.planning.dissection import Dissection

try:
    rehearsal.find_compiler()
    MISSING = ""
except UserError as error:
    MISSING = str(error)
needs_compiler = pytest.mark.skipif(bool(MISSING), reason=MISSING.partition("\n")[0])


@pytest.fixture
def child(monkeypatch):
    """Puts another program in the place of the one that compiles; its first argument is the folder."""

    def replace(program):
        monkeypatch.setattr(rehearsal, "COMMAND", (sys.executable, "-c", textwrap.dedent(program)))
        monkeypatch.setattr(rehearsal, "find_compiler", lambda: None)

    return replace


def compile_it(**arguments):
    return rehearsal.compile_apart(make_case(mesh={"data": 4}), gpus_per_host=4, **arguments)


def test_one_that_hangs_is_killed_and_the_time_is_told(child, tmp_path):
    child(f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)")
    seconds = []
    with pytest.raises(UserError, match="did not compile in 2 s: raise --timeout-s"):
        compile_it(timeout_s=2, on_wait=seconds.append)
    assert len(seconds) > 2
    assert seconds == sorted(seconds)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


@pytest.mark.parametrize(
    ("number", "words"), [(signal.SIGKILL, "too little memory"), (signal.SIGABRT, "Check failed: x == y")]
)
def test_one_that_crashes_leaves_its_last_words(child, number, words):
    child(f"import os; print('F hlo.cc] Check failed: x == y', flush=True); os.kill(os.getpid(), {int(number)})")
    with pytest.raises(UserError, match=words):
        compile_it()


def test_what_the_step_refuses_is_the_users_mistake_and_all_else_is_ours(child):
    child("import json, sys; json.dump({'error': 'set Mesh.data'}, open(sys.argv[1] + '/result.json', 'w'))")
    with pytest.raises(UserError, match=r"^set Mesh\.data$"):
        compile_it()
    child("raise ValueError('a bug')")
    with pytest.raises(RuntimeError, match="a bug"):
        compile_it()


def test_it_sees_no_accelerator_and_no_flags(child, monkeypatch, tmp_path):
    monkeypatch.setenv("XLA_FLAGS", "--xla_no_such_flag")
    monkeypatch.setenv("JAX_PLATFORMS", "cuda,cpu")
    child("import json, os, sys; print(json.dumps(dict(os.environ))); sys.exit(1)")
    with pytest.raises(RuntimeError):
        compile_it(keep=tmp_path / "kept")
    environment = json.loads((tmp_path / "kept" / "output.txt").read_text())
    assert environment["JAX_PLATFORMS"] == "cpu"
    assert "XLA_FLAGS" not in environment
    with pytest.raises(UserError, match="not empty"):
        compile_it(keep=tmp_path / "kept")


def test_a_missing_compiler_is_installed_with_one_command(monkeypatch, tmp_path):
    monkeypatch.setattr(rehearsal, "FOLDER", tmp_path / "here")
    monkeypatch.setattr(rehearsal, "PLUGIN", "jax_plugins.nowhere")
    with pytest.raises(UserError) as caught:
        rehearsal.find_compiler()
    command = str(caught.value).splitlines()[1]
    assert f"pip install --no-deps --upgrade --target {tmp_path / 'here'} jax-cuda13-pjrt==" in command
    assert command.endswith(metadata.version("jaxlib"))


def test_a_compiler_of_another_version_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(rehearsal, "FOLDER", tmp_path)
    (tmp_path / "jax_plugins" / "xla_cuda13").mkdir(parents=True)
    info = tmp_path / "jax_cuda13_pjrt-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: jax-cuda13-pjrt\nVersion: 0.1.0\n")
    with pytest.raises(UserError, match=r"is of version 0\.1\.0 and jaxlib of"):
        rehearsal.find_compiler()


def test_offloaded_moments_cannot_be_rehearsed(child):
    child("")
    case = make_case(mesh={"data": 4}, train={"offload_optimizer": True})
    with pytest.raises(UserError, match="cannot be rehearsed"):
        rehearsal.compile_apart(case, gpus_per_host=4)


# Heads of 64 and of 160 numbers, in bfloat16.
SMALL = {"vocab_size": 1024, "d_model": 256, "num_layers": 4, "num_heads": 4, "max_seq_len": 256}
WIDE = {**SMALL, "d_model": 640}
BFLOAT16 = {"precision": {"compute": "bfloat16"}}
LONG = {"seq_len": 256}


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    ("gpu", "model", "mesh", "sections"),
    [
        ("A100-80", WIDE, {"data": 2, "tensor": 2}, {"train": LONG}),
        ("H100", WIDE, {"pipe": 2, "data": 2}, {"train": {**LONG, "recompute": "selective"}}),
        ("B200", SMALL, {"fsdp": 2, "context": 2}, {"train": {**LONG, "dropout": 0.1, "global_batch_size": 16}}),
    ],
    ids=["A100", "H100", "B200"],
)
def test_small_steps(gpu, model, mesh, sections):
    step = Dissection(*_rehearse(make_case(model, gpu, mesh=mesh, **BFLOAT16, **sections)))
    assert step.compiled.argument_bytes == step.memory.state + step.batch_bytes
    assert step.compiled.alias_bytes == step.memory.state
    # cuDNN takes heads of 160 from Hopper on; keys that go round a ring it never takes.
    assert bool(step.attention) == (gpu == "H100")
    assert step.forward_equivalents == pytest.approx(step.expected_forward_equivalents, rel=0.05)
    assert [finding for finding in audit(step) if finding.severity != "note"] == []
    assert step.buffers[0].size_bytes >= step.buffers[-1].size_bytes > 0
    assert any(buffer.source.startswith("mtx/") for buffer in step.buffers)
    assert json.dumps(step.as_json(), allow_nan=False)


def _rehearse(case):
    return case, rehearsal.compile_apart(case, gpus_per_host=4)
