// y = x W^T for W in the layout of fragments.py, or plain: up to 8 NT tokens at a time, by tensor cores, for NVRTC.
//
// A block takes 16 ROWS rows; its warps share the inputs, and their FP32 sums meet in shared memory in a fixed order, so
// every run gives the same bits. Codes become exact BF16 or FP16 integers in registers; a group's products are summed
// before they are multiplied by its scale, in FP32. A warp has DEPTH slabs of 64 inputs on their way before it uses the
// first; where the kernel starts early, its weights are on their way while the kernel before it ends.
//
// Compiled for:  BITS 4 8, 16: W is (out, in) as torch has it, in HALF's dtype   HALF 0 BF16, 1 FP16
//   GROUP a multiple of 32, 0 for a row   WIDE scales in FP32   TAIL  in is no multiple of 64
//   NT ROWS WARPS DEPTH   KEEP_INPUTS as weights are   EARLY_START  see low_bit_common.cuh
//   SILU  rows g of a tile are gates and g + 8 their values: silu(gate) * value comes out, half as wide; with 16 bits
//         gates are W's first half
#include "low_bit_common.cuh"

#define GATES_FIRST (SILU && BITS == 16)
#define STRIDE (16 * ROWS + 4)  // floats between tokens in shared memory: no two lanes meet in a bank

#if BITS == 16
// 64 inputs of a row tile as a lane has them: 8 of rows g and g + 8, in both blocks.
struct Weights {
    uint4 words[4];
};
#else
typedef Tile Weights;
#endif

struct Slab {
    Weights tiles[ROWS];
    uint4 given[2][KEEP_INPUTS ? NT : 1];
};

// Where a lane reads: weights and scales of its row tiles, inputs of its tokens.
struct Place {
    const uint4 *words[ROWS];
    const u32 *scale[ROWS];
    const u16 *x[NT];
    i64 far;  // 16 bits: from row g to row g + 8
    int in, lane;
};

// Inputs of block b of a slab: 8 of each token, nothing past the end.
INLINE void fetch_given(const Place &at, int slab, uint4 (*out)[NT]) {
    for (int b = 0; b < 2; ++b)
        for (int j = 0; j < NT; ++j) {
            const int k = 64 * slab + 32 * b;
            out[b][j] = !TAIL || k < at.in ? *(const uint4 *)(at.x[j] + k) : make_uint4(0, 0, 0, 0);
        }
}

// Weights of ROWS tiles for 64 inputs.
INLINE void fetch_weights(const Place &at, int slab, Slab &out) {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
#if BITS == 16
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const bool inside = !TAIL || 64 * slab + 32 * (i >> 1) < at.in;
            const uint4 *from = at.words[r] + 8 * slab + 4 * (i >> 1) + (i & 1 ? at.far : 0);
            out.tiles[r].words[i] = inside ? load_once(from) : make_uint4(0, 0, 0, 0);
        }
#else
        fetch_tile(at.words[r], at.scale[r], slab, at.in, out.tiles[r]);
#endif
    }
}

INLINE void fetch_tokens(const Place &at, int slab, Slab &out) {
#if KEEP_INPUTS
    fetch_given(at, slab, out.given);
#endif
}

// The four registers of product s of block b.
INLINE void registers_of(const Weights &tile, int b, int s, u32 *a) {
#if BITS == 16
    const uint4 near = tile.words[2 * b], far = tile.words[2 * b + 1];
    a[0] = s ? near.z : near.x;
    a[1] = s ? far.z : far.x;
    a[2] = s ? near.w : near.y;
    a[3] = s ? far.w : far.y;
#else
    const u32 *own = &tile.words[BITS == 4 ? 0 : b].x;
    decode(own + (BITS == 4 ? 2 * b + s : 2 * s), a);
#endif
}

KERNEL(32 * WARPS) low_bit_linear(const uint4 *words, const u32 *scale, const u16 *x, const u16 *bias,
                      const u16 *residual, u16 *y, int tokens, int tiles, int in) {
    SHARED float sums[WARPS][8 * NT * STRIDE];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, slabs = (in + 63) / 64;
    const int first_token = blockIdx.y * 8 * NT, each = (slabs + WARPS - 1) / WARPS;
    const int begin = warp * each, end = min(begin + each, slabs), first_tile = blockIdx.x * ROWS;
    Place at;
    at.in = in;
    at.lane = lane;
    at.far = (i64)(SILU ? tiles : 1) * in;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        // What is computed of a tile or a token that is not there is not stored.
        const int tile = min(first_tile + r, tiles - 1);
#if BITS == 16
        at.words[r] = words + ((i64)(SILU ? 8 : 16) * tile + (lane >> 2)) * (in / 8) + (lane & 3);
#else
        at.words[r] = words_of(words, tile, in) + lane;
        at.scale[r] = scale_of(scale, tile, in, lane);
#endif
    }
