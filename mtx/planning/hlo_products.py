"""The matrix products of a compiled program and their FLOPs.

Decides what a product is: `dot`, inside fusions too, and calls of cuBLAS and oneDNN; and besides, what attention in one
kernel (cuDNN) multiplies.
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


@dataclass(frozen=True)
class AttentionCall:
    """Attention in one kernel: [B, T, N, H] queries on [B, S, K, H] keys.

    Attributes:
        batch: B times N.
        queries: T.
        keys: S.
        width: H.
        is_backward: Whether it computes gradients.
        executions: How often it runs.
    """

    batch: int
    queries: int
    keys: int
    width: int
    is_backward: bool
    executions: int

    @property
    def flops(self) -> int:
        """Of all its executions, masked scores included: two products forward; five backward, one of them again."""
        products = 5 if self.is_backward else 2
        return 2 * products * self.batch * self.queries * self.keys * self.width * self.executions


def read_attention(program: Program) -> list[AttentionCall]:
    """Every call of cuDNN's attention that runs."""
    found = []
    for computation, line in program.find("custom-call"):
        target = re.search(r'custom_call_target="__cudnn\$fmha(\w*)"', line.attributes)
        scores = re.search(r'"intermediate_tensor_shape":.*?"dimensions":\s*\[([^\]]*)\]', line.attributes)
        if target and scores:
            batch, heads, queries, keys = read_integers(scores[1])
            is_backward, times = target[1].endswith("Backward"), program.executions[computation]
            width = line.shapes[0].dims[-1]
            found.append(AttentionCall(batch * heads, queries, keys, width, is_backward, times))
    return found


def count_flops(products: Iterable[Product], classify: Callable[[Product], Hashable]) -> dict[Hashable, int]:
    """FLOPs by class."""
    counts: Counter[Hashable] = Counter()
    for product in products:
        counts[classify(product)] += product.flops
    return dict(counts)
