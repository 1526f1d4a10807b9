// y = x W^T for many tokens, on Hopper: warpgroups multiply 64 rows by TOKENS tokens, weights from registers.
//
// The layout of fragments.py is what a warpgroup's operand A is, four tiles high; codes become bf16(q s) on their way, so
// the result is that of a BF16 layer on the same grid. Tokens are operand B: 64 inputs of each lie in shared memory, 128
// bytes a row in the hardware's swizzle, inputs in the order that the weights have.
//
// One warpgroup of a block only brings tokens, up to STAGES slabs ahead of the others; those have 64 rows each and decode
// the next weights while the tensor cores multiply the last. WGS: so many warpgroups share the rows of a block, SPLIT: so
// many share its inputs, slab by slab in turn. SPREAD: so many blocks, a cluster, share the inputs of the same rows and
// tokens. Sums meet in shared memory, in a fixed order.
//
// What limits it is how many instructions a multiprocessor issues between products, most of them integers' at half rate:
// 256 tokens a block halve the decoding of 128, and what the loop does beside it is kept short.
//
// Compiled for (and what low_bit_common.cuh names):  TOKENS 32 64 128 256   WGS   SPLIT   STAGES   DEPTH slabs of weights on
// their way (even)   BLOCKS of a multiprocessor   OWN, OTHER registers of a thread that multiplies, that brings tokens
// ARRANGED x is as low_bit_arrange.cu leaves it   SILU as in the other text
#define CONSUMERS (WGS * SPLIT)
#define WARPS (4 * (CONSUMERS + 1))
#define THREADS (32 * WARPS)
#define WIDTH (SILU ? 32 : 64)  // numbers of a token that a warpgroup stores
#define LINE (WIDTH + 8)         // their distance in shared memory: 16 bytes more, against conflicts
#define EIGHTS (TOKENS / 8 / SPREAD)  // of tokens that a block stores
#define PARTS (SPLIT * SPREAD > 1 ? 2 * WGS * 64 * TOKENS : 0)  // u16 of FP32 sums that others add to theirs
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
INLINE void sync_at(int barrier, int count) { asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(count) : "memory"); }
// Gates open when ``count`` have come since they last did: their parity is that of the times they have opened.
static __shared__ u64 gates[2 * STAGES];
INLINE u32 gate_at(int gate) { return (u32)__cvta_generic_to_shared(&gates[gate]); }
INLINE void make_gate(int gate, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(gate_at(gate)), "r"(count) : "memory");
}
INLINE void come_to(int gate) {
    asm volatile("{.reg .b64 state; mbarrier.arrive.shared::cta.b64 state, [%0];}" ::"r"(gate_at(gate)) : "memory");
}
// Whoever comes after a barrier of the block sees them, and copies do.
INLINE void show_gates() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// A piece of memory in one go, without waiting; the only one to come, when it is there.
INLINE void copy_piece(int gate, u32 address, const char *from, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(gate_at(gate)), "r"(bytes) : "memory");
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(address),
                 "l"(from), "r"(bytes), "r"(gate_at(gate))
                 : "memory");
}
// When all that this thread has asked to be copied is there. Who has waited for it may multiply without a fence, as
// CUTLASS does after such copies.
INLINE void come_when_copied(int gate) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(gate_at(gate)) : "memory");
}
INLINE void wait_at(int gate, u32 parity) {
    u32 is_open;
    do {
        asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                     : "=r"(is_open)
                     : "r"(gate_at(gate)), "r"(parity)
                     : "memory");
    } while (!is_open);
}
INLINE u32 address_of(const u16 *shared) { return (u32)__cvta_generic_to_shared(shared); }
// Two inputs of a token, without waiting; zeros if they are not there.
INLINE void copy_pair(u32 address, const char *from, bool is_there) {
#if TAIL
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(address), "l"(from), "r"(is_there ? 4 : 0) : "memory");
#else
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(address), "l"(from) : "memory");
#endif
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
// All threads begin with as many registers; those that bring tokens need few.
#define TAKE_REGISTERS asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(OWN))
#define GIVE_REGISTERS asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(OTHER))
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
// Of (TOKENS, 64) tiles, 1024-byte aligned: address, eight rows to the next 1024 bytes, swizzle of 128 bytes; in 16 bytes.
INLINE u64 described(const u16 *tiles) {
    return ((u64)(address_of(tiles) & 0x3ffff) >> 4) | (1ull << 16) | (64ull << 32) | (1ull << 62);
}
// d[4 j + c]: row g (+ 8 if c > 1), token 8 j + 2 t (+ 1 if c is odd). 16 inputs are 32 bytes.
INLINE void multiply_group(float *d, const u32 *a, u64 tiles, int stage, int step) {
    const u64 at = tiles + (u32)(8 * TOKENS * stage + 2 * step);
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
#elif TOKENS == 128
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
                 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
                 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
                 "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 0;"
                 : SUMS(0), SUMS(8), SUMS(16), SUMS(24), SUMS(32), SUMS(40), SUMS(48), SUMS(56)
                 : GIVEN);
