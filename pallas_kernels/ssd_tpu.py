"""State-space duality (the scan of Mamba-2) for TPU (Pallas Mosaic), on the matrix units: forward, backward, summaries.

One launch computes a chunk's outputs, its state and the pass of states from chunk to chunk: programs go over blocks of tokens in
order, and the states of their heads stay in the chip in fp32. With s the inclusive sum of dt A in a chunk, i and j tokens of it,
and h the state in front of it:

    y_i = sum_{j<=i} (C_i . B_j) exp(s_i - s_j) dt_j x_j + exp(s_i) h C_i + D x_i
    h'  = exp(s_C) h + sum_j exp(s_C - s_j) dt_j x_j (x) B_j

where a decay across the start of a document is 0. How a call is divided: `ssd_tpu_cut`; decays: `ssd_tpu_chunk`; the backward
pass: `ssd_tpu_backward`. Source: Dao and Gu, "Transformers are SSMs" (2024), section 6.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lcx.ops.recurrence import Affine, elapsed
from pallas_kernels import ssd_tpu_backward as reverse
from pallas_kernels.mosaic_tpu import Operand, dot, launch
from pallas_kernels.scan_support import as_given, wrong_kind
from pallas_kernels.scan_tpu import not_here
from pallas_kernels.ssd_tpu_chunk import MOST, Chunk, fill_rows, lanes_of, over_tiles, step_sizes, turn
from pallas_kernels.ssd_tpu_cut import CHUNK, Cut

HEAD_WIDTHS = (64, 128)
STATE_SIZES = (64, 128, 192, 256)


def refuse(spec, shapes, dtypes, device_kind):
    """TPUs only; heads and states that fill the matrix unit; bf16 and fp32."""
    if (reason := not_here(device_kind)) is not None:
        return reason
    K, N = shapes["x_BSHK"][3], shapes["B_BSGN"][3]
    among = lambda valid: ", ".join(map(str, valid))
    if K not in HEAD_WIDTHS:
        return f"head width K={K}; it takes {among(HEAD_WIDTHS)}"
    if N not in STATE_SIZES:
        return f"state size N={N}; it takes {among(STATE_SIZES)}"
    if spec.chunk not in (None, CHUNK):
        return f"chunk={spec.chunk}; it takes {CHUNK}, or None"
    return wrong_kind(dtypes, ("x_BSHK", "dt_BSH", "B_BSGN", "C_BSGN"))


def forward(inputs, initial_state_BHKN, *, spec):
    """See `lcx.ops.ssd`, "Backends". Keeps the state in front of every block, as `Cut.starts` has it."""
    cut, x = Cut(inputs), inputs.x_BSHK
    found = _launch(
        _forward_kernel,
        "lcx_ssd",
        cut,
        spec,
        _tokens(cut, inputs) | dict(D=cut.by_lane(inputs.D_H), initial=cut.state(initial_state_BHKN)),
        outputs=dict(y=cut.tokens(jax.ShapeDtypeStruct(x.shape, x.dtype)), starts=cut.starts(), state=cut.state()),
        scratch=dict(pairs=cut.pairs(), turned_B=cut.turned(), kept_C=cut.map_memory(cut.kind)),
        rows=("s", "past") if cut.kind == jnp.bfloat16 else ("whole", "part", "dt"),
        products=(1, 2),
    )
    return cut.of_tokens(found["y"]), cut.of_state(found["state"]), found["starts"]


def backward(inputs, residuals, dy_BSHK, dfinal_state_BHKN, *, spec):
    """See `lcx.ops.ssd`, "Backends"."""
    cut, x = Cut(inputs, reverse=True), inputs.x_BSHK
    outputs = dict(dx=cut.tokens(jax.ShapeDtypeStruct(x.shape, x.dtype)), ddt=cut.rows(None), dstate=cut.state())
    outputs |= dict(dB=cut.map_sums(), dC=cut.map_sums(), dA=cut.head_sums(), dD=cut.lane_sums())
    outputs |= {} if inputs.dt_bias_H is None else dict(dbias=cut.head_sums())
    found = _launch(
        reverse.kernel,
        "lcx_ssd_backward",
        cut,
        spec,
        _tokens(cut, inputs)
        | dict(D=cut.by_lane(inputs.D_H), dy=cut.tokens(dy_BSHK), starts=cut.starts(residuals))
        | dict(dfinal=cut.state(dfinal_state_BHKN)),
        outputs=outputs,
        scratch=dict.fromkeys(("pairs", "pairs_apart", "dpairs"), cut.pairs())
        | dict.fromkeys(("turned_B", "turned_C"), cut.turned())
        | dict.fromkeys(("kept_B", "kept_C"), cut.map_memory(cut.kind))
        | dict.fromkeys(("sum_B", "sum_C"), cut.map_memory(jnp.float32))
        | dict(states=pltpu.VMEM((cut.chunks, cut.N, cut.lanes), jnp.float32)),
        rows=("dt", "ahead", *(("s",) if cut.kind == jnp.bfloat16 else ("whole", "part")), *reverse.ROWS),
        products=(3, 5),
    )
    gradients = inputs._replace(
        x_BSHK=cut.of_tokens(found["dx"]),
        dt_BSH=cut.of_rows(found["ddt"]),
        A_H=cut.of_heads(found["dA"]),
        B_BSGN=cut.of_maps(found["dB"]),
        C_BSGN=cut.of_maps(found["dC"]),
        D_H=cut.of_lanes(found["dD"]),
        dt_bias_H=cut.of_heads(found["dbias"]) if "dbias" in found else None,
        marks=None,
    )
    return as_given(gradients, inputs), cut.of_state(found["dstate"])


def summary(inputs, dy_BSHK=None, *, spec) -> Affine:
    """See `lcx.ops.ssd`, "Backends". With `dy_BSHK` it is `reverse_summary`: the map of gradients of states."""
    cut, forward = Cut(inputs, reverse=dy_BSHK is not None), dy_BSHK is None
    given = _tokens(cut, inputs)
    for unread in ("C",) if forward else ("x", "B"):
        given[unread] = Operand(None)
    found = _launch(
        reverse.stretch_kernel,
        "lcx_ssd_summary" if forward else "lcx_ssd_reverse_summary",
        cut,
        spec,
        given | dict(dy=cut.tokens(dy_BSHK)),
        outputs=dict(state=cut.state()),
        scratch=dict(turned_B=cut.turned()) if forward else dict(turned_C=cut.turned()),
        rows=(),
        products=(0, 1),
    )
    before = inputs.dt_BSH.astype(jnp.float32)
    before = before if inputs.dt_bias_H is None else before + inputs.dt_bias_H.astype(jnp.float32)[None, None]
    dt_BSH = step_sizes(before, spec)[0]
    dt_BSH = dt_BSH if inputs.marks is None else jnp.where(inputs.marks.real_BS[..., None], dt_BSH, 0.0)
    return Affine(elapsed(dt_BSH, inputs.marks)[..., None, None], cut.of_state(found["state"]))


reverse_summary = summary


def _tokens(cut: Cut, inputs) -> dict[str, Operand]:
    """What every kernel reads."""
    found = dict(x=cut.tokens(inputs.x_BSHK), dt=cut.rows(inputs.dt_BSH), codes=cut.codes(inputs.marks))
    found |= dict(B=cut.maps(inputs.B_BSGN), C=cut.maps(inputs.C_BSGN))
    return found | dict(A=cut.by_head(inputs.A_H), bias=cut.by_head(inputs.dt_bias_H))


def _launch(kernel, name, cut: Cut, spec, inputs, *, outputs, scratch, rows, products) -> dict[str, jax.Array]:
    """Runs a kernel whose blocks go in order; `rows` it keeps beside `left` and `ahead_dt`; `products` as `Cut.cost`'s."""
    scratch, marked = scratch | dict(keep=None), inputs["codes"].array is not None
    scratch |= dict(keep=cut.keep()) if marked else {}
    scratch |= {f"row_{row}": cut.per_head() for row in ("left", "ahead_dt", *(("started",) if marked else ()), *rows)}
    return launch(
        lambda refs: kernel(refs, cut=cut, spec=spec),
        name,
        grid=cut.grid,
        inputs=inputs,
        outputs=outputs,
        scratch=scratch,
        cost=cut.cost(*products, *(x.array for x in [*inputs.values(), *outputs.values()])),
        vmem_bytes=cut.vmem_bytes,
    )


