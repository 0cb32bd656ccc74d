"""Measures a PyTorch model's training step on the work that a config of mtx describes.

    python benchmarks/shapes.py CONFIG > case.json
    python benchmarks/peers/train.py plain case.json [--compile] [--recompute] [--microbatch N] [--count] ...

The step is mtx's: mean cross entropy over random tokens, gradients clipped by their global norm, AdamW that decays
matrices only (fused). FLOPs are not counted here; parameters are, so that `compare.py` can see that the work is equal.
Prints one JSON object, whose names are those of `train_step.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from contextlib import nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import measuring
import torch
import torch._functorch.config
from torch import Tensor, nn
from torch.nn import functional as F

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float8": torch.bfloat16}


def make_model(kind: str, shape: dict[str, Any], *, recompute: bool) -> nn.Module:
    """The model of a shape, on the default device and in the default dtype.

    Args:
        kind: 'plain' or 'transformers'.
        shape: `model` of `benchmarks/shapes.py`.
        recompute: Whether the backward pass computes each layer again.
    """
    if kind == "plain":
        from plain import Decoder

        return Decoder(shape, recompute=recompute)
    from transformers_models import Transformers

    return Transformers(shape, recompute=recompute)


def count_parameters(model: nn.Module, shape: dict[str, Any]) -> dict[str, int]:
    """All parameters, and those that each token is multiplied with: no table that is only looked up in."""
    parameters = list(model.parameters())  # a tied table comes once
    lookups = shape["max_seq_len"] * shape["d_model"] * (shape["position"] == "learned")
    if not shape["tie_embeddings"]:
        lookups += shape["vocab_size"] * shape["d_model"]
    matrices = sum(parameter.numel() for parameter in parameters if parameter.ndim >= 2)
    return {"parameters": sum(p.numel() for p in parameters), "matmul_parameters": matrices - lookups}


def make_optimizer(model: nn.Module, settings: dict[str, float]) -> torch.optim.Optimizer:
    """Fused AdamW with the settings of `benchmarks/shapes.py`; gains and biases do not decay."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": settings["weight_decay"]},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    betas = settings["beta1"], settings["beta2"]
    return torch.optim.AdamW(groups, lr=measuring.LEARNING_RATE, betas=betas, eps=settings["eps"], fused=True)


class Trainer:
    """A model, its optimizer and one batch, of which every step takes all microbatches."""

    def __init__(self, case: dict[str, Any], args: argparse.Namespace, device: torch.device):
        self.device, shape = device, case["model"]
        dtype = _DTYPES[args.params or case["params"]]
        torch.manual_seed(0)
        torch.set_default_dtype(dtype)
        with device:
            model = make_model(args.kind, shape, recompute=args.recompute)
        torch.set_default_dtype(torch.float32)
        self.parameters, self.clip_norm = list(model.parameters()), case["optimizer"]["clip_norm"]
        self.counts = count_parameters(model, shape)
        self.optimizer = make_optimizer(model, case["optimizer"])
        compute = _DTYPES[case["compute"]]
        casts = compute != torch.float32 and dtype == torch.float32

        def loss(tokens: Tensor, targets: Tensor) -> Tensor:
            with torch.autocast(device.type, compute) if casts else nullcontext():
                logits = model(tokens)
                return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

        if args.activation_budget is not None:
            torch._functorch.config.activation_memory_budget = args.activation_budget
        self.loss = torch.compile(loss, mode=args.mode) if args.compile else loss
        rows = torch.randint(shape["vocab_size"], (case["batch"], case["seq_len"] + 1), device=device)
        size = args.microbatch or case["microbatch"]
        self.microbatches = [(r[:, :-1].contiguous(), r[:, 1:].contiguous()) for r in rows.split(size)]
        if case["batch"] % size:
            raise ValueError(f"microbatches of {size} do not make up a batch of {case['batch']}")

    def step(self) -> Tensor:
        """One update; the mean loss, which nobody has waited for."""
        total = torch.zeros((), device=self.device)
        for tokens, targets in self.microbatches:
            loss = self.loss(tokens, targets) / len(self.microbatches)
            loss.backward()
            total += loss.detach()
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total

    def wait(self) -> None:
        """Until the device has done all it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def measure(case: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Times the step."""
    is_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if is_gpu else "cpu")
    # float32 is float32 on a CPU; on a GPU what is left of it, beside bfloat16, may run in TF32.
    torch.set_float32_matmul_precision("high" if is_gpu else "highest")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    trainer = Trainer(case, args, device)
    first_begin = time.perf_counter()
    first_loss = float(trainer.step())
    seconds_to_first_step = measuring.seconds_since_start()
    trainer.wait()
    first_seconds = time.perf_counter() - first_begin
    last_loss = torch.tensor(first_loss)

    def run(count: int) -> None:
        nonlocal last_loss
        for _ in range(count):
            last_loss = trainer.step()
        trainer.wait()

    run(max(args.warmup - 1, 0))
    name = "gpu" if is_gpu else "cpu"
    square = torch.randn((measuring.SQUARE[name],) * 2, dtype=_DTYPES[case["compute"]], device=device)

    def multiply(count: int) -> None:
        for _ in range(count):
            square @ square
        trainer.wait()

    group = args.group or {"cpu": 1, "gpu": 4}[name]
    timed = measuring.measure_steps(run, multiply, steps=args.steps, group=group, platform=name)
    step_seconds: Any = timed["step_seconds"]
    return {
        **trainer.counts,
        **timed,
        "tokens_per_second": case["batch"] * case["seq_len"] / step_seconds["median"],
        "compile_seconds": max(first_seconds - step_seconds["median"], 0.0),
        "seconds_to_first_step": seconds_to_first_step,
        "peak_device_bytes": torch.cuda.max_memory_allocated() if is_gpu else None,
        "peak_resident_bytes": measuring.peak_resident_bytes(),
        "first_loss": first_loss,
        "last_loss": float(last_loss),
        "device": torch.cuda.get_device_name() if is_gpu else "cpu",
        "threads": torch.get_num_threads(),
        "environment": measuring.read_environment(),
        "versions": find_versions(),
    }


