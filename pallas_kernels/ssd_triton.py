"""State-space duality (the scan of Mamba-2) for GPUs in Triton, on the matrix units: forward, backward, summaries.

One launch computes chunk states, their pass from chunk to chunk and outputs. With s the inclusive sum of dt A in a chunk, i and j
tokens of it, and h the state in front of it:

    y_i = sum_{j<=i} (C_i . B_j) exp(s_i - s_j) dt_j x_j + exp(s_i) h C_i + D x_i
    h'  = exp(s_Q) h + sum_j exp(s_Q - s_j) dt_j x_j (x) B_j

where a decay across the start of a document is 0. A head decays at one rate, so that a row is cheaply cut into segments: what
each makes of a state of zero is found by a kernel that stops where nothing is left. Step sizes, one for K numbers, are XLA's.
Kernels: `ssd_triton_forward`, `ssd_triton_backward`; how a call is divided: `ssd_triton_cut`.
Source: Dao and Gu, "Transformers are SSMs" (2024), section 6.
"""

import jax
import jax.numpy as jnp
from jax import lax

from lcx.ops.recurrence import Affine, elapsed, step_sizes
from lcx.ops.varying import alike
from pallas_kernels import ssd_triton_backward as reverse
from pallas_kernels import triton_launch
from pallas_kernels.scan_support import as_given, wrong_kind
from pallas_kernels.ssd_triton_cut import CHUNK, CHUNKS, Cut
from pallas_kernels.ssd_triton_forward import forward_kernel, stretch_kernel

HEAD_WIDTHS = (16, 32, 64, 128, 256)
STATE_SIZES = (16, 32, 64, 128, 256)
# A larger state in fp32 is mostly in memory: it would spill 4 KiB a thread, and compile for minutes.
WIDEST_FP32 = 128
# Outputs of a stripe whose tokens come behind heads.
BY_HEAD = ("direct", "da", "dD")


def refuse(spec, shapes, dtypes, device_kind):
    """Hopper GPUs; heads and states of powers of two; bf16 and fp32."""
    if (reason := triton_launch.not_here(device_kind)) is not None:
        return reason
    K, N = shapes["x_BSHK"][3], shapes["B_BSGN"][3]
    among = lambda valid: ", ".join(map(str, valid))
    if K not in HEAD_WIDTHS:
        return f"head width K={K}; it takes {among(HEAD_WIDTHS)}"
    if N not in STATE_SIZES:
        return f"state size N={N}; it takes {among(STATE_SIZES)}"
    if spec.chunk not in (None, CHUNK):
        return f"chunk={spec.chunk}; it takes {CHUNK}, or None"
    if (reason := wrong_kind(dtypes, ("x_BSHK", "dt_BSH", "B_BSGN", "C_BSGN"))) is not None:
        return reason
    if N > WIDEST_FP32 and any(dtypes[name] == jnp.float32 for name in ("x_BSHK", "B_BSGN", "C_BSGN")):
        return f"state size N={N} in float32; it takes at most {WIDEST_FP32}"
    return None


def forward(inputs, initial_state_BHKN, *, spec):
    """See `lcx.ops.ssd`, "Backends". Keeps the state in front of every block."""
    cut = Cut(inputs)
    dt_BHS = _steps_BHS(inputs, spec, inputs.dt_BSH, inputs.dt_bias_H)
    size, segments = cut.segments(cut.blocks)
    found = triton_launch.launch(
        forward_kernel,
        "lcx_ssd",
        grid=(cut.heads, segments, cut.B),
        inputs=_given(cut, inputs, dt_BHS) | _before(cut, inputs, dt_BHS) | dict(initial=initial_state_BHKN),
        outputs=dict(y=inputs.x_BSHK, starts=cut.states(cut.blocks), final=cut.edge),
        constants=cut.sizes() | dict(CHUNKS=CHUNKS, BLOCKS=size, SEGMENTS=segments),
        warps=cut.warps,
    )
    return found["y"], found["final"], found["starts"]


