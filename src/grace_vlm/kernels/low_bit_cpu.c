// y = x W^T on a CPU for weights of 4 or 8 bits, FP32 activations: x86-64 with AVX2 and FMA, VNNI where there is one.
//
// Weights: panels of 16 rows, a panel one stretch of memory: slabs of 32 inputs, chunks of 64 bytes in it, and in a chunk
// four bytes of every row: [slab][chunk][row][4]. 8 bits: chunk c has inputs 4c to 4c + 3, signed. 4 bits: lower halves
// have inputs 4c to 4c + 3, upper ones 16 + 4c to 16 + 4c + 3, with 8 added. So rows lie across the lanes of a vector
// of 32-bit numbers, one instruction multiplies four inputs of each with four of a token, and nothing is ever added
// across lanes. Scales: FP32 [group][row] beside each panel. Rows that fill up a panel have codes that mean 0.
//
// Two ways to multiply. *Quantized* activations: a token's inputs become bytes, a scale for each group of the weight
// (127 steps to the largest), products are exact integers, and a group's sum is scaled in FP32. *Exact*: codes become
// FP32, so the result is that of FP32 arithmetic on q s, up to the order of sums.
#include "cpu.h"

#include <stdlib.h>

#define ROWS 16
#define SLAB 32
#define AHEAD 4096    // bytes of weights asked for before they are needed: over the end of a page the hardware does not
#define TOKENS (LANES / 2)  // of a block: they share decoded weights
#define PARTS (ROWS / LANES)
#define SHARED 16     // tokens whose inputs become bytes on all threads

typedef struct {
    const uint8_t *codes;
    const float *scale, *x, *norm, *bias, *residual;
    float *y;
    float epsilon;
    float *normal;   // (tokens, inputs) after the norm
    int8_t *bytes;   // of inputs, by blocks of tokens: [fours of inputs][token of the block][4]
    float *steps;    // by blocks too: [group][token], what a byte of the group is worth
    int32_t *start;  // likewise: what a sum of products starts with, to undo what was added to codes
    long tokens, rows, inputs, groups, group;
    int bits;
} Job;

ALWAYS Ints zeros(void) { return both(OP(set1_epi32)(0), OP(set1_epi32)(0)); }
ALWAYS Ints lower(Ints v) { return both(v, OP(set1_epi8)(15)); }
ALWAYS Ints upper(Ints v) { return both(OP(srli_epi16)(v, 4), OP(set1_epi8)(15)); }

// Four bytes of a token in all lanes.
ALWAYS Ints four(const int8_t *bytes) {
    int32_t word;
    memcpy(&word, bytes, 4);
    return OP(set1_epi32)(word);
}

#if LANES == 16
#define VNNI 1
#define DOT(sum, w, x) _mm512_dpbusd_epi32(sum, w, x)
#elif defined(__AVXVNNI__)
#define VNNI 1
#define DOT(sum, w, x) _mm256_dpbusd_avx_epi32(sum, w, x)
#elif defined(__AVX512VNNI__) && defined(__AVX512VL__)
#define VNNI 1
#define DOT(sum, w, x) _mm256_dpbusd_epi32(sum, w, x)
#else
#define VNNI 0
#endif
#define ADDED(bits) ((bits) == 4 ? 8u : VNNI ? 128u : 0u)  // to codes, so that they are unsigned

// ---- quantized activations

ALWAYS long tokens_of(const Job *job, long block) {
    return job->tokens - block < TOKENS ? job->tokens - block : TOKENS;
}

