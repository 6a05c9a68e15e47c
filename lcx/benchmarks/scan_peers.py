"""What a recurrence is measured beside: XLA's associative scan, attention of the same width, and the official kernels.

A peer takes (case, direction, the case's arrays) and gives what is timed; it raises a UserError that says why it is not there.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lcx.benchmarks import speed
from lcx.benchmarks.cases import Case, pullback
from lcx.benchmarks.scan_cases import Scan, Ssd
from lcx.registry import UserError

# The longest rows in which attention, and a scan that holds all states, are tried.
LONGEST = 32_768
HEAD_WIDTH = 128  # of attention


def thunk(solve: Callable[[dict[str, jax.Array]], jax.Array], direction: str, inputs: dict[str, jax.Array]) -> Callable[[], Any]:
    """What is timed of a function of all arrays: itself, or the way back to every array."""
    if direction == "forward":
        return functools.partial(jax.jit(solve), inputs)
    y = jax.eval_shape(solve, inputs)
    return functools.partial(pullback(solve, inputs), jax.random.normal(jax.random.key(99), y.shape, y.dtype))


def ours(implementation: str) -> Callable:
    """An implementation of `pallas_kernels.KERNELS`."""
    return lambda case, direction, inputs: thunk(lambda x: case.solver(implementation)(x)[0], direction, inputs)


def associative(case: Scan, direction: str, inputs: dict[str, jax.Array]) -> Callable[[], Any]:
    """`lax.associative_scan` over all states."""
    _short(case)
    return thunk(associative_scan, direction, inputs)


def associative_scan(x: dict[str, jax.Array]) -> jax.Array:
    """y_BSE of `Scan.inputs`, by the definition of the operation."""
    u, z = x["u_BSE"].astype(jnp.float32), x["z_BSE"].astype(jnp.float32)
    dt = jax.nn.softplus(x["dt_BSE"].astype(jnp.float32) + x["dt_bias_E"][None, None])
    decay = jnp.exp(dt[..., None] * x["A_EN"][None, None])
    added = (dt * u)[..., None] * x["B_BSN"].astype(jnp.float32)[:, :, None]
    later_of = lambda first, second: (second[0] * first[0], second[0] * first[1] + second[1])
    states = lax.associative_scan(later_of, (decay, added), axis=1)[1]
    y = (states * x["C_BSN"].astype(jnp.float32)[:, :, None]).sum(3) + x["D_E"][None, None] * u
    return (y * jax.nn.silu(z)).astype(x["u_BSE"].dtype)


def attention(implementation: str) -> Callable:
    """Causal attention with heads of 128 that together are as wide as the recurrence."""

    def make(case, direction, inputs):
        _short(case)
        heads = max(1, case.E // HEAD_WIDTH)
        problem = Case("causal", case.B, case.S, heads, heads, case.E // heads)
        run, remarks = speed.thunks(problem, direction, (implementation,))
        if implementation not in run:
            raise UserError(remarks[implementation])
        return run[implementation]

    return make


def official(case: Scan | Ssd, direction: str, inputs: dict[str, jax.Array]) -> Callable[[], Any]:
    """The kernels of the papers' authors, on numbers of their own: CUDA for Mamba-1, Triton for Mamba-2."""
    torch, solve, arrays = _official(case)
    if direction == "forward":
        return lambda: _Torch(torch, torch.no_grad()(solve)())
    y = solve()
    dy = torch.randn_like(y)
    return lambda: _Torch(torch, torch.autograd.grad(y, arrays, dy, retain_graph=True))


def missing_official() -> str | None:
    """Why the official kernels are not measured; None if they are."""
    try:
        importlib.import_module("mamba_ssm")
    except ImportError as error:
        return f"mamba_ssm: {error}"
    return None


def _official(case: Scan | Ssd):
    if (why := missing_official()) is not None:
        raise UserError(why)
    torch = importlib.import_module("torch")
    new = lambda *shape: torch.randn(shape, device="cuda", dtype=getattr(torch, case.dtype), requires_grad=True)
    whole = lambda *shape: torch.ones(shape, device="cuda", requires_grad=True)
    if isinstance(case, Scan):
        scan = importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn
        B, S, E, N = case.B, case.S, case.E, case.N
        u, dt, z, Bm, Cm = new(B, E, S), new(B, E, S), new(B, E, S), new(B, N, S), new(B, N, S)
        A, D, bias = whole(E, N), whole(E), whole(E)
        options = dict(z=z, delta_bias=bias, delta_softplus=True)
        return torch, lambda: scan(u, dt, -A, Bm, Cm, D, **options), [u, dt, A, Bm, Cm, D, z, bias]
    chunked = importlib.import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
    B, S, H, K, N = case.B, case.S, case.H, case.K, case.N
    x, dt, Bm, Cm = new(B, S, H, K), new(B, S, H), new(B, S, 1, N), new(B, S, 1, N)
    A, D, bias = whole(H), whole(H), whole(H)
    options = dict(chunk_size=256, D=D, dt_bias=bias, dt_softplus=True)
    return torch, lambda: chunked(x, dt, -A, Bm, Cm, **options), [x, dt, A, Bm, Cm, D, bias]


class _Torch:
    """What PyTorch has started, for `jax.block_until_ready`."""

    def __init__(self, torch: Any, out: Any):
        self.torch, self.out = torch, out

    def block_until_ready(self) -> "_Torch":
        self.torch.cuda.synchronize()
        return self


def _short(case: Scan | Ssd) -> None:
    if case.S > LONGEST:
        raise UserError(f"not tried beyond {LONGEST:,} tokens")
