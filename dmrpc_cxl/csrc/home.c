/*
 * home.c - frames go home: back to the host that made the Ref they came in.
 *
 * A service that only receives would pile up the frames of its callers, and give them back to the coordinator, while the callers
 * ask it for others: round trips, and memory that no cache holds. So whoever frees an exclusive run that came in a Ref hands it
 * to the Ref's creator, who takes it next, while it is warm. Who has given away as many frames itself keeps it instead: where
 * traffic goes both ways, frames change hands without a word each.
 *
 * The word of a frame that is free and this host's, (0, me), becomes (0, home, coming), and home makes it (0, home) when it takes
 * the frame in. From then on home alone may hand it out. Nobody waits, and whoever dies:
 * - Home, before or after: it is found not to be ACTIVE after the words were stored, and they are taken back. If it dies later,
 *   its recovery takes them, as any other free frame of its own: the store, a fence, the look here; the state, a fence, the
 *   look at the words there.
 * - This host, in between: the intent says which run, and its recovery takes back what nobody else's will, or leaves the hint.
 * - Home's entry is another process's by now: the frames are a gift to that one.
 * Taking in and taking back are compare-and-swaps of the same word, so one of them has the frame.
 *
 * The homecoming in the entry of home tells it where to look. It holds hints, nothing more: each is checked against the words
 * before it is believed, and one that was overwritten, or never written, costs nothing but time, for a host that finds no other
 * frames looks through all words for its own (dm_rescan_owned).
 *
 * Context: host lock held, nothing blocks. Paper: none (V-B: who frees last keeps the page); docs/decisions/0014.
 */
#include "dm.h"
#include "intent.h"

/* Tell a host where to look for frames that were handed to it. Context: any process. */
void dm_leave_hint(struct dm_host_entry *home, uint32_t pfn, uint32_t nr) {
    struct dm_homecoming *inbox = &home->homecoming;
    __atomic_fetch_add(&inbox->nr_frames, nr, __ATOMIC_RELAXED);
    uint32_t slot = __atomic_fetch_add(&inbox->nr_taken, 1, __ATOMIC_RELAXED) % DM_HINTS;
    /* Release, both: who sees that there is a hint reads it, and who reads it sees the words. */
    __atomic_store_n(&inbox->hints[slot], (uint64_t)nr << 32 | pfn, __ATOMIC_RELEASE);
    __atomic_fetch_add(&inbox->nr_hints, 1, __ATOMIC_RELEASE);
}

/* Home is not there: what nobody else has taken is this host's again. */
static void take_back(struct dm_host *h, uint16_t to, uint32_t pfn, uint32_t nr) {
    struct dm_run freed = {0, 0};
    for (uint32_t i = 0; i < nr; i++) {
        uint64_t word = __atomic_load_n(&h->frames[pfn + i], __ATOMIC_RELAXED);
        if (dm_frame_refcount(word) == 0 && dm_frame_owner(word) == to && dm_frame_coming(word) &&
            __atomic_compare_exchange_n(&h->frames[pfn + i], &word,
                                        dm_frame_pack(0, h->id, dm_frame_seq(word)), false,
                                        __ATOMIC_ACQ_REL, __ATOMIC_RELAXED)) {
            DM_CRASH_POINT(home_taken_back);
            dm_freed_add(h, &freed, pfn + i);
        }
    }
    dm_freed_end(h, &freed);
}

/* Frames of this host's own left it in a Ref. Those that die with others are never made up for, hence a limit. */
void dm_gave_away(struct dm_host *h, uint32_t nr) {
    uint32_t most = h->nr_frames / 4;
    h->nr_out = h->nr_out + (uint64_t)nr < most ? h->nr_out + nr : most;
}

static void got_back(struct dm_host *h, uint32_t nr) {
    h->nr_out = h->nr_out > nr ? h->nr_out - nr : 0;
}

/* Hand a free run of this host's, which is on no list, to its home. False, and nothing has changed: it stays here. */
bool dm_send_home(struct dm_host *h, uint16_t to, uint32_t pfn, uint32_t nr) {
    if (to == DM_OWNER_POOL || to > h->device.geo.max_hosts)
        return false;
    if (to == h->id || h->nr_out >= nr) {
        got_back(h, nr);
        return false;
    }
    struct dm_host_entry *home = &h->device.hosts[to - 1];
    struct dm_intent *in = dm_intent_begin(h, DM_INTENT_HOME, to, nr, pfn, 0, 0);
    DM_CRASH_POINT(home_begun);
    for (uint32_t i = 0; i < nr; i++) {
        uint64_t *word = &h->frames[pfn + i];
        /* Ours and unused: nobody else changes the word. Release: our use of the frame is over. */
        __atomic_store_n(word, dm_frame_pack(0, to | DM_COMING, dm_frame_seq(*word)),
                         __ATOMIC_RELEASE);
        DM_CRASH_POINT(home_sent);
    }
    __atomic_thread_fence(__ATOMIC_SEQ_CST); /* pairs with the one in recover.c: take_free_frames */
    if (__atomic_load_n(&home->state, __ATOMIC_RELAXED) == DM_HOST_ACTIVE) {
        dm_leave_hint(home, pfn, nr);
        DM_CRASH_POINT(home_hinted);
        DM_COUNT(h, frames_sent_home, nr);
    } else {
        DM_CRASH_POINT(home_found_gone);
        take_back(h, to, pfn, nr);
    }
    dm_intent_end(in);
    DM_CRASH_POINT(home_ended);
    return true;
}

