"""What the optimizers share: clip the gradient, rescale it, add the weight decay.

Decides the order of the transformations, their number format and the sign; the files beside it decide how a gradient
is rescaled. JAX and Optax are imported where they are used: a config is read without them.

Convention: the chain returns the direction u, not scaled by the learning rate and pointing up, decoupled weight decay
included. The step descends with `p -= learning_rate * u`. The rate comes in as an argument of the step, so that it
follows the tokens and the batch ramp without a recompilation and without a state of its own.

Invariant: moments, gradients and directions are float32, whatever the parameters are stored in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mtx.config.schema import Run, Schedule, setting
from mtx.optim.decay import decay_mask

if TYPE_CHECKING:
    import optax


@dataclass(frozen=True, kw_only=True)
class Chain:
    """Fields of every optimizer. Not an optimizer itself: `rescale` is the subclass's."""

    learning_rate: Schedule | float = setting(3e-4, low=0.0, doc="a schedule, or a number for a constant rate")
    weight_decay: float = setting(
        0.1, low=0.0, doc="of matrices and embeddings; decoupled, and times the learning rate: p -= rate * decay * p"
    )
    clip_norm: float | None = setting(
        1.0, low=0.0, doc="largest norm of the gradient of all parameters together; None: never clipped"
    )

    def learning_rate_at(self, run: Run, step: int, tokens: int) -> float:
        """Learning rate of an update, float64 on the host.

        Args:
            run: The run that the optimizer belongs to.
            step: Number of the update, from 1.
            tokens: Tokens trained on, those of this update included.
        """
        if step < 1:
            raise ValueError(f"updates are numbered from 1, got {step}")
        rate: Any = self.learning_rate
        return float(rate) if isinstance(rate, int | float) else rate.value(run, step, tokens)

    def rescale(self, axes: Any) -> optax.GradientTransformation:
        """From clipped gradients to directions of a size that the learning rate can be chosen for, float32."""
        raise NotImplementedError

    def transformation(self, params: Any, axes: Any) -> optax.GradientTransformation:
        """The whole chain. Its `init` and `update` are pure, and `update` needs the parameters.

        Args:
            params: Nested dict of `jax.ShapeDtypeStruct`, for optimizers that choose by shape.
            axes: The same nested dict, with a tuple of logical axes per leaf.
        """
        import jax.numpy as jnp
        import optax

        chain = optax.chain(
            optax.identity() if self.clip_norm is None else optax.clip_by_global_norm(self.clip_norm),
            self.rescale(axes),
            optax.add_decayed_weights(self.weight_decay, mask=decay_mask(axes)),
        )

        def to_float32(tree: Any) -> Any:
            return optax.tree.cast(tree, jnp.float32)

        def update(gradients: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
            return chain.update(to_float32(gradients), state, to_float32(params))

        return optax.GradientTransformation(lambda params: chain.init(to_float32(params)), update)
