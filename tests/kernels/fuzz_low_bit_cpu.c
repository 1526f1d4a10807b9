// Random layers through low_bit_cpu.c against FP64, compiled with a sanitizer: fuzz_low_bit_cpu CASES SEED
//
// Everything lies in memory of exactly its size, at addresses as odd as the interface allows, so that a sanitizer sees
// any byte read or written beside it. Panels are packed here, one code at a time, from the drawing in that file's
// first lines. Outputs are compared with sums in FP64; what activations in bytes may lose is half a step each.
#include "low_bit_cpu.c"

#include <math.h>
#include <stdio.h>

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
static int one_case(long number) {
    const int bits = upto(1) ? 4 : 8, is_exact = (int)upto(1), has_bias = (int)upto(1);
    const long tokens = upto(5) ? upto(19) : upto(70), rows = upto(9) ? 1 + upto(50) : 1 + upto(300);
    const long group = 32 * (1 + upto(4)), inputs = group * (1 + upto(5)), filled = (rows + 15) / 16 * 16;
    const long groups = inputs / group, threads = 1 + upto(3);
    Memory codes = memory((size_t)(filled * inputs * bits / 8), (size_t)upto(15));
    Memory scale = memory((size_t)(filled * groups) * 4, 4 * (size_t)upto(3));
    Memory x = memory((size_t)(tokens * inputs) * 4, 4 * (size_t)upto(3));
    Memory y = memory((size_t)(tokens * rows) * 4, 4 * (size_t)upto(3));
    Memory bias = memory((size_t)rows * 4, 4 * (size_t)upto(3)), q = memory((size_t)(filled * inputs), 0);
    int8_t *whole = q.at;
    for (long n = 0; n < filled * inputs; ++n)
        whole[n] = n / inputs >= rows ? 0 : (int8_t)(bits == 4 ? upto(15) - 8 : upto(255) - 128);
    memset(codes.at, 0, (size_t)(filled * inputs * bits / 8));
    pack(codes.at, whole, filled, inputs, bits);
    float *s = scale.at, *given = x.at, *added = bias.at, *out = y.at;
    for (long n = 0; n < filled * groups; ++n) s[n] = n % 7 == 6 ? 0.0f : any() / 100.0f;
    const int is_extreme = !upto(9);  // every product as large as it can be, all of one sign or of both
    for (long n = 0; n < tokens * inputs; ++n) given[n] = is_extreme ? (upto(1) ? 1.0f : -1.0f) : upto(50) ? any() : 0.0f;
    for (long n = 0; is_extreme && n < rows * inputs; ++n) whole[n] = (int8_t)(bits == 4 ? -8 : -128);
    if (is_extreme) {
        memset(codes.at, 0, (size_t)(filled * inputs * bits / 8));
        pack(codes.at, whole, filled, inputs, bits);
    }
    for (long n = 0; n < rows; ++n) added[n] = any();
    if (low_bit_linear(codes.at, s, given, has_bias ? added : 0, out, tokens, rows, inputs, group, bits, is_exact, threads))
        return 1;
    int is_wrong = 0;
    for (long t = 0; t < tokens; ++t)
        for (long r = 0; r < rows; ++r) {
            double right = has_bias ? added[r] : 0.0, size = fabs(right), allowed = 0.0;
            for (long g = 0; g < groups; ++g) {
                double largest = 0.0, sum = 0.0, all = 0.0;
                const double by = s[(r / 16 * groups + g) * 16 + r % 16];
                for (long k = g * group; k < (g + 1) * group; ++k) {
                    const double v = given[t * inputs + k], w = by * whole[r * inputs + k];
                    largest = fmax(largest, fabs(v)), sum += v * w, all += fabs(w);
                    size += fabs(v * w);
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
    return is_wrong;
}

int main(int count, char **words) {
    if (count != 3) return 2;
    const long cases = strtol(words[1], 0, 10);
    state = strtoull(words[2], 0, 10);
    for (long number = 0; number < cases; ++number)
        if (one_case(number)) return 1;
    printf("%ld cases\n", cases);
    return 0;
}
