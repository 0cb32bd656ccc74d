"""Blocks to parts, on all the cores of this machine: each part is a file that appears whole or not at all.

Decides what runs where and how far it is. What a part holds is decided in `encode.py`.

Invariant: a part that is there is not made again.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mtx.data.encode import Counts, Encoder, Report, encode_in_worker, read_report, start_worker
from mtx.data.inputs import Block, Selection
from mtx.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a build is: bytes of input as stored, and what was found in them."""

    position: int
    total_bytes: int
    reused_parts: int
    counts: Counts


def encode_all(
    blocks: Iterable[Block],
    total_bytes: int,
    encoder: tuple[str, str | None, Selection],
    parts: Path,
    workers: int,
    on_progress: Callable[[Progress], None],
) -> list[Report]:
    """Encodes the blocks that have no part yet. Returns the reports of all, in order.

    Args:
        blocks: Numbered from 0.
        total_bytes: What is to be read of the inputs, as stored.
        encoder: Arguments of `Encoder`.
        parts: Folder of the parts.
        workers: Processes that encode; 1: this one.
        on_progress: Called after every block.

    Raises:
        UserError: A part is damaged, or a worker died.
    """
    reports: dict[int, Report] = {}
    counts, reused, position = Counts(), 0, 0

    def finish(block: Block, report: Report) -> None:
        nonlocal counts, position
        reports[block.number] = report
        counts = sum(report.counts.values(), counts)
        position = max(position, block.position)
        on_progress(Progress(position=position, total_bytes=total_bytes, reused_parts=reused, counts=counts))

    with _encoding(encoder, workers) as submit:
        running: dict[Future[Report], Block] = {}
        for block in blocks:
            path = part_path(parts, block.number)
            if path.exists():
                reused += 1
                finish(block, read_report(path))
                continue
            running[submit(block, path)] = block
            while len(running) >= 2 * workers:  # enough to keep every worker busy, and a bounded memory
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    finish(running.pop(future), future.result())
        for future, block in running.items():
            finish(block, future.result())
    return [report for _, report in sorted(reports.items())]


def part_path(parts: Path, number: int) -> Path:
    """File of a block's part."""
    return parts / f"{number:08}.npz"


@contextmanager
def _encoding(
    encoder: tuple[str, str | None, Selection], workers: int
) -> Iterator[Callable[[Block, Path], Future[Report]]]:
    """What encodes a block: in this process, or in a pool of others."""
    if workers == 1:
        here = Encoder(*encoder)

        def encode(block: Block, path: Path) -> Future[Report]:
            future: Future[Report] = Future()
            future.set_result(here.encode(block, path))
            return future

        yield encode
        return
    # Spawned, not forked: forking a process that has threads (TensorStore's, the tokenizer's) can deadlock.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=start_worker, initargs=encoder)
    try:
        yield lambda block, path: pool.submit(encode_in_worker, block, path)
    except BrokenProcessPool:
        raise UserError(
            "a worker process died, perhaps for lack of memory; the same command goes on from what is finished, "
            "with fewer --workers if memory was short"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)
