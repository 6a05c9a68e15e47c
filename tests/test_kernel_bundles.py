"""Instruction bundles and vector memory of the TPU attention kernels, read from what libtpu writes: compiled, not run."""

import importlib.util

import pytest

from lcx.planning.bundles import blocks, environment, longest, vmem_bytes
from lcx.planning.kernel_counts import compile_into, tpu_attention

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="NOT CHECKED: compiling for TPUs needs pip install 'lcx[plan]' (libtpu)"
)
KERNELS = ("forward", "backward")
# Bundles for one pair of tiles, 512 queries by 512 keys, K=128, bf16, causal, packed documents: (nothing hidden, masked).
# By target and runs a side: one, and the sixteen of cyclic order. Measured with libtpu 0.0.48.1; a budget is 3 % more.
MEASURED = {
    ("v5p", 1): dict(forward=(1397, 1682), backward=(2524, 2694)),
    ("v5e", 1): dict(forward=(1427, 1556), backward=(2422, 2598)),
    ("v6e", 1): dict(forward=(1013, 1303), backward=(1457, 1835)),
    ("v5p", 16): dict(forward=(1400, 1694), backward=(2530, 2708)),
}
MARGIN = 1.03
# Bytes of a kernel, of the 16 MiB that the compiler lets it have. Measured: 2.2 to 4.3 MiB, of which 1 MiB is spilled registers.
VMEM = 9 * 2**19


# The reader.

CODE = """control target key start
LB: loop body
control target key end

     0   :  { %s1 = smov 0 }
   0x1 LB: > { %v1 = vld [vmem:[%s1] sm:$0xff] }
   0x2   : > { %3 = sbr.rel (%p1) target = $region9 }
   0x3 LB: >> { %v2 = vadd.f32 %v1, %v1  ;;  %4 = vmatmul.f32 %v1 }
   0x4   : >> { %5 = vst [vmem:[%s1] sm:$0xff] %v2 }
   0x5 PF: >> { %6 = sbr.rel (!%p2) target = $region3 }
   0x6   :  { %7 = snop }
   0x7   : > { %v3 = vadd.f32 %v1, %v1 }
   0x8   : >> { %v4 = vadd.f32 %v1, %v1 }
"""
UNITS = """== CAPACTIY:
MXU, VALU, VSTORE:SPILL
    4     2     1
== UTILIZATION:
0 0 0
0 0 0
0 0 0
4 2 0
2 0 1
0 0 0
0 0 0
0 1 0
0 2 0
"""
REPORT = (
    '<script> const DATA = {"hlo_breakdowns": {"add.1": {"total_size": 8}, "scan.3": {"total_size": 640}}}; show(DATA);</script>'
)


@pytest.fixture
def dump(tmp_path):
    """What libtpu writes, of a kernel named scan."""
    (tmp_path / "17-scan.3-02-final_bundles.txt").write_text(CODE)
    (tmp_path / "17-scan.3-01-schedule-analysis_final_bundles.txt").write_text("Schedule analysis:")
    (tmp_path / "17-scan.3-00-final_hlo-static-per-bundle-utilization.txt").write_text(UNITS)
    (tmp_path / "17-scan_2.4-02-final_bundles.txt").write_text("")
    (tmp_path / "17-TLP-85-vmem_report.html").write_text(REPORT)
    return tmp_path


def test_blocks_end_at_labels_and_branches_and_where_loops_do(dump):
    found = blocks(dump, "scan")
    assert [(block.loops, block.bundles) for block in found] == [(0, 1), (1, 2), (2, 2), (2, 1), (1, 2), (2, 1)]
    inner = found[2]
    assert inner.used == {"MXU": 6, "VALU": 2, "VSTORE:SPILL": 1}
    assert inner.share("MXU") == 6 / 8 and inner.share("VALU") == 0.5
    assert longest(found, 2) == [inner, found[4]]


def test_vector_memory(dump):
    assert vmem_bytes(dump, "scan") == 640


def test_a_kernel_that_is_not_there(dump):
    with pytest.raises(ValueError, match="0 kernels named scans"):
        blocks(dump, "scans")
    with pytest.raises(ValueError, match="0 memory reports of kernels named scans"):
        vmem_bytes(dump, "scans")


def test_the_environment_keeps_what_is_there(monkeypatch):
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--one=1")
    assert environment("/somewhere")["LIBTPU_INIT_ARGS"].startswith("--one=1 --xla_jf_dump_to=/somewhere ")


# The kernels.


@needs_libtpu
@pytest.mark.parametrize(
    ("target", "runs"), [pytest.param(*key, marks=[] if key == ("v5p", 1) else pytest.mark.slow) for key in MEASURED]
)
def test_attention_stays_within_its_bundles(target, runs, tmp_path, capsys):
    compile_into(tmp_path, "attention", target, runs)
    bodies = tpu_attention(tmp_path)
    table = {kernel: (bodies[kernel], vmem_bytes(tmp_path, f"lcx_attention_{kernel}")) for kernel in KERNELS}
    for kernel, (found, memory) in table.items():
        text = ", ".join(f"{b.bundles} bundles ({b.share('MXU'):.0%} MXU, {b.used['VSTORE:SPILL']} spills)" for b in found)
        with capsys.disabled():
            print(f"\n{target} {runs} runs {kernel}: {text}, {memory / 2**20:.1f} MiB of VMEM", end="")
    for kernel, (found, memory) in table.items():
        whole, masked = (block.bundles for block in found)
        budgets = [MARGIN * bundles for bundles in MEASURED[target, runs][kernel]]
        assert whole <= budgets[0] and masked <= budgets[1], (kernel, whole, masked)
        assert masked > budgets[0], f"{kernel}: a mask where none is needed would not be noticed"
        assert memory <= VMEM, (kernel, memory)