#else
    asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32." TYPE "." TYPE " {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
                 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
                 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
                 "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
                 "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
                 "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
                 "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
                 "}, {%128, %129, %130, %131}, %132, 1, 1, 1, 0;"
                 : SUMS(0), SUMS(8), SUMS(16), SUMS(24), SUMS(32), SUMS(40), SUMS(48), SUMS(56), SUMS(64), SUMS(72), SUMS(80),
                   SUMS(88), SUMS(96), SUMS(104), SUMS(112), SUMS(120)
                 : GIVEN);
#endif
}
#endif

// Gates: tokens of a stage are there; they have been read. Barriers: all products are done; a warpgroup's numbers are in
// place.
#define FULL(stage) (stage)
#define EMPTY(stage) (STAGES + (stage))
#define DONE 1
#define IN_PLACE 2

#if ARRANGED
// All tokens of a block, slab after slab, by one thread.
INLINE void bring_tokens(const u16 *x, u16 *stages, int thread, int first_token, int tokens, int first_slab, int slabs,
                         int in) {
    if (thread) return;
    const i64 line = (i64)128 * TOKENS * ((tokens + TOKENS - 1) / TOKENS);
    const char *from = (const char *)x + first_slab * line + (i64)128 * first_token;
    int stage = 0;
    u32 parity = 1;
    for (int slab = 0; slab < slabs; ++slab, from += line) {
        if (slab >= STAGES) wait_at(EMPTY(stage), parity);
        copy_piece(FULL(stage), address_of(stages) + 128 * TOKENS * stage, from, 128 * TOKENS);
        if (++stage == STAGES) {
            stage = 0;
            parity ^= 1;
        }
    }
}
#else
// All tokens of a block, slab after slab, by 128 threads: a warp has a row of 64 inputs, a lane a pair of them.
INLINE void bring_tokens(const u16 *x, u16 *stages, int thread, int first_token, int tokens, int first_slab, int slabs,
                         int in) {
    const int lane = thread & 31, warp = thread >> 5, piece = lane >> 2;
    // Of every fourth token; those behind the last are left out: their sums are their own, and nobody reads them.
    const int mine = min((tokens - first_token - warp + 3) / 4, TOKENS / 4);
    const char *from = (const char *)(x + (i64)(first_token + warp) * in + 64 * first_slab + 2 * lane);
    const i64 line = 8 * in;
    // Eight inputs go to four places: the pairs of both products of their block.
    const int place = 4 * (piece >> 2) + (lane & 3);
    const u32 own = address_of(stages) + 128 * warp + 4 * (piece & 3);
    const u32 even = own + 16 * (place ^ warp), odd = own + 16 * (place ^ 4 ^ warp);
    int stage = 0;
    u32 parity = 1;
    for (int slab = 0; slab < slabs; ++slab, from += 128) {
        if (slab >= STAGES) wait_at(EMPTY(stage), parity);
        const bool is_there = !TAIL || 64 * (first_slab + slab) + 2 * lane < in;
        const u32 here = 128 * TOKENS * stage;
        const char *row = from;
        if (mine == TOKENS / 4) {
#pragma unroll
            for (int i = 0; i < TOKENS / 4; ++i, row += line) copy_pair((i & 1 ? odd : even) + here + 512 * i, row, is_there);
        } else {
#pragma unroll 1
            for (int i = 0; i < mine; ++i, row += line) copy_pair((i & 1 ? odd : even) + here + 512 * i, row, is_there);
        }
        come_when_copied(FULL(stage));
        if (++stage == STAGES) {
            stage = 0;
            parity ^= 1;
        }
    }
}
#endif

