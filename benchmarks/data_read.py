"""Tokens per second of shuffled batches from a token store. Prints one JSON object.

    python benchmarks/data_read.py [--tokens 100000000] [--store STORE] [--seconds 3]

Without --store, one of random tokens is made in a temporary folder. Each measurement reads batches for some seconds,
twice: first from a store that was just opened, so that chunks are read and checked, then once more.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from mtx.data import integrity
from mtx.data.arrays import ArrayWriter
from mtx.data.batches import Batches
from mtx.data.build import SHARD_TOKENS, VERSION
from mtx.data.packing import plan
from mtx.data.ramp import BatchSizes
from mtx.data.store import open_store

WINDOWS = (256, 1024, 2048)  # seq_len
BATCH_TOKENS = 1 << 16
MEAN_DOCUMENT = 700


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=100_000_000)
    parser.add_argument("--store", type=Path)
    parser.add_argument("--seconds", type=float, default=3.0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = args.store or make_store(Path(folder) / "store", args.tokens)
        result = {
            "machine": f"{platform.processor() or platform.machine()}, {len(os.sched_getaffinity(0))} CPU cores",
            "store_tokens": open_store(path).num_tokens,
            "reads": [measure(path, n, packing, args.seconds) for packing in ("windows", "documents") for n in WINDOWS],
            "plan": measure_plan(1_000_000, 2048),
        }
    print(json.dumps(result, indent=1))


def measure(path: Path, seq_len: int, packing: Any, seconds: float) -> dict[str, Any]:
    """Mean rate of reading, first with nothing in memory and then again."""
    batch_size = BATCH_TOKENS // seq_len
    sizes = BatchSizes(global_batch_size=batch_size, seq_len=seq_len)
    batches = Batches([(open_store(path), 1.0)], seq_len=seq_len, batch_sizes=sizes, seed=0, packing=packing)
    rates = []
    for _ in range(2):
        begin, step = time.perf_counter(), 0
        while time.perf_counter() - begin < seconds:
            batches.read(step)
            step += 1
        rates.append(step * batch_size * seq_len / (time.perf_counter() - begin))
    return {
        "packing": packing,
        "seq_len": seq_len,
        "batch_size": batch_size,
        "tokens_per_second_first": round(rates[0]),
        "tokens_per_second_again": round(rates[1]),
    }


def measure_plan(num_documents: int, seq_len: int) -> dict[str, Any]:
    """Seconds to plan the packing of many documents, and how full the rows are."""
    lengths = np.random.default_rng(0).lognormal(6, 1, num_documents).astype(np.int64) + 2
    begin = time.perf_counter()
    _, targets, row_ends = plan(lengths.cumsum(), seq_len)
    seconds = time.perf_counter() - begin
    used = (targets.sum() + len(targets)) / (len(row_ends) * (seq_len + 1))
    return {"documents": num_documents, "seq_len": seq_len, "seconds": round(seconds, 3), "slots_used": round(used, 4)}


def make_store(path: Path, num_tokens: int) -> Path:
    """A store of random tokens, without names or texts."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 50000, num_tokens).astype(np.uint16)
    ends = np.append(np.unique(rng.integers(2, num_tokens, num_tokens // MEAN_DOCUMENT)), num_tokens)
    path.mkdir()
    for name, array in (("tokens", tokens), ("document_ends", ends.astype(np.int64))):
        writer = ArrayWriter(path / name, dtype=array.dtype, length=len(array), shard=SHARD_TOKENS)
        writer.append(array)
        writer.close()
    manifest = {"format": "mtx token store", "version": VERSION, "dtype": "uint16", "num_tokens": num_tokens}
    rest = {"num_documents": len(ends), "vocab_size": 50000, "tokenizer_fingerprint": "", "end_of_document_id": 0}
    integrity.seal(path, manifest | rest)
    return path


if __name__ == "__main__":
    main()
