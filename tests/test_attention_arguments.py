"""Arguments of attention that do not fit together raise one line that says which, what it is and what it needs."""

import jax.numpy as jnp
import pytest

from lcx.ops.attention import attention
from lcx.ops.types import Mask, contiguous
from lcx.registry import UserError

WRONG = {
    "q_BSHK has shape": dict(q=(2, 8, 4)),
    "k_BTGK has dtype int32": dict(k_dtype=jnp.int32),
    "k_BTGK has dtype bfloat16 and q_BSHK float32": dict(k_dtype=jnp.bfloat16),
    "k_BTGK has shape .* needs B=2, K=4": dict(k=(2, 8, 2, 3)),
    "v_BTGK has shape": dict(v=(2, 9, 2, 4)),
    "H=4 query heads cannot be divided among G=3": dict(k=(2, 8, 3, 4), v=(2, 8, 3, 4)),
    "mask='causal'": dict(mask="causal"),
    "order_k describes 7 tokens": dict(order_k=contiguous(7)),
    "order_q=.* int array": dict(order_q=jnp.zeros(3, jnp.int32)),
    "segments_k_BT is missing": dict(segments_q_BS=jnp.ones((2, 8), jnp.int32)),
    "segments_q_BS is float32": dict(segments_q_BS=jnp.ones((2, 8)), segments_k_BT=jnp.ones((2, 8), jnp.int32)),
    "sink_BT is given but": dict(sink_BT=jnp.ones((2, 8), bool)),
    "alibi_slopes_H has shape": dict(alibi_slopes_H=jnp.ones(2)),
    "softcap=-1.0": dict(softcap=-1.0),
    "scale=0": dict(scale=0),
    "did you mean 'chunked'": dict(implementation="chunkd"),
}


@pytest.mark.parametrize("message", WRONG)
def test_mistakes_are_one_line(message):
    options = dict(mask=Mask()) | WRONG[message]
    shapes = [options.pop("q", (2, 8, 4, 4)), options.pop("k", (2, 8, 2, 4)), options.pop("v", (2, 8, 2, 4))]
    kinds = [jnp.float32, options.pop("k_dtype", jnp.float32), jnp.float32]
    with pytest.raises(UserError, match=message) as error:
        attention(*(jnp.ones(shape, kind) for shape, kind in zip(shapes, kinds, strict=True)), **options)
    assert "\n" not in str(error.value)
