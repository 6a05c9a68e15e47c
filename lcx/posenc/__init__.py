"""Position encodings. A part has `Config`, `rotate(x_BSHK, positions_BS)` for queries and keys, and `slopes(heads)` for ALiBi."""

POSENCS = {
    "rope": "lcx.posenc.rope:Rope",
    "alibi": "lcx.posenc.alibi:Alibi",
    "none": "lcx.posenc.none:NoPosition",
}
