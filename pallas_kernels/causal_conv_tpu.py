"""The causal convolution for TPU (Pallas Mosaic): forward, and backward in one launch.

Programs run over blocks of tokens in order, for up to 1,024 channels each; arrays stay B S E. Tokens stand along sublanes: a
block is widened to fp32 into memory of 128 lanes, where a load may begin at any row, so that a tap is a load from k rows further
up. What a block needs of its neighbour stays in the chip. The backward pass takes blocks from the last to the first: it computes
what the activation was taken of again, its gradient goes into such memory too, and each input gets W shares of it from the rows
behind. Only parts of a block in which a document starts, or something is padding, ask for documents. Source: Gu and Dao, "Mamba"
(2023), section 3.4.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.causal_conv_support import LATER, by_distance, gradients
from pallas_kernels.causal_conv_tpu_cut import COPIED, KEPT, LANES, ROWS, Cut
from pallas_kernels.mosaic_tpu import Operand, launch
from pallas_kernels.scan_support import wrong_kind
from pallas_kernels.scan_tpu import exp, not_here

# silu(x) = z / (-1 - exp z), with z = -x: the kernels get the weights with the other sign, and leave it to whoever sums.
SCALE = {None: 1.0, "silu": -1.0}
# What is larger is taken for this in exp(z), whose reciprocal is then no smaller than the least normal number.
LARGEST = 87.0


def refuse(spec, shapes, dtypes, device_kind):
    """TPUs only; whole groups of 128 channels; up to 9 taps; bf16 and fp32."""
    if (reason := not_here(device_kind)) is not None:
        return reason
    E, W = shapes["w_EW"]
    if E % LANES:
        return f"E={E} channels; it takes multiples of {LANES}, the nearest is {max(LANES, (E + LANES // 2) // LANES * LANES)}"
    if W > KEPT + 1:
        return f"W={W} taps; it takes at most {KEPT + 1}"
    return wrong_kind(dtypes, ("x_BSE",))


def forward(inputs, *, spec):
    """See `lcx.ops.causal_conv`, "Backends"."""
    cut, x = Cut(inputs), inputs.x_BSE
    return _launch(
        _forward_kernel,
        "lcx_causal_conv",
        cut,
        spec,
        _given(cut, inputs, spec) | cut.marks(inputs.segments_BS),
        outputs=dict(y=cut.of_tokens(jax.ShapeDtypeStruct(x.shape, x.dtype))),
        scratch=dict(wide=cut.wide(), edge=cut.edge()),
        operations=2 * cut.W + 9,
    )["y"]


def backward(inputs, dy_BSE, *, spec):
    """See `lcx.ops.causal_conv`, "Backends"."""
    cut, x = Cut(inputs, reverse=True), inputs.x_BSE
    found = _launch(
        _backward_kernel,
        "lcx_causal_conv_backward",
        cut,
        spec,
        _given(cut, inputs, spec)
        | dict(in_front=cut.in_front(x), dy=cut.of_tokens(dy_BSE))
        | cut.marks(inputs.segments_BS, tail=True),
        outputs=dict(dx=cut.of_tokens(jax.ShapeDtypeStruct(x.shape, x.dtype)), sums=cut.sums()),
        scratch=dict(wide=cut.wide(), gradient=cut.wide(), edge=cut.edge()),
        operations=6 * cut.W + 14,
    )
    return gradients(inputs, found["dx"], SCALE[spec.activation] * found["sums"].sum((0, 2)))


def _given(cut: Cut, inputs, spec) -> dict[str, Operand]:
    """What both kernels read."""
    weights = SCALE[spec.activation] * by_distance(inputs)
    return dict(x=cut.of_tokens(inputs.x_BSE), initial=cut.initial(inputs.initial_BWE), weights=cut.weights(weights))


def _launch(kernel, name, cut: Cut, spec, inputs, *, outputs, scratch, operations: int) -> dict[str, jax.Array]:
    """Runs a kernel whose blocks of tokens go in order; `operations` for each token and channel."""
    moved = [x.array for name, x in (inputs | outputs).items() if name != "in_front"]  # of which few rows are read
    return launch(
        lambda refs: kernel(refs, cut, spec),
        name,
        grid=cut.grid,
        inputs=inputs,
        outputs=outputs,
        scratch=scratch | dict(columns=cut.columns(inputs)),
        cost=cut.cost(operations, *moved),
        vmem_bytes=cut.vmem_bytes,
    )


def _forward_kernel(refs, cut: Cut, spec):
    first = pl.program_id(2) == 0
    _ask(refs, cut)

    def of_lanes(j, _):
        lanes = _part(j, LANES)
        weights = _weights(refs, cut, lanes)
        refs.wide[:KEPT, :] = jnp.where(first, refs.initial[:, lanes], refs.edge[:, lanes])

        def of_rows(i, asking, _):
            here = _part(i, ROWS)
            refs.wide[_part(i, ROWS, KEPT), :] = refs.x[here, lanes].astype(jnp.float32)
            word = refs.columns[here, :] if asking else None
            y = _before(weights, _taps(refs, cut, i, word))
            y = y * _sigmoid(y)[0] if spec.activation == "silu" else y
            refs.y[here, lanes] = _only(word, 0, y).astype(refs.y.dtype)

        _over(refs, cut, of_rows)
        refs.edge[:, lanes] = refs.wide[cut.tokens :, :]

    lax.fori_loop(0, cut.channels // LANES, of_lanes, None)


def _backward_kernel(refs, cut: Cut, spec):
    last, first = pl.program_id(2) == 0, pl.program_id(2) == cut.blocks - 1
    _ask(refs, cut)

    @pl.when(last)
    def begin():
        refs.sums[...] = jnp.zeros_like(refs.sums)
        refs.edge[...] = jnp.zeros_like(refs.edge)

    def of_lanes(j, _):
        lanes = _part(j, LANES)
        weights = _weights(refs, cut, lanes)
        in_front = refs.in_front[:, lanes].astype(jnp.float32)[COPIED - KEPT :]
        refs.wide[:KEPT, :] = jnp.where(first, refs.initial[:, lanes], in_front)
        refs.gradient[cut.tokens :, :] = refs.edge[:, lanes]

        def of_outputs(i, asking, _):
            here = _part(i, ROWS)
            refs.wide[_part(i, ROWS, KEPT), :] = refs.x[here, lanes].astype(jnp.float32)
            word = refs.columns[here, :] if asking else None
            g = refs.dy[here, lanes].astype(jnp.float32)
            if spec.activation == "silu":
                z = _before(weights, _taps(refs, cut, i, word))
                sigmoid, other = _sigmoid(z)
                g = g * (sigmoid * (1 + z * other))
            refs.gradient[here, :] = _only(word, 0, g)

        def of_inputs(i, asking, sums):
            here = _part(i, ROWS)
            word = refs.columns[here, :] if asking else None
            g = refs.gradient[here, :]
            dx = weights[0] * g
            for k in range(1, cut.W):
                dx = dx + weights[k] * _only(word, LATER + k, refs.gradient[_part(i, ROWS, k), :])
            refs.dx[here, lanes] = dx.astype(refs.dx.dtype)
            parts = lambda x: x.reshape(-1, KEPT, LANES).sum(0)
            added = [*(parts(g * tap) for tap in _taps(refs, cut, i, word)), parts(g)]
            return tuple(total + x for total, x in zip(sums, added, strict=True))

        _over(refs, cut, of_outputs)
        sums = _over(refs, cut, of_inputs, tuple(refs.sums[k, :, lanes] for k in range(cut.W + 1)))
        for k, total in enumerate(sums):
            refs.sums[k, :, lanes] = total
        refs.edge[:, lanes] = refs.gradient[:KEPT, :]

    lax.fori_loop(0, cut.channels // LANES, of_lanes, None)


def _part(i, size: int, further: int = 0) -> pl.Slice:
    """Part i of rows or of lanes, or as many that stand further on."""
    return pl.ds(pl.multiple_of(i * size, size) + further, size)


def _ask(refs, cut: Cut) -> None:
    """Puts the words of those parts of the block that need them into every lane."""

    def turn(i, _):
        part = _part(i, ROWS)

        @pl.when(refs.asks[0, i] != 0)
        def fill():
            refs.columns[part, :] = jnp.broadcast_to(refs.words[:, part], (LANES, ROWS)).T

    if refs.words is not None:
        lax.fori_loop(0, cut.tokens // ROWS, turn, None)


def _over(refs, cut: Cut, body, carry=None):
    """body(part of the block's tokens, whether it has to ask for documents, carry) for every part."""

    def turn(i, carry):
        if refs.words is None:
            return body(i, False, carry)
        return lax.cond(refs.asks[0, i] != 0, lambda c: body(i, True, c), lambda c: body(i, False, c), carry)

    return lax.fori_loop(0, cut.tokens // ROWS, turn, carry)


def _weights(refs, cut: Cut, lanes) -> list[jax.Array]:
    return [refs.weights[pl.ds(k, 1), lanes] for k in range(cut.W + 1)]


def _taps(refs, cut: Cut, i, word: jax.Array | None) -> list[jax.Array]:
    """What the weights multiply, for part i of the block's tokens."""
    return [_only(word, k, refs.wide[_part(i, ROWS, KEPT - k), :]) for k in range(cut.W)]


def _only(word: jax.Array | None, bit: int, x: jax.Array) -> jax.Array:
    """x where a bit is set, 0 elsewhere, even for what is not a number."""
    return x if word is None else jnp.where((word & (1 << bit)) != 0, x, 0.0)


def _before(weights: list[jax.Array], taps: list[jax.Array]) -> jax.Array:
    """Sum of products and bias."""
    total = weights[-1]
    for weight, tap in zip(weights, taps, strict=False):
        total = total + weight * tap
    return total


def _sigmoid(z: jax.Array) -> tuple[jax.Array, jax.Array]:
    """-sigmoid(-z) and -sigmoid(z), each good to a few roundings of itself however small: neither is a difference.

    By tanh it would be one instruction of the many, but 1 - tanh(z / 2) has lost all its digits at z = 17.
    """
    grown = exp(jnp.minimum(z, LARGEST))
    shrunk = pltpu.reciprocal(-1 - grown, full_range=False)
    return shrunk, grown * shrunk