/* Make a frame that is this host's, free and on no list, its alone. */
bool dm_take_in(struct dm_host *h, uint32_t pfn) {
    uint64_t word = __atomic_load_n(&h->frames[pfn], __ATOMIC_ACQUIRE);
    if (dm_frame_refcount(word) != 0 || dm_frame_owner(word) != h->id)
        return false;
    if (!dm_frame_coming(word))
        return true;
    if (!__atomic_compare_exchange_n(&h->frames[pfn], &word,
                                     dm_frame_pack(0, h->id, dm_frame_seq(word)), false,
                                     __ATOMIC_ACQ_REL, __ATOMIC_RELAXED))
        return false;
    DM_CRASH_POINT(home_taken_in);
    got_back(h, 1);
    DM_COUNT(h, frames_came_home, 1);
    return true;
}

/* Take in a run whose frames all came; false: not all did, and those taken in are on no list yet. */
static bool take_in_run(struct dm_host *h, uint32_t pfn, uint32_t nr) {
    if (dm_freelist_overlaps(&h->free, pfn, nr) || !dm_all_zero(h->pt + pfn, nr))
        return false;
    for (uint32_t i = 0; i < nr; i++) {
        __builtin_prefetch(&h->frames[pfn + i + DM_COUNTS_AHEAD], 1);
        if (!dm_take_in(h, pfn + i))
            return false;
    }
    return true;
}

/* The gauge is a hint as well, and may lag: never below 0. */
static void expect_fewer(struct dm_homecoming *inbox, uint64_t nr) {
    uint32_t there = __atomic_load_n(&inbox->nr_frames, __ATOMIC_RELAXED), rest;
    do
        rest = there > nr ? there - (uint32_t)nr : 0;
    while (!__atomic_compare_exchange_n(&inbox->nr_frames, &there, rest, true, __ATOMIC_RELAXED,
                                        __ATOMIC_RELAXED));
}

/* Take in what the hints name. Called when there are any: dm_welcome_home. */
void dm_take_hints(struct dm_host *h) {
    struct dm_homecoming *inbox = &h->entry->homecoming;
    uint64_t before = h->entry->counters[DM_CNT_frames_came_home];
    h->hints_seen = __atomic_load_n(&inbox->nr_hints, __ATOMIC_ACQUIRE);
    for (uint32_t i = 0; i < DM_HINTS; i++) {
        uint32_t slot =
            (h->hints_seen + i) % DM_HINTS; /* the oldest first: the newest is used first */
        if (!__atomic_load_n(&inbox->hints[slot], __ATOMIC_RELAXED))
            continue;
        uint64_t hint = __atomic_exchange_n(&inbox->hints[slot], 0, __ATOMIC_ACQUIRE);
        struct dm_run run = {(uint32_t)hint, (uint32_t)(hint >> 32)};
        if (run.count == 0 || run.pfn >= h->nr_frames || run.count > h->nr_frames - run.pfn)
            continue;
        if (take_in_run(h, run.pfn, run.count))
            dm_freelist_put(&h->free, run.pfn, run.count);
        else
            dm_add_owned(h, &run, 1); /* frame by frame */
    }
    expect_fewer(inbox, h->entry->counters[DM_CNT_frames_came_home] - before);
    h->entry->nr_free = h->free.nr_free;
}

/* Look through all words, when hints were lost and that is likely to be worth it: a look costs about a nanosecond a frame, asking the
 * coordinator for a batch some 100 us. */
bool dm_search_home(struct dm_host *h) {
    uint32_t there = __atomic_load_n(&h->entry->homecoming.nr_frames, __ATOMIC_RELAXED);
    if (there < h->batch_min || there < h->nr_frames / 256)
        return false;
    dm_rescan_owned(h);
    return true;
}

/* Take in all that others have handed over. */
void dm_all_home(struct dm_host *h) {
    dm_welcome_home(h);
    if (__atomic_load_n(&h->entry->homecoming.nr_frames, __ATOMIC_RELAXED))
        dm_rescan_owned(h);
}
