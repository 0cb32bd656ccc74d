"""How long it takes from a command to the first loss of a training run, and what the time goes to.

    python benchmarks/startup.py [--config RUN.gin] [--rounds 3] [--out FILE]
    python benchmarks/startup.py --layers 4 16 64 [--rehearse configs/runs/mt_nlg_530b.gin ...] [--out FILE]

Without `--layers` and `--rehearse`: imports, and `mtx train` on the text that comes with mtx, each in a process of its
own, one after the other in rounds: cold (an empty compilation cache) and then warm (what the cold one has left there).
A run is ended once its journal says that its first loss was read; `parts` are the journal's.

With them: what tracing, lowering and compiling take. `--layers` compiles the step of the config for this machine's
device with as many layers, in a loop over them; `--rehearse` compiles steps for the clusters that they name.

Seconds of the processor (user and system) stand beside those of the clock: they hold on a machine that others use.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import measuring

ROOT = Path(__file__).resolve().parents[1]
MTX = (sys.executable, "-m", "mtx")
IMPORTS = {
    "python": ("-c", "pass"),
    "mtx --help": ("-m", "mtx", "--help"),
    "jax": ("-c", "import jax"),
    "mtx.training.run": ("-c", "import mtx.training.run"),
}
LIMIT_S = 1800


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "benchmarks/configs/gpt2_small.gin")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, nargs="+", metavar="N")
    parser.add_argument("--rehearse", type=Path, nargs="+", default=[], metavar="RUN.gin")
    parser.add_argument("--out", type=Path, help="a JSON file")
    parser.add_argument("--compile", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.compile is not None:
        print(json.dumps(compile_step(args.config, args.compile)))
        return
    if args.layers or args.rehearse:
        result: dict[str, object] = {
            "layers": {str(count): start_compile(args.config, count) for count in args.layers or ()},
            "rehearsals": {path.stem: rehearse(path) for path in args.rehearse},
        }
    else:
        result = measure_rounds(args.config.resolve(), args.rounds)
    import jax
    from train_step import describe_measurement

    result = {**describe_measurement(jax.devices()[0].device_kind), "config": args.config.name, **result}
    print(json.dumps(result, indent=1))
    if args.out:
        measuring.write_json(args.out, result)


def measure_rounds(config: Path, rounds: int) -> dict[str, object]:
    """Imports and training runs, alternately; of each the median of its rounds, and all of them."""
    found: dict[str, list[dict[str, object]]] = {}
    with tempfile.TemporaryDirectory(prefix="mtx-startup-") as name:
        folder = Path(name)
        run = prepare(config, folder)
        for index in range(rounds):
            for what, arguments in IMPORTS.items():
                found.setdefault(f"import: {what}", []).append(run_to_end([sys.executable, *arguments]))
            cache = folder / f"cache-{index}"
            for what in ("cold", "warm"):
                found.setdefault(f"train: {what}", []).append(train(run, folder / f"{what}-{index}", cache))
    return {what: {"median": median(each), "rounds": each} for what, each in found.items()}


def median(rounds: list[dict[str, object]]) -> dict[str, object]:
    """Of every figure; of the parts of a start each by itself, so that they need not add up."""
    result: dict[str, object] = {}
    for name, value in rounds[0].items():
        values: list[object] = [each[name] for each in rounds]
        if isinstance(value, dict):
            result[name] = median([each for each in values if isinstance(each, dict)])
        else:
            result[name] = round(statistics.median(float(str(each)) for each in values), 3)
    return result


def prepare(config: Path, folder: Path) -> Path:
    """A tokenizer, a store of the text that comes with mtx, and the config with that store as its data."""
    text, select = str(ROOT / "texts/austen.jsonl.gz"), ("--select", "train/*", "--quiet")
    tokenizer, store, run = folder / "tokenizer.model", folder / "store", folder / "run.gin"
    learn = (*MTX, "tokenizer", "train", text, "--vocab-size", "4096", "--out", str(tokenizer), *select)
    build = (*MTX, "data", "build", text, "--tokenizer", str(tokenizer), "--out", str(store), *select)
    for command in (learn, build):
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
    run.write_text(f"include {str(config)!r}\nData.train = {{{str(store)!r}: 1.0}}\n")
    return run


def run_to_end(command: list[str]) -> dict[str, object]:
    """Seconds of the clock and of the processor that a program takes."""
    before, begin = _processor_seconds(), time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
    return {"seconds": time.perf_counter() - begin, "processor_seconds": _processor_seconds() - before}


def train(run: Path, run_dir: Path, cache: Path) -> dict[str, object]:
    """From the command to the first loss; the run is ended then."""
    command = [*MTX, "train", str(run), "--run-dir", str(run_dir), "--set", "Train.steps = 1000", "--quiet"]
    environment = {**os.environ, "MTX_COMPILATION_CACHE": str(cache)}
    before, begin = _processor_seconds(), time.time()
    process = subprocess.Popen(command, env=environment, cwd=ROOT)
    try:
        while (event := _read_start(run_dir)) is None:
            if process.poll() is not None or time.time() - begin > LIMIT_S:
                raise SystemExit(f"{' '.join(command)}: no first loss")
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    parts = event["parts"]
    assert isinstance(parts, dict)
    wall = float(str(event["time"])) - begin
    # From the first loss to the end of the process it has begun with the next step.
    return {"seconds": wall, "processor_seconds": _processor_seconds() - before, "parts": parts}


def _read_start(run_dir: Path) -> dict[str, object] | None:
    journal = run_dir / "journal.jsonl"
    lines = journal.read_text().splitlines(keepends=True) if journal.exists() else []
    events = [json.loads(line) for line in lines if line.endswith("\n")]
    return next((event for event in events if event["event"] == "started"), None)


def _processor_seconds() -> float:
    """User and system, of all children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def start_compile(config: Path, num_layers: int) -> dict[str, object]:
    """`compile_step` in a process of its own, without a compilation cache."""
    command = [sys.executable, __file__, "--config", str(config), "--compile", str(num_layers)]
    environment = {**os.environ, "MTX_COMPILATION_CACHE": ""}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    figures: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return figures


