"""Rotary position encoding (arXiv 2104.09864) with angles exact to 2^30 positions.

position * frequency in fp32 is off by 0.08 rad at two million positions. Here a position is split into three digits of
ten bits, p = a 2^20 + b 2^10 + c; cosine and sine of every digit come from tables made in fp64, and the three rotations
are composed in fp32 by angle addition. The error stays below 4e-7 everywhere.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from lcx.registry import UserError, unknown

DIGIT_BITS = 10
DIGITS = 3
SCALINGS = ("none", "llama3")


def frequencies(width: int, theta: float) -> np.ndarray:
    """fp64 theta^(-2c/width) for c = 0 .. width/2 - 1."""
    return theta ** (-np.arange(0, width, 2, dtype=np.float64) / width)


def llama3_scaling(frequency: np.ndarray, factor: float, low: float, high: float, original_length: int) -> np.ndarray:
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those in between interpolated."""
    rotations = original_length * frequency / (2 * np.pi)
    smooth = np.clip((rotations - low) / (high - low), 0.0, 1.0)
    return frequency * ((1 - smooth) / factor + smooth)


def digit_tables(frequency: np.ndarray) -> np.ndarray:
    """fp32 [digits, 2 (cos, sin), 2^bits, width/2]: the rotation of every value of every digit."""
    value = np.arange(2**DIGIT_BITS, dtype=np.float64)[:, None]
    angles = [np.remainder(value * 2.0 ** (DIGIT_BITS * digit) * frequency, 2 * np.pi) for digit in range(DIGITS)]
    return np.stack([np.stack([np.cos(a), np.sin(a)]) for a in angles]).astype(np.float32)


def rotations(positions_BS: jax.Array, tables: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """fp32 cosine and sine [B, S, width/2] of every position's angles. Positions are int32 in [0, 2^30)."""
    cos = sin = None
    for digit in range(DIGITS):
        value_BS = (positions_BS >> (DIGIT_BITS * digit)) & (2**DIGIT_BITS - 1)
        c, s = jnp.asarray(tables[digit, 0])[value_BS], jnp.asarray(tables[digit, 1])[value_BS]
        cos, sin = (c, s) if cos is None else (cos * c - sin * s, sin * c + cos * s)
    return cos, sin


class Rope:
    """Rotates pairs of the first `fraction` of each head."""

    @dataclasses.dataclass(frozen=True)
    class Config:
        """Rotary encoding.

        Attributes:
          theta: base of the frequencies.
          fraction: share of the head width that rotates.
          interleaved: pairs are neighbours (2c, 2c+1) as in GPT-J, instead of halves (c, c + width/2) as in Llama.
          scaling: none, or llama3 with the next four fields (Hugging Face's rope_type "llama3").
          factor, low_frequency_factor, high_frequency_factor, original_length: of the llama3 scaling.
        """

        theta: float = 500_000.0
        fraction: float = 1.0
        interleaved: bool = False
        scaling: str = "none"
        factor: float = 8.0
        low_frequency_factor: float = 1.0
        high_frequency_factor: float = 4.0
        original_length: int = 8192

    def __init__(self, config: Config, head_width: int):
        self.config = config
        self.width = int(head_width * config.fraction)
        if self.width < 2 or self.width % 2 or config.fraction > 1:
            raise UserError(
                f"posencs.rope.fraction={config.fraction} turns {self.width} of {head_width} head dimensions; "
                "that must be even, at least 2 and no more than there are"
            )
        if config.scaling not in SCALINGS:
            raise unknown("posencs.rope.scaling", config.scaling, SCALINGS)
        low, high = config.low_frequency_factor, config.high_frequency_factor
        if config.factor <= 0 or not 0 < low < high or config.original_length < 1:
            raise UserError(
                f"posencs.rope: factor={config.factor}, low_frequency_factor={low}, high_frequency_factor={high} and "
                f"original_length={config.original_length} must be above 0, and the low factor below the high one"
            )
        frequency = frequencies(self.width, config.theta)
        if config.scaling == "llama3":
            frequency = llama3_scaling(
                frequency, config.factor, config.low_frequency_factor, config.high_frequency_factor, config.original_length
            )
        self.tables = digit_tables(frequency)

    def rotate(self, x_BSHK: jax.Array, positions_BS: jax.Array) -> jax.Array:
        """Queries or keys turned by their positions; fp32 inside, x's dtype out."""
        cos, sin = (t[:, :, None, :] for t in rotations(positions_BS, self.tables))
        turned, rest = x_BSHK[..., : self.width].astype(jnp.float32), x_BSHK[..., self.width :]
        if self.config.interleaved:
            a, b = turned[..., 0::2], turned[..., 1::2]
        else:
            a, b = jnp.split(turned, 2, axis=-1)
        pair = (a * cos - b * sin, b * cos + a * sin)
        joined = jnp.stack(pair, axis=-1).reshape(turned.shape) if self.config.interleaved else jnp.concatenate(pair, axis=-1)
        return jnp.concatenate([joined.astype(x_BSHK.dtype), rest], axis=-1)

    def slopes(self, heads: int) -> None:
        """No bias."""
        del heads
