"""Rules between fields: what a run may not combine, whatever the devices.

Decides nothing about single values (the schema does), about files or about layouts (`mtx.config.layout`). A component
adds its own rules with a method `check(run) -> Iterable[str]`.

Invariant: each message names the fields with their values and says what to set.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

from mtx.config import render, schema
from mtx.config.axes import LOGICAL_AXES, MESH_AXES
from mtx.config.components import families, settings
from mtx.config.deadline import check_stop_before
from mtx.config.render import Origin
from mtx.config.stages import check_blends
from mtx.config.statements import nearest
from mtx.config.values import format_value
from mtx.config.wording import Show, divisors, multiples, show_setting, useless
from mtx.errors import UserError


def check_run(run: schema.Run, provenance: Mapping[str, Origin]) -> list[str]:
    """What is wrong with a run whatever the devices; empty if nothing is."""

    show = partial(show_setting, run, provenance)
    rules = (
        _check_model,
        _check_experts,
        _check_position,
        _check_precision,
        _check_train,
        check_stop_before,
        _check_ramp,
        _check_mesh,
        _check_data,
        _check_checkpoint,
        _check_health,
    )
    messages = [message for rule in rules for message in rule(run, show)]
    for part in render.parts(run).values():
        if hasattr(part, "check"):
            messages += part.check(run)
    return messages


def require_training_data(run: schema.Run) -> None:
    """Raises UserError where a run has nothing to train on."""
    if not run.data.train:
        raise UserError(
            "Data.train is empty, so there is nothing to train on: set Data.train = {'STORE': 1.0}, where STORE is a "
            "folder made by `mtx data build`"
        )


def _check_model(run: schema.Run, show: Show) -> Iterator[str]:
    model = run.model
    if model.family not in families():
        yield f"{show('Model.family')} is no file of mtx/models; {nearest(model.family, families())}"
    if model.head_dim is None and model.d_model % model.num_heads:
        yield (
            f"{show('Model.d_model')} does not divide by {show('Model.num_heads')}: set Model.d_model to "
            f"{multiples(model.d_model, model.num_heads)}, or set Model.head_dim"
        )
    if model.num_heads % model.kv_heads:
        yield (
            f"{show('Model.num_heads')} does not divide by {show('Model.num_kv_heads')}: set Model.num_kv_heads to one "
            f"of {divisors(model.num_heads)}"
        )
    for name, axes in run.rules.overrides.items():
        chosen = (axes,) if isinstance(axes, str) else axes or ()
        if name not in LOGICAL_AXES:
            yield f"Rules.overrides: {name!r} is no logical axis; {nearest(name, LOGICAL_AXES)}"
        for axis in chosen:
            if axis not in MESH_AXES:
                yield f"Rules.overrides: {name!r}: {axis!r} is no mesh axis; {nearest(axis, MESH_AXES)}"
        if len(set(chosen)) < len(chosen):
            yield f"Rules.overrides: {name!r}: {format_value(chosen)} names a mesh axis twice: keep one"


EXPERT_FIELDS = (
    "experts_per_token", "expert_d_ff", "expert_every", "first_dense_layers", "num_shared_experts",
    "expert_capacity_factor", "router_score", "normalize_expert_weights", "load_balance_loss", "router_z_loss",
    "expert_bias_rate",
)  # fmt: skip


def _check_experts(run: schema.Run, show: Show) -> Iterator[str]:
    model = run.model
    if not model.num_experts:
        for name in EXPERT_FIELDS:
            if getattr(model, name) != settings(schema.Model)[name].default:
                yield useless(show, f"Model.{name}", "in a dense model", "set Model.num_experts")
        return
    experts, chosen = show("Model.num_experts"), show("Model.experts_per_token")
    if not 1 <= model.experts_per_token <= model.num_experts:
        yield f"{chosen} with {experts}: set Model.experts_per_token to a count from 1 to {model.num_experts}"
    if "expert_layers" not in model.layer_stacks:
        most = model.num_layers - model.first_dense_layers
        cure = (
            f"Model.expert_every to at most {most}"
            if most > 0
            else f"Model.first_dense_layers below {model.num_layers}"
        )
        yield (
            f"no layer has the experts of {experts}: with {show('Model.first_dense_layers')} and "
            f"{show('Model.expert_every')} the first would come after {show('Model.num_layers')}: set {cure}"
        )
    elif "layers" not in model.layer_stacks and None not in (model.d_ff, model.expert_d_ff):
        cure = "set Model.expert_every or Model.first_dense_layers to have layers without experts"
        yield useless(show, "Model.d_ff", f"where all layers have experts with {show('Model.expert_d_ff')}", cure)
    if model.expert_capacity_factor == 0:
        yield (
            f"{show('Model.expert_capacity_factor')} would drop all tokens: set it to a number above 0, such as 1.25, "
            "or to None to drop none"
        )
    if model.experts_per_token == model.num_experts:
        for name in ("load_balance_loss", "expert_bias_rate"):
            if getattr(model, name) > 0:
                cure = f"raise Model.num_experts above {model.num_experts}"
                yield useless(show, f"Model.{name}", f"where each token goes to all experts, with {chosen}", cure)
    if model.experts_per_token == 1 and model.normalize_expert_weights:
        yield (
            f"{show('Model.normalize_expert_weights')} with {chosen} makes all weights 1, and the loss would teach the "
            "router nothing: leave Model.normalize_expert_weights at None"
        )


def _check_position(run: schema.Run, show: Show) -> Iterator[str]:
    model = run.model
    if model.position == "rotary":
        if model.head_width % 2:
            yield (
                f"rotary positions turn pairs of numbers and the width of a head is {model.head_width}, which is odd: "
                "set Model.head_dim to an even number"
            )
    else:
        for name in ("rope_theta", "rope_scaling"):
            if getattr(model, name) != settings(schema.Model)[name].default:
                yield useless(show, f"Model.{name}", f"with {show('Model.position')}", "set Model.position = 'rotary'")
    scaling = model.rope_scaling
    if scaling and scaling.high_frequency_factor <= scaling.low_frequency_factor:
        yield (
            f"RopeScaling.high_frequency_factor = {scaling.high_frequency_factor} must be above "
            f"RopeScaling.low_frequency_factor = {scaling.low_frequency_factor}"
        )


def _check_precision(run: schema.Run, show: Show) -> Iterator[str]:
    precision, model = run.precision, run.model
    if precision.compute != "float8":
        if precision.float8_products != "all":
            circumstance = f"with {show('Precision.compute')}"
            yield useless(show, "Precision.float8_products", circumstance, "set Precision.compute = 'float8'")
    elif precision.float8_products == "mlp" and "layers" not in model.layer_stacks and not model.num_shared_experts:
        yield (
            f"{show('Precision.float8_products')} leaves no product in 8 bits: all layers have experts, whose products "
            "are in bfloat16; set Precision.float8_products to 'all' or 'attention', or Precision.compute = 'bfloat16'"
        )


def _check_train(run: schema.Run, show: Show) -> Iterator[str]:
    train = run.train
    if train.steps is None and train.tokens is None:
        yield "neither Train.steps nor Train.tokens is set: set one of them, to say how long the run is"
    if train.steps is not None and train.tokens is not None:
        yield f"{show('Train.steps')} and {show('Train.tokens')} both say how long the run is: keep one"
    if train.scan_layers and len(set(run.model.layer_stacks)) > 1:
        yield (
            f"{show('Train.scan_layers')} needs layers of one kind, and here some have experts and some an MLP "
            f"({show('Model.expert_every')}, {show('Model.first_dense_layers')}): leave Train.scan_layers at None"
        )
    if train.seq_len > run.model.max_seq_len:
        yield (
            f"{show('Train.seq_len')} is longer than {show('Model.max_seq_len')}: lower the one to "
            f"{run.model.max_seq_len}, or raise the other to {train.seq_len}"
        )


def _check_ramp(run: schema.Run, show: Show) -> Iterator[str]:
    ramp, batch = run.train.batch_ramp, show("Train.global_batch_size")
    if ramp is None:
        return
    if run.train.microbatch_size is None:
        yield (
            "Train.batch_ramp needs Train.microbatch_size: the batch grows by more microbatches of one size; set it to "
            "what each data shard computes at a time, such as 1"
        )
    distance = run.train.global_batch_size - ramp.start
    if distance <= 0:
        yield f"BatchRamp.start = {ramp.start} must be below {batch}, where the ramp ends"
    elif distance % ramp.increment:
        yield (
            f"BatchRamp.start = {ramp.start} and steps of BatchRamp.increment = {ramp.increment} do not reach {batch}: "
            f"set BatchRamp.increment to one of {divisors(distance)}"
        )


def _check_mesh(run: schema.Run, show: Show) -> Iterator[str]:
    rest = [axis for axis in MESH_AXES if getattr(run.mesh, axis) == -1]
    if len(rest) > 1:
        yield f"{' and '.join(show(f'Mesh.{axis}') for axis in rest)}: one axis at most can take what is left"
    for axis in MESH_AXES:
        if getattr(run.mesh, axis) == 0:
            yield f"{show(f'Mesh.{axis}')} must be a positive count, or -1 for what the other axes leave"


def _check_data(run: schema.Run, show: Show) -> Iterator[str]:
    yield from check_blends(run, show)
    if not run.data.validation:
        for name in ("eval_every", "eval_batches"):
            if getattr(run.train, name) != settings(schema.Train)[name].default:
                cure = "set Data.validation = {'NAME': 'STORE'}"
                yield useless(show, f"Train.{name}", "without Data.validation", cure)


def _check_checkpoint(run: schema.Run, show: Show) -> Iterator[str]:
    every, keep = run.checkpoint.every_steps, run.checkpoint.keep_every
    if keep is not None and every is None:
        yield useless(show, "Checkpoint.keep_every", "without Checkpoint.every_steps", "set Checkpoint.every_steps")
    elif keep is not None and every is not None and keep % every:
        yield (
            f"{show('Checkpoint.keep_every')} must be a multiple of {show('Checkpoint.every_steps')}, or most of the "
            f"steps to be kept are never saved: set Checkpoint.keep_every to {multiples(keep, every)}"
        )


def _check_health(run: schema.Run, show: Show) -> Iterator[str]:
    health, best = run.health, run.checkpoint.keep_best
    if health.spike_score is None:
        for name in ("spike_window", "spike_patience"):
            if getattr(health, name) != settings(schema.Health)[name].default:
                yield useless(show, f"Health.{name}", "without Health.spike_score", "set Health.spike_score = 8.0")
    elif health.spike_score == 0:
        yield (
            f"{show('Health.spike_score')} would take half of all steps for spikes: set it to a number above 0, such "
            "as 8.0, or to None to look for none"
        )
    if health.straggler_every is None and health.straggler_ratio != settings(schema.Health)["straggler_ratio"].default:
        yield useless(show, "Health.straggler_ratio", "without Health.straggler_every", "set Health.straggler_every")
    if best is not None:
        if best not in run.data.validation:
            yield f"{show('Checkpoint.keep_best')} is no name in Data.validation; {nearest(best, run.data.validation)}"
        for name, key in (
            ("Train.eval_every", run.train.eval_every),
            ("Checkpoint.every_steps", run.checkpoint.every_steps),
        ):
            if key is None:
                yield useless(show, "Checkpoint.keep_best", f"without {name}", f"set {name}")