def compile_step(config: Path, num_layers: int) -> dict[str, object]:
    """Seconds of the clock and of the processor for the step of a config with its layers in a loop."""
    from mtx.config.layout import check_layout, resolve_mesh
    from mtx.config.reader import load
    from mtx.mesh import make_mesh, start_process

    start_process()
    import jax

    from mtx.training.inputs import describe_train_batch
    from mtx.training.state import Setup
    from mtx.training.step import make_train_step

    run = load(str(config), [f"Model.num_layers = {num_layers}", "Train.scan_layers = True"]).run
    counts = resolve_mesh(run.mesh, jax.device_count())
    check_layout(run, counts)
    setup = Setup(run, make_mesh(counts))
    state, batch = setup.abstract_state, describe_train_batch(setup)
    clock = [(time.perf_counter(), time.process_time())]
    traced = make_train_step(setup).trace(state, batch)
    clock.append((time.perf_counter(), time.process_time()))
    lowered = traced.lower()
    clock.append((time.perf_counter(), time.process_time()))
    lowered.compile()
    clock.append((time.perf_counter(), time.process_time()))
    return {
        what: {"seconds": after[0] - before[0], "processor_seconds": after[1] - before[1]}
        for what, before, after in zip(("trace", "lower", "compile"), clock, clock[1:])
    }


def rehearse(path: Path) -> dict[str, object]:
    """The step of a run, compiled for its cluster; tracing is part of lowering."""
    command = [*MTX, "rehearse", str(path), "--json", "--quiet"]
    before, begin = _processor_seconds(), time.perf_counter()
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    answer, wall = json.loads(done.stdout), time.perf_counter() - begin
    return {
        "gpus": answer["gpus"],
        "lower_seconds": answer["lower_seconds"],
        "compile_seconds": answer["compile_seconds"],
        "seconds": wall,
        "processor_seconds": _processor_seconds() - before,
    }


if __name__ == "__main__":
    main()
