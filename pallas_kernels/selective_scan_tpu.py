"""The selective scan for TPU (Pallas Mosaic): forward, backward, and what a stretch of tokens does to a state.

Programs run over chunks of tokens in order, and over tiles of 1,024 channels inside; the states of all channels stay in the
chip. The state in front of every chunk is written out for the backward pass. Layouts: `selective_scan_tpu_layout`; the backward
pass: `selective_scan_tpu_backward`. Source: Gu and Dao, "Mamba" (2023), section 3.3.2 and appendix D.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lcx.ops.recurrence import Affine, elapsed, step_sizes
from pallas_kernels import selective_scan_tpu_backward as reverse
from pallas_kernels import selective_scan_tpu_layout as layout
from pallas_kernels.mosaic_tpu import Operand, launch
from pallas_kernels.scan_support import as_given, wrong_kind
from pallas_kernels.scan_tpu import not_here
from pallas_kernels.selective_scan_tpu_cut import (
    GROUPS,
    LANES,
    SLAB,
    Cut,
    chunk_of,
    kept_decays,
)
from pallas_kernels.selective_scan_tpu_layout import everywhere, of_tile, only, rows, step_size, token

# States a channel has at most: each takes a register of 64 for itself, and one for its gradient.
LARGEST_STATE = 32


def refuse(spec, shapes, dtypes, device_kind):
    """TPUs only; whole groups of 128 channels; bf16 and fp32."""
    if (reason := not_here(device_kind)) is not None:
        return reason
    E, N = shapes["A_EN"]
    if E % LANES:
        return f"E={E} channels; it takes multiples of {LANES}, the nearest is {max(LANES, (E + LANES // 2) // LANES * LANES)}"
    if N > LARGEST_STATE:
        return f"N={N} states a channel; it takes at most {LARGEST_STATE}"
    if (reason := wrong_kind(dtypes, ("u_BSE", "dt_BSE", "B_BSN", "C_BSN", "z_BSE"))) is not None:
        return reason
    itemsize = max(jnp.dtype(dtypes[name]).itemsize for name in ("u_BSE", "dt_BSE", "z_BSE") if name in dtypes)
    if chunk_of(E, N, itemsize, device_kind) is None:
        fits = max((n for n in range(N) if chunk_of(E, n, itemsize, device_kind)), default=0)
        return f"E={E} channels of N={N} states take more memory than {device_kind} has; with E={E} it takes at most N={fits}"
    return None


def forward(inputs, initial_state_BEN, *, spec):
    """See `lcx.ops.selective_scan`, "Backends". Keeps the state in front of every chunk, as registers."""
    cut, u = Cut(inputs), inputs.u_BSE
    found = _launch(
        _forward_kernel,
        "lcx_selective_scan",
        cut,
        spec,
        _tokens(cut, inputs) | dict(D=cut.channels(inputs.D_E), initial=cut.state(cut.registers(initial_state_BEN))),
        outputs=dict(y=cut.tokens(jax.ShapeDtypeStruct(u.shape, u.dtype)), starts=cut.starts(), state=cut.state()),
        scratch=dict.fromkeys(("spread_dt", "spread_x", "spread_y"), cut.spread())
        | dict.fromkeys(("across_B", "across_C"), cut.across())
        | dict(turned_B=cut.turned(inputs.B_BSN), turned_C=cut.turned(inputs.C_BSN)),
        operations=7,
    )
    return found["y"], cut.states(found["state"]), found["starts"]


def backward(inputs, residuals, dy_BSE, dfinal_state_BEN, *, spec):
    """See `lcx.ops.selective_scan`, "Backends"."""
    cut = Cut(inputs, reverse=True)
    like = lambda x: cut.tokens(jax.ShapeDtypeStruct(x.shape, x.dtype))
    outputs = dict(du=like(inputs.u_BSE), ddt=like(inputs.dt_BSE), dstate=cut.state(), dA=cut.state(), dD=cut.channel_sums())
    outputs |= dict(dB=cut.sums(), dC=cut.sums())
    outputs |= {} if inputs.z_BSE is None else dict(dz=like(inputs.z_BSE))
    outputs |= {} if inputs.dt_bias_E is None else dict(dbias=cut.channel_sums())
    spread = ["spread_dt", "spread_x", "spread_dy", "spread_gB", "spread_mA"]
    spread += [] if inputs.z_BSE is None else ["spread_y", "slope_z"]
    spread += ["slope_dt"] if spec.dt_softplus else []
    found = _launch(
        reverse.kernel,
        "lcx_selective_scan_backward",
        cut,
        spec,
        _tokens(cut, inputs)
        | dict(D=cut.channels(inputs.D_E), dy=cut.tokens(dy_BSE), starts=cut.starts(residuals))
        | dict(dfinal=cut.state(cut.registers(dfinal_state_BEN)), rate=cut.rates(inputs.A_EN)),
        outputs=outputs,
        scratch=dict.fromkeys(spread, cut.spread())
        | dict.fromkeys(("across_B", "across_C", "sum_B", "sum_C"), cut.across())
        | dict(turned_B=cut.turned(inputs.B_BSN), turned_C=cut.turned(inputs.C_BSN))
        | dict(
            history=pltpu.VMEM((cut.chunk + 1, cut.N, GROUPS, LANES), jnp.float32),
            decays=pltpu.VMEM((cut.chunk, max(1, kept_decays(cut.N)), GROUPS, LANES), jnp.float32),
            chunk_dA=pltpu.VMEM((cut.N, GROUPS, LANES), jnp.float32),
            products=pltpu.VMEM((2 * cut.N * SLAB, LANES), jnp.float32),
        ),
        operations=22,
    )
    gradients = inputs._replace(
        u_BSE=found["du"],
        dt_BSE=found["ddt"],
        A_EN=cut.states(found["dA"].sum(0)),
        B_BSN=cut.by_map(found["dB"]),
        C_BSN=cut.by_map(found["dC"]),
        D_E=cut.by_channel(found["dD"]),
        z_BSE=found.get("dz"),
        dt_bias_E=cut.by_channel(found["dbias"]) if "dbias" in found else None,
        marks=None,
    )
    return as_given(gradients, inputs), cut.states(found["dstate"])


def summary(inputs, dy_BSE=None, *, spec) -> Affine:
    """See `lcx.ops.selective_scan`, "Backends". With `dy_BSE` it is `reverse_summary`: the map of gradients of states."""
    cut, forward = Cut(inputs, reverse=dy_BSE is not None), dy_BSE is None
    read = inputs._replace(C_BSN=None, z_BSE=None) if forward else inputs._replace(u_BSE=None, B_BSN=None)
    found = _launch(
        reverse.stretch_kernel,
        "lcx_selective_scan_summary" if forward else "lcx_selective_scan_reverse_summary",
        cut,
        spec,
        _tokens(cut, read) | dict(dy=cut.tokens(dy_BSE)),
        outputs=dict(state=cut.state()),
        scratch=dict(spread_dt=cut.spread())
        | (
            dict(spread_x=cut.spread(), across_B=cut.across(), turned_B=cut.turned(inputs.B_BSN))
            if forward
            else dict(spread_dy=cut.spread(), across_C=cut.across(), turned_C=cut.turned(inputs.C_BSN))
        ),
        operations=5,
    )
    real_BS = None if inputs.marks is None else inputs.marks.real_BS
    dt_BSE = step_sizes(inputs.dt_BSE, inputs.dt_bias_E, spec.dt_softplus, real_BS)
    return Affine(elapsed(dt_BSE, inputs.marks)[..., None], cut.states(found["state"]))


reverse_summary = summary


def _tokens(cut: Cut, inputs) -> dict[str, Operand]:
    """What every kernel reads."""
    arrays = dict(u=inputs.u_BSE, dt=inputs.dt_BSE, z=inputs.z_BSE)
    found = {name: cut.tokens(x) for name, x in arrays.items()}
    found |= dict(B=cut.maps(inputs.B_BSN), C=cut.maps(inputs.C_BSN), A=cut.log2_rates(inputs.A_EN))
    return found | dict(bias=cut.channels(inputs.dt_bias_E), codes=cut.codes(inputs.marks))


# Memory that only some kernels have; `prepare` fills what there is.
OPTIONAL = ("spread_x", "spread_dy", "spread_y", "slope_dt", "slope_z", "across_B", "across_C", "turned_B", "turned_C")


def _launch(kernel, name, cut: Cut, spec, inputs, *, outputs, scratch, operations: int) -> dict[str, jax.Array]:
    """Runs a kernel whose chunks and tiles go in order; `operations` for each token, channel and state."""
    scratch = dict.fromkeys(OPTIONAL) | scratch | dict(columns=cut.columns(inputs["codes"]))
    return launch(
        lambda refs: kernel(refs, cut=cut, spec=spec),
        name,
        grid=cut.grid,
        inputs=inputs,
        outputs=outputs,
        scratch=scratch,
        cost=cut.cost(operations, *(x.array for x in [*inputs.values(), *outputs.values()])),
        ordered=2,
        vmem_bytes=cut.vmem_bytes,
    )


def _forward_kernel(refs, *, cut: Cut, spec):
    chunk, k = pl.program_id(2), pl.program_id(3)
    tile = of_tile(k)

    @pl.when(chunk == 0)
    def begin():
        refs.state[:, tile, :] = refs.initial[:, tile, :]

    refs.starts[...] = refs.state[:, tile, :]
    layout.prepare(refs, cut, k, spec.dt_softplus)

    def step(q, t, h):
        dt, x, y = step_size(refs, q, t), refs.spread_x[token(q, t), :], None
        for n in range(cut.N):
            row = (q * cut.N + n) * 8 + t
            h[n] = jnp.exp2(dt * refs.A[n, tile, :]) * h[n] + x * everywhere(refs.across_B, row)
            added = h[n] * everywhere(refs.across_C, row)
            y = added if y is None else y + added
        refs.spread_y[token(q, t), :] = y

    h = layout.over_tokens(cut, step, tuple(refs.state[n, tile, :] for n in range(cut.N)))
    for n in range(cut.N):
        refs.state[n, tile, :] = h[n]

    def finish(i, _):
        real = layout.real_rows(refs, i)
        for j in range(GROUPS):
            lanes = layout.lanes_of(j)
            y = layout.take(refs.spread_y, i, j) + refs.D[k, :, lanes] * rows(refs.u, i, j)
            if refs.z is not None:
                y = y * layout.gate(rows(refs.z, i, j))[0]
            refs.y[layout.tokens_of(i), lanes] = only(real, y).astype(refs.y.dtype)

    layout.over(cut.chunk // layout.ROWS, finish)
