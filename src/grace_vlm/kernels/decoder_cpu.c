// What stands between the products of a decoder, on a CPU in FP32: gates, rotation, and attention over pages; and all
// layers at once, for one token each of some requests.
//
// The references are in decoder_rows.py and paged_attention.py. Widths are multiples of 16, which the callers see to.
#include "cpu.h"

#include <float.h>
#include <stdlib.h>

#define BLOCK 32        // tokens of a context whose scores are made at a time
#define MOST_NUMBERS 4096  // of the query heads that share a key head
#define LARGE (1 << 17)    // products of attention that are worth a second thread

#if LANES == 16
ALWAYS Floats scaled_by_power(Floats v, Floats power) { return _mm512_scalef_ps(v, power); }
#else
ALWAYS Floats scaled_by_power(Floats v, Floats power) {
    const __m256i bits = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(power), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(v, _mm256_castsi256_ps(bits));
}
#endif

// e^x with a relative error of 2e-7, between e^-87 and e^88; NaN stays. 2^n e^r with |r| <= ln 2 / 2, a Taylor sum of r.
ALWAYS Floats exponential(Floats x) {
    // The second operand is what a comparison with NaN gives.
    x = OP(min_ps)(OP(set1_ps)(88.0f), OP(max_ps)(OP(set1_ps)(-87.0f), x));
    const Floats n = OP(cvtepi32_ps)(OP(cvtps_epi32)(OP(mul_ps)(x, OP(set1_ps)(1.44269504f))));
    Floats r = OP(fnmadd_ps)(n, OP(set1_ps)(0.693359375f), x);  // ln 2 in two parts, the first exact times n
    r = OP(fnmadd_ps)(n, OP(set1_ps)(-2.12194440e-4f), r);
    Floats sum = OP(set1_ps)(1.0f / 5040);
    const float rest[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
    for (int i = 0; i < 7; ++i) sum = OP(fmadd_ps)(sum, r, OP(set1_ps)(rest[i]));
    return scaled_by_power(sum, n);
}

// ---- gates

typedef struct {
    const float *x;
    float *y;
    long width;
} Gates;

static void gate(const void *given, long row) {
    const Gates *job = given;
    const float *gates = job->x + 2 * row * job->width, *values = gates + job->width;
    for (long k = 0; k < job->width; k += LANES) {
        const Floats g = OP(loadu_ps)(gates + k), one = OP(set1_ps)(1.0f);
        const Floats e = exponential(OP(sub_ps)(OP(setzero_ps)(), g));
        const Floats silu = OP(div_ps)(g, OP(add_ps)(one, e));
        OP(storeu_ps)(job->y + row * job->width + k, OP(mul_ps)(silu, OP(loadu_ps)(values + k)));
    }
}

// y (rows, width) = silu(first half) * second half of x (rows, 2 width).
void gated_rows(const float *x, float *y, long rows, long width, long num_threads) {
    const Gates job = {x, y, width};
    run(&job, gate, rows, num_threads);
}

// ---- norm of q and k, rotation, and the cache

typedef struct {
    const float *qkv, *cos, *sin, *query_norm, *key_norm;
    float *keys, *values;
    const int64_t *slots;
    float *queries;  // (rows, heads, width)
    float epsilon;
    long heads, kv_heads, width;
} Rotation;

// A head, normalised and turned: its first half turns with its second. ``out`` may be ``x``.
ALWAYS void turn(const float *x, const float *norm, float epsilon, const float *cos, const float *sin, long width, float *out) {
    if (norm) {
        rms_row(x, norm, epsilon, width, out);
        x = out;
    }
    const long half = width / 2;
    for (long k = 0; k < half; k += 8) {
        const __m256 low = _mm256_loadu_ps(x + k), high = _mm256_loadu_ps(x + half + k);
        const __m256 a = _mm256_mul_ps(low, _mm256_loadu_ps(cos + k)), b = _mm256_mul_ps(high, _mm256_loadu_ps(cos + half + k));
        _mm256_storeu_ps(out + k, _mm256_fnmadd_ps(high, _mm256_loadu_ps(sin + k), a));
        _mm256_storeu_ps(out + half + k, _mm256_fmadd_ps(low, _mm256_loadu_ps(sin + half + k), b));
    }
}

static void rotate(const void *given, long row) {
    const Rotation *job = given;
    const long width = job->width, all = job->heads + 2 * job->kv_heads, own = job->kv_heads * width;
    const float *x = job->qkv + row * all * width, *cos = job->cos + row * width, *sin = job->sin + row * width;
    for (long h = 0; h < job->heads; ++h)
        turn(x + h * width, job->query_norm, job->epsilon, cos, sin, width, job->queries + (row * job->heads + h) * width);
    x += job->heads * width;
    for (long h = 0; h < job->kv_heads; ++h)
        turn(x + h * width, job->key_norm, job->epsilon, cos, sin, width, job->keys + job->slots[row] * own + h * width);
    memcpy(job->values + job->slots[row] * own, x + own, (size_t)own * sizeof(float));
}

// Of rows (heads + 2 kv_heads) * width of q, k and v: q normalised and turned to ``queries``, k likewise and v to the
// rows' slots. The norms (width,) may be null.
void rotate_append_rows(const float *qkv, const float *cos, const float *sin, const float *query_norm,
                        const float *key_norm, const int64_t *slots, float *keys, float *values, float *queries,
                        long rows, long heads, long kv_heads, long width, float epsilon, long num_threads) {
    const Rotation job = {qkv, cos, sin, query_norm, key_norm, keys, values, slots, queries, epsilon, heads, kv_heads, width};
    run(&job, rotate, rows, num_threads);
}

// ---- attention of one token a request

typedef struct {
    const float *queries, *keys, *values;
    const int32_t *table, *lengths;
    float *out;
    long pages, page_tokens, heads, kv_heads, width;
} Attention;

// The query heads of one key head of one request. Scores of a block at a time; sums are scaled when a larger one comes.
static void attend(const void *given, long number) {
    const Attention *job = given;
    const long request = number / job->kv_heads, kv = number % job->kv_heads, width = job->width;
    const long group = job->heads / job->kv_heads, first = (request * job->heads + kv * group) * width;
    const float *q = job->queries + first, by = 1.0f / sqrtf((float)width);
    const int32_t *pages = job->table + request * job->pages;
    const long count = job->lengths[request] + 1, row = job->kv_heads * width;
    float sums[MOST_NUMBERS], most[MOST_NUMBERS / 16], total[MOST_NUMBERS / 16];
    memset(sums, 0, (size_t)(group * width) * sizeof(float));
    for (long h = 0; h < group; ++h) most[h] = -FLT_MAX, total[h] = 0.0f;
    for (long start = 0; start < count; start += BLOCK) {
        const long some = count - start < BLOCK ? count - start : BLOCK;
        long at[BLOCK];
        for (long t = 0; t < some; ++t) {
            const long token = start + t, page = pages[token / job->page_tokens];
            at[t] = (page * job->page_tokens + token % job->page_tokens) * row + kv * width;
        }
        for (long h = 0; h < group; ++h) {
            float scores[BLOCK], largest = most[h];
            for (long t = 0; t < BLOCK; ++t) scores[t] = -FLT_MAX;
            for (long t = 0; t < some; ++t) {
                Floats sum = OP(setzero_ps)();
                for (long k = 0; k < width; k += LANES)
                    sum = OP(fmadd_ps)(OP(loadu_ps)(q + h * width + k), OP(loadu_ps)(job->keys + at[t] + k), sum);
                scores[t] = total_of(sum) * by;
                if (!(scores[t] <= largest)) largest = scores[t];  // NaN too
            }
            float shrink[LANES];
            OP(storeu_ps)(shrink, exponential(OP(set1_ps)(most[h] - largest)));
            Floats all = OP(setzero_ps)();
            for (long t = 0; t < BLOCK; t += LANES) {
                Floats weight = exponential(OP(sub_ps)(OP(loadu_ps)(scores + t), OP(set1_ps)(largest)));
                OP(storeu_ps)(scores + t, weight);
                all = OP(add_ps)(all, weight);
            }
            float *own = sums + h * width;
            for (long k = 0; k < width; k += LANES) {
                Floats sum = OP(mul_ps)(OP(loadu_ps)(own + k), OP(set1_ps)(shrink[0]));
                for (long t = 0; t < some; ++t)
                    sum = OP(fmadd_ps)(OP(set1_ps)(scores[t]), OP(loadu_ps)(job->values + at[t] + k), sum);
                OP(storeu_ps)(own + k, sum);
            }
            total[h] = total[h] * shrink[0] + total_of(all);
            most[h] = largest;
        }
    }
    for (long h = 0; h < group; ++h)
        for (long k = 0; k < width; ++k) job->out[first + h * width + k] = sums[h * width + k] / total[h];
}

// out (requests, heads * width): each row's queries over its request's keys and values, its own among them, which are
// there already. table (requests, pages), lengths (requests,): as paged_attention.py has them.
void attend_pages(const float *queries, const float *keys, const float *values, const int32_t *table,
                  const int32_t *lengths, float *out, long requests, long pages, long page_tokens, long heads,
                  long kv_heads, long width, long num_threads) {
    const Attention job = {queries, keys, values, table, lengths, out, pages, page_tokens, heads, kv_heads, width};
    long products = 0;
    for (long n = 0; n < requests; ++n) products += (lengths[n] + 1) * heads * width;
    run(&job, attend, requests * kv_heads, products < LARGE ? 1 : num_threads);
}

// ---- all layers

typedef struct {
    const uint8_t *codes;
    const float *scale, *bias;
    long rows, inputs, group, bits;
} Product;

typedef struct {
    Product qkv, out, gate_up, down;
    const float *attention_norm, *mlp_norm, *query_norm, *key_norm;
    float *keys, *values;
    float attention_epsilon, mlp_epsilon, head_epsilon;
} Layer;

ALWAYS int multiply(const Product *w, const float *x, const float *norm, float epsilon, const float *residual, float *y,
                    long tokens, int is_exact, long num_threads) {
    return low_bit_linear(w->codes, w->scale, x, norm, w->bias, residual, y, tokens, w->rows, w->inputs, w->group,
                          epsilon, (int)w->bits, is_exact, num_threads);
}

// x (requests, d) through ``count`` layers, in place; arguments as those of rotate_append_rows and attend_pages. The
// whole loop is here, not in Python, because between two products of a token there are microseconds. Returns 0, or 1 if
// there is no memory.
int decode_layers(const Layer *layers, long count, float *x, const float *cos, const float *sin, const int64_t *slots,
                  const int32_t *table, const int32_t *lengths, long requests, long pages, long page_tokens, long heads,
                  long kv_heads, long width, int is_exact, long num_threads) {
    long wide = 0;
    for (long n = 0; n < count; ++n) {
        if (layers[n].gate_up.rows > wide) wide = layers[n].gate_up.rows;
        if (layers[n].qkv.rows > wide) wide = layers[n].qkv.rows;
    }
    float *first = malloc((size_t)(3 * requests * wide) * sizeof(float));
    if (!first) return 1;
    float *second = first + requests * wide, *third = second + requests * wide;
    int failed = 0;
    for (long n = 0; n < count && !failed; ++n) {
        const Layer *at = layers + n;
        failed |= multiply(&at->qkv, x, at->attention_norm, at->attention_epsilon, 0, first, requests, is_exact, num_threads);
        rotate_append_rows(first, cos, sin, at->query_norm, at->key_norm, slots, at->keys, at->values, second, requests,
                           heads, kv_heads, width, at->head_epsilon, 1);
        attend_pages(second, at->keys, at->values, table, lengths, third, requests, pages, page_tokens, heads, kv_heads,
                     width, num_threads);
        failed |= multiply(&at->out, third, 0, 0.0f, x, x, requests, is_exact, num_threads);
        failed |= multiply(&at->gate_up, x, at->mlp_norm, at->mlp_epsilon, 0, first, requests, is_exact, num_threads);
        gated_rows(first, second, requests, at->gate_up.rows / 2, requests > 1 ? num_threads : 1);
        failed |= multiply(&at->down, second, 0, 0.0f, x, x, requests, is_exact, num_threads);
    }
    free(first);
    return failed;
}
