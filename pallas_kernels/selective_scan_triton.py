"""The selective scan for GPUs in Triton: forward, backward, and what a stretch of tokens does to a state.

A program goes from token to token with the states of a block of channels in registers: about 8 instructions for each token,
channel and state, where a parallel scan inside a program takes 50. Programs enough come from cutting long rows into segments;
what the segments to the left do to a state is found first, by a kernel that stops where nothing further can change a bit.
Kernels: `selective_scan_triton_forward`, `_stretch`, `_backward`. Source: Gu and Dao, "Mamba" (2023), section 3.3.2, appendix D.
"""

import jax
import jax.numpy as jnp

from lcx.ops.recurrence import Affine, elapsed, step_sizes
from pallas_kernels import selective_scan_triton_cut as cuts
from pallas_kernels import triton_launch
from pallas_kernels.scan_support import as_given, wrong_kind
from pallas_kernels.selective_scan_triton_backward import backward_kernel
from pallas_kernels.selective_scan_triton_cut import Cut
from pallas_kernels.selective_scan_triton_forward import forward_kernel
from pallas_kernels.selective_scan_triton_stretch import stretch_kernel

LARGEST_STATE = 64


def refuse(spec, shapes, dtypes, device_kind):
    """Hopper GPUs; bf16 and fp32; up to 64 states."""
    if (reason := triton_launch.not_here(device_kind)) is not None:
        return reason
    if (N := shapes["A_EN"][1]) > LARGEST_STATE:
        return f"N={N} states a channel; it takes at most {LARGEST_STATE}"
    return wrong_kind(dtypes, ("u_BSE", "dt_BSE", "B_BSN", "C_BSN", "z_BSE"))


