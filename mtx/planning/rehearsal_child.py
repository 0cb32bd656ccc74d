"""The process that compiles: the step of `mtx train`, for GPUs that are not there.

    python -m mtx.planning.rehearsal_child FOLDER

FOLDER holds `request.json` (the config as text, hosts, GPUs per host) and `target.txtpb` (the GPU). The process writes
`program.hlo` (the optimized program), what XLA dumps about its buffers, and last `result.json` there.

Decides nothing about the step: `Setup`, the batch and the jitted function are those that a run is made of.

Invariant: JAX sees no device but those of the described cluster, and the parent has set what must be set before JAX is
imported.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from mtx.config import reader
from mtx.errors import UserError
from mtx.health.parent import end_with_parent
from mtx.mesh import make_mesh
from mtx.training.inputs import describe_train_batch
from mtx.training.state import Setup
from mtx.training.step import make_train_step

REQUEST, TARGET, PROGRAM, RESULT, DUMP = "request.json", "target.txtpb", "program.hlo", "result.json", "dump"

CUDNN_VERSION = 91200
"""9.12: the cuDNN that programs are compiled for; JAX asks for 8.9.4 or later, and for 9.10 for some shapes."""

OPTIONS = {
    # Matrix products in cuBLAS, where they can be read. On a GPU XLA measures which kernel is faster; here is none.
    "xla_gpu_enable_triton_gemm": False,
    "xla_gpu_autotune_level": 0,
    "xla_dump_hlo_as_text": True,
    "xla_dump_hlo_module_re": "jit_step",
}


def allow_cudnn(capability: tuple[int, int]) -> None:
    """Makes JAX decide about cuDNN by the GPU that is compiled for. It would ask this machine, which has none.

    Raises:
        RuntimeError: This version of JAX asks in another way.
    """
    from jax._src.cudnn import fused_attention_stablehlo as attention

    def has(wanted: Any) -> bool:
        return tuple(int(part) for part in str(wanted).split(".")) <= capability

    for name, answer in (("check_compute_capability", has), ("check_cudnn_version", lambda: CUDNN_VERSION)):
        if not hasattr(attention, name):
            raise RuntimeError(f"JAX {jax.__version__} has no {attention.__name__}.{name}: mtx rehearse replaces it")
        setattr(attention, name, answer)


def compile_step(config: str, *, hosts: int, gpus_per_host: int, target: str, dump: Path) -> dict[str, Any]:
    """Compiles the step of a run.

    Args:
        config: Its text.
        target: A `GpuTargetConfigProto`.
        dump: A folder for what XLA says about buffers.

    Returns:
        The program as text, what the compiler says of its memory, and how long it took.
    """
    topology = topologies.get_topology_desc(
        platform="cuda", topology=f"1x{hosts}x{gpus_per_host}", target_config=target
    )
    run = reader.load_text(config, "the config").run
    setup = Setup(run, make_mesh(run.mesh, topology.devices))
    device: Any = topology.devices[0]
    major, minor = str(device.compute_capability).split(".")
    allow_cudnn((int(major), int(minor)))
    begin = time.monotonic()
    lowered = make_train_step(setup).trace(setup.abstract_state, describe_train_batch(setup)).lower()
    lowered_at = time.monotonic()
    compiled = lowered.compile(compiler_options={**OPTIONS, "xla_dump_to": str(dump)})
    end = time.monotonic()
    memory = compiled.memory_analysis()
    return {
        "program": compiled.as_text(),
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "code_bytes": memory.generated_code_size_in_bytes,
        "peak_bytes": memory.peak_memory_in_bytes,
        "lower_seconds": lowered_at - begin,
        "compile_seconds": end - lowered_at,
        "jax": jax.__version__,
    }


def main(folder: Path) -> None:
    """What the process does."""
    end_with_parent()
    request = json.loads((folder / REQUEST).read_text())
    try:
        result = compile_step(**request, target=(folder / TARGET).read_text(), dump=folder / DUMP)
    except UserError as error:
        result = {"error": str(error)}
    else:
        (folder / PROGRAM).write_text(result.pop("program"))
        result["memory_of_compiler_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    (folder / RESULT).write_text(json.dumps(result, allow_nan=False))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
