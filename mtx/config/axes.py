"""The closed lists of axis names: what an array's dimension can mean, and what a mesh is made of."""

LOGICAL_AXES = (
    "layers", "vocab", "embed", "heads", "kv_heads", "head_dim", "mlp", "experts", "batch",
    "router",  # the router's outputs: all experts, on every device
    "seq",  # the sequence inside attention and MLP
    "seq_sp",  # the sequence between blocks
    "positions",  # rows of a table of learned positions
)  # fmt: skip

MESH_AXES = ("pipe", "data", "fsdp", "expert", "context", "tensor")
"""In mesh order: `pipe` outermost, `tensor` innermost (neighbouring devices)."""
