"""Published training runs of any software, as cases: what the estimates are fitted on and checked against.

Decides how a row of a table of published runs becomes a run on a cluster, and how its figure becomes seconds. The
table keeps to what was published; what a row leaves out is inferred here by the few rules below, and a run says which
of its fields are.

Rules. A family of programs keeps its models: where the key/value heads are fewer than the heads or the MLP is not
4 times the width, the model is Llama-like (gated MLP, RMSNorm, rotary positions, no biases, untied); Nemotron has
squared ReLU, rotary positions, no biases and is untied; BLOOM has ALiBi; the others are GPT-like (biases, learned
positions, tied; untied in the tables of Megatron Core, whose parameter counts show it). Without the split of a
model-parallel size, tensor takes up to 8 of it. Without a microbatch size it is one sequence with a pipeline, else the
largest that fits the GPU; without a word on recomputation there is none if that fits, else all (torchtitan: selective
if that fits, as its own configurations have it). NeMo splits the optimizer's state over data. Layers that are not
published follow from the FLOP/s and the seconds where the table says how the FLOPs were counted; heads from the width,
near 128 each.

Invariant: a run has a case or says why it has none, and no figure is converted by a convention that its source does
not state.

Source of the conventions: arXiv 2104.04473 (appendix) and 2205.05198 (section 5); the FLOPs are `mtx.planning.flops`.
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtx.config import schema
from mtx.errors import UserError
from mtx.optim.adamw import AdamW
from mtx.planning.case import Case, Cluster
from mtx.planning.conventions import find_noted, seconds_per_step
from mtx.planning.hardware import GPUS, Gpu
from mtx.planning.other_memory import estimate_parts

_TEXTS = (
    "id", "source", "source_seen", "hardware", "precision", "zero_or_fsdp", "sequence_parallel", "recompute", "notes",
)  # fmt: skip
_COUNTS = (
    "layers", "hidden", "ffn", "heads", "kv_heads", "head_dim", "vocab", "seq_len", "tp", "pp", "interleave", "cp",
    "ep", "dp", "micro_batch", "global_batch", "num_gpus",
)  # fmt: skip
_NUMBERS = (
    "peak_tflops_dense_bf16", "params_b", "sec_per_iter", "tflops_per_gpu", "mfu_pct", "tokens_per_s_per_gpu",
)  # fmt: skip
COLUMNS = (*_TEXTS, *_COUNTS, *_NUMBERS)
"""That a table must have, in any order."""

_HARDWARE: Mapping[str, Gpu] = {
    "V100-SXM-32GB": GPUS["V100"],
    "A100-SXM-40GB": GPUS["A100-40"],
    "A100-SXM-80GB": GPUS["A100-80"],
    "H100-SXM-80GB": GPUS["H100"],
    # A part of a cloud: more and slower memory, 500 W. Clocks fall with about the square root of a limit of power: more
    # than its cube root, as if voltage always followed the clock, less than the limit itself. An H200 of the same
    # software agrees within 5 %.
    "H100-SXM-96GB-HBM2e-500W": dataclasses.replace(
        GPUS["H100"],
        name="H100-96",
        memory_bytes=96 * 2**30,
        memory_bandwidth=2.4e12,
        measured_flops={name: flops * (500 / 700) ** 0.5 for name, flops in GPUS["H100"].measured_flops.items()},
        watts=500,
    ),
    "H200-SXM": GPUS["H200"],
    "B200": GPUS["B200"],
    "B300": dataclasses.replace(GPUS["GB300"], name="B300", dense_flops=GPUS["B200"].dense_flops, nvlink_domain=8),
    "GB200": GPUS["GB200"],
    "GB300": GPUS["GB300"],
}

_SOFTWARE = (
    ("sc21_t2_zero3", "deepspeed-zero3"),
    ("sc21", "megatron-2021"),
    ("mlm_jan21", "megatron-2021-jan"),
    ("mlm_gpt3", "megatron-2021"),
    ("mlm", "megatron-2020"),
    ("megatron", "megatron-2020"),
    ("korthikanti", "megatron-2022"),
    ("mcore", "megatron-core"),
    ("bloom", "megatron-deepspeed"),
    ("opt", "metaseq"),
    ("glm", "glm"),
    ("nemo_a100", "nemo-2023"),
    ("nemo2407", "nemo-2024"),
    ("nemo", "nemo-2025"),
    ("dgxc", "nemo-2025"),
    ("mbridge", "megatron-bridge"),
    ("mosaic", "mosaic"),
    ("titan", "torchtitan"),
    ("pax_dgxc", "pax-2025"),
    ("pax_old", "pax-2024-04"),
    ("pax", "pax-2024"),
    ("t5x", "t5x"),
    ("llmc", "llm.c"),
    ("nanogpt", "nanogpt"),
    ("modded_nanogpt", "modded-nanogpt"),
)
"""Beginning of an id -> name in `mtx.planning.software`; the first that fits."""


_MEM_GB = 1000 * 2**20
"""nvidia-smi prints MiB, and the column keeps their thousands: its largest, 80, is more GiB than an A100 of 80 GiB has
for programs (79.3)."""

_TOLERANCE = 1.1
"""An estimate up to this share of the GPU's memory fits: what the estimates of memory err by."""


