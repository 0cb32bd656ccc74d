"""Which XLA flags each jaxlib knows, and which of them a profile sets: an unknown name ends the process at its start.

Versions are those that were tried, in a child process each: 0.10.2, 0.11.2 and 0.12.0.1 (2026-11). Nothing here was
timed on a GPU with mtx: values are the vendor's advice, and what depends on the model is left to the user.

Invariant: a flag is in the table only if each of those versions was asked about it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

TRIED = ("0.10.2", "0.11.2", "0.12.0.1")
"""Of jaxlib, in order. A newer one is taken to know what the last one knows; for an older one nothing is chosen."""

PROFILES = ("throughput", "safe", "debug", "deterministic")
AMPERE, ADA, HOPPER, BLACKWELL = "ampere", "ada", "hopper", "blackwell"
GENERATIONS = (AMPERE, ADA, HOPPER, BLACKWELL)

GPUS = {
    AMPERE: ("a100", "a800", "a40", "a30", "a10"),
    ADA: ("l40s", "l40", "l4"),
    HOPPER: ("h100", "h200", "h800", "h20", "gh200"),
    BLACKWELL: ("b100", "b200", "b300", "gb200", "gb300"),
}
"""Names that `--gpu` takes, by generation."""

TOOLBOX = "https://github.com/NVIDIA/JAX-Toolbox/blob/main/docs/GPU_performance.md"
XLA = "https://github.com/openxla/xla/blob/main/xla/debug_options_flags.cc"
EFFORT = "https://openxla.org/xla/effort_levels"


@dataclass(frozen=True)
class Use:
    """A value that profiles set on GPUs of some generations."""

    value: str
    profiles: tuple[str, ...]
    generations: tuple[str, ...] = GENERATIONS


@dataclass(frozen=True)
class Flag:
    """A flag of XLA.

    Attributes:
        name: Without the dashes.
        meaning: What it does, with the unit of its value.
        source: Where that is said.
        uses: Where a profile sets it; none: only the user does.
        first: First version tried that knows it; None: already the oldest one.
        last: Last version tried that knows it; None: the newest one still does.
    """

    name: str
    meaning: str
    source: str
    uses: tuple[Use, ...] = ()
    first: str | None = None
    last: str | None = None


FLAGS = (
    Flag(
        "xla_gpu_enable_latency_hiding_scheduler",
        "moves collectives so that they run beside matmuls",
        TOOLBOX,
        (Use("true", ("throughput",)), Use("false", ("safe",))),
    ),
    Flag(
        "xla_gpu_enable_command_buffer",
        "kinds of operations that are launched together as CUDA graphs; empty: none",
        TOOLBOX,
        (
            Use("FUSION,CUSTOM_CALL", ("throughput",), (BLACKWELL,)),
            Use("", ("safe", "debug")),
        ),
    ),
    Flag(
        "xla_gpu_disable_async_collectives",
        "collectives that nothing runs beside",
        TOOLBOX,
        (Use("allreduce,allgather,reducescatter,collectivebroadcast,alltoall,collectivepermute", ("safe",)),),
    ),
    Flag(
        "xla_gpu_deterministic_ops",
        "kernels that give the same bits each time, and are not chosen by timing them; slower",
        XLA,
        (Use("true", ("deterministic",)),),
    ),
    Flag(
        "xla_gpu_first_collective_call_warn_stuck_timeout_seconds",
        "seconds after which a first collective that not all have joined is reported",
        XLA,
        (Use("30", ("debug",)),),
    ),
    Flag("xla_gpu_exclude_nondeterministic_ops", "the same bits each time, with kernels still chosen by timing", XLA),
    Flag("xla_gpu_enable_highest_priority_async_stream", "collectives go before matmuls (the default)", TOOLBOX),
    Flag("xla_gpu_enable_pipelined_all_gather", "all-gathers of the next loop turn begin in this one", EFFORT),
    Flag("xla_gpu_enable_pipelined_all_reduce", "all-reduces of a loop turn end in the next one", EFFORT),
    Flag("xla_gpu_enable_pipelined_reduce_scatter", "reduce-scatters of a loop turn end in the next one", EFFORT),
    Flag("xla_gpu_enable_pipelined_p2p", "sends between pipeline stages run beside matmuls", TOOLBOX),
    Flag("xla_gpu_pipeline_all_gather", "default, off, on or explicit", EFFORT, first="0.11.2"),
    Flag("xla_gpu_all_gather_combine_threshold_bytes", "bytes up to which all-gathers are joined", TOOLBOX),
    Flag("xla_gpu_all_reduce_combine_threshold_bytes", "bytes up to which all-reduces are joined", TOOLBOX),
    Flag("xla_gpu_reduce_scatter_combine_threshold_bytes", "bytes up to which reduce-scatters are joined", TOOLBOX),
    Flag("xla_gpu_collective_permute_decomposer_threshold", "bytes from which a permute is split in two", TOOLBOX),
    Flag("xla_gpu_enable_while_loop_double_buffering", "loops are unrolled twice, which saves copies", EFFORT),
    Flag("xla_gpu_enable_all_gather_combine_by_dim", "joins only all-gathers along the same axis", XLA),
    Flag("xla_gpu_enable_reduce_scatter_combine_by_dim", "joins only reduce-scatters along the same axis", XLA),
    Flag(
        "xla_gpu_enable_analytical_sol_latency_estimator", "the scheduler's model of what a collective costs", TOOLBOX
    ),
    Flag("xla_gpu_enable_triton_gemm", "lets autotuning choose Triton for matmuls", XLA),
    Flag("xla_gpu_autotune_level", "0: kernels are not chosen by timing them; 4: the default", XLA),
    Flag("xla_gpu_graph_min_graph_size", "operations that a CUDA graph has at least", XLA),
    Flag("xla_gpu_enable_nccl_user_buffers", "collectives read the arrays themselves; needs NVLS and memory", TOOLBOX),
    Flag("xla_gpu_enable_nccl_comm_splitting", "communicators share what they can: less memory", TOOLBOX),
    Flag("xla_gpu_nccl_collective_max_nchannels", "channels of a collective; 0: NCCL decides", TOOLBOX),
    Flag("xla_gpu_nccl_p2p_max_nchannels", "channels of a send; 0: NCCL decides", TOOLBOX),
    Flag("xla_gpu_nccl_termination_timeout_seconds", "seconds after which a stuck collective ends the process", XLA),
    Flag("xla_gpu_first_collective_call_terminate_timeout_seconds", "seconds: likewise, of the first one", XLA),
    Flag("xla_gpu_executable_warn_stuck_timeout", "seconds after which a program that does not begin is reported", XLA),
    Flag("xla_gpu_use_memcpy_local_p2p", "sends within one process use the copy engines", TOOLBOX),
    Flag("xla_gpu_memory_limit_slop_factor", "percent of memory that the scheduler may plan with", TOOLBOX),
    Flag("xla_gpu_multi_streamed_windowed_einsum", "matmuls in pieces beside their collectives", TOOLBOX),
    Flag("xla_gpu_threshold_for_windowed_einsum_mib", "MiB of a matmul's output from which that is done", TOOLBOX),
    Flag("xla_gpu_per_fusion_autotune_cache_dir", "folder of autotuning results", XLA),
    Flag("xla_gpu_pgle_profile_file_or_directory_path", "a profile that the scheduler takes costs from", TOOLBOX),
    Flag("xla_gpu_cudnn_gemm_fusion_level", "0 to 3: how readily cuDNN's fused matmuls are taken", XLA),
    Flag("xla_disable_hlo_passes", "names of passes that are left out", XLA),
    Flag("xla_dump_to", "folder into which XLA writes its programs", XLA),
    Flag("xla_force_host_platform_device_count", "simulated CPU devices", XLA),
    Flag("xla_gpu_enable_llvm_module_compilation_parallelism", "compiles on several cores", XLA, last="0.10.2"),
    Flag("xla_gpu_experimental_enable_nvshmem", "sends by NVSHMEM", XLA, last="0.10.2"),
)

GONE = {
    "xla_gpu_lhs_enable_gpu_async_tracker": "nothing",
    "xla_gpu_enable_custom_fusions": "nothing",
    "xla_gpu_enable_address_computation_fusion": "nothing",
    "xla_gpu_enable_nccl_per_stream_comms": "nothing",
    "xla_gpu_cudnn_gemm_fusion": "xla_gpu_cudnn_gemm_fusion_level",
    "xla_gpu_enable_triton_softmax_fusion": "nothing: it is always on",
    "xla_gpu_enable_async_all_reduce": "nothing: it is always on",
    "xla_gpu_enable_async_all_gather": "nothing: it is always on",
    "xla_gpu_enable_async_reduce_scatter": "nothing: it is always on",
    "xla_gpu_enable_async_collective_permute": "nothing: it is always on",
    "xla_gpu_enable_async_collectives": "nothing: it is always on (off: xla_gpu_disable_async_collectives)",
    "xla_gpu_graph_level": "xla_gpu_enable_command_buffer",
    "xla_gpu_enable_split_k_autotuning": "nothing",
    "xla_gpu_enable_nvtx": "nothing",
    "xla_gpu_enable_shared_constants": "nothing",
    "xla_gpu_enable_pipelined_collectives": "xla_gpu_enable_pipelined_all_gather and its sisters",
    "xla_gpu_enable_xla_runtime_executable": "nothing",
}
"""Names that public recipes still print and that none of the versions tried knows: what to give instead."""


def generation_of(gpu: str) -> str | None:
    """The generation of a GPU, from its name (`h100`, `NVIDIA H100 80GB HBM3`); None: it is not in the table."""
    words = set(re.split(r"[^a-z0-9]+", gpu.lower()))
    for generation, names in GPUS.items():
        if words & set(names):
            return generation
    return None


def numbers(version: str) -> tuple[int, ...]:
    """A version as numbers to compare: 0.10.2 is before 0.11."""
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0].split(".dev")[0]))


def knows(version: str, flag: Flag) -> bool:
    """Whether a jaxlib, one of those tried or newer, knows a flag; between two that were tried: only what both know."""
    first, last = flag.first or TRIED[0], flag.last or version
    return numbers(first) <= numbers(version) <= numbers(last)


def chosen(profile: str, generation: str, version: str) -> list[tuple[Flag, str]]:
    """The flags of a profile, with values. Nothing for a jaxlib older than those that were tried."""
    return [
        (flag, use.value)
        for flag in FLAGS
        for use in flag.uses
        if profile in use.profiles and generation in use.generations and knows(version, flag)
    ]
