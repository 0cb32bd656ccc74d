"""Which layouts a certificate covers, and what the reduced run keeps of the whole one."""

import dataclasses
import itertools
import math

import pytest

from mtx import cli
from mtx.config import reader, schema
from mtx.config.axes import MESH_AXES
from mtx.config.checks import check_run
from mtx.config.layout import check_layout
from mtx.errors import UserError
from mtx.evaluation.certify import plan_certificate
from mtx.evaluation.covering import cover, parse_layout

TRAINING = ("Train.seq_len = 1024", "Train.global_batch_size = 1024", "Train.microbatch_size = 1", "Train.steps = 1")


def load(name, *statements):
    return reader.load(f"configs/models/{name}.gin", [*TRAINING, *statements]).run


def mesh(**counts):
    return [f"Mesh.{axis} = {count}" for axis, count in counts.items()]


def names(layouts):
    return [str(layout) for layout in layouts]


def test_layouts_cover_the_axes_of_the_mesh():
    run = load("gpt3_175b", *mesh(pipe=8, data=4, tensor=8))
    assert names(cover(run, 8)) == [
        "pipe=2", "data=2", "tensor=2", "pipe=3", "pipe=2 data=2", "pipe=2 tensor=2", "data=2 tensor=2",
        "pipe=2 data=2 tensor=2",
    ]  # fmt: skip
    assert names(cover(run, 4))[-1] == "data=2 tensor=2"
    assert max(layout.num_devices for layout in cover(run, 4)) == 4


def test_an_axis_has_a_factor_of_its_own_count():
    run = load("gpt2_medium", *mesh(data=1, tensor=15), "Model.num_heads = 15", "Model.head_dim = 64")
    assert names(cover(run, 8)) == ["tensor=3"]


def test_a_mesh_without_counts_is_tried_on_all_axes_and_pairs():
    layouts = cover(load("mixtral_8x7b"), 8)
    assert len(set(names(layouts))) == len(layouts)
    for pair in itertools.combinations(MESH_AXES, 2):
        assert any(all(layout.counts[axis] > 1 for axis in pair) for layout in layouts)
        assert any(all(x.counts[a] > 1 for a in pair) and x.num_devices == 8 for x in layouts)
    assert "expert=4" in names(layouts)  # a ring that has a direction
    assert all(layout.counts["expert"] == 1 for layout in cover(load("gpt2_medium"), 8))


def test_what_the_rules_refuse_is_left_out_and_named():
    plan = plan_certificate(load("gpt2_medium"), [], 8)
    assert "pipe=2 fsdp=2" in plan.left_out
    assert "gathered again" in plan.left_out["pipe=2 fsdp=2"]
    assert not any(layout.counts["pipe"] > 1 and layout.counts["fsdp"] > 1 for layout in plan.layouts)


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("gpt2_xl", {"pipe": 4, "context": 2}),
        ("llama3_70b", {"pipe": 4, "context": 2, "tensor": 8}),
        ("mt_nlg_530b", {"pipe": 35, "data": 8, "tensor": 8}),
        ("mixtral_8x7b", {"pipe": 4, "expert": 8, "tensor": 2}),
        ("deepseek_moe_16b", {"expert": 16, "context": 4}),
    ],
)
def test_reduced_runs_pass_the_checks_and_keep_the_architecture(name, counts):
    run = load(name, *mesh(**{"data": 1, **counts}), "Pipeline.virtual_stages = 1")
    plan = plan_certificate(run, [], 8)
    whole, small = run.model, plan.reduced.model
    for layout in plan.layouts:
        placed = plan.place(layout)
        assert check_run(placed, {}) == []
        check_layout(placed, placed.mesh)
    for field in (
        "family", "activation", "norm", "position", "tie_embeddings", "use_bias", "expert_every", "router_score",
        "num_shared_experts", "expert_capacity_factor", "load_balance_loss",
    ):  # fmt: skip
        assert getattr(small, field) == getattr(whole, field), field
    assert (small.kv_heads == 1, small.kv_heads == small.num_heads) == (
        whole.kv_heads == 1,
        whole.kv_heads == whole.num_heads,
    )
    assert set(small.layer_stacks) == set(whole.layer_stacks)
    assert bool(small.vocab_size % 2) == bool(whole.vocab_size % 2)
    assert small.d_model <= 128
    assert small.num_layers <= 8
    assert small.num_experts <= 8
    assert plan.reduced.train.seq_len * plan.reduced.train.global_batch_size <= 4096
    assert plan.reduced.precision == schema.Precision()


