"""How the numbers of the backward pass of the selective scan lie in threads and in shared memory of a program, which is one warp.

*Tile*: the N states of the BLOCK channels of one token, (1, N, BLOCK). A thread has 4 states of 4 channels, so that sums over
states and sums over channels both begin in its registers.
*Rows*: some tokens by BLOCK channels, as the arrays lie in memory; a thread has its own numbers, 4 channels of a token.
What threads of one form have for threads of the other goes through shared memory, parts of sums too: a thread then adds as many
numbers as it has stored, where exchanging them among threads would take two instructions for each halving.
"""

import triton
import triton.language as tl

from pallas_kernels.triton_shared import gl, jit


@triton.constexpr_function
def tile_layout(N, BLOCK):
    return gl.BlockedLayout([1, 4, 4], [1, N // 4, BLOCK // 4], [1, 1, 1], [2, 1, 0])


@triton.constexpr_function
def state_parts_layout(N, BLOCK):
    """Of (tokens, N / 4, BLOCK), parts of sums over states. Without its middle dim it is that of rows."""
    return gl.BlockedLayout([1, N // 4, 4], [128 // BLOCK, 1, BLOCK // 4], [1, 1, 1], [2, 1, 0])


@triton.constexpr_function
def maps_layout(N):
    """Of tokens by states."""
    return gl.BlockedLayout([1, 4], [128 // N, N // 4], [1, 1], [1, 0])


@triton.constexpr_function
def channel_parts_layout(N, BLOCK):
    """Of what `channel_parts_memory` holds: a thread adds up the parts of 4 states."""
    return gl.BlockedLayout([BLOCK // 4, 4], [128 // N, N // 4], [1, 1], [1, 0])


@triton.constexpr_function
def channel_parts_places(N, BLOCK):
    """Numbers of 4 states change places, otherwise in each row of banks (32): up to N=16 none who store a line meet in a bank."""
    lines = max(1, 32 // N)
    return gl.SwizzledSharedLayout(4, lines, max(1, min(N // 4, BLOCK // 4 // lines)), [1, 0])


@jit
def row_memory(ROWS: tl.constexpr, WIDTH: tl.constexpr):
    return gl.allocate_shared_memory(tl.float32, [ROWS, WIDTH], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))


@jit
def stacked_memory(COUNT: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """`row_memory` so many times, for an index that is not known when the kernel is compiled."""
    return gl.allocate_shared_memory(tl.float32, [COUNT, ROWS, WIDTH], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))


@jit
def state_parts_memory(ROWS: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr):
    """For parts of sums over states: of each row N / 4 lines of channels."""
    return gl.allocate_shared_memory(tl.float32, [ROWS, N // 4, BLOCK], gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0]))


@jit
def channel_parts_memory(ROWS: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr):
    """For parts of sums over channels: of each row BLOCK / 4 lines of states."""
    return gl.allocate_shared_memory(tl.float32, [ROWS * BLOCK // 4, N], channel_parts_places(N, BLOCK))


@jit
def of_channels(memory, row: tl.constexpr, TILE: tl.constexpr):
    """A row as a tile, the same for all states."""
    return memory.slice(row, 1, 0).load(gl.SliceLayout(1, TILE))[:, None, :]


@jit
def of_states(memory, row: tl.constexpr, TILE: tl.constexpr):
    """A row of B or C as a tile, the same for all channels."""
    return memory.slice(row, 1, 0).load(gl.SliceLayout(2, TILE))[:, :, None]


@jit
def _four(x):
    """The four numbers of a thread along the last two dims, 2 by 2."""
    even, odd = tl.split(x)
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@jit
def quarters(tile, N: tl.constexpr, BLOCK: tl.constexpr):
    """Of a tile the states 0, 4, 8, ..., those behind each, and so on: four of (1, N / 4, BLOCK)."""
    return _four(tile.reshape(1, N // 4, 2, 2, BLOCK).permute(0, 1, 4, 2, 3))


@jit
def every_fourth(tile, N: tl.constexpr, BLOCK: tl.constexpr):
    """States 0, 4, 8, ... of a tile: a thread's first, whose place in memory is enough to reach all of its own."""
    return tl.max_contiguous(tl.multiple_of(quarters(tile, N, BLOCK)[0], (1, 1, 4)), (1, 1, 4))


@jit
def put_tile(at, tile, STRIDE: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr):
    """Stores a tile; `at` points to every fourth state, and STRIDE numbers further on to the next."""
    four = quarters(tile, N, BLOCK)
    for j in tl.static_range(4):
        tl.store(at + j * STRIDE, four[j])


@jit
def tile_at(at, STRIDE: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr):
    """Loads what `put_tile` stores."""
    even = tl.join(tl.load(at), tl.load(at + 2 * STRIDE))
    odd = tl.join(tl.load(at + STRIDE), tl.load(at + 3 * STRIDE))
    tile = tl.join(even, odd).permute(0, 1, 3, 4, 2).reshape(1, N, BLOCK)
    return gl.convert_layout(tile, tile_layout(N, BLOCK))


@jit
def _in_turn(x):
    """The sum of four, one by one, so that every product among them joins an addition."""
    return x[0] + x[1] + x[2] + x[3]


@jit
def put_state_parts(memory, row: tl.constexpr, tile, N: tl.constexpr, BLOCK: tl.constexpr):
    """Stores the parts of a tile's sums over states."""
    memory.slice(row, 1, 0).store(_in_turn(quarters(tile, N, BLOCK)))


@jit
def put_channel_parts(memory, row: tl.constexpr, tile, N: tl.constexpr, BLOCK: tl.constexpr):
    """Stores the parts of a tile's sums over channels."""
    LINES: tl.constexpr = BLOCK // 4
    parts = _in_turn(_four(tile.reshape(1, N, LINES, 2, 2)))
    memory.slice(row * LINES, LINES, 0).store(parts.permute(0, 2, 1).reshape(LINES, N))


@jit
def channel_sums(memory, ROWS: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr):
    """Sums over channels of all rows, (rows, N)."""
    sums = tl.sum(memory.load(channel_parts_layout(N, BLOCK)).reshape(ROWS, BLOCK // 4, N), axis=1)
    return gl.convert_layout(sums, maps_layout(N))
