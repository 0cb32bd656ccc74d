"""Attention of whole rows: blocks, packed documents, and what cuDNN is told."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import GPT, make_setup

from mtx.errors import UserError
from mtx.nn import blockwise
from mtx.nn.attention import attend_cudnn, choose_kernel
from mtx.nn.blockwise import attend
from mtx.nn.context import Context
from mtx.nn.position import alibi_slopes

HEADS, KV_HEADS, WIDTH = 4, 2, 8


def draw(length, rows=2, seed=0):
    """Queries, keys, values, and the gradient of the output."""
    rng = np.random.default_rng(seed)
    return [
        rng.standard_normal((rows, length, n, WIDTH)).astype(np.float32) for n in (HEADS, KV_HEADS, KV_HEADS, HEADS)
    ]


def pull(q, k, v, d_out, **masks):
    out, back = jax.vjp(lambda *arrays: attend(*arrays, **masks), q, k, v)
    return out, *back(d_out)


def lower(arrays, masks):
    """A program of its own: what `jit` remembers of a function does not know of changed constants."""
    return jax.jit(lambda arrays, masks: pull(*arrays, **masks)).lower(arrays, masks)


def compare(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("length", [61, 64, 8], ids=["a rest", "even", "one block"])
def test_blocks_strips_and_what_is_computed_again_change_nothing(monkeypatch, length):
    """16 blocks of 4 in three strips, with a loop in each, against one block of all."""
    arrays, rng = draw(length), np.random.default_rng(1)
    starts = (rng.random((2, length)) < 0.1) | np.eye(1, length, dtype=bool)
    masks = {
        "segments_BT": np.cumsum(starts, axis=1).astype(np.int32),
        "visible_BT": (rng.random((2, length)) < 0.8) | starts,  # of tokens that see nothing, outputs are arbitrary
        "slopes_N": jnp.array(alibi_slopes(HEADS)),
    }
    expected = lower(arrays, masks).compile()(arrays, masks)
    compare(pull(*arrays, **masks, block=16), expected)  # in line, with the weights kept
    for name, value in (("QUERY_BLOCK", 4), ("KEPT_TOKENS", 8), ("MOST_STRIPS", 3)):
        monkeypatch.setattr(blockwise, name, value)
    program = lower(arrays, masks)
    assert ("while" in program.as_text()) == (length > 8)
    compare(program.compile()(arrays, masks), expected)


def test_packed_documents_are_as_if_they_were_alone():
    arrays, ends = draw(24, rows=1), (5, 6, 17, 24)
    segments = np.repeat(np.arange(4), np.diff((0, *ends)))[None].astype(np.int32)
    packed = pull(*arrays, segments_BT=segments)
    alone = [pull(*(a[:, begin:end] for a in arrays)) for begin, end in zip((0, *ends), ends)]
    compare(packed, [jnp.concatenate(parts, axis=1) for parts in zip(*alone)])


def test_memory_of_long_rows_grows_with_the_tokens_not_with_their_square(monkeypatch):
    for name, value in (("QUERY_BLOCK", 64), ("KEPT_TOKENS", 256)):
        monkeypatch.setattr(blockwise, name, value)

    def temp(length):
        return lower(draw(length, rows=1), {}).compile().memory_analysis().temp_size_in_bytes

    sizes = [temp(length) for length in (1024, 2048)]
    assert sizes[1] < 2.3 * sizes[0]
    assert sizes[1] < HEADS * 2048**2 * 4 / 2  # less than half of the scores


def lower_for_gpu(monkeypatch, width=WIDTH, rows=2, length=64, **masks):
    """What XLA is given for attention and its gradient on a Hopper GPU."""
    from jax._src.cudnn import fused_attention_stablehlo as kernels

    monkeypatch.setattr(kernels, "check_compute_capability", lambda wanted: float(wanted) <= 9.0)
    monkeypatch.setattr(kernels, "check_cudnn_version", lambda: 91200)
    shapes = [jax.ShapeDtypeStruct((rows, length, n, width), jnp.bfloat16) for n in (HEADS, KV_HEADS, KV_HEADS)]
    step = jax.jit(
        jax.grad(lambda q, k, v, masks: attend_cudnn(q, k, v, **masks).astype(jnp.float32).sum(), argnums=(0, 1, 2))
    )
    return step.trace(*shapes, masks).lower(lowering_platforms=("cuda",)).as_text()


def calls(text):
    """For each call of cuDNN its name and the shapes of its operands."""
    found = re.findall(r"custom_call @(__cudnn\$fmha\w+)\(.*?\) .*?: \((.*?)\) ->", text)
    return {name: re.findall(r"tensor<([\w]+)>", operands) for name, operands in found}


SEGMENTS = jax.ShapeDtypeStruct((2, 64), jnp.int32)
VISIBLE = jax.ShapeDtypeStruct((2, 64), jnp.bool_)


@pytest.mark.parametrize(
    "masks",
    [{"segments_BT": SEGMENTS}, {"visible_BT": VISIBLE}, {"segments_BT": SEGMENTS, "visible_BT": VISIBLE}],
    ids=str,
)
def test_masks_enter_the_kernel_of_cudnn_forward_and_backward(monkeypatch, masks):
    plain, masked = calls(lower_for_gpu(monkeypatch)), calls(lower_for_gpu(monkeypatch, **masks))
    assert plain.keys() == {"__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"}
    assert masked.keys() == {"__cudnn$fmhaScaleBiasSoftmax", "__cudnn$fmhaScaleBiasSoftmaxBackward"}
    assert all("2x1x64x64xbf16" in operands for operands in masked.values())
    assert not any("2x1x64x64xbf16" in operands for operands in plain.values())


def test_the_kernel_is_causal_and_takes_any_width(monkeypatch):
    text = lower_for_gpu(monkeypatch, width=20)
    assert all("2x64x4x24xbf16" in operands for operands in calls(text).values())  # filled up to a multiple of 8
    scales = [float(value) for value in re.findall(r"fmha_scale\W+22\W+([\d.]+)", text)]
    assert scales == pytest.approx([20**-0.5] * 2)
    assert len(re.findall(r"mask_type\W+22\W+22CAUSAL", text)) == 2


def test_kernels_by_shape_and_mask():
    comm = make_setup(GPT).context.comm
    facts = {"dtype": jnp.bfloat16, "platform": "gpu", "compute_capability": 9.0}
    plain = {"length": 2048, "masked": False, "alibi": False}

    def chosen(width=128, facts=facts, **changes):
        return choose_kernel(Context(comm, **facts), width, **{**plain, **changes})

    assert chosen() == chosen(width=20) == chosen(width=256) == chosen(masked=True) == "cudnn"
    assert chosen(length=131072) == "cudnn"
    assert chosen(length=131072, masked=True) == chosen(length=2047, masked=True) == chosen(alibi=True) == "xla"
    assert chosen(width=264) == chosen(facts={**facts, "dtype": jnp.float32}) == "xla"
    assert chosen(width=256, facts={**facts, "compute_capability": 8.0}) == "xla"
    with pytest.raises(UserError, match="rows of an even length up to 16384, not 32768"):
        chosen(facts={**facts, "attention": "cudnn"}, length=32768, masked=True)
