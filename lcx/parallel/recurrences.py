"""The recurrences and the convolution in front of them over a mesh: the same values and gradients as on one device.

Batch is spread over (data, fsdp), tokens over seq in contiguous order, channels and heads over tensor.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lcx.ops import causal_conv as conv
from lcx.ops import selective_scan as s6
from lcx.ops import ssd as s2d
from lcx.ops.recurrence import marks
from lcx.ops.recurrence_backend import recurrence_backend
from lcx.parallel.halo import from_left
from lcx.parallel.state_passing import scan_over_devices
from lcx.registry import UserError
from lcx.sharding import activation_spec, per_shard


def selective_scan(
    u_BSE: jax.Array,
    dt_BSE: jax.Array,
    A_EN: jax.Array,
    B_BSN: jax.Array,
    C_BSN: jax.Array,
    D_E: jax.Array,
    *,
    mesh: Mesh,
    z_BSE: jax.Array | None = None,
    dt_bias_E: jax.Array | None = None,
    dt_softplus: bool = True,
    segments_BS: jax.Array | None = None,
    implementation: str = "auto",
) -> jax.Array:
    """`lcx.ops.selective_scan.selective_scan` of rows that are spread over the mesh: y_BSE, from a state of zero.

    Raises:
      UserError: as there; a length that does not divide.
    """
    inputs = s6.Inputs(u_BSE, dt_BSE, A_EN, B_BSN, C_BSN, D_E, z_BSE, dt_bias_E)
    s6.check(inputs, segments_BS)
    spec = s6.ScanSpec(bool(dt_softplus))

    def whole(x, segments_BS):
        options = dict(z_BSE=x.z_BSE, dt_bias_E=x.dt_bias_E, dt_softplus=dt_softplus)
        return s6.selective_scan(*x[:6], **options, segments_BS=segments_BS, implementation=implementation)[0]

    def part(x, segments_Bs):
        backend = recurrence_backend("selective_scan", implementation, spec, x, segments_Bs)
        return scan_over_devices(backend, spec, s6.rate_1EN, mesh.shape["seq"], x)

    return _over_mesh("selective_scan", inputs, segments_BS, mesh, whole, part)


def ssd(
    x_BSHK: jax.Array,
    dt_BSH: jax.Array,
    A_H: jax.Array,
    B_BSGN: jax.Array,
    C_BSGN: jax.Array,
    D_H: jax.Array,
    *,
    mesh: Mesh,
    dt_bias_H: jax.Array | None = None,
    dt_softplus: bool = True,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    segments_BS: jax.Array | None = None,
    chunk: int | None = None,
    implementation: str = "auto",
) -> jax.Array:
    """`lcx.ops.ssd.ssd` of rows that are spread over the mesh: y_BSHK, from a state of zero.

    Raises:
      UserError: as there; a length that does not divide.
    """
    inputs = s2d.Inputs(x_BSHK, dt_BSH, A_H, B_BSGN, C_BSGN, D_H, dt_bias_H)
    spec = s2d.SsdSpec(bool(dt_softplus), tuple(dt_limit), chunk)
    s2d.check(inputs, spec, segments_BS)

    def whole(x, segments_BS):
        options = dict(dt_bias_H=x.dt_bias_H, dt_softplus=dt_softplus, dt_limit=dt_limit, chunk=chunk)
        return s2d.ssd(*x[:6], **options, segments_BS=segments_BS, implementation=implementation)[0]

    def part(x, segments_Bs):
        backend = recurrence_backend("ssd", implementation, spec, x, segments_Bs)
        return scan_over_devices(backend, spec, s2d.rate_1H11, mesh.shape["seq"], x)

    return _over_mesh("ssd", inputs, segments_BS, mesh, whole, part)


def causal_conv(
    x_BSE: jax.Array,
    w_EW: jax.Array,
    bias_E: jax.Array | None = None,
    *,
    mesh: Mesh,
    segments_BS: jax.Array | None = None,
    activation: str | None = None,
    implementation: str = "auto",
) -> jax.Array:
    """`lcx.ops.causal_conv.causal_conv` of rows that are spread over the mesh: y_BSE, with zeros in front of each row.

    A document must not go on behind padding: a device whose first token is padding takes nothing from the one in front.

    Raises:
      UserError: as there; a length that does not divide, or shards shorter than the convolution.
    """
    conv.check(x_BSE, w_EW, bias_E, segments_BS, None, activation)
    shards, halo = mesh.shape["seq"], w_EW.shape[1] - 1
    _check_length("causal_conv", x_BSE.shape[1], mesh)

    def local(x_BsE, w_EW, bias_E, segments_Bs):
        initial_BWE = None
        if shards > 1 and halo:
            initial_BWE = from_left(x_BsE, halo, shards=shards)
            if segments_Bs is not None:
                same_BW = from_left(segments_Bs, halo, shards=shards) == segments_Bs[:, :1]
                initial_BWE = jnp.where((same_BW & (segments_Bs[:, :1] != 0))[..., None], initial_BWE, 0)
        given = dict(segments_BS=segments_Bs, initial_BWE=initial_BWE, activation=activation, implementation=implementation)
        return conv.causal_conv(x_BsE, w_EW, bias_E, **given)[0]

    specs = tuple(activation_spec(dims) for dims in ("BSE", "EW", "E", "BS"))
    run = per_shard(local, mesh=mesh, in_specs=specs, out_specs=activation_spec("BSE"))
    return run(x_BSE, w_EW, bias_E, segments_BS)


def _check_length(op: str, S: int, mesh: Mesh) -> None:
    if S % mesh.shape["seq"]:
        raise UserError(f"{op}: S={S} tokens cannot be divided among mesh axis seq={mesh.shape['seq']}")


def _over_mesh(op: str, inputs: Any, segments_BS: Any, mesh: Mesh, whole: Callable, part: Callable) -> jax.Array:
    """A recurrence on every device: `whole(inputs, segments)` where it has all tokens, else `part`, with marks in the inputs."""
    shards = mesh.shape["seq"]
    arrays = {name: x for name, x in inputs._asdict().items() if x is not None}
    _check_length(op, next(iter(arrays.values())).shape[1], mesh)
    specs = {name: activation_spec(name.rpartition("_")[2]) for name in arrays}

    def local(arrays, segments_Bs):
        given = inputs._replace(**arrays)
        if shards == 1:
            return whole(given, segments_Bs)
        previous_B = None
        if segments_Bs is not None:
            left_B = from_left(segments_Bs, 1, shards=shards)[:, 0]
            previous_B = jnp.where(jax.lax.axis_index("seq") == 0, segments_Bs[:, 0], left_B)
        return part(given._replace(marks=marks(segments_Bs, previous_B)), segments_Bs)

    out_specs = next(iter(specs.values()))
    return per_shard(local, mesh=mesh, in_specs=(specs, activation_spec("BS")), out_specs=out_specs)(arrays, segments_BS)
