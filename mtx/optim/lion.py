"""Lion (arXiv 2302.06675): the sign of an interpolated momentum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mtx.config.schema import Optimizer, Schedule, setting
from mtx.optim.chain import Chain

if TYPE_CHECKING:
    import optax


@dataclass(frozen=True, kw_only=True)
class Lion(Chain, Optimizer):
    """Every parameter moves by the learning rate. State: one moment, the size of the parameters.

    The paper takes a rate 3 to 10 times smaller than AdamW's, and a decay larger by the same factor.
    """

    learning_rate: Schedule | float = setting(1e-4, low=0.0, doc="a schedule, or a number for a constant rate")
    weight_decay: float = setting(
        1.0, low=0.0, doc="of matrices and embeddings; decoupled, and times the learning rate: p -= rate * decay * p"
    )
    beta1: float = setting(0.9, low=0.0, high=1.0, doc="share of the momentum in the sign")
    beta2: float = setting(0.99, low=0.0, high=1.0, doc="decay rate of the momentum")

    def rescale(self, axes: Any) -> optax.GradientTransformation:
        import optax

        return optax.scale_by_lion(b1=self.beta1, b2=self.beta2)