def test_shared_key_value_heads_stay_shared():
    run = load("llama3_8b", *mesh(data=1, tensor=8), "Model.num_kv_heads = 2", "Model.num_heads = 32")
    plan = plan_certificate(run, [], 8)
    assert names(plan.layouts) == ["tensor=2"]
    assert plan.reduced.model.kv_heads == 1
    # Chosen by hand, a layout stands for itself.
    plan = plan_certificate(run, [parse_layout("tensor=2")], 8)
    assert plan.reduced.model.kv_heads % 2 == 0


def test_settings_that_a_layout_lacks_are_left_out_of_it():
    statements = [*mesh(data=1, pipe=2, context=2), "Pipeline.virtual_stages = 2"]
    run = load("llama3_8b", *statements, "Train.context_exchange = 'all_to_all'")
    plan = plan_certificate(run, [], 8)
    for layout in plan.layouts:
        placed = plan.place(layout)
        assert placed.pipeline.virtual_stages == (2 if layout.counts["pipe"] > 1 else 1)
        assert placed.train.context_exchange == ("all_to_all" if layout.counts["context"] > 1 else "ring")
    assert plan.reference.mesh == schema.Mesh(data=1)
    assert plan.reference.pipeline == schema.Pipeline()


def test_a_growing_batch_stays_one():
    ramp = [
        "Train.batch_ramp = @BatchRamp()",
        "BatchRamp.start = 512",
        "BatchRamp.increment = 512",
        "BatchRamp.tokens = 1",
    ]
    plan = plan_certificate(load("gpt2_medium", *mesh(data=4), *ramp), [], 8)
    train = plan.reduced.train
    assert (train.global_batch_size - train.batch_ramp.start) % train.batch_ramp.increment == 0
    assert check_run(plan.reference, {}) == []


@pytest.mark.parametrize("text", ["", "pipes=2", "pipe", "pipe=0", "pipe=-1", "pipe=2,pipe=2", "pipe=2 tensor=2"])
def test_layouts_that_are_none_are_refused(text):
    with pytest.raises(UserError, match=r"AXIS=COUNT.*pipe=2,tensor=2"):
        parse_layout(text)


def test_layouts_are_read():
    layout = parse_layout("pipe=2, tensor=3")
    assert layout.num_devices == 6
    assert layout.mesh == schema.Mesh(data=1, pipe=2, tensor=3)
    assert dataclasses.asdict(layout.mesh) == dict(layout.counts) == dict(layout.stands_for)
    assert math.prod(parse_layout("data=1").counts.values()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layout", "tensor=3"], "Model.num_heads = 16 does not divide over Mesh.tensor = 3"),
        (["--layout", "tensor=8,data=2", "--cpu-devices", "8"], "needs 16 devices and there are 8"),
        (["--layout", "pipe=2,fsdp=2"], "gathered again"),
        (["--set", "Mesh.tensor = 3"], "Model.num_heads = 16 does not divide over Mesh.tensor = 3"),
    ],
)
def test_mistakes_are_told_in_numbers_of_the_run(arguments, message, capsys, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    sets = [part for statement in TRAINING for part in ("--set", statement)]
    assert cli.main(["certify", "configs/models/gpt2_medium.gin", *sets, *arguments]) == 2
    assert message in capsys.readouterr().err
