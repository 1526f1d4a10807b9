// Random layers through the CPU's kernels against FP64, compiled with a sanitizer: fuzz_cpu CASES SEED
//
// Everything lies in memory of exactly its size, at addresses as odd as the interface allows, so that a sanitizer sees
// any byte read or written beside it. Panels are packed here, one code at a time, from the drawing in low_bit_cpu.c's
// first lines. Outputs are compared with sums in FP64; what activations in bytes may lose is half a step each.
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int low_bit_linear(const uint8_t *, const float *, const float *, const float *, const float *, const float *, float *,
                   long, long, long, long, float, int, int, long);
void gated_rows(const float *, float *, long, long, long);
void rotate_append_rows(const float *, const float *, const float *, const float *, const float *, const int64_t *,
                        float *, float *, float *, long, long, long, long, float, long);
void attend_pages(const float *, const float *, const float *, const int32_t *, const int32_t *, float *, long, long,
                  long, long, long, long, long);

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
int decode_layers(const Layer *, long, float *, const float *, const float *, const int64_t *, const int32_t *,
                  const int32_t *, long, long, long, long, long, long, int, long);

static uint64_t state;

static long upto(long most) {  // 0 to most
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (long)((state >> 33) % (uint64_t)(most + 1));
}

static float any(void) { return (float)(upto(20000) - 10000) / 3000.0f; }

typedef struct {
    char *whole;
    void *at;
} Memory;

// ``size`` bytes that begin at ``odd`` past a multiple of 16 and end where the memory does.
static Memory memory(size_t size, size_t odd) {
    Memory made = {malloc(size + odd), 0};
    if (!made.whole) abort();
    made.at = made.whole + odd;
    return made;
}

static void pack(uint8_t *codes, const int8_t *q, long rows, long inputs, int bits) {
    for (long row = 0; row < rows; ++row)
        for (long k = 0; k < inputs; ++k) {
            const long slab = row / 16 * (inputs / 32) + k / 32, four = k % 32 / 4;
            const long chunk = bits == 4 ? four % 4 : four;
            uint8_t *byte = codes + (slab * bits + chunk) * 64 + row % 16 * 4 + k % 4;
            if (bits == 8)
                *byte = (uint8_t)q[row * inputs + k];
            else
                *byte |= (uint8_t)((q[row * inputs + k] + 8) << (four < 4 ? 0 : 4));
        }
}