def forward(inputs, initial_state_BEN, *, spec):
    """See `lcx.ops.selective_scan`, "Backends". Keeps the state in front of every chunk."""
    cut, u = Cut(inputs, spec), inputs.u_BSE
    length, segments = cut.forward_segments()
    before = {} if segments == 1 else _segments(cut, length, segments)
    found = triton_launch.launch(
        forward_kernel,
        "lcx_selective_scan",
        grid=(cut.E_padded // cut.block, segments, cut.B),
        inputs=dict(u=u, dt=inputs.dt_BSE, B=cut.map(inputs.B_BSN), C=cut.map(inputs.C_BSN), z=inputs.z_BSE)
        | dict(
            rate=cut.rates(),
            slowest=cut.slowest(),
            D=cut.channels(inputs.D_E),
            bias=cut.channels(inputs.dt_bias_E),
            codes=cut.codes(),
        )
        | dict(initial=cut.state(initial_state_BEN), elapsed=before.get("elapsed"), stretch=before.get("stretch")),
        outputs=dict(y=u, starts=cut.state_shape(cut.chunks), state=cut.state_shape()),
        constants=cut.sizes()
        | dict(SEGMENT=length, SEGMENTS=segments, CHUNK=cuts.CHUNK, CHUNKS=cut.chunks)
        | dict(BLOCK=cut.block, NEIGHBOURS=cut.neighbours, UNROLLED=cuts.UNROLLED),
    )
    return found["y"], cut.of_state(found["state"]), found["starts"]


def backward(inputs, residuals, dy_BSE, dfinal_state_BEN, *, spec):
    """See `lcx.ops.selective_scan`, "Backends"."""
    cut = Cut(inputs, spec)
    length, segments, together = cut.backward_segments()
    after = {} if segments == 1 else _segments(cut, length, segments, dy_BSE)
    blocks = -(-cut.E // cut.backward_block)
    groups, padding = -(-blocks // together), cut.chunks * cuts.CHUNK - cut.S
    programs = groups * segments * cut.B
    fp32 = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.float32)
    maps = cut.groups(inputs.B_BSN, inputs.C_BSN, padding)
    dmaps = fp32(groups, *maps.shape)
    given = dict(u=inputs.u_BSE, dt=inputs.dt_BSE, z=inputs.z_BSE)
    bias_E = jnp.zeros(cut.E) if inputs.dt_bias_E is None else inputs.dt_bias_E
    found = triton_launch.launch(
        backward_kernel,
        "lcx_selective_scan_backward",
        grid=(groups, segments, cut.B),
        inputs=given
        | dict(maps=maps, dy=dy_BSE, rate=cut.rates(), slowest=cut.slowest())
        | dict(channels=jnp.stack([cut.channels(inputs.D_E), cut.channels(bias_E)]), codes=cut.codes(padding))
        | dict(starts=residuals, dfinal=cut.state(dfinal_state_BEN))
        | dict(elapsed=after.get("elapsed"), stretch=after.get("stretch")),
        outputs={f"d{name}": x for name, x in given.items()}
        | dict(dmaps=dmaps, dstates=cut.state_shape(segments, 2), dchannels=cut.by_segment(segments, 2, cut.E_padded))
        | dict(inner=fp32(programs, cuts.CHUNK // cuts.GROUP, cut.N, cut.backward_block)),
        constants=cut.sizes()
        | dict(SEGMENT=length, SEGMENTS=segments, CHUNK=cuts.CHUNK, CHUNKS=cut.chunks)
        | dict(BLOCK=cut.backward_block, BLOCKS=blocks, TOGETHER=together, PARTS=maps.size)
        | dict(GROUP=cuts.GROUP),
    )
    dB_BSN, dC_BSN = cut.of_groups(found["dmaps"].sum(0))
    dchannels_2E = found["dchannels"].sum((0, 1))[:, : cut.E]
    gradients = inputs._replace(
        u_BSE=found["du"],
        dt_BSE=found["ddt"],
        A_EN=cut.of_state(found["dstates"][:, :, 1].sum((0, 1))),
        B_BSN=dB_BSN,
        C_BSN=dC_BSN,
        D_E=dchannels_2E[0],
        z_BSE=found.get("dz"),
        dt_bias_E=None if inputs.dt_bias_E is None else dchannels_2E[1],
        marks=None,
    )
    return as_given(gradients, inputs), cut.of_state(found["dstates"][:, 0, 0])


def summary(inputs, *, spec):
    """See `lcx.ops.selective_scan`, "Backends"."""
    return _whole(inputs, spec)


def reverse_summary(inputs, dy_BSE, *, spec):
    """See `lcx.ops.selective_scan`, "Backends"."""
    return _whole(inputs, spec, dy_BSE)


def _segments(cut: Cut, length: int, segments: int, dy_BSE: jax.Array | None = None) -> dict[str, jax.Array]:
    """What each segment does to a state, or with `dy_BSE` to the gradient of one: dt in sum, and what it makes of 0."""
    x, forward = cut.inputs, dy_BSE is None
    return triton_launch.launch(
        stretch_kernel,
        "lcx_selective_scan_stretch" if forward else "lcx_selective_scan_reverse_stretch",
        grid=(cut.E_padded // cut.block, segments, cut.B),
        inputs=dict(x=x.u_BSE if forward else dy_BSE, dt=x.dt_BSE, z=None if forward else x.z_BSE)
        | dict(maps=cut.map(x.B_BSN if forward else x.C_BSN), rate=cut.rates(), slowest=cut.slowest())
        | dict(bias=cut.channels(x.dt_bias_E), codes=cut.codes()),
        outputs=dict(elapsed=cut.by_segment(segments, cut.E_padded), stretch=cut.state_shape(segments)),
        constants=cut.sizes()
        | dict(SEGMENT=length, SEGMENTS=segments, BLOCK=cut.block, NEIGHBOURS=cut.neighbours)
        | dict(UNROLLED=cuts.UNROLLED, GRADIENT=not forward),
    )


def _whole(inputs, spec, dy_BSE: jax.Array | None = None) -> Affine:
    """All segments as one."""
    cut = Cut(inputs, spec)
    found = _segments(cut, *cut.forward_segments(), dy_BSE)
    # What a segment makes of 0 decays by all dt of the segments that are passed after it.
    passed_BPE = found["elapsed"] if dy_BSE is None else jnp.flip(found["elapsed"], 1)
    after_BPE = jnp.cumsum(jnp.flip(passed_BPE, 1), 1)
    after_BPE = jnp.flip(jnp.pad(after_BPE, ((0, 0), (1, 0), (0, 0)))[:, :-1], 1)
    after_BPE = after_BPE if dy_BSE is None else jnp.flip(after_BPE, 1)
    state_BNE = (jnp.exp2(after_BPE[:, :, None] * cut.rates()[None, None]) * found["stretch"]).sum(1)
    real_BS = None if inputs.marks is None else inputs.marks.real_BS
    dt_BSE = step_sizes(inputs.dt_BSE, inputs.dt_bias_E, spec.dt_softplus, real_BS)
    return Affine(elapsed(dt_BSE, inputs.marks)[..., None], cut.of_state(state_BNE))
