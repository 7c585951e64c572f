/*
 * counts.c - frame words. Every count of a frame goes through here.
 *
 * Ordering. Taking a count is relaxed: the taker already holds one or owns the frame. Dropping one is a release,
 * and seeing the last one go an acquire: what anybody did to the frame happens before its next use.
 * Whoever's compare-and-swap takes a count to zero owns the frame from that very instant: the same word says so.
 *
 * Context: host lock held.
 */
#include "host.h"

#define AHEAD 32 /* words to prefetch: another host may have written them last */

static inline uint64_t word_in_use(uint64_t word, uint16_t host) {
    return (word & 0xffff000000000000ull) + dm_frame_pack(1, host, 1);
}

static inline uint64_t word_left(uint64_t word, uint16_t host) {
    return (word & 0xffff000000000000ull) | dm_frame_pack(0, host, 0);
}

/* Only the owner changes the word, but another host that searches for frames of its own may read it: dm_rescan_owned. */
static inline void store_own(uint64_t *word, uint64_t next) {
    __atomic_store_n(word, next, __ATOMIC_RELAXED);
}

/* With crash points armed the two below go from word to word; otherwise their loops have no branch for that. */
static __attribute__((cold, noinline)) void enter_use_one_by_one(struct dm_host *h, uint64_t *word,
                                                                 uint32_t nr) {
    for (uint32_t i = 0; i < nr; i++) {
        store_own(&word[i], word_in_use(word[i], h->id));
        DM_CRASH_POINT(frame_in_use);
    }
}

static __attribute__((cold, noinline)) void leave_use_one_by_one(struct dm_host *h, uint64_t *word,
                                                                 uint32_t nr) {
    for (uint32_t i = 0; i < nr; i++) {
        store_own(&word[i], word_left(word[i], h->id));
        DM_CRASH_POINT(frame_left_use);
    }
}

/* 0 -> 1 for frames this host owns: nobody else may change their words, so stores do. */
void dm_frames_enter_use(struct dm_host *h, uint32_t pfn, uint32_t nr) {
    uint64_t *word = h->frames + pfn;
    dm_charge_frames(h, pfn, nr);
    DM_COUNT(h, frames_allocated, nr);
    if (DM_CRASH_IS_ARMED) {
        enter_use_one_by_one(h, word, nr);
        return;
    }
    for (uint32_t i = 0; i < nr; i++) {
        __builtin_prefetch(&word[i + AHEAD], 1);
        store_own(&word[i], word_in_use(word[i], h->id));
    }
}

/* 1 -> 0 for frames of which the caller is known to be the only holder: nobody else may touch the words. */
void dm_frames_leave_use(struct dm_host *h, uint32_t pfn, uint32_t nr) {
    uint64_t *word = h->frames + pfn;
    dm_charge_frames(h, pfn, nr);
    __atomic_thread_fence(__ATOMIC_RELEASE);
    if (DM_CRASH_IS_ARMED) {
        leave_use_one_by_one(h, word, nr);
        return;
    }
    for (uint32_t i = 0; i < nr; i++) {
        __builtin_prefetch(&word[i + AHEAD], 1);
        store_own(&word[i], word_left(word[i], h->id));
    }
}

/* -1. True when it was the last: the frame is this host's now. Decided by the compare-and-swap alone. */
bool dm_count_down(struct dm_host *h, uint32_t pfn) {
    uint64_t word = __atomic_load_n(&h->frames[pfn], __ATOMIC_RELAXED), next;
    do {
        if (dm_frame_refcount(word) == 0)
            dm_fatal(h,
                     "frame %u has no count left to drop: the device is damaged; run `dmrpc fabric "
                     "verify`",
                     pfn);
        next =
            dm_frame_refcount(word) == 1 ? dm_frame_pack(0, h->id, dm_frame_seq(word)) : word - 1;
    } while (!__atomic_compare_exchange_n(&h->frames[pfn], &word, next, true, __ATOMIC_ACQ_REL,
                                          __ATOMIC_RELAXED));
    dm_charge_frames(h, pfn, 1);
    DM_CRASH_POINT(frame_counted_down);
    return dm_frame_refcount(next) == 0;
}

/* Put frames that just became free on the free list: those whose owned-window page is occupied apart. */
void dm_frame_freed(struct dm_host *h, uint32_t pfn, uint32_t nr) {
    uint32_t start = 0;
    for (uint32_t i = dm_all_zero(h->pt + pfn, nr) ? nr : 0; i < nr; i++) {
        if (h->pt[pfn + i] == 0)
            continue;
        if (i > start)
            dm_freelist_put(&h->free, pfn + start, i - start);
        dm_freelist_put_displaced(&h->free, pfn + i);
        start = i + 1;
    }
    if (nr > start)
        dm_freelist_put(&h->free, pfn + start, nr - start);
    h->entry->nr_free = h->free.nr_free;
}

/* Does the caller's count on each frame stand alone? True stays true: only a holder can add counts. */
bool dm_all_exclusive(struct dm_host *h, const struct dm_run *runs, uint32_t nr_runs) {
    for (uint32_t r = 0; r < nr_runs; r++) {
        if (runs[r].pfn == DM_NO_FRAME)
            continue;
        dm_charge_frames(h, runs[r].pfn, runs[r].count);
        for (uint32_t i = 0; i < runs[r].count; i++)
            if (dm_frame_refcount(__atomic_load_n(&h->frames[runs[r].pfn + i], __ATOMIC_ACQUIRE)) !=
                1)
                return false;
    }
    return true;
}
