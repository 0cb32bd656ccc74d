"""Tokens per second of shuffled batches from a token store. Prints one JSON object.

    python benchmarks/data_read.py [--tokens 100000000] [--store STORE] [--seconds 3]

Without --store, one of random tokens is made in a temporary folder; its files are then in the page cache. Three rates:
`first`, from the moment that the store is opened; `again`, a second time, from memory; `beyond_cache`, where memory
holds nothing of the store and every batch is read and checked anew, as with a store that is much larger than the cache.
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
from mtx.data.build import SHARD_TOKENS
from mtx.data.course import Course
from mtx.data.entry import Content, Entry
from mtx.data.packing import plan
from mtx.data.samples import Sources
from mtx.data.store import CACHE_BYTES, FORMAT, VERSION, open_store

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
    """Tokens per second by the kind of reading."""
    batch_size = BATCH_TOKENS // seq_len
    rates: dict[str, Any] = {"packing": packing, "seq_len": seq_len, "batch_size": batch_size}
    for kinds, cache_bytes in ((("first", "again"), CACHE_BYTES), (("beyond_cache",), 0)):
        sources = Sources(cache_bytes=cache_bytes)
        store = sources.open(str(path))
        entry = Entry(
            step=0,
            seed=0,
            seq_len=seq_len,
            packing=packing,
            global_batch_size=batch_size,
            batch_ramp=None,
            train={str(path): 1.0},
            stages={},
            stores={str(path): Content(store.digest, len(sources.samples(store, seq_len, packing)))},
        )
        batches = Batches(Course([entry]), sources)
        for kind in kinds:
            begin, step = time.perf_counter(), 0
            while time.perf_counter() - begin < seconds:
                batches.read(step)
                step += 1
            rates[kind] = round(batches.course.tokens(step) / (time.perf_counter() - begin))
    return rates


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
    manifest = {"format": FORMAT, "version": VERSION, "dtype": "uint16", "num_tokens": num_tokens}
    rest = {"num_documents": len(ends), "vocab_size": 50000, "tokenizer_fingerprint": "", "end_of_document_id": 0}
    integrity.seal(path, manifest | rest)
    return path


if __name__ == "__main__":
    main()
