"""The whole run as frozen, keyword-only dataclasses: every field's type, default, range, unit and meaning.

Decides what can be configured, and nothing else: no value is read, checked against another or built here. Imports
nothing heavy, so that `mtx config` and the launcher answer at once.

Components that a user can add by adding one file (optimizers and schedules under `mtx/optim`, objectives under
`mtx/objectives`) declare their own dataclass there, derived from `Optimizer`, `Schedule` or `Objective` below.

Invariant: a field that exists is read, and an option that has no effect in a run is refused.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

FREE, MATH, DATA, IMPOSSIBLE = "free", "changes the math", "changes the data", "impossible"
REQUIRED = dataclasses.MISSING


def setting(
    default: Any = REQUIRED, *, doc: str, low: float | None = None, high: float | None = None, drift: str = MATH
) -> Any:
    """A field of a config dataclass.

    Args:
        default: The value where no file sets it; without one the field is required.
        doc: Meaning and unit, shown by `mtx config --explain`.
        low: Smallest value allowed.
        high: Largest value allowed.
        drift: What a change of this field means when a run is resumed: FREE, MATH, DATA or IMPOSSIBLE.
    """
    metadata = {"doc": doc, "low": low, "high": high, "drift": drift}
    if isinstance(default, dict | list):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """Base of the optimizer configs in `mtx/optim`."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Base of the learning-rate schedules in `mtx/optim`."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Base of the training objectives in `mtx/objectives`."""


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3.1's stretching of the rotary frequencies for long contexts (arXiv 2407.21783)."""

    factor: float = setting(8.0, low=1.0, doc="how much longer the context becomes")
    low_frequency_factor: float = setting(1.0, doc="wavelengths above original_max_seq_len / this are fully stretched")
    high_frequency_factor: float = setting(4.0, doc="wavelengths below original_max_seq_len / this are left alone")
    original_max_seq_len: int = setting(8192, low=1, doc="context of the unstretched model, tokens")


