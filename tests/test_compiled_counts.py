"""What the compiled training program executes: counts that decide speed and memory, read from the compiler's own text."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from lcx.context import SequenceContext
from lcx.experiment import sizes_of
from lcx.mesh import make_mesh
from lcx.model import LossConfig
from lcx.planning.hlo import operations
from lcx.train_loop.state import plan_model
from tests.experiments import small

# Sizes that occur nowhere else, so that a shape in the program tells what it is.
LENGTH, WIDTH, VOCAB, CHUNK, LAYERS = 320, 112, 208, 40, 3


@functools.cache
def program(loss_chunk: int = CHUNK, **overrides) -> str:
    """The compiled text of loss and gradients, one row for each data shard."""
    fields = dict(sequence__length=LENGTH, ffns__gated__width=WIDTH, model__layers=LAYERS, block__token_chunk=CHUNK)
    e = small(**(fields | overrides))
    plan, mesh = plan_model(e, sizes_of(e, VOCAB)), make_mesh(**e.mesh_sizes)
    rows = e.mesh_sizes["data"] * e.mesh_sizes["fsdp"]
    tokens_BS = jax.ShapeDtypeStruct((rows, LENGTH), jnp.int32)

    def loss(params, tokens_BS):
        positions_BS = jnp.broadcast_to(jnp.arange(LENGTH, dtype=jnp.int32)[None], tokens_BS.shape)
        ctx = SequenceContext(positions_BS, None, e.layout, mesh)
        weights_BS = jnp.ones(tokens_BS.shape)
        model = nnx.merge(plan.graph, params)
        return model.loss(tokens_BS, tokens_BS, weights_BS, ctx, objective=LossConfig(chunk=loss_chunk))[0]

    with jax.set_mesh(mesh):
        return jax.jit(jax.value_and_grad(loss)).lower(plan.shapes, tokens_BS).compile().as_text()


def hidden_dots(text: str, rows: int) -> int:
    """Executed matrix products whose result is a chunk of feed-forward activations."""
    return sum(op.times for op in operations(text) if op.kind == "dot" and f"[{rows},{WIDTH}]" in op.shape)


@pytest.mark.parametrize("keep", ["attention", "minimal"])
def test_the_feed_forward_runs_forward_twice_not_three_times(keep):
    """A chunk: gate and up forward, the same two again for the backward pass, and the gradient of what they feed."""
    text = program(pattern=("blockwise",), block__remat=keep)
    assert hidden_dots(text, CHUNK) == (2 + 2 + 1) * LAYERS * (LENGTH // CHUNK)


def test_without_remat_and_chunks_it_runs_once():
    text = program(pattern=("blockwise",), block__remat="none", block__token_chunk=0)
    assert hidden_dots(text, LENGTH) == (2 + 1) * LAYERS


def permutes(text: str) -> int:
    """Executed collective permutes."""
    return sum(op.times for op in operations(text) if op.kind.startswith("collective-permute") and not op.kind.endswith("done"))


def test_the_forward_ring_is_not_replayed_when_attention_is_kept():
    """K and V go round 3 hops forward; backward K and V again and their gradients: 6 + 12 a layer, and 6 more when replayed."""
    ring = dict(pattern=("ring",), mesh__seq=4, sequence__layout="contiguous")
    assert permutes(program(block__remat="attention", **ring)) == 18 * LAYERS
    assert permutes(program(block__remat="minimal", **ring)) == 24 * LAYERS


@pytest.mark.parametrize("mixer,shards", [("mamba", 4), ("mamba2", 1)])
def test_the_forward_scan_is_not_replayed_when_its_output_is_kept(mixer, shards):
    """Exponentials, one for each decay: where only layer inputs are kept the scan runs again, over devices its summary too."""
    fields = dict(pattern=(mixer,), ffn="none", mesh__seq=shards, model__layers=2, sequence__length=64)
    decays = lambda keep: sum(op.times for op in operations(program(block__remat=keep, **fields)) if op.kind == "exponential")
    assert decays("attention") < decays("minimal")


def gathers(text: str) -> list[int]:
    """Loop depth of every all-gather."""
    return [op.loops for op in operations(text) if op.kind.startswith("all-gather")]


def test_no_weight_is_gathered_inside_a_chunk_loop():
    """Weights are gathered in the scan over layers (depth 1) and outside, never in a loop over tokens (depth 2)."""
    depths = gathers(program(pattern=("ring",), mesh__fsdp=2, mesh__seq=2, train__batch=2))
    assert depths and max(depths) == 1


# name -> (dimensions of an array that must not exist on a device of s tokens of S, options under which it does).
FORBIDDEN = {
    "S x S": (lambda s: (s, LENGTH), dict(pattern=("full",), mesh__seq=1)),
    "S x F": (lambda s: (s, WIDTH), dict(block__token_chunk=0)),
    "S x V": (lambda s: (s, VOCAB), dict(loss_chunk=LENGTH)),
}
# The chunks of both mixers are one loop; what differs is attention.
CASES = [("S x S", "blockwise", 1), *((name, "ring", 4) for name in FORBIDDEN)]


def holds(text: str, dims: tuple[int, int]) -> bool:
    """Whether an array of the program ends in these two dimensions."""
    return bool(re.search(rf"\[(\d+,)*{dims[0]},{dims[1]}\]", text))


@pytest.mark.parametrize("name,mixer,shards", CASES)
def test_no_quadratic_or_wide_array_at_full_length(name, mixer, shards):
    dims, twin = FORBIDDEN[name]
    fields = dict(pattern=(mixer,), mesh__seq=shards, block__remat="attention")
    assert not holds(program(**fields), dims(LENGTH // shards))
    fields |= twin
    assert holds(program(**fields), dims(LENGTH // fields["mesh__seq"])), "the twin"