// One token: its bytes, what they are worth and what its sums start with. What is not finite makes its group's worth
// NaN, and so every output of the token.
static void quantize(const void *given, long token) {
    const Job *job = given;
    const long block = token / TOKENS * TOKENS, count = tokens_of(job, block), at = token - block;
    const float *x = job->normal + token * job->inputs;
    int8_t *out = job->bytes + block * job->inputs + 4 * at;
    const __m256 no_sign = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    const __m256i in_order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    for (long g = 0; g < job->groups; ++g, x += job->group) {
        __m256 largest = _mm256_setzero_ps(), zero = _mm256_setzero_ps();
        for (long k = 0; k < job->group; k += 8) {
            const __m256 v = _mm256_loadu_ps(x + k);
            largest = _mm256_max_ps(largest, _mm256_and_ps(v, no_sign));
            zero = _mm256_fmadd_ps(v, _mm256_setzero_ps(), zero);
        }
        float of_lane[8], size = 0.0f;
        _mm256_storeu_ps(of_lane, largest);
        for (int lane = 0; lane < 8; ++lane) size = of_lane[lane] > size ? of_lane[lane] : size;
        const __m256 inverse = _mm256_set1_ps(size > 0.0f ? 127.0f / size : 0.0f);
        __m256i sum = _mm256_setzero_si256();
        for (long k = 0; k < job->group; k += SLAB, out += SLAB * count) {
            __m256i q[4];
            for (int i = 0; i < 4; ++i) {
                q[i] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + k + 8 * i), inverse));
                sum = _mm256_add_epi32(sum, q[i]);
            }
            const __m256i mixed = _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
            int32_t words[8];
            _mm256_storeu_si256((__m256i *)words, _mm256_permutevar8x32_epi32(mixed, in_order));
            for (int i = 0; i < 8; ++i) memcpy(out + 4 * i * count, words + i, 4);
        }
        uint32_t of_sum[8], all = 0;  // of what is not finite it overflows
        _mm256_storeu_si256((__m256i *)of_sum, sum);
        for (int lane = 0; lane < 8; ++lane) all += of_sum[lane];
        job->steps[block * job->groups + g * count + at] = size / 127.0f + total_of_8(zero);
        job->start[block * job->groups + g * count + at] = (int32_t)-(ADDED(job->bits) * all);
    }
}

#define CHAINS 4  // sums of one token at most, so that an instruction need not wait for the one before it

#if VNNI
// A slab of ``parts`` vectors of rows times ``count`` tokens, all constants where it is inlined.
ALWAYS void slab(Ints (*sum)[TOKENS][CHAINS], const uint8_t *codes, const int8_t *x, const int parts, const int count,
                 const int chains, const int bits) {
    for (int c = 0; c < bits; ++c)
        for (int p = 0; p < parts; ++p) {
            const Ints w = load(codes + 4 * (c * ROWS + p * LANES));
            const Ints low = bits == 4 ? lower(w) : OP(add_epi8)(w, OP(set1_epi8)((char)128)), high = upper(w);
            for (int t = 0; t < count; ++t)
                sum[p][t][c % chains] = DOT(sum[p][t][c % chains], low, four(x + 4 * (c * count + t)));
            for (int t = 0; t < count && bits == 4; ++t)
                sum[p][t][c % chains] = DOT(sum[p][t][c % chains], high, four(x + 4 * ((c + 4) * count + t)));
        }
}
#else
// Two neighbouring products meet in 16 bits. Codes of 4 bits: all eight pairs of a lane's half fit there, as
// 8 x 2 x 15 x 127 < 2^15. Codes of 8 bits: one does, 2 x 128 x 127, where the sign goes to the other factor.
ALWAYS void slab(Ints (*sum)[TOKENS][CHAINS], const uint8_t *codes, const int8_t *x, const int parts, const int count,
                 const int chains, const int bits) {
    const Ints one = OP(set1_epi16)(1);
    Ints pairs[PARTS][TOKENS];
    for (int p = 0; p < parts; ++p)
        for (int t = 0; t < count; ++t) pairs[p][t] = zeros();
    for (int c = 0; c < bits; ++c)
        for (int p = 0; p < parts; ++p) {
            const Ints w = load(codes + 4 * (c * ROWS + p * LANES)), low = lower(w), high = upper(w);
            for (int t = 0; t < count && bits == 4; ++t) {
                const Ints first = OP(maddubs_epi16)(low, four(x + 4 * (c * count + t)));
                const Ints second = OP(maddubs_epi16)(high, four(x + 4 * ((c + 4) * count + t)));
                pairs[p][t] = OP(add_epi16)(pairs[p][t], OP(add_epi16)(first, second));
            }
            for (int t = 0; t < count && bits == 8; ++t) {
                const Ints b = OP(sign_epi8)(four(x + 4 * (c * count + t)), w);
                const Ints two = OP(maddubs_epi16)(OP(abs_epi8)(w), b);
                sum[p][t][c % chains] = OP(add_epi32)(sum[p][t][c % chains], OP(madd_epi16)(two, one));
            }
        }
    for (int p = 0; p < parts; ++p)
        for (int t = 0; t < count && bits == 4; ++t)
            sum[p][t][0] = OP(add_epi32)(sum[p][t][0], OP(madd_epi16)(pairs[p][t], one));
}
#endif