def _forward_kernel(refs, *, cut: Cut, spec):
    @pl.when(pl.program_id(3) == 0)
    def begin():
        refs.state[...] = refs.initial[...]

    refs.starts[...] = refs.state[...]

    fill_rows(refs, cut, spec)

    def chunk(c, _):
        part = Chunk(refs, cut, c)
        B, C = part.load(refs.B), part.load(refs.C)
        refs.turned_B[...], refs.kept_C[...] = turn(B), C
        refs.pairs[...] = jnp.where(part.visible(turned=False), dot(C, B, 1, 1), 0.0)
        over_tiles(cut, lambda t: _tile(part, t), lambda t, found: _store(part, t, *found))

    lax.fori_loop(0, cut.chunks, chunk, None)


def _tile(part: Chunk, t) -> Iterator[tuple[jax.Array, jax.Array] | None]:
    """(outputs, states behind the chunk) of the heads of tile t, in phases for `over_tiles`."""
    refs, kind, lanes = part.refs, part.cut.kind, lanes_of(t)
    x, h, left = part.load(refs.x, lanes), refs.state[:, lanes], part.columns("left", t)
    y = left * dot(refs.kept_C[...], h.astype(kind), 1, 0) + refs.D[:, lanes] * x.astype(jnp.float32)
    state = part.step(t, h, x, left)
    yield
    weights = jnp.concatenate([_weights(part, head).astype(kind) for head in part.heads(t)], axis=1)
    yield
    y = y + dot(weights, part.only(x), 1, 0)
    yield y, state


def _store(part: Chunk, t, y: jax.Array, state: jax.Array) -> None:
    part.refs.y[part.tokens, lanes_of(t)] = y.astype(part.refs.y.dtype)
    part.refs.state[:, lanes_of(t)] = state


def _weights(part: Chunk, head) -> jax.Array:
    """(C_i . B_j) exp(s_i - s_j) dt_j for a head."""
    if part.cut.kind == jnp.bfloat16:
        log = part.column("s", head) - part.row("past", head)
        return part.refs.pairs[...] * jnp.exp2(jnp.minimum(log, MOST))
    decays = reverse.decays(part, head, turned=False)
    return part.refs.pairs[...] * decays * part.row("dt", head)
