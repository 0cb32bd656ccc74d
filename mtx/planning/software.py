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
        attention: 'auto': as `mtx.nn.attention` chooses; 'fused': one kernel, scores stay on chip; 'unfused': scores
            and weights go through memory.
        pipeline: 'lockstep': every tick lasts as long as the slowest stage's; '1f1b': stages wait for each other only.
        overlaps: Whether gradients and weights travel under the computation.
        tensor_overlaps: Whether what `tensor` exchanges travels in pieces under the products.
        fused: Whether elementwise operations are joined (compilers, hand-written kernels) or run one by one.
    """

    name: str
    doc: str
    attention: Literal["auto", "fused", "unfused"] = "fused"
    pipeline: Literal["lockstep", "1f1b"] = "1f1b"
    overlaps: bool = True
    tensor_overlaps: bool = False
    fused: bool = True


_STACKS = (
    Software(name="mtx", doc="this program", attention="auto", pipeline="lockstep", overlaps=False),
    Software(name="megatron-2020", doc="Megatron-LM, September 2020", attention="unfused", overlaps=False),
    Software(name="megatron-2021-jan", doc="Megatron-LM, January 2021", attention="unfused", overlaps=False),
    Software(name="megatron-2021", doc="Megatron-LM, April 2021 (SC21)", attention="unfused", overlaps=False),
    Software(name="megatron-2022", doc="Megatron-LM with sequence parallelism, 2022", attention="unfused"),
    Software(name="megatron-deepspeed", doc="Megatron-DeepSpeed of BigScience, 2022", attention="unfused"),
    Software(name="megatron-core", doc="Megatron Core on H100, 2024"),
    Software(name="deepspeed-zero3", doc="DeepSpeed ZeRO-3, 2021", attention="unfused"),
    Software(name="metaseq", doc="Metaseq (OPT), 2022", attention="unfused"),
    Software(name="glm", doc="GLM-130B's program, 2022", attention="unfused"),
    Software(name="nemo-2023", doc="NeMo on A100, 2023", tensor_overlaps=True),
    Software(name="nemo-2024", doc="NeMo 24.07", tensor_overlaps=True),
    Software(name="nemo-2025", doc="NeMo 25.01 to 25.04", tensor_overlaps=True),
    Software(name="megatron-bridge", doc="Megatron Bridge, 2025", tensor_overlaps=True),
    Software(name="mosaic", doc="MosaicML's llm-foundry"),
    Software(name="torchtitan", doc="torchtitan, eager", fused=False),
    Software(name="torchtitan-compile", doc="torchtitan with torch.compile"),
    Software(name="pax", doc="Pax (JAX)"),
    Software(name="pax-te", doc="Pax with Transformer Engine"),
    Software(name="t5x", doc="T5X (JAX)"),
    Software(name="llm.c", doc="llm.c"),
    Software(name="nanogpt", doc="nanoGPT with torch.compile"),
    Software(name="modded-nanogpt", doc="modded-nanoGPT"),
)

SOFTWARE: Mapping[str, Software] = {stack.name: stack for stack in _STACKS}
"""By name."""