// 0 if every output is as near to FP64 as it must be.
static int linear_case(long number) {
    const int bits = upto(1) ? 4 : 8, is_exact = (int)upto(1), has_bias = (int)upto(1);
    const int has_norm = (int)upto(1), has_residual = (int)upto(1);
    const long tokens = upto(5) ? upto(19) : upto(70), rows = upto(9) ? 1 + upto(50) : 1 + upto(300);
    const long group = 32 * (1 + upto(4)), inputs = group * (1 + upto(5)), filled = (rows + 15) / 16 * 16;
    const long groups = inputs / group, threads = 1 + upto(3);
    Memory codes = memory((size_t)(filled * inputs * bits / 8), (size_t)upto(15));
    Memory scale = memory((size_t)(filled * groups) * 4, 4 * (size_t)upto(3));
    Memory x = memory((size_t)(tokens * inputs) * 4, 4 * (size_t)upto(3));
    Memory y = memory((size_t)(tokens * rows) * 4, 4 * (size_t)upto(3));
    Memory bias = memory((size_t)rows * 4, 4 * (size_t)upto(3)), q = memory((size_t)(filled * inputs), 0);
    Memory norm = memory((size_t)inputs * 4, 4 * (size_t)upto(3)), wide = memory((size_t)(tokens * inputs) * 8, 0);
    Memory residual = memory((size_t)(tokens * rows) * 4, 4 * (size_t)upto(3));
    int8_t *whole = q.at;
    for (long n = 0; n < filled * inputs; ++n)
        whole[n] = n / inputs >= rows ? 0 : (int8_t)(bits == 4 ? upto(15) - 8 : upto(255) - 128);
    memset(codes.at, 0, (size_t)(filled * inputs * bits / 8));
    pack(codes.at, whole, filled, inputs, bits);
    float *s = scale.at, *given = x.at, *added = bias.at, *out = y.at, *weight = norm.at, *rest = residual.at;
    double *v = wide.at;
    for (long n = 0; n < filled * groups; ++n) s[n] = n % 7 == 6 ? 0.0f : any() / 100.0f;
    const int is_extreme = !upto(9);  // every product as large as it can be, all of one sign or of both
    for (long n = 0; n < tokens * inputs; ++n) given[n] = is_extreme ? (upto(1) ? 1.0f : -1.0f) : upto(50) ? any() : 0.0f;
    for (long n = 0; is_extreme && n < rows * inputs; ++n) whole[n] = (int8_t)(bits == 4 ? -8 : -128);
    if (is_extreme) {
        memset(codes.at, 0, (size_t)(filled * inputs * bits / 8));
        pack(codes.at, whole, filled, inputs, bits);
    }
    for (long n = 0; n < rows; ++n) added[n] = any();
    for (long n = 0; n < inputs; ++n) weight[n] = any();
    for (long n = 0; n < tokens * rows; ++n) rest[n] = any();
    for (long t = 0; t < tokens; ++t) {
        double squares = 0.0;
        for (long k = 0; k < inputs; ++k) squares += (double)given[t * inputs + k] * given[t * inputs + k];
        const double by = 1.0 / sqrt(squares / (double)inputs + 1e-3);
        for (long k = 0; k < inputs; ++k) v[t * inputs + k] = given[t * inputs + k] * (has_norm ? by * weight[k] : 1.0);
    }
    if (low_bit_linear(codes.at, s, given, has_norm ? weight : 0, has_bias ? added : 0, has_residual ? rest : 0, out,
                       tokens, rows, inputs, group, 1e-3f, bits, is_exact, threads))
        return 1;
    int is_wrong = 0;
    for (long t = 0; t < tokens; ++t)
        for (long r = 0; r < rows; ++r) {
            double right = (has_bias ? added[r] : 0.0) + (has_residual ? rest[t * rows + r] : 0.0);
            double size = fabs(right), allowed = 0.0;
            for (long g = 0; g < groups; ++g) {
                double largest = 0.0, sum = 0.0, all = 0.0;
                const double by = s[(r / 16 * groups + g) * 16 + r % 16];
                for (long k = g * group; k < (g + 1) * group; ++k) {
                    const double x_k = v[t * inputs + k], w = by * whole[r * inputs + k];
                    largest = fmax(largest, fabs(x_k)), sum += x_k * w, all += fabs(w);
                    size += fabs(x_k * w);
                }
                right += sum;
                if (!is_exact) allowed += 0.505 * largest / 127 * all;
            }
            is_wrong |= !(fabs(out[t * rows + r] - right) <= allowed + 1e-5 * size + 1e-6);
        }
    if (is_wrong)
        printf("case %ld: %d bits, %ld x %ld, group %ld, %ld tokens, exact %d, %ld threads\n", number, bits, rows, inputs,
               group, tokens, is_exact, threads);
    free(codes.whole), free(scale.whole), free(x.whole), free(y.whole), free(bias.whole), free(q.whole);
    free(norm.whole), free(wide.whole), free(residual.whole);
    return is_wrong;
}

static Memory numbers(long count) {
    Memory made = memory((size_t)count * 4, 4 * (size_t)upto(3));
    for (long n = 0; n < count; ++n) ((float *)made.at)[n] = any();
    return made;
}

static int is_near(double found, double right, double size) { return fabs(found - right) <= 1e-5 * size + 1e-6; }

