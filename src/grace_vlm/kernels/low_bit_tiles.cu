// y = x W^T for many tokens, on Hopper: warpgroups multiply 64 rows by TOKENS tokens, weights from registers.
//
// The layout of fragments.py is what a warpgroup's operand A is, four tiles high; codes become bf16(q s) on their way, so
// the result is that of a BF16 layer on the same grid. Tokens are operand B: 64 inputs of each lie in shared memory, 128
// bytes a row in the hardware's swizzle, inputs in the order that the weights have.
//
// One warpgroup of a block only brings tokens, STAGES slabs ahead of the others; the others decode the next weights while
// the tensor cores multiply the last. TALL: a warpgroup has so many pieces of 64 rows, WGS: so many warpgroups share the
// rows of a block, SPLIT: so many share its inputs, slab by slab in turn. SPREAD: so many blocks, a cluster, share the
// inputs of the same rows and tokens. Sums meet in shared memory, in a fixed order.
//
// Compiled for (and what low_bit_common.cuh names):  TOKENS 32 64 128   TALL 1 2   WGS   SPLIT   STAGES   DEPTH slabs of
// weights on their way (even)   SILU as in the other text
#define CONSUMERS (WGS * SPLIT)
#define WARPS (4 * (CONSUMERS + 1))
#define THREADS (32 * WARPS)
#define WIDTH (SILU ? 32 * TALL : 64 * TALL)  // numbers of a token that a warpgroup stores
#define LINE (WIDTH + 8)                       // their distance in shared memory: 16 bytes more, against conflicts
#define EIGHTS (TOKENS / 8 / SPREAD)           // of tokens that a block stores
#define PARTS (SPLIT * SPREAD > 1 ? 2 * WGS * TALL * 64 * TOKENS : 0)  // u16 of FP32 sums that others add to theirs
#define STAGED (STAGES * 64 * TOKENS)
#define STORED (PARTS + WGS * 8 * EIGHTS * LINE)
#define SHARED_WORDS (STAGED > STORED ? STAGED : STORED)  // u16
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
// All but the last ``left`` groups of products are done.
#define wait_for_products(left) asm volatile("wgmma.wait_group.sync.aligned " #left ";" ::: "memory")
INLINE void show_to_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// Named barriers: ``count`` threads come, of which some do not wait.
INLINE void sync_at(int barrier, int count) { asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(count) : "memory"); }
INLINE void arrive_at(int barrier, int count) {
    asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(count) : "memory");
}
#if SPREAD > 1
#define CLUSTER __cluster_dims__(1, 1, SPREAD)
#else
#define CLUSTER
#endif
// All blocks of a cluster, and what another of them has where this one has ``own``.
INLINE void sync_cluster() {
    asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}
INLINE float of_block(const float *own, int block) {
    float v;
    asm volatile("{.reg .u32 at; mapa.shared::cluster.u32 at, %1, %2; ld.shared::cluster.f32 %0, [at];}"
                 : "=f"(v)
                 : "r"((u32)__cvta_generic_to_shared(own)), "r"(block));
    return v;
}
#if TALL == 2 && CONSUMERS == 2
// Of 65,536 registers the three warpgroups have 168 a thread; those that multiply need more.
#define TAKE_REGISTERS asm volatile("setmaxnreg.inc.sync.aligned.u32 216;")
#define GIVE_REGISTERS asm volatile("setmaxnreg.dec.sync.aligned.u32 72;")
#else
#define TAKE_REGISTERS
#define GIVE_REGISTERS
#endif
// Products read registers after they are queued: these stay what they are until here.
INLINE void keep(u32 (*a)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+r"(a[i][0]), "+r"(a[i][1]), "+r"(a[i][2]), "+r"(a[i][3]));
}
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
INLINE u16 *shared_memory() {
    extern SHARED u16 raw[];
    const u32 address = (u32)__cvta_generic_to_shared(raw);
    return raw + (((address + 1023) & ~1023u) - address) / 2;
}
#define SUMS(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define GIVEN "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(at)
// d[4 j + c]: row g (+ 8 if c > 1), token 8 j + 2 t (+ 1 if c is odd). ``tile``: (TOKENS, 64), 1024-byte aligned; its
// descriptor: address, eight rows to the next 1024 bytes, swizzle of 128 bytes; 16 inputs are 32 bytes.
INLINE void multiply_group(float *d, const u32 *a, const u16 *tile, int step) {
    const u64 address = (u64)__cvta_generic_to_shared(tile) + 32 * step;
    const u64 at = ((address & 0x3ffff) >> 4) | (1ull << 16) | (64ull << 32) | (1ull << 62);
#if TOKENS == 32
    asm volatile("wgmma.mma_async.sync.aligned.m64n32k16.f32." TYPE "." TYPE " {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
                 "}, {%16, %17, %18, %19}, %20, 1, 1, 1, 0;"
                 : SUMS(0), SUMS(8)
                 : GIVEN);
#elif TOKENS == 64
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
                 "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 0;"
                 : SUMS(0), SUMS(8), SUMS(16), SUMS(24)
                 : GIVEN);
