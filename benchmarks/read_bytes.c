// Reads stretches of memory with several threads and does nothing else with them: what a weight's bytes cost at least.
//
// Threads take pieces from a counter until none is left, so a core that others disturb takes fewer; each piece goes
// through eight sums, which no chain of additions slows down. One round of threads for all stretches: no start or
// meeting of threads stands between two of them.
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>

#define PIECE (256L * 1024)
#define MOST 256

typedef uint64_t Eight __attribute__((vector_size(64)));
typedef struct {
    const char *const *stretches;
    const long *bytes;
    long count;
    atomic_long next;
    atomic_ulong sum;
} Job;

static uint64_t read_piece(const char *from, long bytes) {
    Eight sums[8] = {{0}};
    const Eight *words = (const Eight *)from;  // a stretch starts at a multiple of 64 bytes
    long k = 0;
    for (; k + 8 <= bytes / 64; k += 8)
        for (int i = 0; i < 8; ++i) sums[i] += words[k + i];
    for (; k < bytes / 64; ++k) sums[0] += words[k];
    uint64_t total = 0;
    for (int i = 0; i < 8; ++i)
        for (int lane = 0; lane < 8; ++lane) total += sums[i][lane];
    for (const char *rest = from + 64 * k; rest < from + bytes; ++rest) total += (uint8_t)*rest;
    return total;
}

static void *take(void *given) {
    Job *job = given;
    uint64_t sum = 0;
    for (;;) {
        long piece = atomic_fetch_add(&job->next, 1), at = 0;
        for (; at < job->count && piece >= (job->bytes[at] + PIECE - 1) / PIECE; ++at)
            piece -= (job->bytes[at] + PIECE - 1) / PIECE;
        if (at == job->count) break;
        const long left = job->bytes[at] - piece * PIECE;
        sum += read_piece(job->stretches[at] + piece * PIECE, left < PIECE ? left : PIECE);
    }
    atomic_fetch_add(&job->sum, sum);
    return 0;
}

// The sum of all words of eight bytes, and of the bytes behind the last 64: a number that depends on every byte.
uint64_t read_stretches(const char *const *stretches, const long *bytes, long count, long num_threads) {
    Job job = {stretches, bytes, count, 0, 0};
    pthread_t others[MOST];
    long hired = 0;
    while (hired < num_threads - 1 && hired < MOST && !pthread_create(&others[hired], 0, take, &job)) ++hired;
    take(&job);
    while (hired) pthread_join(others[--hired], 0);
    return atomic_load(&job.sum);
}