// 64 inputs of a row tile as a lane has them: codes, and BF16 scales of rows g (low half) and g + 8.
struct Piece {
    uint4 words[LOADS];
    u32 scale[HALVES ? 2 : 1];
};

// ``words``: of this slab.
INLINE void fetch_piece(const uint4 *words, const u32 *scale, int slab, int in, Piece &out) {
#pragma unroll
    for (int h = 0; h < LOADS; ++h) {
        const bool inside = BITS == 4 || !TAIL || 64 * slab + 32 * h < in;
        out.words[h] = inside ? load_once(words + 32 * h) : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int b = 0; b < (HALVES ? 2 : 1); ++b) {
        const int first = 64 * slab + 32 * b, group = GROUP ? first / (GROUP ? GROUP : 1) : 0;
        out.scale[b] = !HALVES || !TAIL || first < in ? scale[8 * group] : 0;
    }
}

// Scales in FP16 are kept away from the small numbers of which it has only some bits.
#define UNIT (HALF ? 0.015625f : 1.0f)

// bf16(q s) of a slab: four products' registers; in FP16 that over UNIT.
INLINE void decode_piece(const Piece &piece, u32 (*a)[4]) {
#pragma unroll
    for (int b = 0; b < 2; ++b) {
        const u32 both = piece.scale[HALVES ? b : 0];
#if HALF
        const float near = __uint_as_float(both << 16) / UNIT, far = __uint_as_float(both & 0xffff0000u) / UNIT;
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
    let_next_start();
    const int group = threadIdx.x >> 7, thread = threadIdx.x & 127, lane = threadIdx.x & 31, warp = thread >> 5;
    const int first_token = blockIdx.y * TOKENS, all_slabs = (in + 63) / 64, block = SPREAD > 1 ? blockIdx.z : 0;
    const int first_slab = all_slabs * block / SPREAD, slabs = all_slabs * (block + 1) / SPREAD - first_slab;
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < STAGES; ++stage) {
            make_gate(FULL(stage), ARRANGED ? 1 : 128);
            make_gate(EMPTY(stage), 4 * WGS);
        }
        show_gates();
    }
    __syncthreads();
    if (group == CONSUMERS) {
        GIVE_REGISTERS;
        wait_for_earlier();
        bring_tokens(x, shared, thread, first_token, tokens, first_slab, slabs, in);
        return;
    }
    TAKE_REGISTERS;
    const int rows = group % WGS, turn = SPLIT > 1 ? group / WGS : 0, mine = (slabs - turn + SPLIT - 1) / SPLIT;
    // What is computed of a tile that is not there is not stored.
    const int first_tile = (blockIdx.x * WGS + rows) * 4, tile = min(first_tile + warp, tiles - 1);
    int next = first_slab + turn;  // slab of weights to be asked for
    const uint4 *own_words = words_of(words, tile, in) + LOADS * 32 * next + lane;
    const u32 *own_scale = scale_of(scale, tile, in, lane);

    Piece ahead[DEPTH];
    u32 a[2][4][4];
    float all[TOKENS / 2] = {};
    auto fetch = [&](Piece &out) {
        fetch_piece(own_words, own_scale, next, in, out);
        next += SPLIT;
        own_words += LOADS * 32 * SPLIT;
    };
