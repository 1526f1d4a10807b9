// y = x W^T on a CPU for weights of 4 or 8 bits, FP32 activations: x86-64 with AVX2 and FMA, VNNI where there is one.
//
// Weights: panels of 4 rows, a panel one stretch of memory: [slab of 64 inputs][row][32 bytes (4 bits) or 64 (8 bits)].
// 4 bits: byte j of a slab's 32 holds input j in its lower half and input j + 32 in its upper, with 8 added, so groups
// of 32 are halves. 8 bits: signed bytes in order. Scales: FP32 [group][row] beside each panel. Rows and inputs that fill
// a panel or a slab are codes that mean 0.
//
// Two ways to multiply. *Quantized* activations: a token's inputs become bytes, a scale for each group of the weight
// (127 steps to the largest), products are exact integers, and a group's sum is scaled in FP32. *Exact*: codes become
// FP32, so the result is that of FP32 arithmetic on q s, up to the order of sums.
//
// Threads take panels from a counter until none is left, so a core that others disturb takes fewer. They wait for work
// some microseconds awake and then asleep.
#include <immintrin.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define ROWS 4
#define SLAB 64
#define TOKENS 8      // that share decoded weights
#define CHUNK 4       // panels taken at a time at least
#define AHEAD 2048    // bytes of weights asked for before they are needed: over the end of a page the hardware does not
#define AWAKE 4000    // looks at the counter before a thread sleeps: some 40 microseconds
#define ALWAYS static inline __attribute__((always_inline))

typedef struct {
    const uint8_t *codes;
    const float *scale, *x, *bias;
    float *y;
    int8_t *bytes;     // (tokens, padded inputs)
    float *steps;      // (groups, tokens filled up to eights): what a byte of a token's group is worth
    float *sums;       // likewise: of its inputs, quantized, times what was added to the codes
    long filled;       // tokens, to a multiple of TOKENS
    long tokens, rows, inputs, slabs, groups, group;
    int bits;
} Job;

ALWAYS float total(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define WIDE 1
#define ADDED(bits) ((bits) == 4 ? 8.0f : 128.0f)  // to codes, so that they are unsigned
#else
#define WIDE 0
#define ADDED(bits) ((bits) == 4 ? 8.0f : 0.0f)
#endif

// Sums of four neighbouring products of unsigned and signed bytes, added to eight integers. Without VNNI two of them
// meet in 16 bits first: at most 2 x 15 x 127 for codes of 4 bits, and 2 x 128 x 127 for magnitudes of 8.
ALWAYS __m256i dot(__m256i sum, __m256i unsigned_bytes, __m256i signed_bytes) {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
    return _mm256_dpbusd_epi32(sum, unsigned_bytes, signed_bytes);
#elif defined(__AVXVNNI__)
    return _mm256_dpbusd_avx_epi32(sum, unsigned_bytes, signed_bytes);
#else
    const __m256i pairs = _mm256_maddubs_epi16(unsigned_bytes, signed_bytes);
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#endif
}

ALWAYS __m256i load(const void *from) { return _mm256_loadu_si256((const __m256i *)from); }
ALWAYS __m256i lower(__m256i v) { return _mm256_and_si256(v, _mm256_set1_epi8(15)); }
ALWAYS __m256i upper(__m256i v) { return _mm256_and_si256(_mm256_srli_epi16(v, 4), _mm256_set1_epi8(15)); }

// ---- quantized activations

// Of one token: bytes, what they are worth, and their sum times what was added to codes, group by group. What is not finite makes its group's
// worth NaN, and so every output of the token.
static void quantize(const Job *job, long token) {
    const float *x = job->x + token * job->inputs;
    int8_t *out = job->bytes + token * job->slabs * SLAB;
    const __m256 no_sign = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    const __m256i in_order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    memset(out + job->inputs, 0, job->slabs * SLAB - job->inputs);
    for (long g = 0; g < job->groups; ++g, x += job->group, out += job->group) {
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
        for (long k = 0; k < job->group; k += 32) {
            __m256i q[4];
            for (int i = 0; i < 4; ++i) {
                q[i] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + k + 8 * i), inverse));
                sum = _mm256_add_epi32(sum, q[i]);
            }
            const __m256i mixed = _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
            _mm256_storeu_si256((__m256i *)(out + k), _mm256_permutevar8x32_epi32(mixed, in_order));
        }
        const float step = size / 127.0f + total(zero);
        job->steps[g * job->filled + token] = step;
        job->sums[g * job->filled + token] = ADDED(job->bits) * total(_mm256_cvtepi32_ps(sum)) * step;
    }
}