@dataclass(frozen=True, kw_only=True)
class Model:
    """The architecture. Two runs with equal `Model` have interchangeable checkpoints."""

    family: str = setting("decoder", drift=IMPOSSIBLE, doc="file of mtx/models that builds the model")
    vocab_size: int = setting(low=1, drift=IMPOSSIBLE, doc="rows of the embedding; the tokenizer's size or more")
    d_model: int = setting(low=1, drift=IMPOSSIBLE, doc="width of the residual stream")
    num_layers: int = setting(low=1, drift=IMPOSSIBLE, doc="transformer layers")
    num_heads: int = setting(low=1, drift=IMPOSSIBLE, doc="query heads")
    num_kv_heads: int | None = setting(None, low=1, drift=IMPOSSIBLE, doc="key/value heads; None: num_heads")
    head_dim: int | None = setting(None, low=1, drift=IMPOSSIBLE, doc="width of a head; None: d_model / num_heads")
    d_ff: int | None = setting(None, low=1, drift=IMPOSSIBLE, doc="width of the MLP; None: 4 * d_model")
    max_seq_len: int = setting(low=1, drift=IMPOSSIBLE, doc="longest sequence, tokens; rows of learned positions")
    activation: Literal["gelu", "gelu_tanh", "relu", "silu", "swiglu", "geglu"] = setting(
        "gelu_tanh", drift=IMPOSSIBLE, doc="of the MLP; swiglu and geglu are gated and have a third matrix"
    )
    norm: Literal["layernorm", "rmsnorm"] = setting(
        "layernorm", drift=IMPOSSIBLE, doc="before each branch and the head"
    )
    norm_eps: float = setting(1e-5, low=0.0, doc="added to the variance in norms")
    position: Literal["learned", "rotary", "alibi", "none"] = setting(
        "learned", drift=IMPOSSIBLE, doc="how tokens know their place"
    )
    rope_theta: float = setting(10000.0, low=1.0, doc="base of the rotary frequencies")
    rope_scaling: RopeScaling | None = setting(None, doc="stretching of the rotary frequencies; None: none")
    tie_embeddings: bool = setting(True, drift=IMPOSSIBLE, doc="the head uses the embedding's matrix")
    use_bias: bool = setting(True, drift=IMPOSSIBLE, doc="biases in linear layers and in LayerNorm")
    num_experts: int = setting(0, low=0, drift=IMPOSSIBLE, doc="routed experts of a layer (E); 0: dense")
    experts_per_token: int = setting(0, low=0, drift=IMPOSSIBLE, doc="experts that each token is sent to; 0: dense")
    expert_d_ff: int | None = setting(None, low=1, drift=IMPOSSIBLE, doc="width of an expert; None: that of the MLP")
    expert_every: int = setting(1, low=1, drift=IMPOSSIBLE, doc="every n-th layer has experts, the others an MLP")
    first_dense_layers: int = setting(0, low=0, drift=IMPOSSIBLE, doc="layers at the beginning without experts")
    num_shared_experts: int = setting(0, low=0, drift=IMPOSSIBLE, doc="experts that every token is sent to, besides")
    expert_capacity_factor: float | None = setting(
        None,
        low=0.0,
        doc="slots of an expert per sequence, times experts_per_token * tokens / num_experts; what does not fit is "
        "dropped; None: dropless",
    )
    router_score: Literal["softmax", "sigmoid"] = setting("softmax", doc="from the router's logits to weights")
    normalize_expert_weights: bool | None = setting(
        None, doc="whether the weights of a token's experts sum to one; None: if there are two or more"
    )
    load_balance_loss: float = setting(0.0, low=0.0, doc="coefficient of the balance loss of each sequence; 0: off")
    router_z_loss: float = setting(0.0, low=0.0, doc="coefficient of the mean squared logsumexp of router logits")
    expert_bias_rate: float = setting(
        0.0, low=0.0, doc="step of the biases that balance experts without a loss (arXiv 2408.15664); 0: no biases"
    )
    init_std: float = setting(0.02, low=0.0, doc="std of the normal initializer of weights and embeddings")

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads (K)."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_width(self) -> int:
        """Width of one head (H)."""
        return self.d_model // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def ff_width(self) -> int:
        """Hidden width of the MLP (F)."""
        return 4 * self.d_model if self.d_ff is None else self.d_ff

    @property
    def gated(self) -> bool:
        """Whether the MLP multiplies its hidden layer by a gate."""
        return self.activation in ("swiglu", "geglu")

    @property
    def layer_stacks(self) -> tuple[str, ...]:
        """For each layer the stack that its parameters are in: `layers`, or `expert_layers` where it has experts."""

        def routed(layer: int) -> bool:
            place = layer + 1 - self.first_dense_layers
            return self.num_experts > 0 and place > 0 and place % self.expert_every == 0

        return tuple("expert_layers" if routed(layer) else "layers" for layer in range(self.num_layers))


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """How many devices along each axis of the mesh; their product is the number of devices. One may be -1: the rest."""

    pipe: int = setting(1, low=-1, drift=FREE, doc="pipeline stages")
    data: int = setting(-1, low=-1, drift=FREE, doc="data-parallel replicas; Rules.zero says what is sharded over them")
    fsdp: int = setting(1, low=-1, drift=FREE, doc="data parallel with weights gathered layer by layer (ZeRO-3)")
    expert: int = setting(1, low=-1, drift=FREE, doc="expert parallel")
    context: int = setting(1, low=-1, drift=FREE, doc="sequence split inside attention")
    tensor: int = setting(1, low=-1, drift=FREE, doc="matrices split inside a layer (Megatron tensor parallel)")


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """How layers and microbatches go through the stages of `Mesh.pipe`. Without stages nothing of it has an effect."""

    virtual_stages: int = setting(1, low=1, drift=FREE, doc="chunks of layers per stage (interleaved 1F1B)")
    schedule: Literal["1f1b"] = setting("1f1b", drift=FREE, doc="order of forward and backward passes")
    head: Literal["sharded", "last"] = setting(
        "sharded", drift=FREE, doc="who computes head and loss: all stages a part of the vocabulary, or the last one"
    )


