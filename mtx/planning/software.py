"""Training software whose habits a plan can assume: what its program does that layouts alone do not say.

Decides habits (kernels, schedule, what overlaps) by facts that each project documents; how fast a stack does what all
of them do is its quality, one fitted number of `mtx.planning.constants`.

Invariant: 'mtx' describes the program that this project compiles. It has not been timed on GPUs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Software:
    """Habits of a program.

    Attributes:
        name: As `Case.software` has it.
        doc: What it is.
        attention: 'auto': as `mtx.nn.attention` chooses; 'fused': one kernel written for its GPU, scores stay on chip
            (cuDNN's, FlashAttention-3); 'flash-2' (arXiv 2307.08691), written for Ampere; 'flash', the first ones
            (arXiv 2205.14135, Triton's); 'unfused': scores and weights go through memory.
        pipeline: 'lockstep': every tick lasts as long as the slowest stage's; '1f1b': stages wait for each other only.
        repeats_last: Whether full recomputation repeats the last product of a layer, too, whose result nobody reads.
            JAX leaves it out, and so do PyTorch's checkpoints that stop early.
        splits_hops: Whether shards over `tensor` each send their part to the next stage, not all of them everything.
        selective: What its selective recomputation repeats: 'attention'; 'elementwise': attention, norms and
            activations; 'half': every other product or layer.
        overlaps: Whether gradients and weights travel under the computation.
        tensor_overlaps: Whether what `tensor` and `pipe` exchange travels in pieces under the products.
        shares_adapters: Whether what all GPUs of a machine need comes into it once and not once for each of them.
        fused: Whether elementwise operations are joined (compilers, hand-written kernels) or run one by one.
    """

    name: str
    doc: str
    attention: Literal["auto", "fused", "flash-2", "flash", "unfused"] = "fused"
    pipeline: Literal["lockstep", "1f1b"] = "1f1b"
    repeats_last: bool = True
    splits_hops: bool = True
    selective: Literal["attention", "elementwise", "half"] = "attention"
    overlaps: bool = True
    tensor_overlaps: bool = False
    shares_adapters: bool = True
    fused: bool = True


_STACKS = (
    Software(
        name="mtx",
        doc="this program",
        attention="auto",
        pipeline="lockstep",
        selective="elementwise",
        overlaps=False,
        repeats_last=False,
    ),
    Software(name="megatron-2020", doc="Megatron-LM, September 2020", attention="unfused", overlaps=False),
    Software(name="megatron-2021-jan", doc="Megatron-LM, January 2021", attention="unfused", overlaps=False),
    Software(name="megatron-2021", doc="Megatron-LM, April 2021 (SC21)", attention="unfused", overlaps=False),
    Software(name="megatron-2022", doc="Megatron-LM with sequence parallelism, 2022", attention="unfused"),
    Software(
        name="megatron-deepspeed",
        doc="Megatron-DeepSpeed of BigScience, 2022",
        attention="unfused",
        overlaps=False,
        splits_hops=False,
    ),
    Software(name="megatron-core", doc="Megatron Core 0.8, 2024", tensor_overlaps=True),
    Software(name="deepspeed-zero3", doc="DeepSpeed ZeRO-3, 2021", attention="unfused", shares_adapters=False),
    Software(name="metaseq", doc="Metaseq (OPT), 2022", attention="unfused"),
    Software(name="glm", doc="GLM-130B's program, 2022", attention="unfused"),
    Software(name="nemo-2023", doc="NeMo, 2023", attention="unfused"),
    Software(name="nemo-2024", doc="NeMo 24.07", tensor_overlaps=True),
    Software(name="nemo-2025", doc="NeMo 25.01 to 25.04", tensor_overlaps=True),
    Software(name="megatron-bridge", doc="Megatron Bridge, 2025", tensor_overlaps=True),
    Software(name="mosaic", doc="MosaicML's llm-foundry, 2023", attention="flash", repeats_last=False),
    Software(
        name="torchtitan",
        doc="torchtitan, eager",
        attention="flash-2",
        selective="half",
        fused=False,
        repeats_last=False,
    ),
    Software(
        name="torchtitan-compile",
        doc="torchtitan with torch.compile",
        attention="flash-2",
        selective="half",
        repeats_last=False,
    ),
    Software(name="pax-2024-04", doc="Pax, April 2024", attention="unfused", overlaps=False, repeats_last=False),
    Software(name="pax-2024-04-te", doc="Pax with Transformer Engine, April 2024", overlaps=False, repeats_last=False),
    Software(name="pax-2024", doc="Pax, later in 2024", attention="unfused", repeats_last=False),
    Software(name="pax-2024-te", doc="Pax with Transformer Engine, later in 2024", repeats_last=False),
    Software(name="pax-2025", doc="Pax of NVIDIA's benchmarks 25.01", repeats_last=False),
    Software(name="t5x", doc="T5X", repeats_last=False),
    Software(name="llm.c", doc="llm.c"),
    Software(name="nanogpt", doc="nanoGPT with torch.compile", attention="unfused"),
    Software(name="modded-nanogpt", doc="modded-nanoGPT"),
)

SOFTWARE: Mapping[str, Software] = {stack.name: stack for stack in _STACKS}
"""By name."""