// 64 inputs of a row as they are multiplied, and their products with a token's bytes.
#if WIDE
typedef __m512i Ints;
typedef __m512 Floats;
typedef __m512i Weights;
#define NOTHING _mm512_setzero_si512()
ALWAYS Weights weights_of(const uint8_t *codes, const int bits) {
    if (bits == 8) return _mm512_xor_si512(_mm512_loadu_si512(codes), _mm512_set1_epi8((char)128));
    const __m256i both = load(codes);
    return _mm512_inserti64x4(_mm512_castsi256_si512(lower(both)), upper(both), 1);
}
ALWAYS Ints products(Ints sum, Weights w, const int8_t *bytes, const int bits) {
    (void)bits;
    return _mm512_dpbusd_epi32(sum, w, _mm512_loadu_si512(bytes));
}
ALWAYS Floats scaled(Floats all, Ints sum, const float *by) {
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(*by), all);
}
ALWAYS float total_of(Floats v) {
    return total(_mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1)));
}
#else
typedef __m256i Ints;
typedef __m256 Floats;
typedef struct {
    __m256i first, second;
} Weights;
#define NOTHING _mm256_setzero_si256()
ALWAYS Weights weights_of(const uint8_t *codes, const int bits) {
    if (bits == 8) return (Weights){load(codes), load(codes + 32)};
    const __m256i both = load(codes);
    return (Weights){lower(both), upper(both)};
}
// 8 bits: the sign goes to the other factor: |w| is unsigned, and -128 is 128.
ALWAYS Ints products(Ints sum, Weights w, const int8_t *bytes, const int bits) {
    if (bits == 4) return dot(dot(sum, w.first, load(bytes)), w.second, load(bytes + 32));
    sum = dot(sum, _mm256_abs_epi8(w.first), _mm256_sign_epi8(load(bytes), w.first));
    return dot(sum, _mm256_abs_epi8(w.second), _mm256_sign_epi8(load(bytes + 32), w.second));
}
ALWAYS Floats scaled(Floats all, Ints sum, const float *by) {
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), _mm256_broadcast_ss(by), all);
}
ALWAYS float total_of(Floats v) { return total(v); }
#endif

// 32 inputs of a row with a token's bytes, where groups are halves of slabs.
ALWAYS __m256i half_products(const uint8_t *codes, int half, const int8_t *bytes, const int bits) {
    const __m256i zero = _mm256_setzero_si256(), b = load(bytes + 32 * half);
    if (bits == 4) return dot(zero, half ? upper(load(codes)) : lower(load(codes)), b);
    const __m256i w = load(codes + 32 * half);
    if (WIDE) return dot(zero, _mm256_xor_si256(w, _mm256_set1_epi8((char)128)), b);
    return dot(zero, _mm256_abs_epi8(w), _mm256_sign_epi8(b, w));
}

// ``what`` with the number of tokens and bits as constants.
#define CASE(what, n)                                                                        \
    case n:                                                                                  \
        job->bits == 4 ? what(job, panel, token, n, 4) : what(job, panel, token, n, 8);      \
        break;
#define FOR_COUNT(what)                                                                      \
    switch (count) {                                                                         \
        CASE(what, 1) CASE(what, 2) CASE(what, 3) CASE(what, 4)                              \
        CASE(what, 5) CASE(what, 6) CASE(what, 7) CASE(what, 8)                              \
    }