@dataclass(frozen=True, kw_only=True)
class Rules:
    """From logical axes to mesh axes."""

    sequence_parallel: bool = setting(
        True, drift=FREE, doc="between blocks, activations are split over `tensor` along the sequence"
    )
    zero: Literal[0, 1, 2] = setting(
        2,
        drift=FREE,
        doc="split over data, expert and context: 0 nothing, 1 optimizer state, 2 also gradients and fp32 weights",
    )
    overrides: dict[str, str | tuple[str, ...] | None] = setting(
        {}, drift=FREE, doc="logical axis -> mesh axes, instead of the preset's, e.g. {'vocab': None}"
    )


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Number formats."""

    compute: Literal["float32", "bfloat16", "float8"] = setting(
        "float32",
        doc="of matrix products and activations; float8: products with weights of layers are of 8-bit numbers, all "
        "else is in bfloat16 (docs/float8.md)",
    )
    float8_products: Literal["all", "attention", "mlp"] = setting(
        "all", doc="with compute = 'float8': which products are of 8-bit numbers; attention: its four projections"
    )
    params: Literal["float32", "bfloat16"] = setting(
        "float32", drift=IMPOSSIBLE, doc="of the weights that the optimizer updates"
    )
    gradients: Literal["float32", "bfloat16"] = setting("float32", doc="in which gradients are summed over devices")

    @property
    def activations(self) -> str:
        """Format of activations, and of all products that are not of 8-bit numbers."""
        return "bfloat16" if self.compute == "float8" else self.compute

    @property
    def float8_parts(self) -> tuple[str, ...]:
        """Parts of a layer whose products with weights are of 8-bit numbers. Routed experts have none."""
        if self.compute != "float8":
            return ()
        return ("attention", "mlp") if self.float8_products == "all" else (self.float8_products,)


@dataclass(frozen=True, kw_only=True)
class BatchRamp:
    """Batch size that grows linearly with the tokens seen, as MT-NLG's (arXiv 2201.11990, section 3.2).

    The ramp ends at `Train.global_batch_size`.
    """

    start: int = setting(low=1, drift=DATA, doc="sequences in the first batch")
    increment: int = setting(low=1, drift=DATA, doc="sequences added at a time")
    tokens: int = setting(low=1, drift=DATA, doc="tokens over which the batch grows")


@dataclass(frozen=True, kw_only=True)
class Train:
    """The training run."""

    steps: int | None = setting(None, low=0, drift=FREE, doc="optimizer updates; set this or tokens")
    tokens: int | None = setting(None, low=1, drift=FREE, doc="tokens to train on; set this or steps")
    seed: int = setting(0, low=0, high=2**32 - 1, drift=DATA, doc="of parameters, data order and dropout")
    seq_len: int = setting(low=1, drift=DATA, doc="tokens per sequence")
    global_batch_size: int = setting(low=1, drift=DATA, doc="sequences per update, whatever the number of devices")
    batch_ramp: BatchRamp | None = setting(None, drift=DATA, doc="smaller batches at the beginning; None: none")
    microbatch_size: int | None = setting(
        None,
        low=1,
        drift=FREE,
        doc="sequences per data shard per microbatch; None: the whole share of the batch, with a pipeline one sequence",
    )
    recompute: Literal["none", "selective", "full"] = setting(
        "none", drift=FREE, doc="what the backward pass computes again: nothing, attention and activations, everything"
    )
    scan_layers: bool | None = setting(
        None,
        drift=FREE,
        doc="one compiled layer in a loop instead of all in line (faster steps); None: if there are many",
    )
    loss_chunk_tokens: int | None = setting(
        None, low=1, drift=FREE, doc="tokens whose logits are in memory at a time; None: chosen by the vocabulary"
    )
    attention: Literal["auto", "xla", "cudnn"] = setting(
        "auto", drift=FREE, doc="attention kernel; auto: cuDNN on a GPU where it supports the shape and the mask"
    )
    context_exchange: Literal["ring", "all_to_all"] = setting(
        "ring", drift=FREE, doc="attention over Mesh.context: keys go round in a ring, or heads are split (Ulysses)"
    )
    dropout: float = setting(0.0, low=0.0, high=0.999, doc="probability on the embeddings and both residual branches")
    objective: Objective | None = setting(None, doc="what is learned; None: @Causal()")
    optimizer: Optimizer | None = setting(None, drift=IMPOSSIBLE, doc="None: @AdamW()")
    offload_optimizer: bool = setting(
        False, drift=FREE, doc="between steps the optimizer's moments live in the memory of the host (slower, smaller)"
    )
    log_every: int = setting(10, low=1, drift=FREE, doc="steps between lines of metrics")
    eval_every: int | None = setting(None, low=1, drift=FREE, doc="steps between evaluations; None: at the end only")
    eval_batches: int = setting(8, low=1, drift=FREE, doc="batches per validation set and evaluation, at most")
    stop_before: float | str | None = setting(
        None,
        low=0.0,
        drift=FREE,
        doc="wall-clock limit: seconds since the start of the process, a duration like '11h50m', or a time like "
        "'2026-11-23T18:00:00' (local where it names no zone); the run saves and stops in time (exit code 4)",
    )


@dataclass(frozen=True, kw_only=True)
class Data:
    """Token stores, made by `mtx data build`. Relative paths start at the working directory."""

    train: dict[str, float] = setting({}, drift=DATA, doc="store -> weight; weights are relative shares of the samples")
    stages: dict[str, dict[str, float]] = setting(
        {},
        drift=DATA,
        doc="blends that replace Data.train later: {'1000 steps': {'STORE': weight}, '2e9 tokens': {...}}; each store "
        "goes on where it stood",
    )
    validation: dict[str, str] = setting({}, drift=FREE, doc="name -> store, evaluated every Train.eval_every steps")
    packing: Literal["windows", "documents"] = setting(
        "windows", drift=DATA, doc="windows: slices of the stream; documents: whole ones, which do not see each other"
    )
    prefetch: int = setting(2, low=1, drift=FREE, doc="batches read ahead of the step")


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """The tokenizer that the stores were built with."""

    path: str | None = setting(
        None,
        drift=FREE,
        doc="SentencePiece .model, tokenizer.json, or folder with encoder.json and vocab.bpe; "
        "None: the one that the first training store carries",
    )


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What is saved and how much of it is kept. The last step is always saved."""

    every_steps: int | None = setting(None, low=1, drift=FREE, doc="steps between checkpoints; None: at the end only")
    keep_last: int = setting(3, low=1, drift=FREE, doc="newest checkpoints kept")
    keep_every: int | None = setting(None, low=1, drift=FREE, doc="checkpoints at multiples of this step stay for ever")
    keep_best: str | None = setting(
        None, drift=FREE, doc="name in Data.validation: the checkpoint with the least loss on it stays, too"
    )
    probe: bool = setting(
        True,
        drift=FREE,
        doc="a checkpoint holds digests of its arrays and the loss of the next step; a resume repeats them",
    )


