// y = x W^T for many tokens, on Hopper: warpgroups multiply 64 rows by TOKENS tokens, weights from registers.
//
// The layout of fragments.py is what a warpgroup's operand A is, four tiles high; codes become bf16(q s) on their way, so
// the result is that of a BF16 layer on the same grid. Tokens are operand B: 64 inputs of each lie in shared memory, 128
// bytes a row in the hardware's swizzle, inputs in the order that the weights have. While tensor cores read one half of
// it, threads bring the next slab's inputs to the other and decode the next weights.
//
// Compiled for (and what low_bit_common.cuh names):  TOKENS 64 128   WGS warpgroups of a block   SILU as in the other text
#define WARPS (4 * WGS)
#define THREADS (32 * WARPS)
#include "low_bit_common.cuh"

#ifndef EMULATE
#if HALF
#define TYPE "f16"
#else
#define TYPE "bf16"
#endif
// Registers and shared memory, as they are written now, are what the next product reads.
INLINE void open_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
INLINE void queue_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
INLINE void wait_for_products() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }
INLINE void show_to_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// Products read registers after they are queued: these stay what they are until here.
INLINE void keep(u32 *a) { asm volatile("" : "+r"(a[0]), "+r"(a[1]), "+r"(a[2]), "+r"(a[3])); }
INLINE u32 times(u32 a, u32 b) {
    u32 v;
#if HALF
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(v) : "r"(a), "r"(b));
#else
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(v) : "r"(a), "r"(b));
#endif
    return v;
}
// And sums are what they are from here on.
INLINE void settle(float *d) {
#pragma unroll
    for (int i = 0; i < TOKENS / 2; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
// d[4 j + c]: row g (+ 8 if c > 1), token 8 j + 2 t (+ 1 if c is odd). ``tile``: (TOKENS, 64), 1024-byte aligned; its
// descriptor: address, eight rows to the next 1024 bytes, swizzle of 128 bytes; 16 inputs are 32 bytes.
INLINE void multiply_group(float *d, const u32 *a, const u16 *tile, int step) {
    const u64 address = (u64)__cvta_generic_to_shared(tile) + 32 * step;
    const u64 at = ((address & 0x3ffff) >> 4) | (1ull << 16) | (64ull << 32) | (1ull << 62);
#if TOKENS == 64
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
                 "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 0;"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
                   "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
                   "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
                   "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(at));
#else
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
                 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
                 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
                 "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 0;"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
                   "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
                   "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
                   "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]),
                   "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]),
                   "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]),
                   "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]),
                   "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(at));
#endif
}
#endif

#define UNITS (TOKENS * 8 / THREADS)  // 16-byte pieces of a slab's inputs that a thread brings

INLINE void fetch_inputs(const u16 *x, int first_token, int tokens, int in, int slab, uint4 *held) {
#pragma unroll
    for (int i = 0; i < UNITS; ++i) {
        const int unit = threadIdx.x + i * THREADS, token = min(first_token + unit / 8, tokens - 1);
        const int k = 64 * slab + 8 * (unit % 8);
        held[i] = k < in ? *(const uint4 *)(x + (i64)token * in + k) : make_uint4(0, 0, 0, 0);
    }
}

// Eight inputs go to four places: the pairs of both products of their block.
INLINE void lay_inputs(const uint4 *held, u16 *tile) {
#pragma unroll
    for (int i = 0; i < UNITS; ++i) {
        const int unit = threadIdx.x + i * THREADS, token = unit / 8, block = unit % 8 / 4, t = unit % 4;
        const u32 *pairs = &held[i].x;
#pragma unroll
        for (int pair = 0; pair < 4; ++pair)
            *(u32 *)(tile + 64 * token + 8 * ((4 * block + pair) ^ (token & 7)) + 2 * t) = pairs[pair];
    }
}

// bf16(q s) of a slab: four products' registers.
INLINE void decode_tile(const Tile &tile, u32 (*a)[4]) {
#pragma unroll
    for (int b = 0; b < 2; ++b) {
        const uint2 by = tile.scale[HALVES ? b : 0];
        const float near = __uint_as_float(by.x), far = __uint_as_float(by.y);
        const u32 scale[2] = {pair(near, near), pair(far, far)};
        const u32 *own = &tile.words[BITS == 4 ? 0 : b].x;
#pragma unroll
        for (int s = 0; s < 2; ++s) {
            decode(own + (BITS == 4 ? 2 * b + s : 2 * s), a[2 * b + s]);
#pragma unroll
            for (int i = 0; i < 4; ++i) a[2 * b + s][i] = times(a[2 * b + s][i], scale[i & 1]);
        }
    }
}

KERNEL(THREADS) low_bit_tiles(const uint4 *words, const u32 *scale, const u16 *x, const u16 *bias, const u16 *residual,
                              u16 *y, int tokens, int tiles, int in) {
    SHARED ALIGNED u16 inputs[2][64 * TOKENS];
    const int lane = threadIdx.x & 31, tile = blockIdx.x * WARPS + (threadIdx.x >> 5), slabs = (in + 63) / 64;
    const int first_token = blockIdx.y * TOKENS, there = min(tile, tiles - 1);
    const uint4 *own_words = words_of(words, there, in) + lane;
    const u32 *own_scale = scale_of(scale, there, in, lane);

    Tile next;
    uint4 held[UNITS];
    u32 a[4][4];
    fetch_tile(own_words, own_scale, 0, in, next);
    fetch_inputs(x, first_token, tokens, in, 0, held);
    lay_inputs(held, inputs[0]);
    decode_tile(next, a);
    if (1 < slabs) {
        fetch_tile(own_words, own_scale, 1, in, next);
        fetch_inputs(x, first_token, tokens, in, 1, held);
    }
    show_to_products();
    __syncthreads();

    float all[TOKENS / 2] = {};
    for (int slab = 0; slab < slabs; ++slab) {
        const u16 *current = inputs[slab & 1];
        open_products();
#pragma unroll
        for (int step = 0; step < 4; ++step) multiply_group(all, a[step], current, step);
        queue_products();
        u32 later[4][4];
        if (slab + 1 < slabs) {
            // Its last readers were waited for before the last barrier.
            lay_inputs(held, inputs[(slab + 1) & 1]);
            decode_tile(next, later);
        }
        if (slab + 2 < slabs) {
            fetch_tile(own_words, own_scale, slab + 2, in, next);
            fetch_inputs(x, first_token, tokens, in, slab + 2, held);
        }
        show_to_products();
        wait_for_products();
        __syncthreads();
#pragma unroll
        for (int step = 0; step < 4; ++step) keep(a[step]);
#pragma unroll
        for (int step = 0; step < 4; ++step)
#pragma unroll
            for (int i = 0; i < 4; ++i) a[step][i] = later[step][i];
    }

    settle(all);
    if (tile >= tiles) return;
#pragma unroll
    for (int j = 0; j < TOKENS / 8; ++j)
#pragma unroll
        for (int c = 0; c < (SILU ? 2 : 4); ++c) {
            const int token = first_token + 8 * j + 2 * (lane & 3) + (c & 1), row = (lane >> 2) + 8 * (c >> 1);
            if (token >= tokens) continue;
            float total = all[4 * j + c] + (bias ? wide(bias[16 * tile + row]) : 0.0f);
            if (SILU) {
                const float gate = wide(rounded(total));
                const float value = all[4 * j + c + 2] + (bias ? wide(bias[16 * tile + row + 8]) : 0.0f);
                total = wide(rounded(gate / (1.0f + expf(-gate)))) * wide(rounded(value));
            }
            const i64 out = (i64)token * (SILU ? 8 : 16) * tiles + (SILU ? 8 : 16) * tile + row;
            u32 stored = rounded(total);
            if (residual) stored = rounded(wide(stored) + wide(residual[out]));
            y[out] = (u16)stored;
        }
}