// A panel for ``count`` tokens (a constant where it is inlined), row by row.
ALWAYS void panel_quantized(const Job *job, long panel, long token, const int count, const int bits) {
    const long width = bits * 8, parts = job->group / SLAB, stride = job->slabs * SLAB;
    const float *scale = job->scale + panel * job->groups * ROWS;
    for (int r = 0; r < ROWS && panel * ROWS + r < job->rows; ++r) {
        const uint8_t *own = job->codes + (panel * job->slabs * ROWS + r) * width;
        const int8_t *bytes = job->bytes + token * stride;
        Floats all[TOKENS];
        __m256 less = _mm256_setzero_ps();
        for (int t = 0; t < count; ++t) all[t] = (Floats){0};
        for (long g = 0; g < job->groups; ++g) {
            Ints sum[TOKENS];
            for (int t = 0; t < count; ++t) sum[t] = NOTHING;
            for (long p = 0; p < parts; ++p, own += ROWS * width, bytes += SLAB) {
                const Weights w = weights_of(own, bits);
                for (int t = 0; t < count; ++t) sum[t] = products(sum[t], w, bytes + t * stride, bits);
            }
            const __m256 by = _mm256_set1_ps(scale[g * ROWS + r]);
            const long at = g * job->filled + token;
            float worth[TOKENS];
            _mm256_storeu_ps(worth, _mm256_mul_ps(by, _mm256_loadu_ps(job->steps + at)));
            less = _mm256_fmadd_ps(by, _mm256_loadu_ps(job->sums + at), less);
            for (int t = 0; t < count; ++t) all[t] = scaled(all[t], sum[t], worth + t);
        }
        const long row = panel * ROWS + r;
        float minus[TOKENS];
        _mm256_storeu_ps(minus, less);
        for (int t = 0; t < count; ++t)
            job->y[(token + t) * job->rows + row] = total_of(all[t]) - minus[t] + (job->bias ? job->bias[row] : 0.0f);
    }
}

// The same where a slab is of two groups; rare, and not hurried.
static void panel_of_halves(const Job *job, long panel, long token, const int count, const int bits) {
    const long width = bits * 8, parts = job->group / 32;
    const float *scale = job->scale + panel * job->groups * ROWS;
    for (int r = 0; r < ROWS && panel * ROWS + r < job->rows; ++r) {
        const uint8_t *codes = job->codes + (panel * job->slabs * ROWS + r) * width;
        const long row = panel * ROWS + r;
        for (long t = token; t < token + count; ++t) {
            __m256 all = _mm256_setzero_ps();
            float less = 0.0f;
            for (long g = 0; g < job->groups; ++g) {
                __m256i sum = _mm256_setzero_si256();
                for (long p = g * parts; p < (g + 1) * parts; ++p) {
                    const int8_t *bytes = job->bytes + (t * job->slabs + p / 2) * SLAB;
                    sum = _mm256_add_epi32(sum, half_products(codes + p / 2 * ROWS * width, p % 2, bytes, bits));
                }
                const float own = scale[g * ROWS + r];
                const __m256 by = _mm256_set1_ps(own * job->steps[g * job->filled + t]);
                all = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), by, all);
                less += own * job->sums[g * job->filled + t];
            }
            job->y[t * job->rows + row] = total(all) - less + (job->bias ? job->bias[row] : 0.0f);
        }
    }
}

// One token: all rows of a panel at once, so that its bytes are loaded once and weights in the order of memory.
ALWAYS void panel_one(const Job *job, long panel, const int bits) {
    const long width = bits * 8, parts = job->group / SLAB;
    const float *scale = job->scale + panel * job->groups * ROWS;
    const uint8_t *own = job->codes + panel * job->slabs * ROWS * width;
    const int8_t *bytes = job->bytes;
    Floats all[ROWS];
    __m128 less = _mm_setzero_ps();
    for (int r = 0; r < ROWS; ++r) all[r] = (Floats){0};
    for (long g = 0; g < job->groups; ++g) {
        Ints sum[ROWS];
        for (int r = 0; r < ROWS; ++r) sum[r] = NOTHING;
        for (long p = 0; p < parts; ++p, own += ROWS * width, bytes += SLAB) {
            _mm_prefetch((const char *)own + AHEAD, _MM_HINT_T0);
            _mm_prefetch((const char *)own + AHEAD + 64, _MM_HINT_T0);
            for (int r = 0; r < ROWS; ++r) sum[r] = products(sum[r], weights_of(own + r * width, bits), bytes, bits);
        }
        const __m128 scales = _mm_loadu_ps(scale + g * ROWS);
        less = _mm_fmadd_ps(scales, _mm_set1_ps(job->sums[g * job->filled]), less);
        float by[ROWS];
        _mm_storeu_ps(by, _mm_mul_ps(scales, _mm_set1_ps(job->steps[g * job->filled])));
        for (int r = 0; r < ROWS; ++r) all[r] = scaled(all[r], sum[r], by + r);
    }
    float minus[ROWS];
    _mm_storeu_ps(minus, less);
    for (int r = 0; r < ROWS && panel * ROWS + r < job->rows; ++r) {
        const long row = panel * ROWS + r;
        job->y[row] = total_of(all[r]) - minus[r] + (job->bias ? job->bias[row] : 0.0f);
    }
}

