"""Which changes of a config a resume takes, which it asks about and which it refuses."""

import os
from pathlib import Path

import pytest

from mtx.checkpoints.drift import LENGTH, Drift, check_keys, compare_for_resume
from mtx.config import schema
from mtx.config.components import classes, settings
from mtx.config.reader import load_text
from mtx.errors import UserError

GOLDEN = Path(__file__).parents[1] / "golden/drift.txt"

BASE = """\
Model.vocab_size = 96
Model.d_model = 32
Model.num_layers = 2
Model.num_heads = 4
Model.max_seq_len = 16
Train.seq_len = 16
Train.global_batch_size = 8
Data.train = {'a': 0.5, 'b': 0.5}
"""
STEPS = "Train.steps = 100"
COSINE = "AdamW.learning_rate = @WarmupCosine()\nWarmupCosine.peak = 1e-2\nWarmupCosine.warmup_steps = 4"


def load(*statements):
    return load_text("\n".join([BASE, *statements]), "run.gin")


def drift(old, new, accepted=(), *, step=50, recorded=None) -> Drift:
    """Each run as its statements, a string or a tuple of them."""
    saved, config = (load(*((x,) if isinstance(x, str) else x)) for x in (old, new))
    known = saved if recorded is None else load(*recorded)
    return compare_for_resume(saved.run, known.run, config.run, frozenset(accepted), step, provenance=config.provenance)


def test_every_field_has_its_class():
    """A new field is a decision: FREE only where it cannot change a number beyond rounding, or what is trained on."""
    table = {s.key: s.drift for cls in classes().values() for s in settings(cls).values()}
    text = "".join(f"{key:<36} {kind}\n" for key, kind in sorted(table.items()))
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()


def test_a_run_that_did_not_change():
    assert drift((STEPS, COSINE), (STEPS, COSINE)) == Drift()
    # What no longer changes may still be accepted: a restart loop repeats its command line.
    assert drift(STEPS, STEPS, ["Train.seed"]) == Drift()


def test_layout_is_free():
    found = drift(STEPS, (STEPS, "Mesh.tensor = 2", "Train.recompute = 'full'", "Checkpoint.keep_last = 5"))
    assert found.free == (
        "Mesh.tensor: 1 -> 2", "Train.recompute: 'none' -> 'full'", "Checkpoint.keep_last: 3 -> 5"
    )  # fmt: skip
    assert found == Drift(free=found.free)


def test_math_and_data_need_to_be_accepted():
    changed = (STEPS, "Train.seed = 5", "AdamW.weight_decay = 0.2", "Mesh.tensor = 2")
    found = drift(STEPS, changed)
    assert found.needed == (
        "Train.seed: 0 -> 5 (changes the data, set at run.gin:11)",
        "AdamW.weight_decay: 0.1 -> 0.2 (changes the math, set at run.gin:12)",
    )
    assert found.keys == ("Train.seed", "AdamW.weight_decay")
    assert (found.accepted, found.impossible, len(found.free)) == ((), (), 1)
    some = drift(STEPS, changed, ["Train.seed"])
    assert (some.accepted, some.needed, some.keys) == (found.needed[:1], found.needed[1:], ("AdamW.weight_decay",))
    assert drift(STEPS, changed, found.keys).accepted == found.needed


def test_impossible_is_never_accepted():
    keys = ["Model.d_model", "Precision.params", "Adafactor.min_dim_to_factor"]
    change = ("Model.d_model = 64", "Precision.params = 'bfloat16'")
    old, new = (STEPS, "Train.optimizer = @Adafactor()"), (STEPS, "Train.optimizer = @Adafactor()")
    base = BASE.replace("Model.d_model = 32\n", "")
    saved, config = (
        load_text("\n".join([BASE, *old]), "old").run,
        load_text("\n".join([base, *new, *change, "Adafactor.min_dim_to_factor = 8"]), "new"),
    )
    found = compare_for_resume(saved, config.run, config.run, frozenset(keys), 50)
    assert [line.split(":")[0] for line in found.impossible] == keys
    assert found == Drift(impossible=found.impossible)


def test_another_optimizer_is_another_state():
    found = drift((STEPS, COSINE), (STEPS, "Train.optimizer = @Lion()"), ["Train.optimizer", "Lion.beta1"])
    assert "Train.optimizer: @AdamW() -> @Lion() (impossible, set at run.gin:11)" in found.impossible
    assert found == Drift(impossible=found.impossible)  # the fields of both, and of the schedule, included


