"""How instructions of kernels are counted, from listings: loops in loops, and what is not known is an error."""

import collections

import pytest

from lcx import command
from lcx.planning import kernel_counts, sass
from lcx.planning.bundles import Block

LISTING = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   MUFU.EX2 R2, R1 ;
.L_x_2:
        /*0020*/              @!P0 FADD R3, R2, R1 ;
        /*0030*/               @P1 BRA `(.L_x_2) ;
        /*0040*/                   FMUL R3, R3, R1 ;
        /*0050*/              @!P2 BRA `(.L_x_2) ;
        /*0060*/               @P0 BRA `(.L_x_1) ;
        /*0070*/                   EXIT ;
.L_x_3:
        /*0080*/                   WARPSYNC.COLLECTIVE R4, `(.L_x_4) ;
.L_x_4:
        /*0090*/                   BRA `(.L_x_3) ;
"""


def test_loops_stand_in_loops():
    """Two branches back to one label are one loop; what brings threads together behind the program is none."""
    (outer,) = sass.loops(LISTING)
    assert outer.instructions == dict({"MUFU.EX2": 1}, FADD=1, BRA=3, FMUL=1)
    (inner,) = outer.inside
    assert inner.instructions.total() == 4 and inner.inside == [] and outer.innermost() == inner.innermost() == [inner]
    assert outer.executed(1) == 6 and outer.executed(10) == 2 + 40


def loop(instructions: int, *inside: sass.Loop) -> sass.Loop:
    return sass.Loop(0, 0, collections.Counter(FFMA=instructions), list(inside))


def code(*loops: sass.Loop) -> sass.Code:
    return sass.Code(255, 0, collections.Counter(FFMA=900), list(loops))


def test_a_token_of_the_selective_scan_on_a_gpu():
    """8 tokens a turn; 32 groups of 4 tokens in a chunk of 128, gone through two by two, then one by one."""
    states, reverse = loop(500), loop(900)
    kernels = dict(
        forward=[code(loop(10), loop(800))],
        stretch=[code(loop(400)), code(loop(480))],
        backward=[code(loop(1700, states, reverse))],
    )
    found = kernel_counts.gpu_scan(kernels)
    assert found["forward"] == 800 / 8 * 16 and found["stretch"] == 480 / 8 * 16
    assert found["backward"] == (300 + 16 * 500 + 32 * 900) / 128 * 32
    with pytest.raises(ValueError, match="other loops"):
        kernel_counts.gpu_scan(kernels | dict(backward=[code(loop(1700, states))]))
    with pytest.raises(ValueError, match="other loops"):
        kernel_counts.gpu_scan(kernels | dict(forward=[code(loop(800, loop(60)))]))


def test_a_token_and_head_of_ssd_on_a_gpu():
    """By 4 warps of 64 tokens; the longest of both directions; all of a kernel without loops, short ones aside."""
    one = dict(forward=loop(900, loop(640)), stretch=loop(320), states=loop(480), gradients=loop(960), maps=loop(560))
    kernels = {name: [code(x)] for name, x in one.items()} | dict(pairs=[code(loop(30))])
    kernels["stretch"].append(code(loop(400)))
    found = kernel_counts.gpu_ssd(kernels)
    assert (found["forward"], found["stretch"], found["parts"]["pairs"]) == (40, 25, 900 / 16)
    assert found["backward"] == sum(found["parts"].values()) == (480 + 960 + 560 + 900) / 16


def test_other_loops_on_a_tpu_are_noticed(monkeypatch):
    blocks = [Block(2, 128, {}, {})] * 4
    monkeypatch.setattr(kernel_counts.bundles, "blocks", lambda folder, kernel: blocks)
    with pytest.raises(ValueError, match="lcx_selective_scan_backward has loops of .* bundles, where 6 are known"):
        kernel_counts.tpu_scan("")
    with pytest.raises(ValueError, match="lcx_ssd has loops of .* bundles, where 1 are known"):
        kernel_counts.tpu_ssd("")
    with pytest.raises(ValueError, match="lcx_causal_conv has loops of .* bundles, where 1 and 2 are known"):
        kernel_counts.tpu_conv("", "v5p")


def test_a_token_of_the_convolution_on_a_tpu(monkeypatch):
    """Bodies of 128 tokens and 128 channels, first those that ask; groups of channels 8 times; and what a program takes once."""
    of_passes = dict(lcx_causal_conv=[160, 80], lcx_causal_conv_backward=[160, 80, 240, 160])
    around = [Block(1, 2048, {}, {}), Block(2, 64, {}, {}), Block(2, 32, {}, {}), Block(3, 16, {}, {})]
    blocks = lambda folder, kernel: around + [Block(3, count, {}, {}) for count in of_passes[kernel]]
    monkeypatch.setattr(kernel_counts.bundles, "blocks", blocks)
    found, once = kernel_counts.tpu_conv("", "v5p"), 1 + 0.25 + 2
    assert found["forward"] == dict(plain=5 + once, asking=10 + 0.5 + once)
    assert found["backward"] == dict(plain=15 + once, asking=25 + 0.5 + once)
    assert kernel_counts.tpu_conv("", "v4")["forward"] == dict(plain=5 + 1 + 2 * 2.25, asking=10.5 + 1 + 2 * 2.25)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("", "the following arguments are required: op, target"),
        ("conv v5p", "v5p: op='conv' is not known (valid: selective_scan, ssd, causal_conv, attention)"),
        ("causal_conv h100", "h100: op='causal_conv' is not known (valid: selective_scan, ssd, attention)"),
        ("ssd v5q", "target='v5q' is not known; did you mean 'v5p'? (valid: v4, v5e, v5p, v6e, h100)"),
    ],
)
def test_a_wrong_argument_is_one_line(arguments, says, capsys):
    assert command.status(kernel_counts.run, arguments.split()) == 2
    assert capsys.readouterr().err.startswith(f"error: {says}")


def test_a_pair_of_tiles_of_attention_on_a_gpu():
    """Forward 64 queries by 128 keys a turn, backward 64 by 64; the loop of the warps that copy is none of products."""
    turn = lambda total, exponentials: sass.Loop(0, 0, collections.Counter({"HGMMA": 8, "MUFU.EX2": exponentials, "FFMA": total}))
    kernels = dict(forward=turn(326, 66), dq=turn(160, 32), dk_dv=turn(260, 32))
    kernels = {f"lcx_attention_{name}": [code(loop(50), x)] for name, x in kernels.items()}
    found = kernel_counts.gpu_attention(kernels)
    assert found == dict(forward=[4 * 400 * 32], backward=[4 * (200 + 300) * 64])
    for wrong in (loop(400), turn(326, 65)):
        with pytest.raises(ValueError, match="not a loop over tiles"):
            kernel_counts.gpu_attention(kernels | dict(lcx_attention_forward=[code(wrong)]))
