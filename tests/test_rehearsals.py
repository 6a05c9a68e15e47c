"""Every committed experiment rehearsed as a person would, within the time, memory and loss that its header promises."""

import json
import os
import pathlib
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parent.parent
# config -> nats per byte that the held-out loss ends below, seconds on two quiet cores, GiB of host memory.
PROMISED = {
    "tiny": (3.0, 60, 4),
    "ring_1m": (3.0, 150, 4),
    "mst_1m": (3.0, 150, 4),
    "bpt_256k": (3.0, 200, 4),
    "llama.py:1b": (4.0, 120, 4),
    "longnet_1m": (4.2, 360, 16),
    "mamba_1m": (4.2, 360, 16),
    "hybrid_1m": (4.2, 360, 16),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PROMISED)
def test_a_rehearsal_keeps_what_its_header_promises(name, tmp_path, capsys):
    loss, seconds, gibibytes = PROMISED[name]
    file = ROOT / "configs" / (name if ":" in name else f"{name}.py")
    environment = {key: value for key, value in os.environ.items() if key not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}
    command = [sys.executable, "-m", "lcx.train", "--config", str(file), "--workdir", str(tmp_path / "run")]
    began = time.perf_counter()
    subprocess.run([*command, "--config.track.wandb=disabled"], check=True, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    took = time.perf_counter() - began
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])["loss"]
    with capsys.disabled():
        held_out, peak = summary["held_out"]["loss"], summary["host_peak_bytes"] / 2**30
        print(f"\n{name}: {took:.0f} s, {peak:.1f} GiB, loss {first:.2f} at first, held-out {held_out:.4f}", flush=True)
    assert summary["ending"] == "finished" and held_out < loss and held_out < first
    assert took < seconds and peak < gibibytes
