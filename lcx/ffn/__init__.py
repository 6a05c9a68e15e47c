"""Feed-forward layers. A part has `Config`, `weights()` (name -> parameter) and `apply(weights, x_BCD) -> y_BCD`, which sees
one chunk of one device's tokens."""

FFNS = {
    "gated": "lcx.ffn.gated:Gated",
    "dense": "lcx.ffn.dense:Dense",
    "none": "lcx.ffn.none:NoFeedForward",
}
