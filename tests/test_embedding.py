"""The lookup over a mesh equals taking rows of the whole table, in chunks too, with its gradient."""

import jax
import jax.numpy as jnp
import pytest

from lcx import embedding
from tests.tolerance import assert_close

V, D, B, S = 24, 32, 2, 40


def value_and_gradient(fn, table_VD):
    weight_BSD = jax.random.normal(jax.random.key(3), (B, S, D))
    loss = lambda table: (jnp.sum(fn(table) * weight_BSD), fn(table))
    (_, x), grad = jax.jit(jax.value_and_grad(loss, has_aux=True))(table_VD)
    return x, grad


def compare(mesh, shift=0):
    table_VD = jax.random.normal(jax.random.key(0), (V, D))
    tokens_BS = jax.random.randint(jax.random.key(1), (B, S), 0, V)
    expected = value_and_gradient(lambda table: table[tokens_BS], table_VD)
    with jax.set_mesh(mesh):
        found = value_and_gradient(
            lambda table: embedding.embed(table, (tokens_BS + shift) % V, mesh=mesh, dtype=jnp.float32), table_VD
        )
    assert_close(found[0], expected[0])
    assert_close(found[1], expected[1], gradient=True)


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("sizes", [{}, dict(seq=4), dict(data=2, seq=2, tensor=2), dict(fsdp=2, seq=4)], ids=str)
def test_equals_rows_of_the_table(mesh_of, monkeypatch, sizes, chunks):
    """Three chunks do not divide a device's tokens."""
    mesh = mesh_of(**sizes)
    rows = B // mesh.shape["data"] * S
    monkeypatch.setattr(embedding, "LOOKUP_BYTES", -(-4 * embedding.LANES * rows // chunks))
    compare(mesh)


def test_another_token_is_noticed(mesh_of):
    with pytest.raises(AssertionError):
        compare(mesh_of(seq=4), shift=1)


def test_a_long_sequence_is_looked_up_in_chunks(mesh_of):
    """From the compiler: the columns of all tokens never stand there at once."""
    mesh, length = mesh_of(seq=8), 2**20
    table, tokens = jax.ShapeDtypeStruct((V, D), jnp.float32), jax.ShapeDtypeStruct((1, length), jnp.int32)
    with jax.set_mesh(mesh):
        run = jax.jit(lambda t, i: embedding.embed(t, i, mesh=mesh, dtype=jnp.bfloat16))
        text = run.lower(table, tokens).compile().as_text()
    assert f"[8,1,{length // 8},{D // 8}]" not in text and "while" in text


def test_an_id_outside_the_vocabulary_is_a_zero_row(mesh_of):
    mesh = mesh_of(seq=2)
    with jax.set_mesh(mesh):
        x = jax.jit(lambda t, i: embedding.embed(t, i, mesh=mesh, dtype=jnp.float32))(
            jnp.ones((V, D)), jnp.array([[0, V, -1, 2]])
        )
    assert x[0, :, 0].tolist() == [1, 0, 0, 1]