static void quantized(const Job *job, long panel) {
    const int halves = job->group % SLAB != 0;
    if (job->tokens == 1 && !halves) {
        if (job->bits == 4)
            panel_one(job, panel, 4);
        else
            panel_one(job, panel, 8);
        return;
    }
    for (long token = 0; token < job->tokens; token += TOKENS) {
        const long count = job->tokens - token < TOKENS ? job->tokens - token : TOKENS;
        if (halves) {
            panel_of_halves(job, panel, token, (int)count, job->bits);
            continue;
        }
        FOR_COUNT(panel_quantized)
    }
}

// ---- exact

// Eight codes as FP32. ``at``: which eight of 64, in order.
ALWAYS __m256 decoded(const uint8_t *codes, int at, const int bits) {
    __m128i eight = _mm_loadl_epi64((const __m128i *)(codes + (bits == 4 ? 8 * (at % 4) : 8 * at)));
    if (bits == 4) {
        eight = _mm_and_si128(at < 4 ? eight : _mm_srli_epi16(eight, 4), _mm_set1_epi8(15));
        eight = _mm_sub_epi8(eight, _mm_set1_epi8(8));
    }
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight));
}

// ``rows`` rows of a panel from ``row`` on for ``count`` tokens, all constants where it is inlined: as many sums at a
// time as keep the processor from waiting for one, and fit in its registers.
ALWAYS void rows_exact(const Job *job, long panel, long token, int row, const int rows, const int count, const int bits) {
    const long width = bits * 8;
    const float *scale = job->scale + panel * job->groups * ROWS + row, *x = job->x + token * job->inputs;
    const uint8_t *codes = job->codes + (panel * job->slabs * ROWS + row) * width;
    __m256 all[ROWS][TOKENS];
    for (int r = 0; r < rows; ++r)
        for (int t = 0; t < count; ++t) all[r][t] = _mm256_setzero_ps();
    for (long g = 0; g < job->groups; ++g) {
        __m256 sum[ROWS][TOKENS];
        for (int r = 0; r < rows; ++r)
            for (int t = 0; t < count; ++t) sum[r][t] = _mm256_setzero_ps();
        for (long k = g * job->group; k < (g + 1) * job->group; k += 8) {
            const uint8_t *own = codes + k / SLAB * ROWS * width;
            for (int r = 0; r < rows; ++r) {
                const __m256 w = decoded(own + r * width, (int)(k % SLAB / 8), bits);
                for (int t = 0; t < count; ++t)
                    sum[r][t] = _mm256_fmadd_ps(w, _mm256_loadu_ps(x + t * job->inputs + k), sum[r][t]);
            }
        }
        for (int r = 0; r < rows; ++r)
            for (int t = 0; t < count; ++t)
                all[r][t] = _mm256_fmadd_ps(sum[r][t], _mm256_set1_ps(scale[g * ROWS + r]), all[r][t]);
    }
    for (int r = 0; r < rows; ++r) {
        const long out = panel * ROWS + row + r;
        if (out >= job->rows) return;
        for (int t = 0; t < count; ++t)
            job->y[(token + t) * job->rows + out] = total(all[r][t]) + (job->bias ? job->bias[out] : 0.0f);
    }
}

ALWAYS void panel_exact(const Job *job, long panel, long token, const int count, const int bits) {
    const int rows = count <= 2 ? 4 : count <= 4 ? 2 : 1;
    for (int row = 0; row < ROWS; row += rows) rows_exact(job, panel, token, row, rows, count, bits);
}

static void exact(const Job *job, long panel) {
    for (long token = 0; token < job->tokens; token += TOKENS) {
        const long count = job->tokens - token < TOKENS ? job->tokens - token : TOKENS;
        FOR_COUNT(panel_exact)
    }
}

// ---- threads

typedef struct {
    pthread_mutex_t lock;
    pthread_cond_t work;
    atomic_long round, next, busy;
    long last, hired, wanted;
    void (*part)(const Job *, long);
    const Job *job;
} Team;
static Team team = {PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, 0, 0, 0, 0, 0, 0, 0, 0};
static pthread_mutex_t one_caller = PTHREAD_MUTEX_INITIALIZER;