def find_versions() -> dict[str, str | None]:
    """Of what the figures depend on."""
    versions: dict[str, str | None] = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for name in ("torch", "transformers", "triton"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return versions


def main() -> None:
    """Measures, or counts only, and prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("plain", "transformers"))
    parser.add_argument("case", type=Path, help="what benchmarks/shapes.py prints, in a file")
    parser.add_argument("--compile", action="store_true", help="torch.compile around model and loss")
    parser.add_argument("--mode", default="default", help="of torch.compile, e.g. max-autotune-no-cudagraphs")
    parser.add_argument("--recompute", action="store_true", help="gradient checkpointing of every layer")
    parser.add_argument(
        "--activation-budget", type=float, help="share of activations that torch.compile keeps; default: what it likes"
    )
    parser.add_argument("--microbatch", type=int, help="sequences at a time; default: as many as mtx takes")
    parser.add_argument("--params", choices=("float32", "bfloat16"), help="of the weights; default: as mtx's")
    parser.add_argument("--attention", choices=("flash", "cudnn", "math"), help="kernel; default: PyTorch chooses")
    parser.add_argument("--steps", type=int, default=8, help="groups of steps that count")
    parser.add_argument("--warmup", type=int, default=1, help="steps before those that count")
    parser.add_argument("--group", type=int, help="steps timed together; default: 1 on a CPU, 4 on a GPU")
    parser.add_argument("--count", action="store_true", help="count parameters, build nothing and measure nothing")
    parser.add_argument("--out", type=Path, help="a file that does not exist yet")
    args = parser.parse_args()
    if not args.compile and (args.activation_budget is not None or args.mode != "default"):
        parser.error("--activation-budget and --mode are torch.compile's: they need --compile")
    case = json.loads(args.case.read_text())
    if args.count:
        with torch.device("meta"):
            result = count_parameters(make_model(args.kind, case["model"], recompute=False), case["model"])
    else:
        with choose_kernel(args.attention):
            result = measure(case, args)
    text = json.dumps(result, indent=1)
    print(text)
    if args.out:
        with args.out.open("x") as file:
            file.write(text + "\n")


def choose_kernel(name: str | None) -> Any:
    """A context in which attention has one kernel only; None: PyTorch's own choice."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backends = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "math": SDPBackend.MATH,
    }
    return nullcontext() if name is None else sdpa_kernel(backends[name])


if __name__ == "__main__":
    main()