#else
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
                 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
                 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
                 "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 0;"
                 : SUMS(0), SUMS(8), SUMS(16), SUMS(24), SUMS(32), SUMS(40), SUMS(48), SUMS(56)
                 : GIVEN);
#endif
}
#endif

// Barriers: tokens of a stage are there, have been read; all products are done; a warpgroup's numbers are in place.
#define FULL(stage) (1 + (stage))
#define EMPTY(stage) (1 + STAGES + (stage))
#define DONE (1 + 2 * STAGES)
#define IN_PLACE (2 + 2 * STAGES)

#define UNITS (TOKENS / 16)                           // 16-byte pieces of a slab's inputs that a thread brings
#define AHEAD ((TALL == 2 ? 8 : 16) / UNITS)          // slabs of them that it waits for at a time

// All tokens of a block, slab after slab, by 128 threads: thread / 8 is a token of sixteen, thread % 8 its 16 bytes.
INLINE void bring_tokens(const u16 *x, u16 *stages, int thread, int first_token, int tokens, int first_slab, int slabs,
                         int in) {
    const int piece = thread & 7, row = thread >> 3;
    const u16 *from = x + (i64)first_token * in + 8 * piece;
    int offset[UNITS];
#pragma unroll
    for (int i = 0; i < UNITS; ++i) offset[i] = min(row + 16 * i, tokens - 1 - first_token) * in;

    uint4 held[AHEAD][UNITS];
    auto fetch = [&](int one, uint4 *out) {
        const int slab = first_slab + one;
#pragma unroll
        for (int i = 0; i < UNITS; ++i)
            out[i] = !TAIL || 64 * slab + 8 * piece < in ? *(const uint4 *)(from + offset[i] + 64 * slab)
                                                         : make_uint4(0, 0, 0, 0);
    };
#pragma unroll
    for (int a = 0; a < AHEAD; ++a)
        if (a < slabs) fetch(a, held[a]);
    for (int start = 0; start < slabs; start += AHEAD) {
#pragma unroll
        for (int a = 0; a < AHEAD; ++a) {
            const int slab = start + a, stage = slab % STAGES;
            if (slab >= slabs) break;
            if (slab >= STAGES) sync_at(EMPTY(stage), 128 * (1 + WGS));
            u16 *tile = stages + stage * 64 * TOKENS + 64 * row + 2 * (piece & 3);
            // Eight inputs go to four places: the pairs of both products of their block.
#pragma unroll
            for (int i = 0; i < UNITS; ++i) {
                const u32 *pairs = &held[a][i].x;
#pragma unroll
                for (int pair = 0; pair < 4; ++pair)
                    *(u32 *)(tile + 1024 * i + 8 * ((4 * (piece >> 2) + pair) ^ (row & 7))) = pairs[pair];
            }
            if (slab + AHEAD < slabs) fetch(slab + AHEAD, held[a]);
            show_to_products();
            arrive_at(FULL(stage), 128 * (1 + WGS));
        }
    }
}

// 64 inputs of a row tile as a lane has them: codes, and BF16 scales of rows g (low half) and g + 8.
struct Piece {
    uint4 words[LOADS];
    u32 scale[HALVES ? 2 : 1];
};

INLINE void fetch_piece(const uint4 *words, const u32 *scale, int slab, int in, Piece &out) {
#pragma unroll
    for (int h = 0; h < LOADS; ++h) {
        const bool inside = BITS == 4 || !TAIL || 64 * slab + 32 * h < in;
        out.words[h] = inside ? load_once(words + (LOADS * slab + h) * 32) : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int b = 0; b < (HALVES ? 2 : 1); ++b) {
        const int first = 64 * slab + 32 * b, group = GROUP ? first / (GROUP ? GROUP : 1) : 0;
        out.scale[b] = !HALVES || !TAIL || first < in ? scale[8 * group] : 0;
    }
}