def test_biases_that_come_or_go_are_impossible():
    experts = (STEPS, "Model.num_experts = 4", "Model.experts_per_token = 2")
    biased = (*experts, "Model.expert_bias_rate = 1e-3")
    lower = (*experts, "Model.expert_bias_rate = 1e-4")
    assert len(drift(biased, experts, ["Model.expert_bias_rate"]).impossible) == 1
    assert len(drift(experts, biased, ["Model.expert_bias_rate"]).impossible) == 1
    assert len(drift(biased, lower, ["Model.expert_bias_rate"]).accepted) == 1


def test_the_context_of_a_model_without_learned_positions_is_free():
    base = BASE.replace("Model.max_seq_len = 16", "Model.max_seq_len = 32")
    for position, kind in (("learned", "impossible"), ("rotary", "free")):
        lines = f"{STEPS}\nModel.position = '{position}'"
        old, new = (load_text(f"{text}\n{lines}", "run.gin").run for text in (BASE, base))
        (line,) = getattr(compare_for_resume(old, old, new), kind)
        assert line.startswith("Model.max_seq_len: 16 -> 32")


def test_a_field_covers_the_components_that_come_with_it():
    new = (STEPS, COSINE)
    found = drift(STEPS, new)
    assert found.keys == ("AdamW.learning_rate",)
    assert {line.split(":")[0] for line in found.needed} > {"AdamW.learning_rate", "WarmupCosine.peak"}
    taken = drift(STEPS, new, ["AdamW.learning_rate"])
    assert taken == Drift(accepted=found.needed)
    assert drift(new, STEPS, ["AdamW.learning_rate"]).needed == ()
    ramp = ("BatchRamp.start = 2", "BatchRamp.increment = 2", "BatchRamp.tokens = 1000", "Train.microbatch_size = 1")
    found = drift(STEPS, (STEPS, "Train.batch_ramp = @BatchRamp()", *ramp))
    assert found.keys == ("Train.batch_ramp",)
    assert all("changes the data" in line for line in found.needed)


def test_a_component_that_stays_is_not_covered():
    ramped = (
        STEPS, "Train.batch_ramp = @BatchRamp()", "BatchRamp.start = 2", "BatchRamp.increment = 2",
        "Train.microbatch_size = 1",
    )  # fmt: skip
    old, new = (*ramped, "BatchRamp.tokens = 1000"), (*ramped, "BatchRamp.tokens = 2000")
    assert drift(old, new, ["Train.batch_ramp"]).keys == ("BatchRamp.tokens",)


def test_what_an_earlier_attempt_accepted_is_accepted():
    new = (STEPS, "Train.seed = 5", "AdamW.weight_decay = 0.2")
    found = drift(STEPS, new, recorded=(STEPS, "Train.seed = 5"))
    assert [line.split(":")[0] for line in found.accepted] == ["Train.seed"]
    assert found.keys == ("AdamW.weight_decay",)
    # But not a third value, also of a field of a component that was accepted.
    assert drift(STEPS, new, recorded=(STEPS, "Train.seed = 6")).keys == ("Train.seed", "AdamW.weight_decay")
    higher = COSINE.replace("1e-2", "2e-2")
    assert drift(STEPS, (STEPS, higher), recorded=(STEPS, COSINE)).keys == ("WarmupCosine.peak",)
    assert drift(STEPS, (STEPS, COSINE), recorded=(STEPS, COSINE)).needed == ()


def test_the_order_of_sources_is_data():
    base = BASE.replace("{'a': 0.5, 'b': 0.5}", "{'b': 0.5, 'a': 0.5}")
    new = load_text(f"{base}\n{STEPS}", "new").run
    assert compare_for_resume(load(STEPS).run, load(STEPS).run, new, step=1).keys == ("Data.train",)


@pytest.mark.parametrize(("longer", "step"), [(120, 50), (120, 100), (80, 50), (100_000, 99)])
def test_a_length_that_bends_the_schedule_is_math(longer, step):
    found = drift((STEPS, COSINE), (f"Train.steps = {longer}", COSINE), step=step)
    assert found.needed == (
        f"Train.steps: 100 -> {longer} (changes the math, set at run.gin:10); the schedule ends with the run: set "
        "WarmupCosine.decay_steps = 100 to keep it",
    )
    assert found.keys == ("Train.steps",)
    assert drift((STEPS, COSINE), (f"Train.steps = {longer}", COSINE), ["Train.steps"], step=step).needed == ()


