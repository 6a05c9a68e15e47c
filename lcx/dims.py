"""The legend of dimension letters.

A name such as `q_BSHK` lists the dimensions of an array, outermost first. A lower-case letter is the slice of that
dimension that one device holds inside a manual region (`k_BsGK`). The same letters are the *logical dimensions* of
parameters (`nnx.Param(w, dims="DF")`), which `lcx.sharding` maps to mesh axes and `lcx.train_loop.optimizer` to rules.

In this project `dim` is a dimension of an array and `axis` is an axis of the device mesh.
"""

import dataclasses

DIMS = {
    "B": "batch (sequences)",
    "S": "query sequence (tokens)",
    "T": "key sequence (tokens)",
    "D": "model width",
    "H": "query heads",
    "G": "key/value heads, or B/C groups of a state-space model",
    "R": "query heads per key/value head (H = G * R); rank of a step-size projection",
    "K": "width of one head",
    "F": "feed-forward width",
    "V": "vocabulary",
    "E": "inner width of a recurrent mixer",
    "N": "state size of a recurrence",
    "W": "convolution width",
    "L": "layers (the stacked dimension of a parameter)",
    "C": "chunk of tokens",
    "P": "devices along the sequence",
}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes that every part of a model is built for; fields are letters of the legend.

    Attributes:
      D, H, G, K, V, L: see `DIMS`.
      dtype: type of activations. Parameters are fp32.
      norm_eps: epsilon of every RMS norm.
    """

    D: int
    H: int
    G: int
    K: int
    V: int
    L: int
    dtype: str
    norm_eps: float
