"""How a run fits a mesh: what must divide, what excludes what, what the rules of the run may not say.

Decides when a layout is refused, and why; which layouts there are is decided in `mtx.config.layout`.

Invariant: a number that a message proposes mends what that message says.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations

from mtx.config import schema
from mtx.config.axes import MESH_AXES
from mtx.config.render import Origin
from mtx.config.rules import Rules, choose_rules
from mtx.config.values import format_value
from mtx.config.wording import divisors, multiples, show_place, show_setting, useless

FLOAT8_MULTIPLE = 16
"""cuBLASLt multiplies 8-bit matrices whose dims are multiples of this. XLA would fill up others, a copy each."""

WHOLE = ("embed", "head_dim", "positions", "router")
"""Logical axes that no layer can have a part of."""

ARRAYS = (
    ("layers", "experts", "mlp"),
    ("layers", "batch", "seq_sp"),  # every stage works on other tokens
    ("layers", "batch", "seq", "heads"),
    ("layers", "batch", "seq", "kv_heads"),
    ("layers", "batch", "seq", "mlp"),
    ("layers", "batch", "seq", "vocab"),
)
"""The other logical axes, where they meet in a parameter or an activation: no mesh axis can split two of them."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A run on a mesh.

    Attributes:
        sizes: Devices along each mesh axis.
        provenance: Where values were set, for messages.
        found: Mesh axes whose size is not chosen but what the devices leave: that it is 1 is nobody's mistake.
    """

    run: schema.Run
    sizes: Mapping[str, int]
    provenance: Mapping[str, Origin] = field(default_factory=dict)
    found: tuple[str, ...] = ()

    @cached_property
    def rules(self) -> Rules:
        """Logical axis -> live mesh axes."""
        return choose_rules(self.run, self.sizes)

    def live(self, *logical: str) -> list[str]:
        """Mesh axes that split any of some logical axes, in mesh order."""
        return [axis for axis in MESH_AXES if any(axis in self.rules[name] for name in logical)]

    def shards(self, *logical: str) -> int:
        """Devices over which logical axes are split."""
        return math.prod(self.sizes[axis] for axis in {axis for name in logical for axis in self.rules[name]})

    def axes(self, *logical: str) -> str:
        """'Mesh.data * Mesh.fsdp': the axes that split them."""
        return " * ".join(f"Mesh.{axis}" for axis in self.live(*logical))

    def split(self, *logical: str) -> str:
        """'Mesh.data * Mesh.fsdp = 8 (runs/x.gin:4, runs/x.gin:5)': those axes and their product."""
        keys = [f"Mesh.{axis}" for axis in self.live(*logical) if axis not in self.found]
        places = dict.fromkeys(self.provenance[key].place for key in keys if key in self.provenance)
        where = f" ({', '.join(places)})" if places else ""
        return f"{self.axes(*logical)} = {self.shards(*logical)}{where}"

    def show(self, key: str) -> str:
        """'Model.d_model = 768 (runs/x.gin:3)'."""
        owner, name = key.split(".")
        if owner == "Mesh":
            return f"{key} = {self.sizes[name]}{'' if name in self.found else show_place(self.provenance, key)}"
        return show_setting(self.run, self.provenance, key)

    def show_value(self, key: str, value: int) -> str:
        """The same of a value that may follow from others."""
        return f"{key} = {value}{show_place(self.provenance, key)}"

    def is_one(self, axis: str) -> bool:
        """Whether the config itself gives the axis a single device."""
        return self.sizes[axis] == 1 and axis not in self.found


def misfits(layout: Layout) -> Iterator[str]:
    """What does not fit. No more devices along any axis would mend any of it."""
    for check in (
        _check_rules,
        _check_stages,
        _check_experts,
        _check_widths,
        _check_sequence,
        _check_batch,
        _check_float8,
    ):
        yield from check(layout)


def contradictions(layout: Layout) -> Iterator[str]:
    """Options that exclude each other on this mesh, or have no effect there."""
    for check in (_check_pipeline, _check_exchange):
        yield from check(layout)


def _check_rules(layout: Layout) -> Iterator[str]:
    if not layout.run.rules.overrides:
        return
    rules, cure = layout.rules, "leave it out of Rules.overrides"

    def over(name: str) -> str:
        return f"{name!r} over {', '.join(rules[name]) or 'nothing'}"

    for name in WHOLE:
        if rules[name]:
            yield (
                f"Rules.overrides puts {over(name)}, and layers need all of it: {cure} (to save memory, Mesh.fsdp and "
                "Rules.zero split each weight along a dim that divides)"
            )
    if rules["layers"] != (("pipe",) if layout.sizes["pipe"] > 1 else ()):
        yield f"Rules.overrides puts {over('layers')}, and layers are split over pipe, as its stages, alone: {cure}"
    collisions: dict[tuple[str, str], list[str]] = {}
    for first, second in dict.fromkeys(pair for array in ARRAYS for pair in combinations(array, 2)):
        for axis in [axis for axis in rules[first] if axis in rules[second]]:
            collisions.setdefault((axis, first), []).append(second)
    for (axis, first), others in collisions.items():
        yield (
            f"Rules.overrides makes {axis} split {first!r} and also {', '.join(map(repr, others))}, and arrays have "
            f"both: keep {axis} for one of them"
        )
    if not set(rules["experts"]) <= set(rules["batch"]):
        yield (
            f"Rules.overrides puts {over('experts')}, and tokens are exchanged among devices that have others: choose "
            f"axes of 'batch' ({', '.join(rules['batch']) or 'none is live'})"
        )
    if rules["kv_heads"] not in ((), rules["heads"]):
        yield (
            f"Rules.overrides puts {over('heads')} and {over('kv_heads')}, and a device needs the keys of its queries: "
            "split both alike, or set 'kv_heads': None"
        )
    seq, seq_sp = rules["seq"], rules["seq_sp"]
    if seq_sp[: len(seq)] != seq:
        yield (
            f"Rules.overrides puts {over('seq')} and {over('seq_sp')}, and between blocks the sequence is split "
            "further, never less: begin 'seq_sp' with the axes of 'seq'"
        )
        return
    added = seq_sp[len(seq) :]
    for name in ("heads", "mlp", "vocab"):
        if added and rules[name] not in ((), added):
            yield (
                f"Rules.overrides puts {over(name)}, and what is summed over them would be split along the sequence "
                f"over {', '.join(added)} ('seq_sp' beyond 'seq'): use the same axes for both, or set 'seq_sp' to "
                f"{format_value(seq or None)}"
            )


def _check_stages(layout: Layout) -> Iterator[str]:
    stages, fsdp, data = (layout.sizes[axis] for axis in ("pipe", "fsdp", "data"))
    if stages == 1:
        return
    chunks, layers = layout.run.pipeline.virtual_stages, layout.run.model.num_layers
    if layers < stages * chunks:
        cures = [f"Model.num_layers to {stages * chunks} or more"]
        if layers // chunks > 1 or chunks == 1:
            cures.append(f"Mesh.pipe to {layers // chunks} or less")
        if chunks > 1 and layers >= stages:
            cures.append(f"Pipeline.virtual_stages to {layers // stages} or less")
        product = f"Mesh.pipe * Pipeline.virtual_stages = {stages * chunks}" if chunks > 1 else layout.show("Mesh.pipe")
        shown = layout.show("Model.num_layers")
        yield f"{shown} is too few for {product}, which each need one: set {', or '.join(cures)}"
    if fsdp > 1:
        zero = "" if layout.run.rules.zero == 2 else ", with Rules.zero = 2"
        yield (
            f"{layout.show('Mesh.fsdp')} with {layout.show('Mesh.pipe')}: every weight would be gathered again for "
            f"each microbatch; set Mesh.data = {data * fsdp} and Mesh.fsdp = 1{zero}, which splits the state alike and "
            "gathers once a step, or Mesh.pipe = 1"
        )


def _check_experts(layout: Layout) -> Iterator[str]:
    experts, data, expert = layout.run.model.num_experts, layout.sizes["data"], layout.sizes["expert"]
    if not experts:
        if expert > 1:
            yield (
                f"{layout.show('Mesh.expert')} splits experts, and with {layout.show('Model.num_experts')} there are "
                f"none: set Mesh.data = {data * expert} and Mesh.expert = 1"
            )
        return
    yield from _divide(layout, "experts", "Model.num_experts", experts)


def _check_widths(layout: Layout) -> Iterator[str]:
    model = layout.run.model
    yield from _divide(layout, "heads", "Model.num_heads", model.num_heads)
    shards = layout.shards("kv_heads") if layout.rules["kv_heads"] else layout.shards("heads")
    if model.num_kv_heads is not None and shards % model.kv_heads:  # else several shards compute with the same head
        axes = "kv_heads" if layout.rules["kv_heads"] else "heads"
        yield from _divide(layout, axes, "Model.num_kv_heads", model.kv_heads)
    widths = {}
    if not model.num_experts or model.expert_d_ff is None or model.expert_every > 1 or model.first_dense_layers:
        widths["Model.d_ff"] = model.ff_width
    if model.num_experts and model.expert_d_ff is not None:
        widths["Model.expert_d_ff"] = model.expert_d_ff
    for key, width in widths.items():
        yield from _divide(layout, "mlp", key, width)


def _divide(layout: Layout, logical: str, key: str, size: int) -> Iterator[str]:
    shards = layout.shards(logical)
    if size % shards:
        axes = layout.axes(logical)
        yield (
            f"{layout.show_value(key, size)} does not divide over {layout.split(logical)}: set {key} to "
            f"{multiples(size, shards)}, or {axes} to one of {divisors(size)}"
        )


def _check_sequence(layout: Layout) -> Iterator[str]:
    length = layout.run.train.seq_len
    parts, shards = layout.shards("seq"), layout.shards("seq", "seq_sp")
    step = math.lcm(shards, 2 * parts) if parts > 1 else shards
    if length % step == 0:
        return
    shown, axes, lengths = layout.show("Train.seq_len"), layout.axes("seq", "seq_sp"), multiples(length, step)
    if length % shards == 0 or parts == shards:
        axes = layout.axes("seq")
        yield (
            f"{shown} does not divide into {2 * parts} slices, of which each shard over {layout.split('seq')} has an "
            f"early and a late one, to have the same work under a causal mask: set Train.seq_len to {lengths}"
            + (f", or {axes} to one of {divisors(length // 2)}" if length % 2 == 0 else f", or {axes} to 1")
        )
    else:
        fewer = "" if parts > 1 else f", or {axes} to one of {divisors(length)}"
        yield f"{shown} does not divide over {layout.split('seq', 'seq_sp')}: set Train.seq_len to {lengths}{fewer}"


def _batch_sizes(run: schema.Run) -> dict[str, int]:
    """All sizes that the batch takes are sums of these."""
    ramp, sizes = run.train.batch_ramp, {"Train.global_batch_size": run.train.global_batch_size}
    return sizes | ({"BatchRamp.start": ramp.start, "BatchRamp.increment": ramp.increment} if ramp else {})


def _check_batch(layout: Layout) -> Iterator[str]:
    """Every size of the batch over data shards, microbatches, and the groups of an interleaved pipeline."""
    shards, microbatch = layout.shards("batch"), layout.run.train.microbatch_size
    stages, chunks = layout.sizes["pipe"], layout.run.pipeline.virtual_stages
    group = stages if stages > 1 and chunks > 1 else 1
    step = shards * (microbatch or 1) * group
    for key, size in _batch_sizes(layout.run).items():
        if size % step == 0:
            continue
        shown, share, sizes = layout.show_value(key, size), size // shards, multiples(size, step)
        axes = layout.axes("batch")
        where = f"each of {shards} data shards ({axes})" if shards > 1 else "the one data shard"
        if size % shards:
            yield (
                f"{shown} sequences do not divide over {layout.split('batch')} data shards: set {key} to {sizes}, or "
                f"{axes} to one of {divisors(size)}"
            )
        elif share % (microbatch or 1):
            yield (
                f"{shown} gives {where} {share} sequences, which {layout.show('Train.microbatch_size')} does not "
                f"divide: set Train.microbatch_size to one of {divisors(share)}, or {key} to {sizes}"
            )
        else:
            most = share // (microbatch or 1)
            yield (
                f"{shown} gives {where} {most} microbatches, and with "
                f"{layout.show('Pipeline.virtual_stages')} they go through the stages in groups of "
                f"{layout.show('Mesh.pipe')}: set {key} to {sizes} ({multiples(most, group)} microbatches), or "
                "Pipeline.virtual_stages to 1"
            )


def _check_float8(layout: Layout) -> Iterator[str]:
    """The dims of 8-bit products on a device."""
    model, train, parts = layout.run.model, layout.run.train, layout.run.precision.float8_parts
    dims = [("Model.d_model", model.d_model, "", FLOAT8_MULTIPLE if model.head_dim else math.lcm(16, model.num_heads))]
    dims.append(("Train.seq_len", train.seq_len, "seq", FLOAT8_MULTIPLE * layout.shards("seq")))
    if "mlp" in parts and "layers" in model.layer_stacks:
        dims.append(("Model.d_ff", model.ff_width, "mlp", FLOAT8_MULTIPLE * layout.shards("mlp")))
    if "mlp" in parts and model.num_shared_experts:
        width = model.ff_width if model.expert_d_ff is None else model.expert_d_ff
        key = "Model.d_ff" if model.expert_d_ff is None else "Model.expert_d_ff"
        shared = layout.shards("mlp") // math.gcd(layout.shards("mlp"), model.num_shared_experts)
        dims.append((key, width, "mlp", FLOAT8_MULTIPLE * shared))
    for key, size, logical, step in dims if parts else ():
        if size % step:
            where = f" over {layout.split(logical)}" if logical and layout.live(logical) else ""
            yield (
                f"{layout.show_value(key, size)}{where} is no multiple of {FLOAT8_MULTIPLE} on a device, which 8-bit "
                f"products need ({layout.show('Precision.compute')}): set {key} to {multiples(size, step)}"
            )
    if "attention" in parts:
        shards = {"Model.num_heads": layout.shards("heads"), "Model.num_kv_heads": layout.shards("kv_heads")}
        heads = {"Model.num_heads": model.num_heads, "Model.num_kv_heads": model.kv_heads}
        for key, count in heads.items():
            here = count // shards[key]
            if count % shards[key] == 0 and here * model.head_width % FLOAT8_MULTIPLE:
                yield (
                    f"{layout.show_value(key, count)} of {model.head_width} numbers make {here * model.head_width} on "
                    f"a device, which is no multiple of {FLOAT8_MULTIPLE} as 8-bit products need "
                    f"({layout.show('Precision.compute')}): set Model.head_dim to "
                    f"{multiples(model.head_width, FLOAT8_MULTIPLE)}"
                )


def _check_pipeline(layout: Layout) -> Iterator[str]:
    run, stages = layout.run, layout.sizes["pipe"]
    if layout.is_one("pipe"):
        for name in ("virtual_stages", "head"):
            if getattr(run.pipeline, name) != getattr(schema.Pipeline, name):
                yield useless(
                    layout.show, f"Pipeline.{name}", f"with {layout.show('Mesh.pipe')}", "set Mesh.pipe to 2 or more"
                )
    if stages == 1:
        return
    if run.train.scan_layers:
        yield (
            f"{layout.show('Train.scan_layers')} with {layout.show('Mesh.pipe')}: the few layers of a stage run in "
            "line; leave Train.scan_layers at None"
        )


def _check_exchange(layout: Layout) -> Iterator[str]:
    run, parts = layout.run, layout.shards("seq")
    if run.train.context_exchange == "all_to_all":
        if layout.is_one("context"):
            circumstance = f"with {layout.show('Mesh.context')}"
            yield useless(layout.show, "Train.context_exchange", circumstance, "set Mesh.context to 2 or more")
        heads, shards = run.model.num_heads, layout.shards("heads")
        if heads % shards == 0 and heads // shards % parts:
            axes = layout.axes("seq")
            yield (
                f"{layout.show('Train.context_exchange')} splits the heads of a device over {layout.split('seq')}, and "
                f"{layout.show('Model.num_heads')} leaves it {heads // shards}: set Model.num_heads to "
                f"{multiples(heads, shards * parts)}, or {axes} to one of {divisors(heads // shards)}, or "
                "Train.context_exchange = 'ring'"
            )
    elif run.train.attention == "cudnn" and parts > 1:
        yield (
            f"{layout.show('Train.attention')} computes whole sequences, and with "
            f"{layout.show('Train.context_exchange')} a device has a part of them, over {layout.split('seq')}: set "
            "Train.context_exchange = 'all_to_all', or Train.attention = 'auto'"
        )