@dataclass(frozen=True)
class PublishedRun:
    """A row.

    Attributes:
        id: Names it.
        row: As published, by column.
        case: The run on its cluster; None: see `skipped`.
        skipped: Why there is no case.
        inferred: Fields of the case that were not published, by column.
        step_seconds: Of one optimizer step; None where nothing that was published can be converted.
        memory_bytes: Of the fullest GPU, as its source measured it.
        is_dense_bf16: Whether it is a dense transformer computed in bfloat16.
        out_of_memory: Whether it did not fit.
    """

    id: str
    row: Mapping[str, str]
    case: Case | None
    skipped: str | None
    inferred: tuple[str, ...]
    step_seconds: float | None
    memory_bytes: float | None
    is_dense_bf16: bool
    out_of_memory: bool

    @property
    def precision(self) -> str:
        """Of the products, as published: 'fp16', 'bf16', 'fp8', ... A case knows 16 bits only."""
        return self.row["precision"]


class _Missing(Exception):
    """A row that cannot be a case; says why."""


def read_runs(path: str | Path) -> list[PublishedRun]:
    """The runs of a table (CSV with a header of COLUMNS), in its order.

    Raises:
        UserError: The file is not there, has no such columns, or a cell is not a number.
    """
    try:
        with open(path, encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            absent = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
            if absent:
                raise UserError(
                    f"{path}:1: no column {', '.join(absent)}: the first line of a table of runs names all of its "
                    f"{len(COLUMNS)} columns, as in benchmarks/data/published_runs.csv"
                )
            return [_read_row(row, f"{path}:{reader.line_num}") for row in reader]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; name a table of runs, a .csv file") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as a table of runs: {error}") from None


def _read_row(row: dict[str, Any], where: str) -> PublishedRun:
    if None in row or None in row.values():
        raise UserError(f"{where}: has more or fewer cells than the header; quote a cell that has commas")
    values: dict[str, float] = {}
    for name in (*_COUNTS, *_NUMBERS):
        if text := row[name].strip():
            values[name] = _number(text, name, where)
    notes = row["notes"]
    case: Case | None = None
    skipped: str | None = None
    inferred: tuple[str, ...] = ()
    try:
        case, inferred = _Reader(row, values).case()
    except (_Missing, UserError) as reason:
        skipped = str(reason)
    memory = find_noted(notes, "mem_gb", _MEM_GB) or find_noted(notes, "mem_gib", 2**30)
    return PublishedRun(
        id=row["id"],
        row=row,
        case=case,
        skipped=skipped,
        inferred=inferred,
        step_seconds=None if case is None else seconds_per_step(case, row, values),
        memory_bytes=memory,
        is_dense_bf16=case is not None and row["precision"] in ("bf16", "bf16-TE"),
        out_of_memory=re.search(r"\bOUT_OF_MEMORY\b|\bOOM(?!\w)(?<!close to OOM)", notes) is not None,
    )


