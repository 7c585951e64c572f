/*
 * latency.h - a model of slower memory: what the DM layer itself does to the device takes longer.
 *
 * A plain load or store of the user cannot be delayed. What the DM layer does can: it says how many cache lines it read or
 * wrote, the model adds up what these would have taken longer, and the thread spins once that is worth it (PAY_PS). Spinning goes
 * on wherever the access was, also under the host lock and in the fault handler: slower memory would hold them up as well.
 *
 *   words     frame words and Ref entries: each line waits alone. A line that was the last one to be touched is in the cache.
 *   copies    bytes copied, zeroed or said to be read (Host.charge): `overlap` lines are under way at once.
 *
 * Nothing is charged for page tables of the host's own, for intents and counters: a host writes them alone, from its cache.
 * What was spun too long is taken off the next time, so errors do not add up.
 *
 * Off: line_ps is 0, and every charge is one comparison with it.
 */
#ifndef DM_LATENCY_H
#define DM_LATENCY_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#define DM_LINE_BYTES 64u
#define DM_WORDS_PER_LINE 8u
#define DM_LATENCY_MAX_NS 100000u
#define DM_LATENCY_MAX_OVERLAP 1024u

struct dm_latency {
    uint64_t
        line_ps; /* what a line takes longer, in ps; 0: off. Atomic, relaxed: it may be set at any time */
    uint64_t last_line; /* line of words touched last; relaxed: a guess what is in the cache */

    pthread_mutex_t lock; /* guards what follows; held for a few additions */
    uint32_t overlap;
    uint64_t charge_ps; /* what charging itself takes: part of the wait */
    int64_t owed_ps;    /* not spun yet; below 0: spun too long */
    uint64_t lines_alone, lines_copied, waits;
    uint64_t owed_ns, waited_ns; /* in all; ps that are not whole ns yet stay in owed_rest_ps */
    uint64_t owed_rest_ps;
};

/* What this machine's memory and clock are like, measured once in a process. */
struct dm_latency_measured {
    double local_ns;     /* one load that misses every cache */
    double overshoot_ns; /* what one wait takes longer than it should */
    double charge_ns;    /* what charging a line takes, without the wait */
};

void dm_latency_init(struct dm_latency *l);
void dm_latency_destroy(struct dm_latency *l);
struct dm_latency_measured dm_latency_measure(void);
void dm_latency_set(struct dm_latency *l, uint64_t extra_ps, uint32_t overlap);
double dm_latency_error(uint64_t extra_ps);
void dm_latency_charge(struct dm_latency *l, uint64_t lines_alone, uint64_t lines_copied);

static inline bool dm_latency_on(const struct dm_latency *l) {
    return __builtin_expect(__atomic_load_n(&l->line_ps, __ATOMIC_RELAXED) != 0, 0);
}

/* Words [first, first + nr) of a table of 8-byte words that starts on a line were read or changed; `table` tells tables apart. */
static inline void dm_latency_words(struct dm_latency *l, unsigned table, uint64_t first,
                                    uint64_t nr) {
    if (!dm_latency_on(l) || nr == 0)
        return;
    uint64_t from = first / DM_WORDS_PER_LINE, to = (first + nr - 1) / DM_WORDS_PER_LINE;
    uint64_t named = (uint64_t)(table + 1) << 56;
    uint64_t lines =
        to - from + 1 - (__atomic_load_n(&l->last_line, __ATOMIC_RELAXED) == (named | from));
    __atomic_store_n(&l->last_line, named | to, __ATOMIC_RELAXED);
    if (lines)
        dm_latency_charge(l, lines, 0);
}

/* That many bytes were read and as many written, or only one of both. */
static inline void dm_latency_bytes(struct dm_latency *l, uint64_t bytes) {
    if (dm_latency_on(l) && bytes)
        dm_latency_charge(l, 0, (bytes + DM_LINE_BYTES - 1) / DM_LINE_BYTES);
}

#endif
