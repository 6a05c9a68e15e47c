"""Per-device operations: public functions, plain `jnp` implementations, and the one dispatcher. Names no mesh axis.

The modules are the interface, each named after its function: `from lcx.ops.attention import attention`, and in the same way
`linear_cross_entropy`, `selective_scan`, `ssd` and `causal_conv`. Only the descriptions that every operation shares are exported
here; a function of the same name would hide its module. What recurrences share, the algebra of their states, is
`lcx.ops.recurrence`.
"""

from lcx.ops.types import AttentionSpec, Mask, Runs, Segments, contiguous

__all__ = ["AttentionSpec", "Mask", "Runs", "Segments", "contiguous"]