static int gates_case(void) {
    const long rows = upto(9), width = 16 * (1 + upto(9));
    Memory x = numbers(2 * rows * width), y = memory((size_t)(rows * width) * 4, 4 * (size_t)upto(3));
    float *given = x.at, *out = y.at;
    for (long n = 0; n < 2 * rows * width; ++n)
        if (!upto(20)) given[n] *= 60.0f;  // where e^x ends
    gated_rows(given, out, rows, width, 1 + upto(3));
    int is_right = 1;
    for (long r = 0; r < rows; ++r)
        for (long k = 0; k < width; ++k) {
            const double g = given[2 * r * width + k], right = g / (1.0 + exp(-g)) * given[(2 * r + 1) * width + k];
            is_right &= is_near(out[r * width + k], right, fabs(right));
        }
    free(x.whole), free(y.whole);
    return is_right;
}

// A head in FP64 as the reference has it.
static void turned(const float *x, const float *norm, const float *cos, const float *sin, long width, double *out) {
    double squares = 0.0, v[256];
    for (long k = 0; k < width; ++k) squares += (double)x[k] * x[k];
    for (long k = 0; k < width; ++k) v[k] = norm ? x[k] / sqrt(squares / (double)width + 1e-3) * norm[k] : x[k];
    for (long k = 0; k < width; ++k)
        out[k] = v[k] * cos[k] + (k < width / 2 ? -v[k + width / 2] : v[k - width / 2]) * sin[k];
}

// New tokens of several requests go into their pages and attend to all that is theirs; other slots stay as they were.
static int attention_case(void) {
    const long requests = 1 + upto(4), kv_heads = 1 + upto(2), heads = kv_heads * (1 + upto(3)), width = 16 * (1 + upto(8));
    const long page_tokens = 1 + upto(8), pages = 1 + upto(12), all = heads + 2 * kv_heads, row = kv_heads * width;
    const long slots = (requests * pages + 1) * page_tokens;
    Memory qkv = numbers(requests * all * width), cos = numbers(requests * width), sin = numbers(requests * width);
    Memory norms[2] = {numbers(width), numbers(width)}, cache[2] = {numbers(slots * row), numbers(slots * row)};
    Memory queries = numbers(requests * heads * width), out = numbers(requests * heads * width);
    Memory table = memory((size_t)(requests * pages) * 4, 4), lengths = memory((size_t)requests * 4, 4);
    Memory own = memory((size_t)requests * 8, 8);
    const int has_norm = (int)upto(1);
    for (long n = 0; n < requests * pages; ++n) ((int32_t *)table.at)[n] = (int32_t)(requests * pages - n);
    for (long r = 0; r < requests; ++r) {
        const long length = upto(pages * page_tokens - 1), page = ((int32_t *)table.at)[r * pages + length / page_tokens];
        ((int32_t *)lengths.at)[r] = (int32_t)length;
        ((int64_t *)own.at)[r] = page * page_tokens + length % page_tokens;
    }
    Memory before = memory((size_t)(slots * row) * 4, 0);
    memcpy(before.at, cache[0].at, (size_t)(slots * row) * 4);
    const float *q_norm = has_norm ? norms[0].at : 0, *k_norm = has_norm ? norms[1].at : 0;
    rotate_append_rows(qkv.at, cos.at, sin.at, q_norm, k_norm, own.at, cache[0].at, cache[1].at, queries.at, requests,
                       heads, kv_heads, width, 1e-3f, 1 + upto(3));
    attend_pages(queries.at, cache[0].at, cache[1].at, table.at, lengths.at, out.at, requests, pages, page_tokens, heads,
                 kv_heads, width, 1 + upto(3));
    const float *keys = cache[0].at, *values = cache[1].at;
    int is_right = 1;
    for (long r = 0; r < requests; ++r) {
        const float *given = (float *)qkv.at + r * all * width, *c = (float *)cos.at + r * width, *s = (float *)sin.at + r * width;
        const long count = ((int32_t *)lengths.at)[r] + 1, slot = ((int64_t *)own.at)[r];
        double right[256];
        for (long h = 0; h < kv_heads; ++h) {
            turned(given + (heads + h) * width, k_norm, c, s, width, right);
            for (long k = 0; k < width; ++k) {
                is_right &= is_near(keys[slot * row + h * width + k], right[k], 30.0);
                is_right &= values[slot * row + h * width + k] == given[(heads + kv_heads + h) * width + k];
                ((float *)before.at)[slot * row + h * width + k] = keys[slot * row + h * width + k];
            }
        }
        for (long h = 0; h < heads; ++h) {
            double scores[256], most = -1e300, total = 0.0;
            const long kv = h / (heads / kv_heads);
            turned(given + h * width, q_norm, c, s, width, right);
            for (long t = 0; t < count; ++t) {
                const long at = ((int32_t *)table.at)[r * pages + t / page_tokens] * page_tokens + t % page_tokens;
                scores[t] = 0.0;
                for (long k = 0; k < width; ++k) scores[t] += right[k] * keys[at * row + kv * width + k] / sqrt((double)width);
                most = fmax(most, scores[t]);
            }
            for (long t = 0; t < count; ++t) total += scores[t] = exp(scores[t] - most);
            for (long k = 0; k < width; ++k) {
                double sum = 0.0;
                for (long t = 0; t < count; ++t) {
                    const long at = ((int32_t *)table.at)[r * pages + t / page_tokens] * page_tokens + t % page_tokens;
                    sum += scores[t] / total * values[at * row + kv * width + k];
                }
                is_right &= fabs(((float *)out.at)[(r * heads + h) * width + k] - sum) <= 3e-3;  // FP32 scores of hundreds
            }
        }
    }
    is_right &= !memcmp(before.at, keys, (size_t)(slots * row) * 4);
    Memory made[] = {qkv, cos, sin, norms[0], norms[1], cache[0], cache[1], queries, out, table, lengths, own, before};
    for (size_t n = 0; n < sizeof made / sizeof *made; ++n) free(made[n].whole);
    return is_right;
}

