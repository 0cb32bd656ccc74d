"""The fire drill: that it passes, and that it would notice."""

import json
import os
import random
import subprocess

import pytest
from programs import ROOT, run
from tiny import GPT, make_run

from mtx.config import reader, schema
from mtx.data.training import open_training_data
from mtx.evaluation import drill_faults
from mtx.evaluation.drill import Result, as_json, list_scenarios
from mtx.evaluation.drill_copy import make_copy
from mtx.evaluation.drill_kills import count_steps
from mtx.evaluation.drill_play import Stage
from mtx.evaluation.drill_run import (
    BIT_EQUAL,
    Place,
    compare,
    count_undone,
    is_within_tolerance,
    last_step,
    seconds_to_recover,
)
from mtx.health.faults import parse_faults
from mtx.optim.adamw import AdamW
from mtx.optim.warmup_cosine import WarmupCosine

CONFIG = """
Model.vocab_size = 500
Model.d_model = 64
Model.num_layers = 4
Model.num_heads = 4
Model.max_seq_len = 64
Train.seq_len = 64
Train.global_batch_size = 32
Train.steps = 100000
Train.dropout = 0.1
Data.train = {'no/such/store': 1.0}
Data.validation = {'held out': 'no/such/validation'}
AdamW.learning_rate = @WarmupCosine()
WarmupCosine.peak = 1e-2
WarmupCosine.warmup_steps = 2000
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("drill") / "run.gin"
    path.write_text(CONFIG)
    return path


def drill(config, *arguments, timeout_s=500):
    done = run(["-m", "mtx", "drill", str(config), "--json", *arguments], timeout_s=timeout_s, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return done


@pytest.mark.slow
def test_quick_scenarios_pass_and_leave_nothing(config, tmp_path):
    (tmp_path / "tmp").mkdir()
    os.environ["TMPDIR"] = str(tmp_path / "tmp")
    try:
        done = drill(config, "--only", "kill-step", "--only", "clock-jump")
    finally:
        del os.environ["TMPDIR"]
    document = json.loads(done.stdout)
    assert done.returncode == 0, done.stderr
    killed, jumped = document["scenarios"]
    assert (killed["name"], killed["outcome"], killed["losses"]) == ("kill-step", "passed", BIT_EQUAL)
    assert killed["exit_codes"] == [[-9], [0]]
    assert 0 < killed["steps_lost"] <= 8
    assert 0 < killed["seconds_to_recover"] < killed["seconds"]
    assert (jumped["exit_codes"], jumped["steps_lost"], jumped["losses"]) == ([[0]], 0, BIT_EQUAL)
    assert "scenario 1 of 2: kill-step" in done.stderr
    assert os.listdir(tmp_path / "tmp") == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_whole_drill_passes(config):
    done = drill(config, timeout_s=1700)
    document = json.loads(done.stdout)
    assert [(s["name"], s["detail"]) for s in document["scenarios"] if s["outcome"] == "failed"] == []
    assert done.returncode == 0
    assert len(document["scenarios"]) == len(list_scenarios(2))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_random_kills_lose_nothing(config):
    done = drill(config, "--kills", "8", "--seed", "3", timeout_s=800)
    document = json.loads(done.stdout)
    assert (document["ok"], document["kills"], document["losses"]) == (True, 8, BIT_EQUAL), document["detail"]


def test_mistakes(config, tmp_path):
    done = drill(config, "--only", "kill-stp")
    assert (done.returncode, "kill-step" in done.stderr) == (2, True)
    done = drill(config, "--out", str(tmp_path))
    assert (done.returncode, "exists already" in done.stderr) == (2, True)


def test_scenarios_are_well_formed():
    scenarios = list_scenarios(3)
    assert len({scenario.name for scenario in scenarios}) == len(scenarios) == 18
    for scenario in scenarios:
        assert parse_faults(scenario.fault)
        assert scenario.fault.count(":2") <= 1 or scenario.processes == 3
    listed = run(["-m", "mtx", "drill", "--list"]).stdout.splitlines()
    assert [line.split()[0] for line in listed] == [scenario.name for scenario in list_scenarios(2)]


def test_scenarios_that_are_not_possible_are_told(tmp_path):
    stage = Stage(Place(tmp_path, None, None, 1.0), no_mounts="nobody may mount")
    results = [stage.play(s) for s in list_scenarios(2) if s.on_private_disk]
    assert [(r.outcome, r.detail) for r in results] == [("not possible here", "nobody may mount")] * 3
    assert as_json(results)["ok"]
    assert not as_json([*results, Result(name="x", what="y", outcome="failed")])["ok"]


def test_copy_of_a_run(tmp_path):
    base = make_run(
        GPT, train={"steps": 10**6, "optimizer": AdamW(learning_rate=WarmupCosine(peak=1e-3, warmup_tokens=10**9))}
    )
    data = schema.Data(
        train={"a": 1.0, "b": 3.0}, stages={"500 steps": {"c": 1.0}}, validation={"v": "a"}, packing="documents"
    )
    run_of_user = schema.Run(**{**vars(base), "data": data})
    copy = make_copy(run_of_user, tmp_path / "copy", processes=2, steps=16)
    small = reader.load(copy.config).run
    assert [path.name for path in copy.stores] == ["store-0", "store-1", "store-2"]
    assert list(small.data.train.values()) == [1.0, 3.0]
    assert small.data.train.keys() == {str(path) for path in copy.stores[:2]}
    assert small.data.stages == {"8 steps": {str(copy.stores[2]): 1.0}}
    assert small.data.packing == "documents"
    assert (small.train.steps, small.checkpoint.every_steps) == (16, 4)
    schedule = small.train.optimizer.learning_rate
    assert (schedule.warmup_steps, schedule.warmup_tokens, schedule.peak) == (4, None, 1e-3)
    assert open_training_data(small).train.read(0)["tokens"].max() < small.model.vocab_size


def test_copy_reads_the_text_of_the_run(tmp_path):
    folder = tmp_path / "own"
    first = make_copy(make_data_run("invented"), folder, processes=2, steps=4)
    second = make_copy(make_data_run(str(first.stores[0])), tmp_path / "again", processes=2, steps=4)
    third = make_copy(make_data_run("other"), tmp_path / "third", processes=2, steps=4)
    texts = [copy.stores[0].with_suffix(".jsonl").read_text() for copy in (first, second, third)]
    joined = ["".join(json.loads(line)["text"] for line in text.splitlines()) for text in texts]
    assert joined[0].startswith(joined[1][:100])
    assert joined[0][:100] != joined[2][:100]


def make_data_run(store):
    base = make_run(GPT)
    return schema.Run(**{**vars(base), "data": schema.Data(train={store: 1.0})})


def make_run_dir(path, losses, *, validation=2.5, digests=None):
    (path / "checkpoints/4").mkdir(parents=True)
    (path / "checkpoints/4/manifest.json").write_text(json.dumps({"meta": {"digests": digests or {}}}))
    lines = [{"step": step, "loss": loss, "grad_norm": 1.0} for step, loss in enumerate(losses, 1)]
    lines.append({"step": len(losses), "eval": "held out", "loss": validation})
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize(("other", "said", "is_close"), [
    ({}, BIT_EQUAL, True),
    ({"losses": [3.0, 2.0 + 1e-12]}, "5.0e-13, first at step 2", True),
    ({"losses": [3.0, 2.001]}, "5.0e-04, first at step 2", False),
    ({"validation": 2.6}, "4.0e-02, first at step 2", False),
    ({"losses": [3.0]}, "lines of metrics are missing or too many", False),
    ({"digests": {"params/w": "bb"}}, "arrays differ in the end, first params/w", True),
])  # fmt: skip
def test_comparison(tmp_path, other, said, is_close):
    values = {"losses": [3.0, 2.0], "digests": {"params/w": "aa"}}
    reference = make_run_dir(tmp_path / "reference", **values)
    comparison = compare(make_run_dir(tmp_path / "run", **{**values, **other}), reference)
    assert comparison.startswith(said)
    assert is_within_tolerance(comparison) is is_close


def test_steps_of_a_run(tmp_path):
    assert last_step(tmp_path) == 0
    path = make_run_dir(tmp_path / "run", [1.0] * 300) / "metrics.jsonl"
    assert last_step(path.parent) == 300
    with path.open("a") as file:
        file.write('{"step": 301, "lo')
    assert last_step(path.parent) == 300
    for number, steps in ((1, 3), (2, 5)):
        undone = [{"step": step, "loss": 1.0} for step in range(steps)] + [{"step": 9, "eval": "x", "loss": 1.0}]
        text = "".join(json.dumps(line) + "\n" for line in undone)
        (path.parent / f"metrics.before-resume-{number}.jsonl").write_text(text)
    assert count_undone(path.parent) == [3, 5]


def test_seconds_to_recover():
    seen = [(1.0, 4), (2.0, 9), (5.0, 4), (6.0, 8), (7.5, 10)]
    assert seconds_to_recover(seen, fault=2.0, ended=2.5, step=10) == 5.5
    assert seconds_to_recover(seen, fault=2.0, ended=2.5, step=11) is None


def test_damage_to_files(tmp_path):
    small, large = tmp_path / "a", tmp_path / "below/b"
    large.parent.mkdir()
    small.write_bytes(b"123")
    content = random.Random(1).randbytes(1001)
    large.write_bytes(content)
    assert drill_faults.largest_file(tmp_path) == large
    drill_faults.flip_byte(large)
    assert sum(a != b for a, b in zip(large.read_bytes(), content)) == 1
    drill_faults.flip_byte(large)
    assert large.read_bytes() == content
    drill_faults.truncate(large)
    assert large.read_bytes() == content[:500]


MOUNTS = """
import errno, pathlib, sys
from mtx.evaluation import drill_faults as faults
reason = faults.make_room_for_mounts()
if reason is not None:
    sys.exit(reason)
folder = pathlib.Path(sys.argv[1])
with faults.small_disk(folder / "disk", 1 << 20) as disk:
    ballast = faults.fill(disk, free_bytes=100_000)
    try:
        (disk / "large").write_bytes(bytes(200_000))
    except OSError as error:
        assert error.errno == errno.ENOSPC
        (disk / "large").unlink()
    else:
        sys.exit("not full")
    ballast.unlink()
    (disk / "large").write_bytes(bytes(200_000))
    with faults.read_only(disk):
        try:
            (disk / "more").touch()
        except OSError as error:
            assert error.errno == errno.EROFS
        else:
            sys.exit("not read-only")
    (disk / "more").touch()
print("done")
"""


def test_disks(tmp_path):
    done = run(["-c", MOUNTS, str(tmp_path)], check=False)
    if "no mount" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.stdout == "done\n", done.stderr
    assert str(tmp_path) not in subprocess.run(["mount"], capture_output=True, text=True, cwd=ROOT).stdout


def test_kills_leave_the_run_unfinished():
    assert [count_steps(kills) for kills in (1, 15, 200)] == [32, 36, 480]