@pytest.mark.parametrize(
    "schedule",
    [
        (),
        ("AdamW.learning_rate = @Constant()", "Constant.peak = 1e-3", "Constant.warmup_steps = 10"),
        (COSINE, "WarmupCosine.decay_steps = 100"),
        (COSINE, "WarmupCosine.decay_steps = 1000"),
    ],
)
def test_a_length_that_bends_nothing_is_free(schedule):
    found = drift((STEPS, *schedule), ("Train.steps = 200", *schedule))
    assert found == Drift(free=("Train.steps: 100 -> 200",))


def test_the_advice_keeps_the_schedule():
    """What the message says to set is taken without a question, and it is no change of the math."""
    found = drift((STEPS, COSINE), ("Train.steps = 120", COSINE, "WarmupCosine.decay_steps = 100"))
    assert found == Drift(free=("Train.steps: 100 -> 120", "WarmupCosine.decay_steps: None -> 100"))
    # Another end is the schedule's matter, not the length's.
    found = drift((STEPS, COSINE), ("Train.steps = 120", COSINE, "WarmupCosine.decay_steps = 110"))
    assert (found.free, found.keys) == (("Train.steps: 100 -> 120",), ("WarmupCosine.decay_steps",))
    # Both.
    found = drift((STEPS, COSINE), ("Train.steps = 120", COSINE.replace("1e-2", "2e-2")))
    assert found.keys == ("Train.steps", "WarmupCosine.peak")


def test_a_schedule_counts_by_the_steps_to_come():
    longer = COSINE.replace("warmup_steps = 4", "warmup_steps = 8")
    flat = ("AdamW.learning_rate = @Constant()", "Constant.peak = 1e-2")
    assert drift((STEPS, COSINE), (STEPS, longer)).keys == ("WarmupCosine.warmup_steps",)
    assert drift((STEPS, *flat), (STEPS, *flat, "Constant.warmup_steps = 8"), step=5).needed != ()
    assert drift((STEPS, *flat), (STEPS, *flat, "Constant.warmup_steps = 8"), step=8).needed == ()
    assert drift(STEPS, (STEPS, "AdamW.learning_rate = 3e-3")).keys == ("AdamW.learning_rate",)


def test_a_late_decay_is_seen():
    stable = "AdamW.learning_rate = @WarmupStableDecay()\nWarmupStableDecay.peak = 1e-2"
    old, new = ("Train.steps = 1_000_000", stable), ("Train.steps = 1_000_100", stable)
    assert drift(old, new, step=10).keys == ("Train.steps",)


def test_a_length_in_tokens():
    """100 steps are 12,800 tokens."""
    linear = "AdamW.learning_rate = @WarmupLinear()\nWarmupLinear.peak = 1e-2"
    tokens = "Train.tokens = 12_800"
    assert drift((tokens, linear), ("Train.tokens = 12_800", linear)) == Drift()
    found = drift((tokens, linear), ("Train.tokens = 20_000", linear))
    assert found.keys == ("Train.tokens",)
    assert found.needed[0].endswith("set WarmupLinear.decay_tokens = 12800 to keep it")
    # Said in tokens, a constant rate is the same.
    assert drift(STEPS, tokens) == Drift(free=("Train.steps: 100 -> None", "Train.tokens: None -> 12800"))
    # A schedule in steps that took its end from the length has none any more.
    ended = (linear, "WarmupLinear.warmup_steps = 4", "WarmupLinear.decay_steps = 100")
    found = drift((STEPS, linear, "WarmupLinear.warmup_steps = 4"), (tokens, *ended))
    assert found.needed == ()
    in_tokens = (linear, "WarmupLinear.warmup_tokens = 512")
    found = drift((STEPS, linear, "WarmupLinear.warmup_steps = 8"), (tokens, *in_tokens), step=1)
    assert set(found.keys) == {*LENGTH, "WarmupLinear.warmup_steps", "WarmupLinear.warmup_tokens"}


def test_keys_that_do_not_exist():
    check_keys(["Train.seed", "AdamW.weight_decay", "Lion.beta1"])
    with pytest.raises(UserError, match=r"--accept Train\.sed: no such field; did you mean Train\.seed"):
        check_keys(["Train.seed", "Train.sed"])
    with pytest.raises(UserError, match="--accept Train: no such field"):
        check_keys(["Train"])


def test_every_class_is_in_use():
    kinds = {s.drift for cls in classes().values() for s in settings(cls).values()}
    assert kinds == {schema.FREE, schema.MATH, schema.DATA, schema.IMPOSSIBLE}
