"""Muon for the matrices of the layers, AdamW for everything else (arXiv 2502.16982)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mtx.config.schema import Optimizer, setting
from mtx.optim.chain import Chain
from mtx.optim.decay import is_matrix

if TYPE_CHECKING:
    import optax


@dataclass(frozen=True, kw_only=True)
class Muon(Chain, Optimizer):
    """Momentum whose singular values are made equal. State: one moment for matrices, two for the rest.

    The direction of a matrix has the RMS that AdamW's is measured to have, so that one learning rate and one weight
    decay, those of AdamW, serve all parameters.
    """

    momentum: float = setting(0.95, low=0.0, high=1.0, doc="decay rate of the (Nesterov) momentum of matrices")
    iterations: int = setting(5, low=1, doc="Newton-Schulz iterations that make the singular values equal")
    rms: float = setting(0.2, low=0.0, doc="RMS of the direction of a matrix")
    beta1: float = setting(0.9, low=0.0, high=1.0, doc="AdamW's, for the parameters that are no matrix of a layer")
    beta2: float = setting(0.95, low=0.0, high=1.0, doc="AdamW's, for the parameters that are no matrix of a layer")
    eps: float = setting(1e-8, low=0.0, doc="AdamW's, for the parameters that are no matrix of a layer")

    def rescale(self, axes: Any) -> optax.GradientTransformation:
        import jax
        import optax
        from optax import contrib

        def last_two_dims(updates: Any) -> Any:  # the dims before them are layers and experts, each on its own
            return jax.tree.map(lambda _: contrib.MuonDimensionNumbers(-2, -1), updates)

        def label(names: tuple[str, ...]) -> str:
            return "matrix" if names[0] == "layers" and is_matrix(names) else "other"

        def to_rms(updates: Any, params: Any) -> Any:  # an orthogonal m x n matrix has an RMS of max(m, n) ** -0.5
            return jax.tree.map(lambda u: u * (self.rms * max(u.shape[-2:]) ** 0.5), updates)

        matrices = optax.chain(
            contrib.scale_by_muon(beta=self.momentum, ns_steps=self.iterations, weight_dimension_numbers=last_two_dims),
            optax.stateless(to_rms),
        )
        others = optax.scale_by_adam(b1=self.beta1, b2=self.beta2, eps=self.eps)
        labels = jax.tree.map(label, axes, is_leaf=lambda node: isinstance(node, tuple))
        return optax.partition({"matrix": matrices, "other": others}, labels)
