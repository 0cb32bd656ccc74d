"""How long a matrix product takes on a GPU, by its shape.

Decides how shape enters: products are cut into tiles that the multiprocessors share in waves, of which the last one is
not full; filling and draining a tile's pipe takes the time of some more summed length; and a product takes no less than
its factors' way through memory.

Invariant: no product is faster than the fastest one that was measured on its GPU, times a fitted efficiency.
"""

from __future__ import annotations

from mtx.planning.constants import Constants
from mtx.planning.hardware import Gpu
from mtx.planning.hlo_products import Product

TILES = ((256, 128, 1.0), (128, 256, 1.0), (128, 128, 0.95), (128, 64, 0.85), (64, 128, 0.85), (64, 64, 0.7))
"""Rows and columns that a multiprocessor computes at a time, and how fast: small tiles read more for each product.
Libraries choose the best."""
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
    rows, columns, contracted = product.rows, product.columns, product.contracted
    efficiency = constants.float8_efficiency if dtype == "float8" else constants.matmul_efficiency
    rate = fastest_flops(gpu, dtype) * efficiency
    share = 0.0
    for tile_rows, tile_columns, speed in TILES:
        tiles = product.batch * -(-rows // tile_rows) * -(-columns // tile_columns)
        waves = -(-tiles // gpu.multiprocessors)
        done = product.batch * rows * columns / (waves * gpu.multiprocessors * tile_rows * tile_columns)
        share = max(share, done * speed)
    filled = contracted / (contracted + constants.matmul_fill)
    numbers = rows * contracted + contracted * columns + rows * columns
    memory = product.batch * numbers * BYTES[dtype] / (gpu.memory_bandwidth * constants.memory_efficiency)
    return max(product.flops / (rate * share * filled), memory * product.executions)
