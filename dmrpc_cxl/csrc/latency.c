/*
 * latency.c - the model of slower memory, and what it knows of this machine.
 *
 * Context: any thread; the host lock may be held or not.
 */
#define _GNU_SOURCE
#include "latency.h"

#include <string.h>
#include <sys/mman.h>
#include <time.h>

#define PAY_PS                                                                                     \
    2000000 /* wait once that much is owed: below, a look at the clock would be most of it */
#define CHASE_BYTES (128ull << 20)
#define CHASE_STEP 128 /* lines come in pairs: touch one of each */
#define CHASE_LOADS 20000
#define CHASES 5
#define TRIALS 5
#define TRIAL_LINES 4000
#define TRIAL_PS 200000

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
}

static inline void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
}

/* Spin for that long; return how long it was. */
static uint64_t spin(uint64_t ns) {
    uint64_t begin = now_ns(), now = begin;
    while (now - begin < ns) {
        relax();
        now = now_ns();
    }
    return now - begin;
}

void dm_latency_init(struct dm_latency *l) {
    memset(l, 0, sizeof *l);
    pthread_mutex_init(&l->lock, NULL);
    l->overlap = 1;
}

void dm_latency_destroy(struct dm_latency *l) { pthread_mutex_destroy(&l->lock); }

void dm_latency_charge(struct dm_latency *l, uint64_t lines_alone, uint64_t lines_copied) {
    pthread_mutex_lock(&l->lock);
    uint64_t line_ps = __atomic_load_n(&l->line_ps, __ATOMIC_RELAXED);
    uint64_t charged = lines_alone * line_ps + lines_copied * line_ps / l->overlap;
    l->lines_alone += lines_alone;
    l->lines_copied += lines_copied;
    l->owed_rest_ps += charged;
    l->owed_ns += l->owed_rest_ps / 1000;
    l->owed_rest_ps %= 1000;
    l->owed_ps += (int64_t)charged - (int64_t)l->charge_ps;
    uint64_t due_ns = l->owed_ps > PAY_PS ? (uint64_t)l->owed_ps / 1000 : 0;
    if (due_ns)
        l->owed_ps = 0;
    pthread_mutex_unlock(&l->lock);
    if (!due_ns)
        return;
    uint64_t waited = spin(due_ns);
    pthread_mutex_lock(&l->lock);
    l->waits++;
    l->waited_ns += waited;
    /* Spun too long: to be taken off later. But not what another thread had of the CPU meanwhile. */
    int64_t over = (int64_t)(waited - due_ns) * 1000;
    l->owed_ps -= over < PAY_PS ? over : PAY_PS;
    pthread_mutex_unlock(&l->lock);
}

/* ---------------------------------------------------------------- this machine */

/* One load that misses, in ns: each address depends on what was loaded before, and is nowhere near it. */
static double chase(const unsigned char *memory) {
    const uint64_t places = CHASE_BYTES / CHASE_STEP;
    uint64_t at = 12345;
    double best = 1e9;
    for (int i = 0; i < CHASES; i++) {
        uint64_t begin = now_ns();
        for (int j = 0; j < CHASE_LOADS; j++) {
            const volatile unsigned char *place = memory + at * CHASE_STEP;
            at = (at * 6364136223846793005ull + 1442695040888963407ull + *place) & (places - 1);
        }
        double each = (double)(now_ns() - begin) / CHASE_LOADS;
        best = each < best ? each : best;
    }
    return best;
}

static struct dm_latency_measured measured;

static void measure(void) {
    unsigned char *memory =
        mmap(NULL, CHASE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    measured.local_ns = 100; /* if there is no memory to try it on */
    if (memory != MAP_FAILED) {
        madvise(memory, CHASE_BYTES, MADV_HUGEPAGE);
        memset(memory, 0, CHASE_BYTES); /* or every page would be the kernel's page of zeros */
        measured.local_ns = chase(memory);
        munmap(memory, CHASE_BYTES);
    }
    double best = 1e9;
    for (int i = 0; i < TRIALS; i++) {
        double over = 0;
        for (int j = 0; j < 50; j++)
            over += (double)(spin(PAY_PS / 1000) - PAY_PS / 1000);
        best = over / 50 < best ? over / 50 : best;
    }
    measured.overshoot_ns = best;
}

void dm_latency_set(struct dm_latency *l, uint64_t extra_ps, uint32_t overlap) {
    uint64_t charge_ps = extra_ps ? (uint64_t)(dm_latency_measure().charge_ns * 1000) : 0;
    pthread_mutex_lock(&l->lock);
    l->overlap = overlap;
    l->charge_ps = charge_ps;
    l->owed_ps = 0;
    __atomic_store_n(&l->line_ps, extra_ps, __ATOMIC_RELAXED);
    pthread_mutex_unlock(&l->lock);
}

/* Charge lines one by one, the worst case, and return what that takes longer than it should, in ns for one. The best of
 * some trials: others may have had the CPU in the rest. */
static double excess(struct dm_latency *l) {
    double best = 1e9;
    for (int i = 0; i < TRIALS; i++) {
        l->owed_ps = 0;
        uint64_t begin = now_ns();
        for (uint64_t word = 0; word < TRIAL_LINES; word++)
            dm_latency_words(l, 0, word * DM_WORDS_PER_LINE, 1);
        double taken = (double)(now_ns() - begin) - (double)l->line_ps * TRIAL_LINES / 1000;
        best = taken < best ? taken : best;
    }
    return best / TRIAL_LINES;
}

static void measure_all(void) {
    measure();
    struct dm_latency l;
    dm_latency_init(&l);
    l.line_ps = TRIAL_PS;
    double charge = excess(&l);
    dm_latency_destroy(&l);
    measured.charge_ns = charge > 0 ? charge : 0;
}

struct dm_latency_measured dm_latency_measure(void) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, measure_all);
    return measured;
}

/* By which share charges take longer (or shorter) than what they charge, for lines that are charged one by one. */
double dm_latency_error(uint64_t extra_ps) {
    if (extra_ps == 0)
        return 0;
    struct dm_latency l;
    dm_latency_init(&l);
    dm_latency_set(&l, extra_ps, 1);
    double found = excess(&l) * 1000 / (double)extra_ps;
    dm_latency_destroy(&l);
    return found;
}