def _number(text: str, name: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf") or (name in _COUNTS and value != int(value)):
        wanted = "a whole number above 0" if name in _COUNTS else "a number above 0"
        raise UserError(f"{where}: {name} is {text!r}, which is not {wanted}; leave out what is not known")
    return value


class _Reader:
    """One row on its way to a case; remembers what was inferred."""

    def __init__(self, row: Mapping[str, str], values: Mapping[str, float]) -> None:
        self.row, self.values, self.notes = row, values, row["notes"]
        self.inferred: list[str] = []
        self.name = f"{row['id']} {_noted_text(row['notes'], 'model')}"

    def case(self) -> tuple[Case, tuple[str, ...]]:
        row, notes = self.row, self.notes
        if row["hardware"] not in _HARDWARE:
            raise _Missing(f"{row['hardware']} is not in the table of GPUs")
        if "MoE" in notes or self.count("ep", 1) > 1:
            raise _Missing("a mixture of experts, whose experts the columns do not describe")
        gpus = self.count("num_gpus")
        model = self.model()
        mesh, share = self.mesh(gpus)
        sharded = row["zero_or_fsdp"]
        software = _software(row)
        half_gradients = (row["precision"] == "fp16" and software != "megatron-2022") or "mp_mode=PURE" in notes
        if "?" in sharded or not sharded:
            self.inferred.append("zero_or_fsdp")
        zero1 = "zero1" in sharded or (not sharded and software.startswith(("nemo", "megatron-bridge")))
        micro = self.count("micro_batch", 0) or int(find_noted(notes, "local_batch") or 0) or None
        batch = self.global_batch(share, micro)
        run = schema.Run(
            model=model,
            mesh=mesh,
            pipeline=schema.Pipeline(virtual_stages=self.count("interleave", 1), head="last"),
            rules=schema.Rules(sequence_parallel=self.sequence_parallel(mesh.tensor), zero=1 if zero1 else 0),
            precision=schema.Precision(compute="bfloat16", gradients="bfloat16" if half_gradients else "float32"),
            train=schema.Train(steps=1, seq_len=self.count("seq_len"), global_batch_size=batch, optimizer=AdamW()),
            data=schema.Data(),
            tokenizer=schema.Tokenizer(),
            checkpoint=schema.Checkpoint(),
            health=schema.Health(),
            cluster=schema.Cluster(),
        )
        case = self.fill(Case.of(run, self.cluster(gpus), software, check=False), micro, batch // share)
        return case, tuple(self.inferred)

    def fill(self, case: Case, micro: int | None, per_shard: int) -> Case:
        """With the microbatch and the recomputation; where they are not published, the first that fits."""
        policies: list[Any] = [re.sub(r"\(.*", "", self.row["recompute"])]
        if not policies[0]:
            self.inferred.append("recompute")
            policies = ["selective" if case.software.startswith("torchtitan") else "none", "full"]
        sizes = [micro] if micro else [1]
        if micro is None:
            self.inferred.append("micro_batch")
            if case.sizes["pipe"] == 1:
                sizes = [size for size in range(per_shard, 0, -1) if per_shard % size == 0] or [1]
        choices = list(itertools.product(policies, sizes))
        spans_machines = "DCN" in self.row["zero_or_fsdp"]
        for recompute, size in choices:
            train = dataclasses.replace(case.run.train, microbatch_size=size, recompute=recompute)
            case = dataclasses.replace(case, run=dataclasses.replace(case.run, train=train))
            if len(choices) == 1 and not spans_machines:
                return case
            if sum(estimate_parts(case).values()) <= _TOLERANCE * case.cluster.gpu.memory_bytes:
                return case
        if spans_machines:
            raise _Missing("its groups of FSDP span machines, how many is not published")
        return case

    def count(self, name: str, default: int | None = None) -> int:
        if name in self.values:
            return int(self.values[name])
        if default is None:
            raise _Missing(f"{name} is not published")
        return default

    def cluster(self, gpus: int) -> Cluster:
        gpu = _HARDWARE[self.row["hardware"]]
        links = re.search(r"OmniPath (\d)(?:x100Gb/node| links/node)", self.notes)
        nic = int(links[1]) * 100e9 / 8 / gpu.nvlink_domain if links else None  # bytes/s of one GPU
        return Cluster.of(
            gpu, gpus, domain=16 if gpu.name == "V100" and "DGX-2" in self.notes else None, nic_bandwidth=nic
        )

    def model(self) -> schema.Model:
        hidden = self.count("hidden")
        padded = re.search(r"vocab padded to (\d+)", self.notes)
        shape: dict[str, Any] = {
            "vocab_size": int(padded[1]) if padded else self.count("vocab"),
            "d_model": hidden,
            "num_layers": self.layers(hidden),
            "num_heads": self.heads(hidden),
            "d_ff": self.count("ffn", 4 * hidden),
            "max_seq_len": self.count("seq_len"),
        }
        heads = shape["num_heads"]
        kv_heads = self.count("kv_heads", heads)
        shape |= {"num_kv_heads": kv_heads, "head_dim": self.count("head_dim", hidden // heads)}
        plain: dict[str, Any] = {"norm": "rmsnorm", "position": "rotary", "use_bias": False, "tie_embeddings": False}
        if "nemotron" in self.name.lower():
            return schema.Model(**shape, **plain | {"activation": "relu", "norm": "layernorm"})
        if kv_heads != heads or shape["d_ff"] != 4 * hidden:
            return schema.Model(**shape, **plain, activation="swiglu")
        position: Any = "alibi" if self.row["id"].startswith("bloom") else "learned"
        tied = not self.row["id"].startswith("mcore")
        return schema.Model(**shape, activation="gelu_tanh", position=position, tie_embeddings=tied)

    def layers(self, hidden: int) -> int:
        if "layers" in self.values or "before formula fix" not in self.notes:
            return self.count("layers")
        # These FLOP/s are 8 * (12 * layers * hidden^2) * tokens: the layers with full recomputation, without the head.
        self.inferred.append("layers")
        tokens = self.count("global_batch") * self.count("seq_len")
        flops = self.values["tflops_per_gpu"] * 1e12 * self.values["sec_per_iter"] * self.count("num_gpus")
        return round(flops / (96 * tokens * hidden**2))

    def heads(self, hidden: int) -> int:
        if "heads" in self.values:
            return self.count("heads")
        self.inferred.append("heads")
        split = self.count("tp", 1)
        whole = [n for n in range(split, hidden + 1, split) if hidden % n == 0]
        if not whole:
            raise _Missing("heads is not published")
        return min(whole, key=lambda n: abs(hidden / n - 128))

    def mesh(self, gpus: int) -> tuple[schema.Mesh, int]:
        """Also the number of data shards."""
        if "tp" not in self.values and (size := find_noted(self.notes, "model_parallel_size")):
            tensor = min(8, int(size))
            pipe = int(size) // tensor
            self.inferred += ["tp", "pp"]
        else:
            tensor, pipe = self.count("tp"), self.count("pp")
        context = self.count("cp", 1)
        share, rest = divmod(gpus, tensor * pipe * context)
        if rest or not share:
            raise _Missing(f"tp {tensor} * pp {pipe} * cp {context} does not divide its {gpus} GPUs")
        sharded = self.row["zero_or_fsdp"]
        fsdp = 1
        if group := re.match(r"fsdp(\d+)(?!\()", sharded):
            fsdp = int(group[1])
        elif sharded.startswith(("fsdp", "zero3")):
            fsdp = share
        if share % fsdp:
            raise _Missing(f"groups of {fsdp} do not divide its {share} data shards")
        if self.count("dp", share // fsdp) not in (share, share // fsdp):
            self.inferred.append("dp")
        return schema.Mesh(pipe=pipe, data=share // fsdp, fsdp=fsdp, context=context, tensor=tensor), share

    def sequence_parallel(self, tensor: int) -> bool:
        said = self.row["sequence_parallel"]
        if said:
            return said == "yes"
        if tensor > 1:
            self.inferred.append("sequence_parallel")
        return _software(self.row) not in ("megatron-2020", "megatron-2021-jan", "megatron-2021", "metaseq", "glm")

    def global_batch(self, share: int, micro: int | None) -> int:
        if "global_batch" in self.values:
            return self.count("global_batch")
        if "local_batch" in self.notes and micro:
            return micro * share
        if size := find_noted(self.notes.replace("GBS ", "GBS="), "GBS"):
            self.inferred.append("global_batch")
            return int(size)
        return self.count("global_batch")


def _noted_text(notes: str, key: str) -> str:
    found = re.search(rf"\b{key}=([^;]*)", notes)
    return found[1].strip() if found else ""


def _software(row: Mapping[str, str]) -> str:
    name = next((name for start, name in _SOFTWARE if row["id"].startswith(start)), None)
    if name is None:  # a new source: by what it looks like
        if row["zero_or_fsdp"].startswith("fsdp"):
            return "torchtitan-compile"
        return {"V100": "megatron-2020", "A100": "megatron-2022"}.get(row["hardware"][:4], "nemo-2025")
    if name == "torchtitan" and "eager" not in f"{row['id']} {row['notes']}":
        return "torchtitan-compile"
    if name in ("pax-2024", "pax-2024-04") and row["precision"].endswith("-TE"):
        return f"{name}-te"
    return name
