// Threads of the CPU's kernels. They take parts of the work from a counter until none is left, so a core that others
// disturb takes fewer. They wait for work some microseconds awake and then asleep.
#include "cpu.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>

#define AWAKE 4000  // looks at the counter before a thread sleeps: some 40 microseconds
#define MOST 256    // threads

typedef struct {
    pthread_mutex_t lock;
    pthread_cond_t work;
    atomic_long round, next, inside, wanted;
    atomic_int is_open;
    long last, hired;
    void (*part)(const void *, long);
    const void *job;
    atomic_int cpu[MOST];  // of the caller and of each member
} Team;
static Team team = {.lock = PTHREAD_MUTEX_INITIALIZER, .work = PTHREAD_COND_INITIALIZER};
static pthread_mutex_t one_caller = PTHREAD_MUTEX_INITIALIZER;

// Half of a fair share of what is left: long stretches of memory first, short ones at the end.
static void take(void) {
    long first = atomic_load(&team.next);
    while (first < team.last) {
        const long share = (team.last - first) / (2 * (atomic_load(&team.wanted) + 1)), size = share > 1 ? share : 1;
        if (!atomic_compare_exchange_weak(&team.next, &first, first + size)) continue;
        for (long n = first; n < first + size && n < team.last; ++n) team.part(team.job, n);
        first = atomic_load(&team.next);
    }
}

// Linux may wake a thread on the processor of the one that waits for it, and leaves both there for milliseconds, though
// another is idle. So whoever finds an earlier member where it is goes elsewhere.
static void spread(long number) {
#ifdef __linux__
    const int here = sched_getcpu();
    int is_alone = 1;
    for (long n = 0; n < number; ++n) is_alone &= atomic_load(&team.cpu[n]) != here;
    cpu_set_t allowed, free;
    if (!is_alone && !sched_getaffinity(0, sizeof allowed, &allowed)) {
        free = allowed;
        for (long n = 0; n < number; ++n)
            if (atomic_load(&team.cpu[n]) >= 0) CPU_CLR(atomic_load(&team.cpu[n]), &free);
        if (CPU_COUNT(&free) && !sched_setaffinity(0, sizeof free, &free)) sched_setaffinity(0, sizeof allowed, &allowed);
    }
    atomic_store(&team.cpu[number], sched_getcpu());
#else
    (void)number;
#endif
}

typedef struct {
    long number, seen;
} Start;

static void *member(void *given) {
    const long number = ((Start *)given)->number;
    long seen = ((Start *)given)->seen;
    free(given);
    for (;;) {
        // One that the last work was not for sleeps at once.
        const int looks = number <= atomic_load(&team.wanted) ? AWAKE : 0;
        for (int look = 0; look < looks && atomic_load(&team.round) == seen; ++look) _mm_pause();
        if (atomic_load(&team.round) == seen) {
            pthread_mutex_lock(&team.lock);
            while (atomic_load(&team.round) == seen) pthread_cond_wait(&team.work, &team.lock);
            pthread_mutex_unlock(&team.lock);
        }
        seen = atomic_load(&team.round);
        // Whoever is inside while it is open may read the team's job; who comes too late is not waited for.
        atomic_fetch_add(&team.inside, 1);
        if (atomic_load(&team.is_open) && number <= atomic_load(&team.wanted)) {
            spread(number);
            take();
        }
        atomic_fetch_sub(&team.inside, 1);
    }
    return 0;
}

// A child of fork() has none of its parent's threads.
static void forget(void) {
    pthread_mutex_init(&team.lock, 0);
    pthread_cond_init(&team.work, 0);
    pthread_mutex_init(&one_caller, 0);
    team.hired = 0;
    atomic_store(&team.inside, 0);
    atomic_store(&team.is_open, 0);
}

static void hire(long wanted) {
    static int is_told = 0;
    if (!is_told) is_told = !pthread_atfork(0, 0, forget);
    while (team.hired < wanted) {
        pthread_t thread;
        Start *start = malloc(sizeof *start);
        if (!start) return;
        *start = (Start){team.hired + 1, atomic_load(&team.round)};
        atomic_store(&team.cpu[team.hired + 1], -1);
        if (pthread_create(&thread, 0, member, start)) {
            free(start);
            return;
        }
        pthread_detach(thread);
        ++team.hired;
    }
}

// The caller works too; it leaves when all parts are done.
void run(const void *job, void (*part)(const void *, long), long parts, long num_threads) {
    if (num_threads > MOST) num_threads = MOST;
    if (num_threads <= 1 || parts <= 1) {
        for (long n = 0; n < parts; ++n) part(job, n);
        return;
    }
    pthread_mutex_lock(&one_caller);
    hire(num_threads - 1);
    team.job = job;
    team.part = part;
    team.last = parts;
    atomic_store(&team.wanted, num_threads - 1);
    atomic_store(&team.next, 0);
    spread(0);
    atomic_store(&team.is_open, 1);
    pthread_mutex_lock(&team.lock);
    atomic_fetch_add(&team.round, 1);
    pthread_cond_broadcast(&team.work);
    pthread_mutex_unlock(&team.lock);
    take();
    atomic_store(&team.is_open, 0);
    while (atomic_load(&team.inside)) sched_yield();
    pthread_mutex_unlock(&one_caller);
}