@dataclass(frozen=True, kw_only=True)
class Health:
    """How a run looks after itself."""

    max_nonfinite: int = setting(
        3, low=0, drift=FREE, doc="steps in a row whose update may be skipped for a gradient that is not finite"
    )
    spike_score: float | None = setting(
        None,
        low=0.0,
        drift=FREE,
        doc="loss above the median by so many robust standard deviations is a spike; None: off",
    )
    spike_window: int = setting(128, low=32, drift=FREE, doc="steps whose losses the median is taken of")
    spike_patience: int = setting(1, low=1, drift=FREE, doc="steps in a row above the threshold that make a spike")
    max_rollbacks: int = setting(
        3, low=0, drift=FREE, doc="times that a run goes back to one checkpoint and skips data; then exit code 3"
    )
    hang_timeout_s: float = setting(
        1800.0,
        low=1.0,
        drift=FREE,
        doc="seconds without progress after which the late process is named and the run ends",
    )
    peer_timeout_s: float = setting(
        20.0, low=1.0, drift=FREE, doc="seconds without a sign of life of a process after which the others end the run"
    )
    straggler_every: int | None = setting(
        100, low=1, drift=FREE, doc="steps between comparisons of the processes' own time; None: never"
    )
    straggler_ratio: float = setting(
        1.5, low=1.0, drift=FREE, doc="a process that takes so many times the median of all is named"
    )
    digest_every: int | None = setting(
        None, low=1, drift=FREE, doc="steps between comparisons of what should be copies of one array; None: never"
    )


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The GPUs that `mtx plan` and `mtx rehearse` look ahead to. A run takes the devices that it finds."""

    gpu: str | None = setting(None, drift=FREE, doc="model of GPU, by its name in the table of `mtx plan --list-gpus`")
    gpus: int | None = setting(None, low=1, drift=FREE, doc="number of GPUs; None: as many as the mesh names")
    gpus_per_host: int = setting(8, low=1, drift=FREE, doc="GPUs of a machine")
    nvlink_domain: int | None = setting(
        None, low=1, drift=FREE, doc="GPUs that reach each other through NVLink; None: as in the GPU's usual system"
    )
    nic_gbps: float | None = setting(
        None, low=0.001, drift=FREE, doc="network, gigabits per second, GPU and direction; None: as in the usual system"
    )
    gpu_hour_price: float | None = setting(
        None,
        low=0.0,
        drift=FREE,
        doc="of one GPU for an hour, in any currency; None: no costs are shown",
    )


@dataclass(frozen=True, kw_only=True)
class Run:
    """The whole run. Its fields are the classes that a config file may set by name."""

    model: Model
    mesh: Mesh
    pipeline: Pipeline
    rules: Rules
    precision: Precision
    train: Train
    data: Data
    tokenizer: Tokenizer
    checkpoint: Checkpoint
    health: Health
    cluster: Cluster
