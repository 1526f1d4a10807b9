// Tokens as low_bit_tiles.cu wants them in shared memory, so that it can fetch 64 inputs of all its tokens in one piece.
//
// y: slab after slab (64 inputs), in each all tokens, up to a whole number of blocks, 128 bytes each: eight pieces of 16
// bytes, exchanged by the token's place among eight. A piece has a pair of inputs from each of four places (fragments.py).
#include "low_bit_common.cuh"

// A thread: 32 inputs of a token.
KERNEL(256, 1) low_bit_arrange(const u16 *x, u16 *y, int tokens, int padded, int in) {
    let_next_start();
    wait_for_earlier();
    const int blocks = (in + 63) / 64 * 2;
    const i64 index = (i64)blockIdx.x * 256 + threadIdx.x, token = index / blocks;
    const int block = (int)(index % blocks);
    if (token >= tokens) return;
    const bool is_there = 32 * block < in;
    uint4 given[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
        given[i] = is_there ? ((const uint4 *)(x + token * in + 32 * block))[i] : make_uint4(0, 0, 0, 0);
    uint4 *row = (uint4 *)(y + ((i64)(block >> 1) * padded + token) * 64);
    const int first = 4 * (block & 1), place = (int)(token & 7);
    row[(first + 0) ^ place] = make_uint4(given[0].x, given[1].x, given[2].x, given[3].x);
    row[(first + 1) ^ place] = make_uint4(given[0].y, given[1].y, given[2].y, given[3].y);
    row[(first + 2) ^ place] = make_uint4(given[0].z, given[1].z, given[2].z, given[3].z);
    row[(first + 3) ^ place] = make_uint4(given[0].w, given[1].w, given[2].w, given[3].w);
}
