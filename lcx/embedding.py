"""Token embedding from a table that no device holds whole."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from lcx.sharding import activation_spec, parameter_spec, per_shard

TABLE_AXES = ("fsdp", "seq")
# Bytes of the rows that a device looks up at a time. It holds few columns of many tokens, and a TPU pads them to a whole lane.
LOOKUP_BYTES = 2**27
LANES = 128


def embed(table_VD: jax.Array, tokens_BS: jax.Array, *, mesh: Mesh, dtype: jnp.dtype) -> jax.Array:
    """Rows of the table, x_BSD in `dtype`.

    Every device looks up its own columns for the tokens of the whole (fsdp, seq) group, and one all-to-all turns columns of
    all tokens into all columns of its own tokens. The message is as large as the result, where gathering the table would
    move V x D; the gradient goes back the same way and is summed in fp32 on the shard that owns it.

    Args:
      table_VD: fp32, V over tensor and D over (fsdp, seq).
      tokens_BS: int32; an id outside [0, V) gives a zero row.
      mesh: the device mesh.
      dtype: of the result.
    """
    devices = mesh.shape["fsdp"] * mesh.shape["seq"]

    def lookup(table_vd, tokens_bs):
        rows = table_vd.shape[0]
        ids = lax.all_gather(tokens_bs, TABLE_AXES) if devices > 1 else tokens_bs[None]
        ids = ids - (lax.axis_index("tensor") * rows if mesh.shape["tensor"] > 1 else 0)
        here = (ids >= 0) & (ids < rows)
        x = jnp.where(here[..., None], table_vd[jnp.clip(ids, 0, rows - 1)], 0.0).astype(dtype)
        if mesh.shape["tensor"] > 1:
            x = lax.psum(x, "tensor")
        if devices == 1:
            return x[0]
        return lax.all_to_all(x, TABLE_AXES, split_axis=0, concat_axis=3, tiled=True)[0]

    def local(table_vd, tokens_bs):
        (b, s), columns = tokens_bs.shape, table_vd.shape[1]
        n = -(-devices * b * s * max(columns, LANES) * table_vd.dtype.itemsize // LOOKUP_BYTES)
        c = -(-s // n)
        ids_nbc = jnp.pad(tokens_bs, ((0, 0), (0, n * c - s)), constant_values=-1).reshape(b, n, c).swapaxes(0, 1)
        x_nbcD = lax.map(lambda ids_bc: lookup(table_vd, ids_bc), ids_nbc)
        return x_nbcD.swapaxes(0, 1).reshape(b, n * c, -1)[:, :s]

    specs = (parameter_spec("VD"), activation_spec("BS"))
    return per_shard(local, mesh=mesh, in_specs=specs, out_specs=activation_spec("BSD"))(table_VD, tokens_BS)
