"""Measurements that are commands: `python -m lcx.bench NAME`. A module has `run(argv) -> exit status`."""

BENCHMARKS = {
    "attention": "lcx.benchmarks.attention",
    "selective_scan": "lcx.benchmarks.selective_scan",
    "ssd": "lcx.benchmarks.ssd",
    "tune": "lcx.benchmarks.tune",
}
