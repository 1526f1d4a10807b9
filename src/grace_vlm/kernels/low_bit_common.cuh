// What the kernels of low-bit layers share: a GPU's instructions, and codes to a tensor core's registers (fragments.py).
//
// Compiled for:  BITS 4 8, 16 for plain weights   HALF 0 BF16, 1 FP16   GROUP a multiple of 32, 0 for a row   WIDE scales in FP32
//   TAIL  in is no multiple of 64   EARLY_START  the kernel is launched while the one before it still runs (Hopper)
#pragma once
#ifdef EMULATE
#include "emulate.h"
#else
typedef unsigned int u32;
typedef unsigned short u16;
typedef long long i64;
typedef unsigned long long u64;
#define SHARED __shared__
#define KERNEL(...) extern "C" __global__ void __launch_bounds__(__VA_ARGS__)  // threads, blocks at least

// Weights are read once: past the first cache.
__device__ __forceinline__ uint4 load_once(const uint4 *from) {
    uint4 v;
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
    return v;
}
__device__ __forceinline__ u32 and_or(u32 a, u32 mask, u32 bits) {
    u32 v;
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(v) : "r"(a), "r"(mask), "r"(bits));
    return v;
}
__device__ __forceinline__ u32 bytes_of(u32 a, u32 b, u32 which) { return __byte_perm(a, b, which); }
#if HALF
__device__ __forceinline__ u32 minus(u32 a, u32 b) {
    u32 v;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(v) : "r"(a), "r"(b));
    return v;
}
__device__ __forceinline__ float wide(u16 a) {
    float v;
    asm("cvt.f32.f16 %0, %1;" : "=f"(v) : "h"(a));
    return v;
}
__device__ __forceinline__ u32 pair(float low, float high) {
    u32 v;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
    return v;
}
#define MMA "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
#else
__device__ __forceinline__ u32 minus(u32 a, u32 b) {
    u32 v;  // a + (-b): bf16x2 has no subtraction before sm_90
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(v) : "r"(a), "r"(0x3F803F80u), "r"(b ^ 0x80008000u));
    return v;
}
__device__ __forceinline__ float wide(u16 a) { return __uint_as_float((u32)a << 16); }
__device__ __forceinline__ u32 pair(float low, float high) {
    u32 v;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
    return v;
}
#define MMA "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
#endif
__device__ __forceinline__ void multiply(float *d, const u32 *a, u32 b0, u32 b1) {
    asm(MMA " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// What the kernels before this one have written may be read from here on, and what they read may be written.
__device__ __forceinline__ void wait_for_earlier() {
#if EARLY_START
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// The next kernel may take what is free, fetch its weights and wait.
__device__ __forceinline__ void let_next_start() {
#if EARLY_START
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
#define INLINE __device__ __forceinline__
#endif

#define LOADS (BITS / 4)   // 16-byte loads of a lane for 64 inputs
#define HALVES (GROUP % 64 != 0)  // the two blocks of a slab may be of two groups

INLINE u32 rounded(float v) { return pair(v, 0.0f) & 0xffffu; }

// The four registers of a product. 4 bits: word s of a block. 8 bits: words 2s and 2s + 1.
INLINE void decode(const u32 *w, u32 *a) {
#if BITS == 4
    const u32 magic = HALF ? 0x64006400u : 0x43004300u, bias = HALF ? 0x64086408u : 0x43084308u;
    for (int i = 0; i < 4; ++i) a[i] = minus(and_or(w[0] >> (4 * i), 0x000f000fu, magic), bias);
#else
    for (int i = 0; i < 4; ++i) {
        const u32 word = w[i >> 1], first = 2 * (i & 1);
#if HALF
        // 1024 + code, and 1152 away
        const u32 both = bytes_of(word, 0x64646464u, 0x4040u + first + ((first + 1) << 8));
        a[i] = minus(both, 0x64806480u);
#else
        // BF16 has 7 bits after the point: by way of FP32, 2^23 + code, and 2^23 + 128 away
        const float low = __uint_as_float(bytes_of(word, 0x4B000000u, 0x7650u + first)) - 8388736.0f;
        const float high = __uint_as_float(bytes_of(word, 0x4B000000u, 0x7650u + first + 1)) - 8388736.0f;
        a[i] = pair(low, high);
#endif
    }
#endif
}

// 64 inputs of a row tile as a lane has them: codes, and FP32 scales of rows g and g + 8.
struct Tile {
    uint4 words[LOADS];
    uint2 scale[HALVES ? 2 : 1];
};

INLINE const uint4 *words_of(const uint4 *words, i64 tile, int in) {
    return words + tile * (BITS == 4 ? (in + 63) / 64 : in / 32) * 32;
}
INLINE const u32 *scale_of(const u32 *scale, i64 tile, int in, int lane) {
    return scale + tile * (GROUP ? in / (GROUP ? GROUP : 1) : 1) * (WIDE ? 16 : 8) + (lane >> 2) * (WIDE ? 2 : 1);
}
INLINE void fetch_tile(const uint4 *words, const u32 *scale, int slab, int in, Tile &out) {
    for (int h = 0; h < LOADS; ++h) {
        const bool inside = BITS == 4 || !TAIL || 64 * slab + 32 * h < in;
        out.words[h] = inside ? load_once(words + (LOADS * slab + h) * 32) : make_uint4(0, 0, 0, 0);
    }
    for (int b = 0; b < (HALVES ? 2 : 1); ++b) {
        const int first = 64 * slab + 32 * b, group = GROUP ? first / (GROUP ? GROUP : 1) : 0;
        const bool inside = !HALVES || !TAIL || first < in;
#if WIDE
        out.scale[b] = inside ? *(const uint2 *)(scale + 16 * group) : make_uint2(0, 0);
#else
        const u32 both = inside ? scale[8 * group] : 0;
        out.scale[b] = make_uint2(both << 16, both & 0xffff0000u);
#endif
    }
}
