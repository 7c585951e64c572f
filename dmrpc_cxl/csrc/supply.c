/*
 * supply.c - frames from and to the coordinator.
 *
 * The truth about ownership is in the frame words: a grant has changed them before the answer is sent, a return before
 * the message is. A lost message therefore loses nothing: after a reconnection the host looks for words that
 * name it (dm_rescan_owned), and a restarted coordinator reads the pool from the words.
 *
 * Batches double while a host keeps asking and the amount it may sit on doubles while it keeps returning, so that
 * frames that travel from one host to another cost few round trips at any speed.
 *
 * Context: called with the host lock held; it is dropped while the coordinator is asked and taken again.
 */
#include <string.h>

#include "host.h"

/* Free frames that are not promised to a mapping. */
uint32_t dm_unpromised(const struct dm_host *h) {
    return h->free.nr_free > h->nr_reserved ? h->free.nr_free - h->nr_reserved : 0;
}

static int request(struct dm_host *h, struct dm_link *l, uint16_t type, const void *payload,
                   uint32_t length, void *reply, uint32_t reply_max, uint32_t *reply_length,
                   struct dm_error *e) {
    dm_exit(h);
    pthread_mutex_unlock(&h->lock);
    bool shared = l == &h->link;
    if (shared)
        pthread_mutex_lock(&h->link_lock);
    int s = dm_link_request(l, h, type, payload, length, reply, reply_max, reply_length,
                            dm_now_ns() + h->deadline_ns, e);
    if (shared)
        pthread_mutex_unlock(&h->link_lock);
    pthread_mutex_lock(&h->lock);
    dm_enter(h);
    DM_COUNT(h, coordinator_round_trips, 1);
    return s;
}

/* Add runs that somebody says are this host's now: only frames whose word agrees and that are not listed yet. */
void dm_add_owned(struct dm_host *h, const struct dm_run *runs, uint32_t nr_runs) {
    const uint64_t *came = &h->entry->counters[DM_CNT_frames_came_home], before = *came;
    const uint32_t nr_free = h->free.nr_free;
    for (uint32_t r = 0; r < nr_runs; r++) {
        if (runs[r].count == 0 || runs[r].pfn >= h->nr_frames ||
            runs[r].count > h->nr_frames - runs[r].pfn)
            continue;
        uint32_t start = 0;
        for (uint32_t i = 0; i <= runs[r].count; i++) {
            uint32_t pfn = runs[r].pfn + i;
            bool ours = false;
            if (i < runs[r].count && !dm_freelist_has(&h->free, pfn) && dm_take_in(h, pfn)) {
                ours = h->pt[pfn] == 0;
                if (!ours)
                    dm_freelist_put_displaced(&h->free, pfn);
            }
            if (ours)
                continue;
            if (i > start) {
                dm_freelist_put_cold(&h->free, runs[r].pfn + start, i - start);
            }
            start = i + 1;
        }
    }
    h->entry->nr_free = h->free.nr_free;
    DM_COUNT(h, frames_granted, h->free.nr_free - nr_free - (*came - before));
}

/* Frames that were granted in an answer that never arrived, or handed over by other hosts. */
void dm_rescan_owned(struct dm_host *h) {
    struct dm_run all = {0, h->nr_frames};
    __atomic_store_n(&h->entry->homecoming.nr_frames, 0,
                     __ATOMIC_RELAXED); /* all that came is found */
    dm_add_owned(h, &all, 1);
}

int dm_refill(struct dm_host *h, struct dm_link *l, uint32_t need, uint32_t min_run,
              struct dm_error *e) {
    struct dm_run runs[DM_WIRE_MAX_RUNS];
    uint32_t length = 0, free_before = h->free.nr_free;
    struct dm_msg_grant grant = {.want = need > h->batch ? need : h->batch, .min_run = min_run};
    int s;
    if (dm_search_home(h) && h->free.nr_free >= free_before + need)
        return DM_OK;
    DM_CRASH_POINT(grant_wanted);
    do {
        s = request(h, l, DM_MSG_GRANT, &grant, sizeof grant, runs, sizeof runs, &length, e);
        if (h->closed)
            return dm_fail(e, DM_ERR_CLOSED, "host detached while it waited for frames");
        if (l->reopened) { /* an answer may have been lost with the connection before */
            l->reopened = false;
            dm_rescan_owned(h);
        }
        if (s == DM_AGAIN_LOOK && h->free.nr_free >= free_before + need)
            return DM_OK; /* it was: not granted twice */
    } while (s == DM_AGAIN_LOOK);
    if (s == DM_OK) {
        DM_CRASH_POINT(grant_received);
        dm_add_owned(h, runs, length / sizeof runs[0]);
    } else if (s == DM_ERR_COORDINATOR_REFUSED &&
               (e->wire_status == DM_WIRE_NO_FRAMES || e->wire_status == DM_WIRE_QUOTA)) {
        dm_rescan_owned(h); /* the last resort: what was handed over without a hint */
        if (h->free.nr_free > free_before)
            return DM_OK;
        DM_COUNT(h, out_of_frames, 1);
        return DM_ERR_OUT_OF_FRAMES;
    } else {
        return s;
    }
    if (h->free.nr_free == free_before)
        return dm_fail(e, DM_ERR_OUT_OF_FRAMES, "the coordinator granted no frame");
    if (h->batch < h->batch_max)
        h->batch = h->batch * 2 < h->batch_max ? h->batch * 2 : h->batch_max;
    if (h->high < 2 * h->batch)
        h->high = 2 * h->batch;
    return DM_OK;
}