// bf16(q s) of a slab: four products' registers.
INLINE void decode_piece(const Piece &piece, u32 (*a)[4]) {
#pragma unroll
    for (int b = 0; b < 2; ++b) {
        const u32 both = piece.scale[HALVES ? b : 0];
#if HALF
        const float near = __uint_as_float(both << 16), far = __uint_as_float(both & 0xffff0000u);
        const u32 scale[2] = {pair(near, near), pair(far, far)};
#else
        const u32 scale[2] = {bytes_of(both, both, 0x1010), bytes_of(both, both, 0x3232)};
#endif
        const u32 *own = &piece.words[BITS == 4 ? 0 : b].x;
#pragma unroll
        for (int s = 0; s < 2; ++s) {
            decode(own + (BITS == 4 ? 2 * b + s : 2 * s), a[2 * b + s]);
#pragma unroll
            for (int i = 0; i < 4; ++i) a[2 * b + s][i] = times(a[2 * b + s][i], scale[i & 1]);
        }
    }
}

KERNEL(THREADS, BLOCKS)
CLUSTER low_bit_tiles(const uint4 *words, const u32 *scale, const u16 *x, const u16 *bias, const u16 *residual, u16 *y,
                      int tokens, int tiles, int in) {
    u16 *shared = shared_memory();
    const int group = threadIdx.x >> 7, thread = threadIdx.x & 127, lane = threadIdx.x & 31, warp = thread >> 5;
    const int first_token = blockIdx.y * TOKENS, all_slabs = (in + 63) / 64, block = SPREAD > 1 ? blockIdx.z : 0;
    const int first_slab = all_slabs * block / SPREAD, slabs = all_slabs * (block + 1) / SPREAD - first_slab;
    if (group == CONSUMERS) {
        GIVE_REGISTERS;
        bring_tokens(x, shared, thread, first_token, tokens, first_slab, slabs, in);
        return;
    }
    TAKE_REGISTERS;
    const int rows = group % WGS, turn = group / WGS, mine = (slabs - turn + SPLIT - 1) / SPLIT;
    const int first_tile = (blockIdx.x * WGS + rows) * 4 * TALL;
    const uint4 *own_words[TALL];
    const u32 *own_scale[TALL];
#pragma unroll
    for (int h = 0; h < TALL; ++h) {
        // What is computed of a tile that is not there is not stored.
        const int tile = min(first_tile + 4 * h + warp, tiles - 1);
        own_words[h] = words_of(words, tile, in) + lane;
        own_scale[h] = scale_of(scale, tile, in, lane);
    }

    Piece ahead[DEPTH][TALL];
    u32 a[2][4][4];
    float all[TALL][TOKENS / 2] = {};
#pragma unroll
    for (int d = 0; d < DEPTH; ++d)
#pragma unroll
        for (int h = 0; h < TALL; ++h)
            if (d < mine) fetch_piece(own_words[h], own_scale[h], first_slab + turn + SPLIT * d, in, ahead[d][h]);
    if (0 < mine) decode_piece(ahead[0][0], a[0]);
    for (int start = 0; start < mine; start += DEPTH) {
#pragma unroll
        for (int d = 0; d < DEPTH; ++d) {
            const int i = start + d, slab = turn + SPLIT * i, stage = slab % STAGES;
            if (i >= mine) break;
            sync_at(FULL(stage), 128 * (1 + WGS));
#pragma unroll
            for (int h = 0; h < TALL; ++h) {
                const int now = TALL == 2 ? h : d & 1;
                open_products();
#pragma unroll
                for (int step = 0; step < 4; ++step)
                    multiply_group(all[h], a[now][step], shared + stage * 64 * TOKENS, step);
                queue_products();
                // The products before these are done: their registers are free, and their slab after its last piece.
                wait_for_products(1);
                keep(a[now ^ 1]);
                if (h == 0 && i > 0 && slab - SPLIT + STAGES < slabs)
                    arrive_at(EMPTY((slab - SPLIT) % STAGES), 128 * (1 + WGS));
                if (h + 1 < TALL) {
                    decode_piece(ahead[d][TALL - 1], a[now ^ 1]);
                    continue;
                }
                if (i + 1 < mine) decode_piece(ahead[(d + 1) % DEPTH][0], a[now ^ 1]);
                if (i + DEPTH < mine)
#pragma unroll
                    for (int one = 0; one < TALL; ++one)
                        fetch_piece(own_words[one], own_scale[one], first_slab + slab + SPLIT * DEPTH, in, ahead[d][one]);
            }
        }
    }
    wait_for_products(0);
    keep(a[0]);
    keep(a[1]);
#pragma unroll
    for (int h = 0; h < TALL; ++h) settle(all[h]);

    // Tokens are no longer needed: their memory takes sums, and numbers on their way to full lines of y.
    sync_at(DONE, 128 * CONSUMERS);
#if SPLIT * SPREAD > 1
    float *parts = (float *)shared + rows * TALL * 64 * TOKENS + thread;
#define PART(h, i) parts[(h) * 64 * TOKENS + 128 * (i)]
#endif
#if SPLIT > 1
#pragma unroll
    for (int h = 0; h < TALL; ++h)
#pragma unroll
        for (int i = 0; i < TOKENS / 2; ++i)
            if (turn) PART(h, i) = all[h][i];
    sync_at(DONE, 128 * CONSUMERS);
    if (turn) return;
#pragma unroll
    for (int h = 0; h < TALL; ++h)
#pragma unroll
        for (int i = 0; i < TOKENS / 2; ++i) all[h][i] += PART(h, i);
#endif
#if SPREAD > 1
    // Each block of the cluster ends with all sums of its share of the tokens.
#pragma unroll
    for (int h = 0; h < TALL; ++h)
#pragma unroll
        for (int i = 0; i < TOKENS / 2; ++i) PART(h, i) = all[h][i];
    sync_cluster();
    float sums[TALL][4 * EIGHTS] = {};
#pragma unroll
    for (int h = 0; h < TALL; ++h)
#pragma unroll
        for (int i = 0; i < 4 * EIGHTS; ++i)
#pragma unroll
            for (int other = 0; other < SPREAD; ++other)
                sums[h][i] += of_block(&PART(h, 4 * EIGHTS * block + i), other);
    sync_cluster();  // none ends before the others have read what is its
#else
    float(*sums)[4 * EIGHTS] = all;
#endif
    const int first_stored = first_token + 8 * EIGHTS * block;
    u16 *lines = shared + PARTS + rows * 8 * EIGHTS * LINE;
#pragma unroll
    for (int h = 0; h < TALL; ++h) {
        const int first_row = 16 * min(first_tile + 4 * h + warp, tiles - 1) + (lane >> 2);
        const float near = bias ? wide(bias[first_row]) : 0.0f, far = bias ? wide(bias[first_row + 8]) : 0.0f;
        u16 *line = lines + 2 * (lane & 3) * LINE + (SILU ? 8 : 16) * (4 * h + warp) + (lane >> 2);
#pragma unroll
        for (int j = 0; j < EIGHTS; ++j)
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                const u32 low = rounded(sums[h][4 * j + c] + near), high = rounded(sums[h][4 * j + c + 2] + far);
                u16 *at = line + (8 * j + c) * LINE;
                if (SILU) {
                    const float gate = wide(low);
                    at[0] = (u16)rounded(wide(rounded(gate / (1.0f + expf(-gate)))) * wide(high));
                } else {
                    at[0] = (u16)low;
                    at[8] = (u16)high;
                }
            }
    }
    sync_at(IN_PLACE + rows, 128);
    const int out = (SILU ? 8 : 16) * tiles, first_column = (SILU ? 8 : 16) * first_tile;
    for (int index = thread; index < 8 * EIGHTS * (WIDTH / 8); index += 128) {
        const int token = index / (WIDTH / 8), column = 8 * (index % (WIDTH / 8));
        if (first_stored + token >= tokens || first_column + column >= out) continue;
        const i64 to = (i64)(first_stored + token) * out + first_column + column;
        uint4 v = *(const uint4 *)(lines + token * LINE + column);
        if (residual) {
            const uint4 more = *(const uint4 *)(residual + to);
            const u32 *b = &more.x;
            u32 *a = &v.x;
#pragma unroll
            for (int i = 0; i < 4; ++i)
                a[i] = pair(wide(a[i] & 0xffff) + wide(b[i] & 0xffff), wide(a[i] >> 16) + wide(b[i] >> 16));
        }
        *(uint4 *)(y + to) = v;
    }
}
