"""Measures checkpoints of a config on this machine: how long a save stops the steps, and how fast one is verified.

    python benchmarks/checkpoints.py benchmarks/configs/gpt2_small.gin FOLDER [--set ...] [--saves N] [--out FILE.json]

What is done at a save is what `mtx train` does: the state in its canonical order, digests of its arrays, a copy that is
written while the next steps run. FOLDER is a new one on the disk that is meant; it is left with the checkpoints.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

from train_step import describe_measurement


def main() -> None:
    """Measures and prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="STATEMENT")
    parser.add_argument("--saves", type=int, default=4)
    parser.add_argument("--out", type=Path, help="a file that does not exist yet")
    args = parser.parse_args()
    args.folder.mkdir()
    text = json.dumps(measure(args.config, args.overrides, args.folder, args.saves), indent=1)
    print(text)
    if args.out:
        with args.out.open("x") as file:
            file.write(text + "\n")


def measure(path: str, overrides: list[str], folder: Path, saves: int) -> dict[str, object]:
    """Trains on random tokens and saves between steps."""
    from mtx.config.layout import resolve_mesh
    from mtx.config.reader import load
    from mtx.mesh import make_mesh, start_process

    start_process()
    import jax
    import numpy as np
    from jax.sharding import NamedSharding

    from mtx.checkpoints import manifest
    from mtx.checkpoints.store import Checkpoints
    from mtx.sharding import batch_spec
    from mtx.training.digest import Digester
    from mtx.training.state import Setup
    from mtx.training.step import make_train_step

    run = load(path, overrides).run
    setup = Setup(run, make_mesh(resolve_mesh(run.mesh, jax.device_count())))
    shape = (run.train.global_batch_size, run.train.seq_len + 1)
    tokens = np.random.default_rng(0).integers(0, run.model.vocab_size, shape).astype(np.int32)
    batch = {"tokens": jax.device_put(tokens, NamedSharding(setup.mesh, batch_spec({**setup.rules, "seq": ()}, 2)))}
    batch["learning_rate"] = np.float32(1e-4)
    state = setup.initialize()
    step, digester = make_train_step(setup).lower(state, batch).compile(), Digester(setup.mesh)

    def time_step() -> float:
        nonlocal state
        begin = time.perf_counter()
        state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))
        return time.perf_counter() - begin

    time_step()
    alone = [time_step() for _ in range(3)]
    stalls, digests, meanwhile, stored = [], [], [], []
    with Checkpoints(
        folder, on_stored=lambda step, seconds, size_bytes: stored.append((seconds, size_bytes))
    ) as saving:
        for number in range(1, saves + 1):
            begin = time.perf_counter()
            canonical = setup.canonical.store(state)
            digester(canonical).leaf_digests()
            digests.append(time.perf_counter() - begin)
            assert saving.save(number, canonical, {})
            stalls.append(time.perf_counter() - begin)
            saving.amend({})
            del canonical
            while len(stored) < number:
                meanwhile.append(time_step())
    verified = []
    for number in range(1, saves + 1):
        begin = time.perf_counter()
        assert manifest.verify(folder / str(number)) == []
        verified.append(stored[number - 1][1] / (time.perf_counter() - begin))
    return {
        **describe_measurement(setup.mesh.devices.flat[0].device_kind),
        "checkpoint_bytes": stored[-1][1],
        "step_seconds": {"alone": statistics.median(alone), "while_writing": statistics.median(meanwhile)},
        "stall_seconds": {"first": stalls[0], "later": stalls[1:]},
        "of_which_digests_seconds": digests,
        "stored_seconds": [seconds for seconds, _ in stored],
        "verified_bytes_per_second": verified,
    }


if __name__ == "__main__":
    main()
