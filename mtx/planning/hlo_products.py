"""The matrix products of a compiled program and their FLOPs.

Decides what a product is: `dot`, inside fusions too, and calls of cuBLAS and oneDNN. Attention in one kernel (cuDNN) is
not seen as products.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass

from mtx.planning.hlo import Instruction, Program, read_integers


@dataclass(frozen=True)
class Product:
    """A (batched) matrix product, [rows, contracted] x [contracted, columns].

    Attributes:
        batch: Number of independent products.
        executions: How often it runs.
    """

    batch: int
    rows: int
    contracted: int
    columns: int
    executions: int

    @property
    def flops(self) -> int:
        """Of all its executions; a multiply-add is 2."""
        return 2 * self.batch * self.rows * self.contracted * self.columns * self.executions


def read_products(program: Program) -> list[Product]:
    """Every matrix product that runs: `dot`, in fusions too, and calls of cuBLAS and oneDNN.

    Raises:
        ValueError: A call of a library does not say over which dims it sums.
    """
    found = []
    for computation, line in program.find("dot", "custom-call"):
        target = re.search(r'custom_call_target="([^"]*)"', line.attributes)
        if target and not re.search(r"gemm|matmul", target[1]):
            continue
        lhs, rhs = (program.computations[computation][name].shapes[0] for name in line.operands[:2])
        summed = [lhs.dims[d] for d in _contracting_dims(line, len(lhs.dims))]
        contracted, result = math.prod(summed), line.shapes[0]
        # rows * columns * batch = result, rows * batch = lhs / contracted, columns * batch = rhs / contracted
        rows_batch, columns_batch = lhs.size // contracted, rhs.size // contracted
        batch = rows_batch * columns_batch // result.size
        times = program.executions[computation]
        found.append(Product(batch, rows_batch // batch, contracted, columns_batch // batch, times))
    return found


def _contracting_dims(line: Instruction, num_dims: int) -> tuple[int, ...]:
    if dims := re.search(r"lhs_contracting_dims=\{([\d,]*)\}", line.attributes):
        return read_integers(dims[1])
    if dims := re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', line.attributes):  # cuBLAS
        return read_integers(dims[1])
    config = re.search(r"backend_config=(\{.*\})", line.attributes)
    onednn = json.loads(config[1]).get("onednn_matmul_config") if config else None
    if onednn is None:
        raise ValueError(f"{line.name}: over which dims does it sum? {line.attributes[:300]}")
    return (num_dims - 2,) if onednn.get("transpose_a") else (num_dims - 1,)


def count_flops(products: Iterable[Product], classify: Callable[[Product], Hashable]) -> dict[Hashable, int]:
    """FLOPs by class."""
    counts: Counter[Hashable] = Counter()
    for product in products:
        counts[classify(product)] += product.flops
    return dict(counts)