def backward(inputs, residuals, dy_BSHK, dfinal_state_BHKN, *, spec):
    """See `lcx.ops.ssd`, "Backends". From the last stripe of the rows to the first."""
    cut, bias = Cut(inputs), inputs.dt_bias_H
    dt_BHS, pull = jax.vjp(lambda *given: _steps_BHS(inputs, spec, *given), inputs.dt_BSH, bias)
    given = _given(cut, inputs, dt_BHS) | dict(dy=dy_BSHK.astype(cut.kind), starts=residuals)

    def stripe(dstate_BHKN, offset):
        return _backward_stripe(cut, inputs, given, dstate_BHKN, offset[None])

    if cut.stripes == 1:
        dinitial_BHKN, found = stripe(dfinal_state_BHKN, jnp.int32(0))
    else:
        (start,) = alike([dfinal_state_BHKN], *given.values())
        offsets = jnp.arange(cut.stripes, dtype=jnp.int32) * (cut.stripe * cut.block)
        dinitial_BHKN, found = lax.scan(stripe, start, offsets, reverse=True)
        # Stripes stand in front of all dims.
        join = lambda x, dim: jnp.moveaxis(x, 0, dim).reshape(*x.shape[1 : dim + 1], -1, *x.shape[dim + 2 :])
        found = {name: join(x, 2 if name in BY_HEAD else 1) for name, x in found.items()}
    found = {name: x[:, :, : cut.S] if name in BY_HEAD else x[:, : cut.S] for name, x in found.items()}
    rate_H = inputs.A_H.astype(jnp.float32)
    ddt_BSH, dbias_H = pull(found["direct"] + rate_H[None, :, None] * found["da"])
    gradients = inputs._replace(
        x_BSHK=found["dx"],
        dt_BSH=ddt_BSH,
        A_H=(dt_BHS * found["da"]).sum((0, 2)),
        B_BSGN=found["dB"],
        C_BSGN=found["dC"],
        D_H=found["dD"].sum((0, 2)),
        dt_bias_H=dbias_H,
        marks=None,
    )
    return as_given(gradients, inputs), dinitial_BHKN


