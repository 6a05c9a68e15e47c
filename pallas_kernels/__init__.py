"""Implementations of the operations in `lcx.ops`: one file per operation and target.

`KERNELS` maps an operation to its implementations, name -> module; `lcx.ops.dispatch` chooses among them. Strings only:
a module, and with it Pallas, is imported when it is first asked for.
"""

KERNELS = {
    "attention": {
        "reference": "lcx.ops.attention_reference",
        "chunked": "lcx.ops.attention_chunked",
        "mosaic_tpu": "pallas_kernels.attention_tpu",
        "mosaic_gpu": "pallas_kernels.attention_hopper",
        "cudnn": "lcx.ops.attention_cudnn",
        "tokamax": "lcx.ops.attention_tokamax",
    },
    "linear_cross_entropy": {
        "reference": "lcx.ops.linear_cross_entropy_reference",
        "chunked": "lcx.ops.linear_cross_entropy_chunked",
    },
    "causal_conv": {
        "reference": "lcx.ops.causal_conv_reference",
        "chunked": "lcx.ops.causal_conv_chunked",
        "mosaic_tpu": "pallas_kernels.causal_conv_tpu",
        "triton": "pallas_kernels.causal_conv_triton",
    },
    "selective_scan": {
        "reference": "lcx.ops.selective_scan_reference",
        "chunked": "lcx.ops.selective_scan_chunked",
        "mosaic_tpu": "pallas_kernels.selective_scan_tpu",
        "triton": "pallas_kernels.selective_scan_triton",
    },
    "ssd": {
        "reference": "lcx.ops.ssd_reference",
        "chunked": "lcx.ops.ssd_chunked",
        "mosaic_tpu": "pallas_kernels.ssd_tpu",
        "triton": "pallas_kernels.ssd_triton",
    },
}
