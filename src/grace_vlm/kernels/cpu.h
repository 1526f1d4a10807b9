// What the CPU's kernels share: vectors of 32-bit numbers, and threads. x86-64 with AVX2 and FMA, wider where there is it.
#pragma once
#ifndef _GNU_SOURCE
#define _GNU_SOURCE  // sched_getcpu
#endif
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#define ALWAYS static inline __attribute__((always_inline))

// ---- vectors: LANES rows of 32 bits

// NARROW is for tests: 256 bits and VNNI, as processors without AVX-512 have them.
#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && !defined(NARROW)
#define LANES 16
typedef __m512i Ints;
typedef __m512 Floats;
#define OP(name) _mm512_##name
ALWAYS Ints load(const void *from) { return _mm512_loadu_si512(from); }
ALWAYS Ints both(Ints a, Ints b) { return _mm512_and_si512(a, b); }
#else
#define LANES 8
typedef __m256i Ints;
typedef __m256 Floats;
#define OP(name) _mm256_##name
ALWAYS Ints load(const void *from) { return _mm256_loadu_si256((const __m256i *)from); }
ALWAYS Ints both(Ints a, Ints b) { return _mm256_and_si256(a, b); }
#endif

// The sum of all lanes.
ALWAYS float total_of_8(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

#if LANES == 16
ALWAYS float total_of(Floats v) {
    return total_of_8(_mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1)));
}
#else
ALWAYS float total_of(Floats v) { return total_of_8(v); }
#endif

// x / rms(x) * weight of a row of n.
ALWAYS void rms_row(const float *x, const float *weight, float epsilon, long n, float *out) {
    const long whole = n / LANES * LANES;
    Floats squares = OP(setzero_ps)();
    for (long k = 0; k < whole; k += LANES) {
        const Floats v = OP(loadu_ps)(x + k);
        squares = OP(fmadd_ps)(v, v, squares);
    }
    float sum = total_of(squares);
    for (long k = whole; k < n; ++k) sum += x[k] * x[k];
    const float by = 1.0f / sqrtf(sum / (float)n + epsilon);
    for (long k = 0; k < whole; k += LANES)
        OP(storeu_ps)(out + k, OP(mul_ps)(OP(loadu_ps)(weight + k), OP(mul_ps)(OP(loadu_ps)(x + k), OP(set1_ps)(by))));
    for (long k = whole; k < n; ++k) out[k] = weight[k] * (x[k] * by);
}

// ``part`` of ``job`` for 0 to ``parts`` - 1, on so many threads (cpu_team.c); returns when all are done.
void run(const void *job, void (*part)(const void *, long), long parts, long num_threads);

// y (tokens, rows) = rms_norm(x) W^T + bias + residual (low_bit_cpu.c).
int low_bit_linear(const uint8_t *codes, const float *scale, const float *x, const float *norm, const float *bias,
                   const float *residual, float *y, long tokens, long rows, long inputs, long group, float epsilon,
                   int bits, int is_exact, long num_threads);