def _backward_stripe(cut: Cut, inputs, given, dstate_BHKN, offset) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(the gradient of the state in front of a stripe, those of its tokens), given that of the state behind it."""
    (size, segments), chunks, sizes = cut.segments(cut.stripe), cut.stripe * CHUNKS, cut.sizes()
    tokens, given = chunks * CHUNK, given | dict(offset=offset)
    by_token = lambda like: jax.ShapeDtypeStruct((cut.B, tokens, *like.shape[2:]), like.dtype)

    def run(kernel, name, grid, names, outputs, **constants):
        wanted = {name: given[name] for name in names.split()}
        constants = sizes | dict(STRIPE=chunks) | constants
        run = dict(grid=(*grid, cut.B), inputs=wanted, outputs=outputs, constants=constants, warps=cut.warps)
        found = triton_launch.launch(kernel, f"lcx_ssd_{name}", **run)
        given.update(found)
        return found

    states = cut.states(chunks, dtype=cut.kind)
    run(
        reverse.states_kernel,
        "states",
        (cut.heads, cut.stripe),
        "x dt codes B A starts offset",
        dict(inner=states),
        CHUNKS=CHUNKS,
    )
    given |= dict(dfinal=dstate_BHKN) | _stretches(cut, given, size, segments, given["dy"], given["C"], cut.stripe)
    after = run(
        reverse.gradients_kernel,
        "gradients",
        (cut.heads, segments),
        "dt codes C A dy dfinal states totals inner offset",
        dict(behind=states, da=cut.by_head(cut.K // cut.width, tokens), dinitial=cut.edge),
        CHUNKS=CHUNKS,
        BLOCKS=size,
        SEGMENTS=segments,
    )
    outputs = dict(dx=by_token(inputs.x_BSHK)) | dict.fromkeys(("direct", "da", "dD"), cut.by_head(tokens))
    outputs |= dict(dpairs=jax.ShapeDtypeStruct((cut.B, cut.H, chunks, CHUNK, CHUNK), cut.kind))
    found = run(reverse.pairs_kernel, "pairs", (cut.H, chunks), "x dt codes B C A D dy behind offset", outputs)
    names = "x dt codes B C A dy inner behind dpairs offset"
    outputs = dict(dB=by_token(inputs.B_BSGN), dC=by_token(inputs.C_BSGN))
    found |= run(reverse.maps_kernel, "maps", (cut.G, chunks), names, outputs)
    found["da"] = found["da"] + after["da"].sum(2)
    del found["dpairs"]
    return after["dinitial"], found


def summary(inputs, *, spec):
    """See `lcx.ops.ssd`, "Backends"."""
    return _whole(inputs, None, spec)


def reverse_summary(inputs, dy_BSHK, *, spec):
    """See `lcx.ops.ssd`, "Backends"."""
    return _whole(inputs, dy_BSHK, spec)


def _whole(inputs, dy_BSHK, spec) -> Affine:
    """All tokens as a map of states, or of gradients of states where `dy_BSHK` is given."""
    cut, forward = Cut(inputs), dy_BSHK is None
    dt_BHS = _steps_BHS(inputs, spec, inputs.dt_BSH, inputs.dt_bias_H)
    given, (size, segments) = _given(cut, inputs, dt_BHS), cut.segments(cut.blocks)
    x, maps = (given["x"], given["B"]) if forward else (dy_BSHK.astype(cut.kind), given["C"])
    found = _stretches(cut, given, size, segments, x, maps, cut.blocks, summary=True, forward=forward)
    # What a segment makes of zero decays by all that is passed after it.
    passed = lax.cumsum(found["totals"], axis=2, reverse=forward)
    nothing = jnp.zeros_like(passed[:, :, :1])
    passed = jnp.concatenate([passed[:, :, 1:], nothing] if forward else [nothing, passed[:, :, :-1]], axis=2)
    state_BHNK = (jnp.exp2(passed)[..., None, None] * found["states"]).sum(2)
    dt_BSH = jnp.swapaxes(dt_BHS, 1, 2)
    return Affine(elapsed(dt_BSH, inputs.marks)[..., None, None], jnp.swapaxes(state_BHNK, 2, 3))


def _before(cut: Cut, inputs, dt_BHS) -> dict[str, jax.Array | None]:
    """What the forward kernel knows of the other segments."""
    given, (size, segments) = _given(cut, inputs, dt_BHS), cut.segments(cut.blocks)
    return _stretches(cut, given, size, segments, given["x"], given["B"], cut.blocks, forward=True)


def _stretches(
    cut: Cut, given, size: int, segments: int, x, maps, blocks: int, *, summary: bool = False, forward: bool = False
) -> dict[str, jax.Array | None]:
    """What each segment of so many blocks from the offset on makes of zero, and its log decay; nothing if there is only one."""
    if segments == 1 and not summary:
        return dict(states=None, totals=None)
    offset = given.get("offset", jnp.zeros(1, jnp.int32))
    return triton_launch.launch(
        stretch_kernel,
        "lcx_ssd_summary" if forward else "lcx_ssd_reverse_summary",
        grid=(cut.heads, segments, cut.B),
        inputs=dict(x=x, dt=given["dt"], codes=given["codes"], maps=maps, A=given["A"], offset=offset),
        outputs=dict(states=cut.states(segments), totals=cut.by_head(segments)),
        constants=cut.sizes() | dict(CHUNKS=CHUNKS, BLOCKS=size, SEGMENTS=segments, ALL=blocks, REVERSE=not forward),
        warps=cut.warps,
    )


def _given(cut: Cut, inputs, dt_BHS) -> dict[str, jax.Array | None]:
    """What every kernel reads."""
    codes = None if inputs.marks is None else jnp.where(inputs.marks.reset_BS, 2, inputs.marks.real_BS.astype(jnp.int32))
    of_heads = {name: x.astype(jnp.float32) for name, x in (("A", inputs.A_H), ("D", inputs.D_H))}
    tokens = dict(x=inputs.x_BSHK, B=inputs.B_BSGN, C=inputs.C_BSGN)
    return {name: x.astype(cut.kind) for name, x in tokens.items()} | of_heads | dict(dt=dt_BHS, codes=codes)


def _steps_BHS(inputs, spec, dt_BSH, bias_H):
    """fp32 step sizes, tokens last."""
    real_BS = None if inputs.marks is None else inputs.marks.real_BS
    return jnp.swapaxes(step_sizes(dt_BSH, bias_H, spec.dt_softplus, real_BS, spec.dt_limit), 1, 2)
