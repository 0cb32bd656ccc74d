"""Adafactor (arXiv 1804.04235): second moments as a row and a column, for models whose moments do not fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mtx.config.schema import IMPOSSIBLE, Optimizer, Schedule, setting
from mtx.optim.chain import Chain
from mtx.optim.decay import stack_axes

if TYPE_CHECKING:
    import optax


@dataclass(frozen=True, kw_only=True)
class Adafactor(Chain, Optimizer):
    """Directions relative to the size of each parameter. State: a row and a column per matrix.

    Without first moment, and with update clipping, as T5 is trained.
    """

    learning_rate: Schedule | float = setting(
        1e-2, low=0.0, doc="a schedule, or a number for a constant rate; relative to the RMS of each parameter"
    )
    weight_decay: float = setting(
        0.0, low=0.0, doc="of matrices and embeddings; decoupled, and times the learning rate: p -= rate * decay * p"
    )
    clip_norm: float | None = setting(
        None, low=0.0, doc="largest norm of the gradient of all parameters together; None: never clipped"
    )
    update_clip: float = setting(1.0, low=1.0, doc="largest RMS of a parameter's rescaled gradient")
    decay_exponent: float = setting(
        0.8, low=0.0, high=1.0, doc="c in 1 - t**-c, the decay rate of the second moments at update t"
    )
    min_dim_to_factor: int = setting(
        128,
        low=1,
        drift=IMPOSSIBLE,
        doc="parameters whose second largest dim is smaller keep their second moments whole",
    )

    def rescale(self, axes: Any) -> optax.GradientTransformation:
        import optax

        return _within_stacks(
            optax.chain(
                optax.scale_by_factored_rms(
                    decay_rate=self.decay_exponent, min_dim_size_to_factor=self.min_dim_to_factor
                ),
                optax.clip_by_block_rms(self.update_clip),
                optax.scale_by_param_block_rms(),
            ),
            axes,
        )


def _within_stacks(transformation: optax.GradientTransformation, axes: Any) -> optax.GradientTransformation:
    """Applies to every layer of a stack on its own what would else see the stack as one parameter."""
    import jax
    import optax

    def repeat(depth: int) -> optax.GradientTransformation:
        if depth == 0:
            return transformation
        inner = repeat(depth - 1)

        def init(params: Any) -> Any:
            # optax.tree.map_params asks with a placeholder, which has no layers, for the structure of the state.
            return jax.vmap(inner.init)(params) if jax.tree.leaves(params) else inner.init(params)

        return optax.GradientTransformation(init, jax.vmap(inner.update))

    def name_stack(path: Any, names: tuple[str, ...]) -> str:
        stacks = stack_axes(names)
        # Two stacks of layers may have different numbers of them: each is on its own.
        return "/".join((path[0].key, *stacks[1:])) if stacks else ""

    labels = jax.tree_util.tree_map_with_path(name_stack, axes, is_leaf=lambda node: isinstance(node, tuple))
    depths = {label: len(label.split("/")) if label else 0 for label in jax.tree.leaves(labels)}
    return optax.partition({label: repeat(depth) for label, depth in depths.items()}, labels)
