"""How long a matrix product takes on a GPU, by its shape.

Decides how shape enters: products are cut into tiles that the multiprocessors share in waves, of which the last one is
not full; filling and draining a tile's pipe takes the time of some more summed length; and a product takes no less than
its factors' way through memory.

Invariant: no product is faster than the fastest one that was measured on its GPU, times a fitted efficiency.
"""

from __future__ import annotations

import math

from mtx.planning.constants import Constants
from mtx.planning.hardware import Gpu
from mtx.planning.hlo_products import Product

TILES = ((256, 128), (128, 256), (128, 128), (128, 64), (64, 128), (64, 64))
"""Rows and columns that a multiprocessor computes at a time, of which libraries choose the best."""
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8": 1}


def fastest_flops(gpu: Gpu, dtype: str) -> float:
    """FLOP/s of the fastest product: measured, or as the data sheet has it times what its relatives reach."""
    if dtype == "float32":
        return gpu.float32_flops * _reach(gpu)
    name = "float16" if dtype == "bfloat16" and "bfloat16" not in gpu.dense_flops else dtype
    if name not in gpu.dense_flops:
        name = "float16"
    return gpu.measured_flops.get(name) or gpu.dense_flops[name] * _reach(gpu)


def _reach(gpu: Gpu) -> float:
    measured = gpu.measured_flops.get("bfloat16")
    return 0.85 if measured is None else measured / gpu.dense_flops["bfloat16"]


def product_seconds(product: Product, gpu: Gpu, dtype: str, constants: Constants) -> float:
    """Seconds of all executions of a product.

    Args:
        dtype: Of its factors.
    """
    rate = fastest_flops(gpu, dtype) * constants.matmul_efficiency
    size = max(
        product.rows
        * product.columns
        / (math.ceil(product.rows / r) * r * math.ceil(product.columns / c) * c)
        * _wave_share(product.batch * math.ceil(product.rows / r) * math.ceil(product.columns / c), gpu.multiprocessors)
        * _reuse(r, c)
        for r, c in TILES
    )
    filled = product.contracted / (product.contracted + constants.matmul_fill)
    numbers = product.rows * product.contracted + product.contracted * product.columns + product.rows * product.columns
    memory = product.batch * numbers * BYTES[dtype] / (gpu.memory_bandwidth * constants.memory_efficiency)
    return max(product.flops / (rate * size * filled), memory * product.executions)


def _wave_share(tiles: int, multiprocessors: int) -> float:
    waves = tiles / multiprocessors
    return waves / math.ceil(waves)


def _reuse(rows: int, columns: int) -> float:
    """Small tiles read more per product than large ones."""
    return (1 / 384 + 1 / 192) / (1 / 384 + 1 / rows + 1 / columns) * 1.0 if rows * columns < 256 * 128 else 1.0
