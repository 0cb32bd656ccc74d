"""What the backward pass computes again of attention in cuDNN's kernel."""

import jax
import jax.numpy as jnp
import pytest

from mtx.nn.attention import attend_cudnn
from mtx.training.remat import rematerialize


@pytest.mark.parametrize(("recompute", "forward"), [("none", 1), ("selective", 1), ("full", 2)])
def test_selective_keeps_what_the_kernel_of_cudnn_computed(monkeypatch, recompute, forward):
    from jax._src.cudnn import fused_attention_stablehlo as kernels

    monkeypatch.setattr(kernels, "check_compute_capability", lambda wanted: float(wanted) <= 9.0)
    monkeypatch.setattr(kernels, "check_cudnn_version", lambda: 91200)

    def layer(x_BTNH):
        return attend_cudnn(jnp.sin(x_BTNH), x_BTNH, x_BTNH)

    layer = rematerialize(layer, recompute, (), scanned=False)
    gradient = jax.jit(jax.value_and_grad(lambda x_BTNH: layer(x_BTNH).astype(jnp.float32).sum()))
    shape = jax.ShapeDtypeStruct((1, 64, 2, 8), jnp.bfloat16)
    text = gradient.trace(shape).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@__cudnn$fmhaSoftmax(") == forward
    assert text.count("@__cudnn$fmhaSoftmaxBackward(") == 1