// Rows ``first`` to ``first`` + LANES of a panel of one token, with what is added to them.
ALWAYS void put(const Job *job, long panel, int first, long token, Floats v) {
    const long row = panel * ROWS + first, left = job->rows - row;
    float *y = job->y + token * job->rows + row;
    const float *bias = job->bias ? job->bias + row : 0;
    const float *residual = job->residual ? job->residual + token * job->rows + row : 0;
    float own[LANES];
    if (left >= LANES) {
        if (bias) v = OP(add_ps)(v, OP(loadu_ps)(bias));
        if (residual) v = OP(add_ps)(v, OP(loadu_ps)(residual));
        OP(storeu_ps)(y, v);
        return;
    }
    OP(storeu_ps)(own, v);
    for (long r = 0; r < left; ++r) y[r] = own[r] + (bias ? bias[r] : 0.0f) + (residual ? residual[r] : 0.0f);
}

// ``parts`` vectors of a panel's rows from row ``first`` on for ``count`` tokens.
ALWAYS void tile_quantized(const Job *job, long panel, int first, long token, const int parts, const int count,
                           const int bits) {
    const int chains = count * parts <= 2 ? CHAINS : count * parts <= 4 ? 2 : 1;
    const uint8_t *codes = job->codes + panel * job->inputs / SLAB * bits * 64 + first * 4;
    const int8_t *x = job->bytes + token * job->inputs;
    const float *scale = job->scale + panel * job->groups * ROWS + first, *steps = job->steps + token * job->groups;
    const int32_t *start = job->start + token * job->groups;
    Floats all[PARTS][TOKENS];
    for (int p = 0; p < parts; ++p)
        for (int t = 0; t < count; ++t) all[p][t] = OP(setzero_ps)();
    for (long g = 0; g < job->groups; ++g, scale += ROWS, steps += count, start += count) {
        Ints sum[PARTS][TOKENS][CHAINS];
        for (int p = 0; p < parts; ++p)
            for (int t = 0; t < count; ++t) {
                sum[p][t][0] = OP(set1_epi32)(start[t]);
                for (int c = 1; c < chains; ++c) sum[p][t][c] = zeros();
            }
        for (long s = 0; s < job->group; s += SLAB, codes += bits * 64, x += SLAB * count) {
            if (count == 1)
                for (int c = 0; c < bits; ++c) _mm_prefetch((const char *)codes + 64 * c + AHEAD, _MM_HINT_T0);
            slab(sum, codes, x, parts, count, chains, bits);
        }
        for (int p = 0; p < parts; ++p) {
            const Floats by = OP(loadu_ps)(scale + p * LANES);
            for (int t = 0; t < count; ++t) {
                for (int c = 1; c < chains; ++c) sum[p][t][0] = OP(add_epi32)(sum[p][t][0], sum[p][t][c]);
                const Floats worth = OP(mul_ps)(by, OP(set1_ps)(steps[t]));
                all[p][t] = OP(fmadd_ps)(OP(cvtepi32_ps)(sum[p][t][0]), worth, all[p][t]);
            }
        }
    }
    for (int p = 0; p < parts; ++p)
        for (int t = 0; t < count; ++t) put(job, panel, first + p * LANES, token + t, all[p][t]);
}

// ---- exact

// The code of 4 bits from bit ``at`` on, or of 8, of every lane as FP32.
ALWAYS Floats decoded(Ints lanes, int at, const int bits) {
    if (bits == 8) return OP(cvtepi32_ps)(OP(srai_epi32)(OP(slli_epi32)(lanes, 24 - at), 24));
#if LANES == 16
    const Floats codes = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    return _mm512_permutexvar_ps(_mm512_srli_epi32(lanes, at), codes);
#else
    return OP(cvtepi32_ps)(OP(srai_epi32)(OP(slli_epi32)(_mm256_xor_si256(lanes, _mm256_set1_epi8((char)0x88)), 28 - at), 28));
#endif
}

