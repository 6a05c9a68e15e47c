"""Measurements that are commands: `python -m lcx.bench NAME`. A module has `run(argv) -> exit status`."""

BENCHMARKS = {
    "attention": "lcx.benchmarks.attention",
    "tune": "lcx.benchmarks.tune",
}