#pragma unroll
    for (int j = 0; j < NT; ++j)
        at.x[j] = x + (i64)min(first_token + 8 * j + (lane >> 2), tokens - 1) * in + 8 * (lane & 3);

    Slab kept[DEPTH];
    let_next_start();
#pragma unroll
    for (int d = 0; d < DEPTH; ++d)
        if (begin + d < end) fetch_weights(at, begin + d, kept[d]);
    wait_for_earlier();
#pragma unroll
    for (int d = 0; d < DEPTH; ++d)
        if (begin + d < end) fetch_tokens(at, begin + d, kept[d]);

    float all[ROWS][NT][4] = {};
    for (int start = begin; start < end; start += DEPTH) {
#pragma unroll
        for (int d = 0; d < DEPTH; ++d) {
            const int slab = start + d;
            if (slab >= end) break;
#if KEEP_INPUTS
            uint4(*given)[NT] = kept[d].given;
#else
            uint4 given[2][NT];
            fetch_given(at, slab, given);
#endif
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                float part[NT][4] = {};
#pragma unroll
                for (int b = 0; b < 2; ++b) {
#pragma unroll
                    for (int s = 0; s < 2; ++s) {
                        u32 a[4];
                        registers_of(kept[d].tiles[r], b, s, a);
#pragma unroll
                        for (int j = 0; j < NT; ++j) {
                            const uint4 v = given[b][j];
                            multiply(BITS == 16 ? all[r][j] : part[j], a, s ? v.z : v.x, s ? v.w : v.y);
                        }
                    }
#if BITS < 16
                    if (HALVES || b) {
                        const uint2 by = kept[d].tiles[r].scale[HALVES ? b : 0];
#pragma unroll
                        for (int j = 0; j < NT; ++j)
#pragma unroll
                            for (int c = 0; c < 4; ++c) {
                                all[r][j][c] += part[j][c] * __uint_as_float(c < 2 ? by.x : by.y);
                                part[j][c] = 0.0f;
                            }
                    }
#endif
                }
            }
            if (slab + DEPTH < end) {
                fetch_weights(at, slab + DEPTH, kept[d]);
                fetch_tokens(at, slab + DEPTH, kept[d]);
            }
        }
    }

#pragma unroll
    for (int r = 0; r < ROWS; ++r)
#pragma unroll
        for (int j = 0; j < NT; ++j)
#pragma unroll
            for (int c = 0; c < 4; ++c)
                sums[warp][(8 * j + 2 * (lane & 3) + (c & 1)) * STRIDE + 16 * r + (lane >> 2) + 8 * (c >> 1)] = all[r][j][c];
    __syncthreads();
    const int width = SILU ? 8 * ROWS : 16 * ROWS;
    for (int index = threadIdx.x; index < 8 * NT * width; index += 32 * WARPS) {
        const int n = index / width, column = index % width, token = first_token + n;
        const int row = SILU ? 16 * (column / 8) + column % 8 : column, tile = first_tile + row / 16;
        if (token >= tokens || tile >= tiles) continue;
        float total = 0.0f, value = 0.0f;
        for (int w = 0; w < WARPS; ++w) total += sums[w][n * STRIDE + row];
        const int at_bias = GATES_FIRST ? 8 * tile + row % 8 : 16 * tile + row % 16;
        if (bias) total += wide(bias[at_bias]);
        if (SILU) {
            for (int w = 0; w < WARPS; ++w) value += sums[w][n * STRIDE + row + 8];
            if (bias) value += wide(bias[at_bias + (GATES_FIRST ? 8 * tiles : 8)]);
            const float gate = wide(rounded(total));
            total = wide(rounded(gate / (1.0f + expf(-gate)))) * wide(rounded(value));
        }
        const i64 out = (i64)token * (SILU ? 8 : 16) * tiles + (SILU ? 8 : 16) * tile + (SILU ? row % 8 : row % 16);
        u32 stored = rounded(total);
        if (residual) stored = rounded(wide(stored) + wide(residual[out]));
        y[out] = (u16)stored;
    }
}
