"""The causal convolution for GPUs in Triton: forward, and backward in one launch.

A program is a warp: it goes from token to token with the last inputs of a block of channels in registers, so that every number is
read once. Of dw and dbias it sums what its stretch of tokens adds, and XLA adds the sums up. Kernels:
`causal_conv_triton_forward`, `causal_conv_triton_backward`. Source: Gu and Dao, "Mamba" (2023), section 3.4.
"""

import jax
import jax.numpy as jnp
import triton

from pallas_kernels import triton_launch
from pallas_kernels.causal_conv_support import by_distance, gradients, reaches
from pallas_kernels.causal_conv_triton_backward import backward_kernel
from pallas_kernels.causal_conv_triton_forward import forward_kernel
from pallas_kernels.scan_support import wrong_kind

# Channels of a program; tokens whose numbers it asks for at once.
BLOCK, UNROLLED = 128, 4
# Tokens of a program: at most, so that its sums are little beside what it reads; fewer while programs are less than that.
LONGEST, SHORTEST, PROGRAMS = 512, 32, 4096
# Taps whose inputs and gradients fit the registers of a thread.
LARGEST_WIDTH = 7


def refuse(spec, shapes, dtypes, device_kind):
    """Hopper GPUs; up to 7 taps; bf16 and fp32."""
    if (reason := triton_launch.not_here(device_kind)) is not None:
        return reason
    if (W := shapes["w_EW"][1]) > LARGEST_WIDTH:
        return f"W={W} taps; it takes at most {LARGEST_WIDTH}"
    return wrong_kind(dtypes, ("x_BSE",))


def forward(inputs, *, spec):
    """See `lcx.ops.causal_conv`, "Backends"."""
    return _launch(forward_kernel, "lcx_causal_conv", inputs, spec, {}, dict(y=inputs.x_BSE), {})["y"]


def backward(inputs, dy_BSE, *, spec):
    """See `lcx.ops.causal_conv`, "Backends"."""
    (B, S, E), W = inputs.x_BSE.shape, inputs.w_EW.shape[1]
    stretches = -(-S // stretch(B, S, E))
    sums = jax.ShapeDtypeStruct((B, stretches, W + 1, E), jnp.float32)
    outputs = dict(dx=inputs.x_BSE, sums=sums)
    name = "lcx_causal_conv_backward"
    found = _launch(backward_kernel, name, inputs, spec, dict(dy=dy_BSE), outputs, dict(STRETCHES=stretches))
    return gradients(inputs, found["dx"], found["sums"].sum((0, 1)))


def stretch(B: int, S: int, E: int) -> int:
    """Tokens of a program."""
    tokens = LONGEST
    while tokens > SHORTEST and B * -(-E // BLOCK) * -(-S // tokens) < PROGRAMS:
        tokens //= 2
    return max(tokens, triton.next_power_of_2(-(-S // triton_launch.MOST_PROGRAMS)))


def _launch(kernel, name, inputs, spec, more, outputs, constants) -> dict[str, jax.Array]:
    (B, S, E), W = inputs.x_BSE.shape, inputs.w_EW.shape[1]
    tokens = stretch(B, S, E)
    return triton_launch.launch(
        kernel,
        name,
        grid=(-(-E // BLOCK), -(-S // tokens), B),
        inputs=dict(x=inputs.x_BSE, initial=inputs.initial_BWE, weights=by_distance(inputs))
        | dict(words=None if inputs.segments_BS is None else reaches(inputs.segments_BS, W).reshape(B, -1)[:, :S])
        | more,
        outputs=outputs,
        constants=dict(S=S, E=E, W=W, STRETCH=tokens, BLOCK=BLOCK, UNROLLED=UNROLLED, SILU=spec.activation == "silu") | constants,
    )
