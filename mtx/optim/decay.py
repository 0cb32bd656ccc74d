"""Which parameters decay.

Invariant: what a parameter is follows from its logical axes, never from its name or its number of dims.
"""

from __future__ import annotations

from typing import Any

STACKS = ("layers", "experts")
"""Leading axes that hold many parameters of one kind, not a dim of one."""


def stack_axes(axes: tuple[str, ...]) -> tuple[str, ...]:
    """The leading axes along which parameters of one kind are stacked."""
    return axes[:1] + stack_axes(axes[1:]) if axes[:1] and axes[0] in STACKS else ()


def is_matrix(axes: tuple[str, ...]) -> bool:
    """Whether each parameter of the stack has two dims or more: weights and tables, but no gain and no bias."""
    return len(axes) - len(stack_axes(axes)) >= 2


def decay_mask(axes: Any) -> Any:
    """True where weight decay applies: every matrix, the embeddings included, as GPT-3 and Megatron-LM decay them.

    Args:
        axes: Nested dict with a tuple of logical axes per leaf.

    Returns:
        The same nested dict of bool.
    """
    return {key: is_matrix(at) if isinstance(at, tuple) else decay_mask(at) for key, at in axes.items()}