ALWAYS void tile_exact(const Job *job, long panel, int first, long token, const int parts, const int count,
                       const int bits) {
    const int chains = count * parts <= 2 ? CHAINS : count * parts <= 4 ? 2 : 1;
    const uint8_t *codes = job->codes + panel * job->inputs / SLAB * bits * 64 + first * 4;
    const float *x = job->normal + token * job->inputs, *scale = job->scale + panel * job->groups * ROWS + first;
    Floats all[PARTS][TOKENS];
    for (int p = 0; p < parts; ++p)
        for (int t = 0; t < count; ++t) all[p][t] = OP(setzero_ps)();
    for (long g = 0; g < job->groups; ++g, scale += ROWS) {
        Floats sum[PARTS][TOKENS][CHAINS];
        for (int p = 0; p < parts; ++p)
            for (int t = 0; t < count; ++t)
                for (int c = 0; c < chains; ++c) sum[p][t][c] = OP(setzero_ps)();
        for (long s = 0; s < job->group; s += SLAB, codes += bits * 64, x += SLAB)
            for (int c = 0; c < bits; ++c)
                for (int p = 0; p < parts; ++p) {
                    const Ints lanes = load(codes + 4 * (c * ROWS + p * LANES));
                    for (int at = 0; at < 32; at += bits) {
                        const Floats w = decoded(lanes, at, bits);
                        const int k = 4 * c + at / 8 + (bits == 4 && at % 8 ? 16 : 0), chain = at / bits % chains;
                        for (int t = 0; t < count; ++t)
                            sum[p][t][chain] =
                                OP(fmadd_ps)(w, OP(set1_ps)(x[t * job->inputs + k]), sum[p][t][chain]);
                    }
                }
        for (int p = 0; p < parts; ++p)
            for (int t = 0; t < count; ++t) {
                for (int c = 1; c < chains; ++c) sum[p][t][0] = OP(add_ps)(sum[p][t][0], sum[p][t][c]);
                all[p][t] = OP(fmadd_ps)(sum[p][t][0], OP(loadu_ps)(scale + p * LANES), all[p][t]);
            }
    }
    for (int p = 0; p < parts; ++p)
        for (int t = 0; t < count; ++t) put(job, panel, first + p * LANES, token + t, all[p][t]);
}

// ---- a panel for all tokens

// ``what`` with the number of tokens and bits as constants; few tokens go through all rows of a panel at once.
#define TILES(what, n, bits)                                                                             \
    for (int first = 0; first < ROWS; first += n <= 2 ? ROWS : LANES)                                    \
        what(job, panel, first, token, n <= 2 ? PARTS : 1, n, bits);
#define CASE(what, n)                                                                                    \
    case n:                                                                                              \
        if (job->bits == 4) {                                                                            \
            TILES(what, n, 4)                                                                            \
        } else {                                                                                         \
            TILES(what, n, 8)                                                                            \
        }                                                                                                \
        break;
#if TOKENS == 8
#define MORE(what) CASE(what, 5) CASE(what, 6) CASE(what, 7) CASE(what, 8)
#else
#define MORE(what)
#endif
#define PANEL(name, what)                                                                                \
    static void name(const void *given, long panel) {                                                    \
        const Job *job = given;                                                                          \
        for (long token = 0; token < job->tokens; token += TOKENS) switch (tokens_of(job, token)) {      \
                CASE(what, 1) CASE(what, 2) CASE(what, 3) CASE(what, 4) MORE(what)                       \
            }                                                                                            \
    }
PANEL(quantized, tile_quantized)
PANEL(exact, tile_exact)

static void normalise(const void *given, long token) {
    const Job *job = given;
    rms_row(job->x + token * job->inputs, job->norm, job->epsilon, job->inputs, job->normal + token * job->inputs);
}

// y (tokens, rows) = rms_norm(x) W^T + bias + residual; norm (inputs,), bias (rows,) and residual (tokens, rows) may be
// null. Returns 0, or 1 if there is no memory. ``group`` divides ``inputs`` and is a multiple of 32.
int low_bit_linear(const uint8_t *codes, const float *scale, const float *x, const float *norm, const float *bias,
                   const float *residual, float *y, long tokens, long rows, long inputs, long group, float epsilon,
                   int bits, int is_exact, long num_threads) {
    if (tokens <= 0 || rows <= 0) return 0;
    Job job = {codes, scale, x, norm, bias, residual, y, epsilon, 0, 0, 0, 0, tokens, rows, inputs, inputs / group, group, bits};
    const long panels = (rows + ROWS - 1) / ROWS, threads_of_rows = tokens < SHARED ? 1 : num_threads;
    const size_t wide = norm ? (size_t)tokens * inputs : 0, numbers = is_exact ? 0 : (size_t)tokens * job.groups;
    float *memory = malloc((wide + 2 * numbers) * sizeof(float) + (is_exact ? 0 : (size_t)tokens * inputs) + 1);
    if (!memory) return 1;
    job.normal = norm ? memory : (float *)x;
    job.steps = memory + wide;
    job.start = (int32_t *)(job.steps + numbers);
    job.bytes = (int8_t *)(job.start + numbers);
    if (norm) run(&job, normalise, tokens, threads_of_rows);
    if (!is_exact) run(&job, quantize, tokens, threads_of_rows);
    run(&job, is_exact ? exact : quantized, panels, num_threads);
    free(memory);
    return 0;
}
