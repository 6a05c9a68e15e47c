"""What every entry of the mixer table promises: causality, separate documents, determinism, gradients, its declared caps."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lcx import registry
from lcx.context import SequenceContext
from lcx.dims import Sizes
from lcx.mesh import make_mesh
from lcx.mixers import MIXERS
from lcx.mixers.attention import Attention
from lcx.parallel import layouts
from lcx.posenc.rope import Rope
from lcx.registry import UserError
from tests.tolerance import assert_close, assert_trees_close, rms_ratio

SIZES = Sizes(D=32, H=4, G=2, K=8, V=64, L=2, dtype="float32", norm_eps=1e-5)
LENGTH = 64
# Where the second document starts. LongNet's pattern is that of the row, so there it starts where the pattern repeats.
CUT, CUTS = 21, {"longnet": 32}
CLASSES = {name: registry.load(MIXERS, name, field="mixer") for name in MIXERS}
SHARDED = [name for name, part in CLASSES.items() if part.caps.sharded]


@functools.cache
def build(name: str, **differences):
    """(graph, parameters) of a tiny mixer; the parameters depend on their shapes only, so that mixers can be compared."""
    part = CLASSES[name]
    config = dataclasses.replace(part.Config(), **(part.tiny() | differences))
    return nnx.split(part(config, SIZES, Rope(Rope.Config(), SIZES.K), rngs=nnx.Rngs(0)))


@functools.cache
def apply(name: str, shards: int = 1, layout: str = "contiguous", packed: bool = False, **differences):
    """(params, x_BSD) -> y_BSD in contiguous order and -> gradients, both compiled; the parameters; the plain function."""
    graph, params = build(name, **differences)
    mesh = make_mesh(seq=shards)
    cut = CUTS.get(name, CUT)
    segments = (np.arange(LENGTH) >= cut).astype(np.int32)[None] + 1
    positions = np.where(segments == 2, np.arange(LENGTH) - cut, np.arange(LENGTH)) if packed else np.arange(LENGTH)[None]

    def run(params, x_BSD):
        with_layout = functools.partial(layouts.convert, mesh=mesh)
        # A shorter row has the first of the positions.
        found = jnp.asarray(positions[:, : x_BSD.shape[1]], jnp.int32)
        ctx = SequenceContext(found, jnp.asarray(segments) if packed else None, "contiguous", mesh)
        y_BSD = nnx.merge(graph, params)(with_layout(x_BSD, "contiguous", layout), ctx.in_layout(layout))
        return with_layout(y_BSD, layout, "contiguous")

    def weighted(params, x_BSD):
        y_BSD = run(params, x_BSD)
        return jnp.sum(y_BSD * jnp.cos(jnp.arange(LENGTH, dtype=jnp.float32))[None, :, None]), y_BSD

    gradients = jax.jit(jax.grad(weighted, argnums=(0, 1), has_aux=True))
    # One program gives both: where only values are asked for, the gradients are cheaper than another compilation.
    return (lambda *args: gradients(*args)[1]), (lambda *args: gradients(*args)[0]), params, run


def params_of(name: str):
    return build(name)[1]


@functools.cache
def hidden() -> jax.Array:
    return jax.random.normal(jax.random.key(1), (1, LENGTH, SIZES.D))


@pytest.mark.parametrize("name", MIXERS)
def test_no_token_sees_a_later_one(name):
    """By gradient: the output at CUT does not depend on any input after it, and does on itself and on earlier ones."""
    _, _, params, run = apply(name)
    grad = jax.jit(jax.grad(lambda x: jnp.sum(run(params, x)[:, CUT] ** 2)))(hidden())
    np.testing.assert_array_equal(grad[:, CUT + 1 :], 0)
    assert np.abs(np.asarray(grad[:, CUT])).min() > 0 and np.abs(np.asarray(grad[:, :CUT])).max() > 0


@pytest.mark.parametrize("name", [n for n in MIXERS if CLASSES[n].caps.bidirectional])
def test_a_bidirectional_form_sees_the_future(name):
    _, _, params, run = apply(name, causal=False)
    grad = jax.jit(jax.grad(lambda x: jnp.sum(run(params, x)[:, CUT] ** 2)))(hidden())
    assert np.abs(np.asarray(grad[:, CUT + 1 :])).max() > 1e-6


@pytest.mark.parametrize("name", MIXERS)
def test_packed_documents_equal_separate_ones(name):
    """The second document of a packed row equals the same tokens in a row of their own (shifted to its start)."""
    run, _, params, _ = apply(name, packed=True)
    alone, *_ = apply(name)
    x_BSD = hidden()
    packed = run(params, x_BSD)
    cut = CUTS.get(name, CUT)
    shifted = jnp.concatenate([x_BSD[:, cut:], jnp.zeros_like(x_BSD[:, :cut])], axis=1)
    assert_close(packed[:, :cut], alone(params, x_BSD)[:, :cut], name="first document")
    assert_close(packed[:, cut:], alone(params, shifted)[:, : LENGTH - cut], name="second document")
    assert rms_ratio(alone(params, x_BSD)[:, cut:], packed[:, cut:]) > 1e-2  # the twin: unpacked, the first leaks in


@pytest.mark.parametrize("name", MIXERS)
def test_it_is_deterministic(name):
    _, grad, params, _ = apply(name, packed=True)
    jax.tree.map(np.testing.assert_array_equal, grad(params, hidden()), grad(params, hidden()))


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
@pytest.mark.parametrize("name", SHARDED)
def test_sharded_equals_whole_with_gradients(name, layout):
    if layout not in CLASSES[name].caps.layouts:
        with pytest.raises(UserError, match=f"layout '{layout}' and this mixer takes {CLASSES[name].caps.layouts[0]}"):
            apply(name, shards=4, layout=layout, packed=True)[0](params_of(name), hidden())
        return
    whole, whole_grad, params, _ = apply(name, packed=True)
    run, grad, *_ = apply(name, shards=4, layout=layout, packed=True)
    assert_close(run(params, hidden()), whole(params, hidden()))
    assert_trees_close(grad(params, hidden()), whole_grad(params, hidden()), gradient=True)
    # The twin: the second shard's tokens changed by a hundredth.
    other = hidden().at[:, LENGTH // 4 : LENGTH // 2].multiply(1.01)
    assert rms_ratio(run(params, other), whole(params, hidden())) > 1e-4


@pytest.mark.parametrize("length", [53, 1])
@pytest.mark.parametrize("name", MIXERS)
def test_a_row_of_any_length_is_the_start_of_a_longer_one(name, length):
    """Values and the gradient of every input token; no mixer looks ahead."""
    _, _, params, run = apply(name)
    x_BSD = hidden()
    start = jnp.cos(jnp.arange(length, dtype=jnp.float32))[None, :, None]

    def both(x_BSD):
        y_BSD = run(params, x_BSD)[:, :length]
        return jnp.sum(y_BSD * start), y_BSD

    of = jax.jit(jax.grad(both, has_aux=True))
    (grad, y_BSD), (long_grad, long_y_BSD) = of(x_BSD[:, :length]), of(x_BSD)
    assert_close(y_BSD, long_y_BSD)
    assert_close(grad, long_grad[:, :length], gradient=True)


@pytest.mark.parametrize("name", [n for n in MIXERS if issubclass(CLASSES[n], Attention) and n != "full"])
def test_every_attention_equals_full_attention(name):
    run, grad, params, _ = apply(name, packed=True)
    full, full_grad, *_ = apply("full", packed=True)
    assert_close(run(params, hidden()), full(params, hidden()))
    assert_trees_close(grad(params, hidden()), full_grad(params, hidden()), gradient=True)


@pytest.mark.parametrize("name", MIXERS)
def test_caps_are_enforced(name):
    part = CLASSES[name]
    problems = part.check(dataclasses.replace(part.Config(), **part.tiny()), SIZES, LENGTH, dict(data=1, fsdp=1, seq=2, tensor=1))
    assert bool(problems) != part.caps.sharded
    assert part.caps.fused == (hasattr(part, "prepare") and hasattr(part, "attend"))
    assert set(part.caps.layouts) <= set(layouts.LAYOUTS)
