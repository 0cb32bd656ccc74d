"""The closed lists of axis names: what an array's dimension can mean, and what a mesh is made of."""

LOGICAL_AXES = (
    "layers", "vocab", "embed", "heads", "kv_heads", "head_dim", "mlp", "experts", "batch", "seq", "seq_sp", "positions",
)  # fmt: skip
"""`seq` is the sequence inside attention and MLP, `seq_sp` the sequence between blocks; `positions` are rows of a table."""

MESH_AXES = ("pipe", "data", "fsdp", "expert", "context", "tensor")
"""In mesh order: `pipe` outermost, `tensor` innermost (neighbouring devices)."""