/* Give free frames back until keep are left. Their words say so before the coordinator hears of it. */
int dm_give_back(struct dm_host *h, struct dm_link *l, uint32_t keep, struct dm_error *e) {
    enum { MAX_RUNS = 2048 };
    struct dm_run runs[MAX_RUNS];
    dm_welcome_home(h);
    if (keep < h->nr_reserved)
        keep = h->nr_reserved;
    while (h->free.nr_free > keep) {
        uint32_t nr_runs = 0, given = 0;
        while (nr_runs < MAX_RUNS && h->free.nr_free > keep) {
            struct dm_run *r = &runs[nr_runs];
            r->count = dm_freelist_evict(&h->free, h->free.nr_free - keep, &r->pfn);
            if (!r->count)
                break;
            for (uint32_t i = 0; i < r->count; i++) {
                /* Ours and unused: nobody else changes the word. Release: our use of it is over. */
                uint64_t *word = &h->frames[r->pfn + i];
                __atomic_store_n(word, dm_frame_pack(0, DM_OWNER_POOL, dm_frame_seq(*word)),
                                 __ATOMIC_RELEASE);
                DM_CRASH_POINT(return_worded);
            }
            given += r->count;
            nr_runs++;
        }
        if (!nr_runs)
            break;
        DM_COUNT(h, frames_returned, given);
        h->entry->nr_free = h->free.nr_free;
        DM_CRASH_POINT(return_untold);
        int s = request(h, l, DM_MSG_RETURN, runs, nr_runs * (uint32_t)sizeof runs[0], NULL, 0,
                        NULL, e);
        DM_CRASH_POINT(return_told);
        if (s)
            return s;
        if (h->closed)
            return DM_OK;
    }
    return DM_OK;
}

/* Tell the coordinator, which asked for frames, that there are none to be had here. */
int dm_give_back_none(struct dm_host *h, struct dm_link *l, struct dm_error *e) {
    return request(h, l, DM_MSG_RETURN, NULL, 0, NULL, 0, NULL, e);
}

/* Take a run of exactly nr frames, asking the coordinator when short. */
int dm_take_run(struct dm_host *h, uint32_t nr, bool may_block, uint32_t *pfn, struct dm_error *e) {
    bool defragmented = false;
    uint64_t give_up = 0;
    for (;;) {
        dm_welcome_home(h);
        if (dm_unpromised(h) >= nr && dm_freelist_take(&h->free, nr, pfn)) {
            h->entry->nr_free = h->free.nr_free;
            return DM_OK;
        }
        if (nr > h->nr_frames)
            return dm_fail(e, DM_ERR_OUT_OF_FRAMES, "%u frames asked for, the device has %u", nr,
                           h->nr_frames);
        if (!may_block)
            return DM_AGAIN_BLOCKING;
        if (!give_up)
            give_up = dm_now_ns() + h->deadline_ns;
        else if (dm_now_ns() > give_up)
            return dm_fail(e, DM_ERR_OUT_OF_FRAMES,
                           "no run of %u frames before the deadline: other threads took what came",
                           nr);
        int s = dm_refill(h, &h->link, nr, nr, e);
        if (s == DM_ERR_OUT_OF_FRAMES && !defragmented && dm_unpromised(h) > 0) {
            /* Our fragments and the pool's may make one run together. */
            defragmented = true;
            s = dm_give_back(h, &h->link, 0, e);
        }
        if (s)
            return s;
    }
}

/* Take one frame, wherever its window page is: for overflow frames, which are not mapped. */
int dm_take_one(struct dm_host *h, bool may_block, uint32_t *pfn, struct dm_error *e) {
    struct dm_run run;
    while (!dm_take_upto(h, 1, 0, &run)) {
        if (!may_block)
            return DM_AGAIN_BLOCKING;
        int s = dm_refill(h, &h->link, 1, 1, e);
        if (s)
            return s;
    }
    *pfn = run.pfn;
    return DM_OK;
}

/* Take up to nr consecutive frames for copy-on-write or holes without asking anybody; `reserved` of the host's
 * promised frames belong to the caller. Returns the number taken, 0 when there are none. */
int dm_take_upto(struct dm_host *h, uint32_t nr, uint32_t reserved, struct dm_run *run) {
    dm_welcome_home(h);
    uint32_t may = dm_unpromised(h) + (reserved < h->nr_reserved ? reserved : h->nr_reserved);
    if (may > h->free.nr_free)
        may = h->free.nr_free;
    if (nr > may)
        nr = may;
    run->count = nr ? dm_freelist_take_upto(&h->free, nr, &run->pfn) : 0;
    h->entry->nr_free = h->free.nr_free;
    return (int)run->count;
}
