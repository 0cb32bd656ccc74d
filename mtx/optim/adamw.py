"""AdamW (arXiv 1711.05101), with GPT-3's settings as defaults."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mtx.config.schema import Optimizer, setting
from mtx.optim.chain import Chain

if TYPE_CHECKING:
    import optax


@dataclass(frozen=True, kw_only=True)
class AdamW(Chain, Optimizer):
    """Adam with decoupled weight decay. State: two moments, each the size of the parameters."""

    beta1: float = setting(0.9, low=0.0, high=1.0, doc="decay rate of the mean of the gradients")
    beta2: float = setting(0.95, low=0.0, high=1.0, doc="decay rate of the mean of their squares")
    eps: float = setting(1e-8, low=0.0, doc="added to the root of the mean square")

    def rescale(self, axes: Any) -> optax.GradientTransformation:
        import optax

        return optax.scale_by_adam(b1=self.beta1, b2=self.beta2, eps=self.eps)