static Memory kept[256];
static int num_kept;

static void *keep(Memory made) { return kept[num_kept++] = made, made.at; }

static Product product(long rows, long inputs, long bits) {
    const long filled = (rows + 15) / 16 * 16, group = inputs % 64 || upto(1) ? 32 : 64;
    uint8_t *codes = keep(memory((size_t)(filled * inputs * bits / 8), (size_t)upto(15)));
    for (long n = 0; n < filled * inputs * bits / 8; ++n) codes[n] = (uint8_t)upto(255);
    float *scale = keep(numbers(filled * inputs / group));
    for (long n = 0; n < filled * inputs / group; ++n) scale[n] /= bits == 4 ? 100.0f : 2000.0f;
    return (Product){codes, scale, upto(1) ? keep(numbers(rows)) : 0, rows, inputs, group, bits};
}

static void multiply(const Product *w, const float *x, const float *norm, const float *residual, float *y, long tokens,
                     int is_exact) {
    low_bit_linear(w->codes, w->scale, x, norm, w->bias, residual, y, tokens, w->rows, w->inputs, w->group, 1e-5f,
                   (int)w->bits, is_exact, 1);
}

// All layers in one call are the calls that it makes, to the last bit.
static int layers_case(void) {
    const long requests = 1 + upto(3), kv_heads = 1 + upto(1), heads = kv_heads * (1 + upto(2)), width = 32 * (1 + upto(1));
    const long d = 32 * (1 + upto(3)), inner = 32 * (1 + upto(3)), row = kv_heads * width, num_layers = 1 + upto(1);
    const long all = (heads + 2 * kv_heads) * width, page_tokens = 4, pages = 3, slots = requests * pages * page_tokens;
    const int is_exact = (int)upto(1);
    Layer layers[2];
    float *before[2][2];
    num_kept = 0;
    for (long n = 0; n < num_layers; ++n) {
        const long bits = upto(1) ? 4 : 8;
        layers[n] = (Layer){
            product(all, d, bits), product(d, heads * width, bits), product(2 * inner, d, bits), product(d, inner, bits),
            keep(numbers(d)), keep(numbers(d)), upto(1) ? keep(numbers(width)) : 0, upto(1) ? keep(numbers(width)) : 0,
            keep(numbers(slots * row)), keep(numbers(slots * row)), 1e-5f, 1e-5f, 1e-5f};
        for (int of = 0; of < 2; ++of) {
            before[n][of] = keep(memory((size_t)(slots * row) * 4, 0));
            memcpy(before[n][of], of ? layers[n].values : layers[n].keys, (size_t)(slots * row) * 4);
        }
    }
    float *x = keep(numbers(requests * d)), *own = keep(memory((size_t)(requests * d) * 4, 0));
    float *cos = keep(numbers(requests * width)), *sin = keep(numbers(requests * width));
    int32_t *table = keep(memory((size_t)(requests * pages) * 4, 4)), *lengths = keep(memory((size_t)requests * 4, 4));
    int64_t *at = keep(memory((size_t)requests * 8, 8));
    for (long n = 0; n < requests * pages; ++n) table[n] = (int32_t)(requests * pages - 1 - n);
    for (long r = 0; r < requests; ++r) {
        lengths[r] = (int32_t)upto(pages * page_tokens - 1);
        at[r] = table[r * pages + lengths[r] / page_tokens] * page_tokens + lengths[r] % page_tokens;
    }
    memcpy(own, x, (size_t)(requests * d) * 4);
    if (decode_layers(layers, num_layers, x, cos, sin, at, table, lengths, requests, pages, page_tokens, heads, kv_heads,
                      width, is_exact, 1 + upto(2)))
        return 0;
    float *qkv = keep(numbers(requests * all)), *queries = keep(numbers(requests * heads * width));
    float *attended = keep(numbers(requests * heads * width)), *gates = keep(numbers(2 * requests * inner));
    float *inside = keep(numbers(requests * inner));
    for (long n = 0; n < num_layers; ++n) {
        const Layer *l = layers + n;
        multiply(&l->qkv, own, l->attention_norm, 0, qkv, requests, is_exact);
        rotate_append_rows(qkv, cos, sin, l->query_norm, l->key_norm, at, before[n][0], before[n][1], queries, requests,
                           heads, kv_heads, width, 1e-5f, 1);
        attend_pages(queries, before[n][0], before[n][1], table, lengths, attended, requests, pages, page_tokens, heads,
                     kv_heads, width, 1);
        multiply(&l->out, attended, 0, own, own, requests, is_exact);
        multiply(&l->gate_up, own, l->mlp_norm, 0, gates, requests, is_exact);
        gated_rows(gates, inside, requests, inner, 1);
        multiply(&l->down, inside, 0, own, own, requests, is_exact);
    }
    int is_right = !memcmp(x, own, (size_t)(requests * d) * 4);
    for (long n = 0; n < num_layers; ++n)
        is_right &= !memcmp(layers[n].keys, before[n][0], (size_t)(slots * row) * 4) &&
                    !memcmp(layers[n].values, before[n][1], (size_t)(slots * row) * 4);
    for (int n = 0; n < num_kept; ++n) free(kept[n].whole);
    return is_right;
}

int main(int count, char **words) {
    if (count != 3) return 2;
    const long cases = strtol(words[1], 0, 10);
    state = strtoull(words[2], 0, 10);
    for (long number = 0; number < cases; ++number) {
        if (linear_case(number)) return 1;
        const char *wrong = !gates_case() ? "gates" : !attention_case() ? "attention" : !layers_case() ? "layers" : 0;
        if (wrong) {
            printf("case %ld: %s\n", number, wrong);
            return 1;
        }
    }
    printf("%ld cases\n", cases);
    return 0;
}