// A quarter of a fair share of what is left: long stretches of memory first, short ones at the end.
static void take(void) {
    long first = atomic_load(&team.next);
    while (first < team.last) {
        const long share = (team.last - first) / (4 * (team.wanted + 1)), size = share > CHUNK ? share : CHUNK;
        if (!atomic_compare_exchange_weak(&team.next, &first, first + size)) continue;
        for (long panel = first; panel < first + size && panel < team.last; ++panel) team.part(team.job, panel);
        first = atomic_load(&team.next);
    }
}

typedef struct {
    long number, seen;
} Start;

static void *member(void *given) {
    const long number = ((Start *)given)->number;
    long seen = ((Start *)given)->seen;
    free(given);
    for (;;) {
        for (int look = 0; look < AWAKE && atomic_load(&team.round) == seen; ++look) _mm_pause();
        if (atomic_load(&team.round) == seen) {
            pthread_mutex_lock(&team.lock);
            while (atomic_load(&team.round) == seen) pthread_cond_wait(&team.work, &team.lock);
            pthread_mutex_unlock(&team.lock);
        }
        seen = atomic_load(&team.round);
        if (number < team.wanted) take();
        atomic_fetch_sub(&team.busy, 1);
    }
    return 0;
}

// A child of fork() has none of its parent's threads.
static void forget(void) {
    pthread_mutex_init(&team.lock, 0);
    pthread_cond_init(&team.work, 0);
    pthread_mutex_init(&one_caller, 0);
    team.hired = 0;
}

static void hire(long wanted) {
    static int is_told = 0;
    if (!is_told) is_told = !pthread_atfork(0, 0, forget);
    while (team.hired < wanted) {
        pthread_t thread;
        Start *start = malloc(sizeof *start);
        if (!start) return;
        *start = (Start){team.hired, atomic_load(&team.round)};
        if (pthread_create(&thread, 0, member, start)) {
            free(start);
            return;
        }
        pthread_detach(thread);
        ++team.hired;
    }
}

// The caller works too; it leaves when the last of the others has.
static void run(const Job *job, void (*part)(const Job *, long), long panels, long num_threads) {
    pthread_mutex_lock(&one_caller);
    if (num_threads > 1 && panels > CHUNK) {
        hire(num_threads - 1);
        team.job = job;
        team.part = part;
        team.last = panels;
        team.wanted = num_threads - 1;
        atomic_store(&team.next, 0);
        atomic_store(&team.busy, team.hired);
        pthread_mutex_lock(&team.lock);
        atomic_fetch_add(&team.round, 1);
        pthread_cond_broadcast(&team.work);
        pthread_mutex_unlock(&team.lock);
        take();
        while (atomic_load(&team.busy)) sched_yield();
    } else {
        for (long panel = 0; panel < panels; ++panel) part(job, panel);
    }
    pthread_mutex_unlock(&one_caller);
}

// y (tokens, rows) = x (tokens, inputs) W^T + bias. Returns 0, or 1 if there is no memory. ``group`` divides ``inputs``
// and is a multiple of 32.
int low_bit_linear(const uint8_t *codes, const float *scale, const float *x, const float *bias, float *y, long tokens,
                   long rows, long inputs, long group, int bits, int is_exact, long num_threads) {
    if (tokens <= 0 || rows <= 0) return 0;
    const long filled = (tokens + TOKENS - 1) / TOKENS * TOKENS;
    Job job = {codes, scale, x, bias, y, 0, 0, 0, filled, tokens, rows, inputs, (inputs + SLAB - 1) / SLAB, inputs / group, group, bits};
    const long panels = (rows + ROWS - 1) / ROWS;
    if (is_exact) {
        run(&job, exact, panels, num_threads);
        return 0;
    }
    const size_t bytes = (size_t)tokens * job.slabs * SLAB, numbers = (size_t)filled * job.groups;
    job.bytes = malloc(bytes + 2 * numbers * sizeof(float) + 64);
    if (!job.bytes) return 1;
    job.steps = (float *)(job.bytes + (bytes + 63) / 64 * 64);
    job.sums = job.steps + numbers;
    memset(job.steps, 0, 2 * numbers * sizeof(float));
    for (long token = 0; token < tokens; ++token) quantize(&job, token);
    run(&job, quantized, panels, num_threads);
    free(job.bytes);
    return 0;
}
