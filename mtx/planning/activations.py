"""Bytes of what a layer computes on one device, and which of it a training step has in memory at the same time.

Decides sizes from the logical axes of the values that layers name with `tap`, and what is kept of them from the same
tables of `mtx.training.remat` that the step uses. What XLA holds besides, while it runs a layer backward, is counted in
whole arrays; that count is the only thing in here that is not derived, and a compiled program is its test.

Invariant: every size is linear in the tokens of a microbatch on the device.

Letters: B sequences of a microbatch, T tokens of a sequence on the device, R tokens of it between blocks, D model, N
query heads, K key/value heads, H head dim, F feed-forward, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mtx.nn.attention import choose_kernel
from mtx.nn.blockwise import KEPT_TOKENS, QUERY_BLOCK
from mtx.nn.context import Context
from mtx.nn.grouped import MOST_ROWS
from mtx.nn.ring_attention import BLOCK
from mtx.nn.router import slots_per_row
from mtx.planning.case import Case
from mtx.planning.target import TARGETS

WIDTHS = {"float32": 4, "bfloat16": 2}
"""Bytes of a number."""
FLOAT32 = 4

DENSE_INPUTS = frozenset({"attention_in", "query", "attention_out", "mlp_in"})
INPUTS_OF_PRODUCTS = DENSE_INPUTS | {"expert_in", "router_logits", "expert_ids"}
KEPT_OF_HIDDEN: Mapping[str, float] = {"gelu": 4, "gelu_tanh": 6, "relu": 2.5, "silu": 4, "swiglu": 6, "geglu": 8}
"""Arrays as large as the hidden layer that JAX keeps of an MLP: factors of products, and of the activation's chain.
Those of jax 0.10; 0.11 keeps one less of gelu_tanh and geglu."""


@dataclass(frozen=True)
class Layer:
    """A layer of one stack on one device, for one microbatch.

    Attributes:
        routed: Whether its feed-forward is experts.
    """

    case: Case
    routed: bool

    @cached_property
    def width(self) -> int:
        """Bytes of a number of activations."""
        return WIDTHS[self.case.run.precision.activations]

    @cached_property
    def tokens(self) -> int:
        """B * T."""
        return self.case.microbatch_size * self.case.run.train.seq_len // self.case.shards("seq")

    @cached_property
    def stream(self) -> int:
        """Bytes of the residual stream between blocks: [B, R, D]."""
        case = self.case
        parts = math.prod(case.sizes[axis] for axis in {*case.rules["seq"], *case.rules["seq_sp"]})
        return case.microbatch_size * case.run.train.seq_len // parts * case.run.model.d_model * self.width

    @cached_property
    def gathered(self) -> int:
        """Bytes of the input of a block: [B, T, D]."""
        return self.tokens * self.case.run.model.d_model * self.width

    @cached_property
    def queries(self) -> int:
        """Bytes of [B, T, N, H]."""
        model = self.case.run.model
        return self.tokens * model.num_heads // self.case.shards("heads") * model.head_width * self.width

    @cached_property
    def keys(self) -> int:
        """Bytes of [B, T, K, H]."""
        model = self.case.run.model
        return self.tokens * model.kv_heads // self.case.shards("kv_heads") * model.head_width * self.width

    @cached_property
    def hidden(self) -> int:
        """Bytes of the hidden layer of the MLP, [B, T, F]; with experts, of those that all tokens go to; else 0."""
        model = self.case.run.model
        wide = model.ff_width
        if self.routed:
            wide = model.num_shared_experts * (model.expert_d_ff or wide)
        return self.tokens * wide // self.case.shards("mlp") * self.width

    @property
    def in_slots(self) -> bool:
        """Whether each expert has the same number of rows; else they are sorted by expert (`mtx.nn.experts`)."""
        return self.case.run.model.expert_capacity_factor is not None and not self.case.rules["seq"]

    @cached_property
    def expert_matrices(self) -> int:
        """Numbers in the matrices of the experts of a device."""
        model = self.case.run.model
        wide = (model.expert_d_ff or model.ff_width) // self.case.shards("mlp")
        return model.num_experts // self.case.shards("experts") * model.d_model * wide * (3 if model.gated else 2)

    @cached_property
    def expert_rows(self) -> int:
        """Rows of the buffer that the experts of a device work on."""
        if not self.routed:
            return 0
        case, model = self.case, self.case.run.model
        shards = case.shards("experts")
        if self.in_slots:
            return model.num_experts * case.microbatch_size * slots_per_row(model, case.run.train.seq_len)
        here = model.num_experts // shards
        most = shards * self.tokens * min(model.experts_per_token, here)
        block = min(MOST_ROWS, max(8, most // here // 8 * 8))
        return (math.ceil(most / block) + here) * block

    @cached_property
    def expert_hidden(self) -> int:
        """Bytes of the hidden layers of the experts of a device."""
        model = self.case.run.model
        wide = (model.expert_d_ff or model.ff_width) // self.case.shards("mlp")
        return self.expert_rows * wide * self.width

    @cached_property
    def values(self) -> Mapping[str, int]:
        """By the names of `tap`: bytes of each value that a policy may keep."""
        model = self.case.run.model
        found = {
            "layer_in": self.stream,
            "attention_in": self.gathered,
            "query": self.queries,
            "key": self.keys,
            "value": self.keys,
            "attention_out": self.queries,
            "after_attention": self.stream,
            "mlp_in": self.gathered,
        }
        if self.hidden:
            found["mlp_hidden"] = self.hidden
            found["mlp_gate"] = self.hidden if model.gated else 0
        if self.routed:
            found["router_logits"] = self.tokens * model.num_experts * FLOAT32
            found["expert_ids"] = self.tokens * model.experts_per_token * FLOAT32
            found["expert_ranks"] = found["expert_ids"] if model.expert_capacity_factor is not None else 0
            found["expert_in"] = self.expert_rows * model.d_model * self.width
            found["expert_weights"] = self.expert_rows * FLOAT32
            found["expert_hidden"] = self.expert_hidden
            found["expert_gate"] = self.expert_hidden if model.gated else 0
        return found

    def keep(self, names: frozenset[str]) -> int:
        """Bytes of the values with these names."""
        return sum(size for name, size in self.values.items() if name in names)

    @cached_property
    def kernel(self) -> str:
        """`cudnn`, `xla` or `ring`; see `mtx.nn.attention.choose_kernel`."""
        return choose_attention(self.case)

    @cached_property
    def kept_by_attention(self) -> int:
        """Bytes that attention itself keeps for its backward pass where nothing is computed again."""
        model, length = self.case.run.model, self.case.run.train.seq_len
        rows = self.tokens * model.num_heads // self.case.shards("heads")
        if self.kernel != "xla":
            return rows * FLOAT32  # the log-sum-exp of the scores
        # Of each block of queries the weights up to the block's end, where they are not computed again, and a sum each.
        seen = (length + min(QUERY_BLOCK, length)) // 2 if length <= KEPT_TOKENS else 0
        return rows * (seen * self.width + FLOAT32)

    @cached_property
    def attention_work(self) -> int:
        """Bytes that attention needs for a while, backward: scores and their gradients, or sums over keys."""
        model, length = self.case.run.model, self.case.run.train.seq_len
        rows = self.case.microbatch_size * model.num_heads // self.case.shards("heads")
        whole = 2 * self.queries + 4 * self.keys  # gradients, and what changes its layout
        if self.kernel == "ring":
            half = length // self.case.shards("seq") // 2
            block = -(-half // -(-half // BLOCK))
            sums = (self.queries + 4 * self.keys) * FLOAT32 // self.width
            return whole + sums + rows * block**2 * (2 * FLOAT32 + 2 * self.width)
        if self.kernel == "xla":
            return whole + rows * min(QUERY_BLOCK, length) * length * (2 * FLOAT32 + self.width)
        if self.case.run.data.packing == "documents":  # the mask, and the gradient by it
            whole += 2 * self.case.microbatch_size * length**2 * self.width
        return whole

    @cached_property
    def activated(self) -> int:
        """Bytes of the hidden layer behind the activation."""
        return self.hidden + self.expert_hidden

    def keep_all(self, *, explicit: bool) -> int:
        """Bytes that stay in memory until the backward pass where nothing is computed again.

        Args:
            explicit: Whether what is kept is what JAX says, since a loop or a barrier is between the two passes. Else
                XLA sees both and computes again what costs it nothing but registers.
        """
        model = self.case.run.model
        whole = (INPUTS_OF_PRODUCTS if self.routed else DENSE_INPUTS) | {"key", "value"}
        found = self.keep(frozenset(whole)) + self.kept_by_attention
        arrays = KEPT_OF_HIDDEN[model.activation] if explicit else min(3, KEPT_OF_HIDDEN[model.activation])
        found += int(arrays * self.hidden) + int(arrays * self.expert_hidden)
        if self.routed:
            found += self.expert_hidden * FLOAT32 // self.width  # times the weight of the choice, in float32
        if explicit:
            norms = 6 + self.routed * 1  # of each norm the input in float32, less the mean, and divided
            return found + norms * self.stream * FLOAT32 // self.width + self.queries
        return found + (4 if model.use_bias else 2) * self.stream

    def recompute(self, kept: frozenset[str]) -> int:
        """Bytes of the values that have to be there for the backward pass of the layer, and are not among `kept`."""
        named = sum(size for name, size in self.values.items() if name not in kept and name != "layer_in")
        # Of the MLP there are the factors of its products, or what XLA makes of them in one go: as many arrays.
        arrays = 1 if "mlp_hidden" not in kept else 3 if self.case.run.model.gated else 2
        weighted = self.expert_hidden * FLOAT32 // self.width  # times the weight of the choice, in float32
        return named + arrays * self.activated + weighted

    @cached_property
    def backward_work(self) -> int:
        """Bytes of gradients while one layer runs backward."""
        model = self.case.run.model
        gradients = self.activated * (2 if model.gated else 1)
        if model.use_bias:  # sums over tokens in float32
            gradients += self.activated * FLOAT32 // self.width
        rows = 2 * self.expert_rows * model.d_model * self.width
        if self.expert_rows and not self.in_slots:  # a loop over blocks adds them up
            rows += self.expert_matrices * FLOAT32
        return gradients + rows + self.gathered + 4 * self.stream + self.attention_work

    @cached_property
    def factors(self) -> int:
        """Bytes of the factors of products that give gradients of weights: of each the input, and the gradient of the
        output. Those in the hidden layer give way to the gradients, in float32, where these are smaller."""
        model, products = self.case.run.model, 3 if self.case.run.model.gated else 2
        rows = self.expert_rows * model.d_model * self.width if self.routed else self.gathered
        matrices = self.expert_matrices if self.routed else products * model.d_model * self.hidden // self.width
        if not self.routed:
            matrices //= self.tokens
        hidden = min(products * self.activated, matrices * FLOAT32)
        return 2 * (self.gathered + self.queries + self.keys + rows) + hidden


def keeps_attention(case: Case) -> bool:
    """Whether what attention computes forward is kept by `Train.recompute = 'selective'`: only a pipeline, which keeps
    values by name, and plain XLA compute it again."""
    ours = case.software == "mtx" and case.stages is None
    return ours and case.run.train.recompute == "selective" and choose_attention(case) == "cudnn"


def choose_attention(case: Case) -> str:
    """The kernel that the step takes on the cluster's GPUs."""
    target, run = TARGETS.get(case.cluster.gpu.name), case.run
    capability = 7.0 if target is None else float("{}.{}".format(*target.compute_capability))
    context = Context(
        comm=_Axes(case),  # type: ignore[arg-type]
        dtype=np.dtype(run.precision.activations),
        attention=run.train.attention,
        platform="gpu",
        compute_capability=capability,
        context_exchange=run.train.context_exchange,
    )
    packed, alibi = run.data.packing == "documents", run.model.position == "alibi"
    return choose_kernel(context, run.model.head_width, length=run.train.seq_len, masked=packed, alibi=alibi)


@dataclass(frozen=True)
class _Axes:
    """As much of `mtx.collectives.Comm` as the choice of a kernel asks for."""

    case: Case

    def axes(self, name: str) -> tuple[str, ...]:
        return self.case.rules[name]