#pragma unroll
    for (int d = 0; d < DEPTH; ++d)
        if (d < mine) fetch(ahead[d]);
    if (0 < mine) decode_piece(ahead[0], a[0]);
    const u64 tiles_of_tokens = described(shared);
    int stage = turn, last_stage = 0;
    u32 parity = 0;
    for (int start = 0; start < mine; start += DEPTH) {
#pragma unroll
        for (int d = 0; d < DEPTH; ++d) {
            const int i = start + d;
            if (i >= mine) break;
            wait_at(FULL(stage), parity);
            open_products();
#pragma unroll
            for (int step = 0; step < 4; ++step) multiply_group(all, a[d & 1][step], tiles_of_tokens, stage, step);
            queue_products();
            // The products before these are done: their registers are free, and their slab.
            wait_for_products(1);
            keep(a[(d & 1) ^ 1]);
            if (i > 0 && lane == 0) come_to(EMPTY(last_stage));
            if (i + 1 < mine) decode_piece(ahead[(d + 1) % DEPTH], a[(d & 1) ^ 1]);
            if (i + DEPTH < mine) fetch(ahead[d]);
            last_stage = stage;
            if ((stage += SPLIT) >= STAGES) {
                stage -= STAGES;
                parity ^= 1;
            }
        }
    }
    wait_for_products(0);
    keep(a[0]);
    keep(a[1]);
    settle(all);

    // Tokens are no longer needed: their memory takes sums, and numbers on their way to full lines of y.
    sync_at(DONE, 128 * CONSUMERS);
#if SPLIT * SPREAD > 1
    float *parts = (float *)shared + rows * 64 * TOKENS + thread;
#endif
#if SPLIT > 1
#pragma unroll
    for (int i = 0; i < TOKENS / 2; ++i)
        if (turn) parts[128 * i] = all[i];
    sync_at(DONE, 128 * CONSUMERS);
    if (turn) return;
#pragma unroll
    for (int i = 0; i < TOKENS / 2; ++i) all[i] += parts[128 * i];
#endif
#if SPREAD > 1
    // Each block of the cluster ends with all sums of its share of the tokens.
#pragma unroll
    for (int i = 0; i < TOKENS / 2; ++i) parts[128 * i] = all[i];
    sync_cluster();
    float sums[4 * EIGHTS] = {};
#pragma unroll
    for (int i = 0; i < 4 * EIGHTS; ++i)
#pragma unroll
        for (int other = 0; other < SPREAD; ++other) sums[i] += of_block(&parts[128 * (4 * EIGHTS * block + i)], other);
    sync_cluster();  // none ends before the others have read what is its
#else
    float *sums = all;
#endif
    wait_for_earlier();  // the residual may be read, and y written
    const int first_stored = first_token + 8 * EIGHTS * block;
    u16 *lines = shared + PARTS + rows * 8 * EIGHTS * LINE;
    const int first_row = 16 * tile + (lane >> 2);
    const float near = bias ? wide(bias[first_row]) : 0.0f, far = bias ? wide(bias[first_row + 8]) : 0.0f;
    u16 *line = lines + 2 * (lane & 3) * LINE + (SILU ? 8 : 16) * warp + (lane >> 2);
#pragma unroll
    for (int j = 0; j < EIGHTS; ++j)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            const u32 low = rounded(sums[4 * j + c] * UNIT + near), high = rounded(sums[4 * j + c + 2] * UNIT + far);
            u16 *at = line + (8 * j + c) * LINE;
            if (SILU) {
                const float gate = wide(low);
                at[0] = (u16)rounded(wide(rounded(gate / (1.0f + expf(-gate)))) * wide(high));
            } else {
                at[0] = (u16)low;
                at[8] = (u16)high;
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
