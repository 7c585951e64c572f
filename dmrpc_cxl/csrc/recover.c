/*
 * recover.c - reclaiming what a dead host held, from the device's tables alone.
 *
 * The host's process is gone: its page table, its intent record and the Refs it holds change no more, but for Refs that
 * others accept at this moment (a compare-and-swap decides) and frame words that others hold too (atomics).
 *
 * The steps may be repeated after a crash of the coordinator at any instruction: each either is idempotent or leaves its
 * progress in the dead host's entry. Where one word cannot tell whether a count was dropped, it is
 * taken as dropped: a frame with a count too many is found by the scrubber, one too few would be handed out twice.
 *
 * Two may be at it: a coordinator that was stopped anywhere, replaced, and goes on, and its successor. Each asks right before
 * each store whether it was replaced, but may be stopped just behind the answer. So a count is dropped by whoever moves
 * the progress on, by compare-and-swap from what it was; and an entry is freed by compare-and-swap from the word that made it
 * the dead host's. What is stored blindly (an empty page-table entry, the end of an intent) is what the other one stores, too.
 *
 *   1. the interrupted operation (one case an intent)
 *   2. Refs the host held
 *   3. pages it mapped
 *   4. frames it owned with refcount 0 -> pool
 *
 * Context: the coordinator, one recovery of a host at a time; no host lock exists here.
 */
#include "recover.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "dm.h"

struct recovery {
    struct dm_device *dev;
    struct dm_host_entry *entry;
    struct dm_intent *intent;
    uint32_t *pt;
    uint16_t host;
    uint32_t page_shift, nr_frames;
    bool damaged;   /* the intent record makes no sense */
    bool no_memory; /* stop; the next attempt goes on from here */
    bool fenced;    /* another coordinator has taken over, and repeats all this: stop */
    struct dm_recovery *out;
};

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* ---------------------------------------------------------------- frames */

/* Asked right before each store, for this process may have been stopped for any time. A store that is made a moment too
 * late even so is one that the successor makes, too, or a count that it takes as dropped: at worst one frame is left with
 * a count too many. */
static bool fenced(struct recovery *r) { return r->fenced = r->fenced || dm_device_fenced(r->dev); }

/* -1; the frame goes to the pool when it was the last count. */
static void count_down(struct recovery *r, uint32_t pfn) {
    if (pfn >= r->nr_frames || fenced(r))
        return;
    uint64_t *at = &r->dev->frames[pfn];
    uint64_t word = __atomic_load_n(at, __ATOMIC_RELAXED), next;
    do {
        if (dm_frame_refcount(word) == 0)
            return; /* damaged; `dmrpc fabric verify` tells */
        next = dm_frame_refcount(word) == 1 ? dm_frame_pack(0, DM_OWNER_POOL, dm_frame_seq(word))
                                            : word - 1;
    } while (
        !__atomic_compare_exchange_n(at, &word, next, true, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED));
    r->out->frames_reclaimed += dm_frame_refcount(next) == 0;
    DM_CRASH_POINT(recover_counted_down);
}

/* A frame that the dead host took from its free list, or still has there: its word names the host until it is in the
 * pool, where somebody else may get it at once. To the pool. */
static void reclaim(struct recovery *r, uint32_t pfn) {
    if (pfn >= r->nr_frames || fenced(r))
        return;
    uint64_t word = __atomic_load_n(&r->dev->frames[pfn], __ATOMIC_ACQUIRE);
    if (dm_frame_refcount(word) > 1 || dm_frame_owner(word) != r->host)
        return;
    if (__atomic_compare_exchange_n(&r->dev->frames[pfn], &word,
                                    dm_frame_pack(0, DM_OWNER_POOL, dm_frame_seq(word)), false,
                                    __ATOMIC_ACQ_REL, __ATOMIC_RELAXED)) {
        r->out->frames_reclaimed++;
        DM_CRASH_POINT(recover_reclaimed);
    }
}

static uint64_t progress(const struct recovery *r) {
    return __atomic_load_n(&r->intent->progress, __ATOMIC_ACQUIRE);
}

/* Take a step. False: somebody else has, or this coordinator was replaced. */
static bool step(struct recovery *r, uint64_t *word, uint64_t from, uint64_t to) {
    if (fenced(r) ||
        !__atomic_compare_exchange_n(word, &from, to, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED))
        return false;
    DM_CRASH_POINT(recover_progress);
    return true;
}

/* ---------------------------------------------------------------- Refs */

static char *data_of(struct recovery *r) { return (char *)r->dev->data; }

static int runs_of(struct recovery *r, const struct dm_ref_entry *entry, struct dm_runs *runs) {
    dm_runs_init(runs);
    int s = dm_runs_of_entry(entry, data_of(r), r->page_shift, r->nr_frames, runs);
    if (s)
        dm_runs_free(runs);
    if (s == DM_ERR_NO_MEMORY)
        r->no_memory = true;
    else if (s)
        r->out->refs_damaged++;
    return s;
}

static void free_overflow(struct recovery *r, struct dm_ref_entry *entry) {
    /* Bounded: a damaged chain may run in a circle. */
    for (uint32_t i = 0; i < r->nr_frames && entry->overflow && entry->overflow <= r->nr_frames;
         i++) {
        uint32_t pfn = entry->overflow - 1;
        const struct dm_ref_overflow *o =
            (const struct dm_ref_overflow *)(data_of(r) + ((uint64_t)pfn << r->page_shift));
        uint32_t link = pfn + 1;
        if (fenced(r) || !__atomic_compare_exchange_n(&entry->overflow, &link, o->next, false,
                                                      __ATOMIC_RELEASE, __ATOMIC_RELAXED))
            return;
        DM_CRASH_POINT(recover_unlinked);
        /* Linked before it was counted: a frame still on the dead host's free list has no count to drop. */
        if (dm_frame_refcount(__atomic_load_n(&r->dev->frames[pfn], __ATOMIC_ACQUIRE)))
            count_down(r, pfn);
    }
}

/* From the word that says whose it is: a successor may have done it, and somebody may use the entry again. */
static void make_free(struct dm_ref_entry *entry, uint64_t word) {
    if (__atomic_compare_exchange_n(&entry->state, &word,
                                    dm_ref_pack(DM_REF_FREE, 0, 0, dm_ref_gen(word) + 1), false,
                                    __ATOMIC_RELEASE, __ATOMIC_RELAXED))
        DM_CRASH_POINT(recover_ref_freed);
}

static uint64_t dropping(uint32_t index, uint64_t done) {
    return (uint64_t)(index + 1) << 32 | done;
}

static uint64_t now_dropping(const struct recovery *r) {
    return __atomic_load_n(&r->entry->dropping, __ATOMIC_ACQUIRE);
}

/* No Ref is being dropped any more. After the one that was: until then a repetition goes on with it. */
static void end_drop(struct recovery *r) {
    uint64_t word = now_dropping(r);
    if (word && !fenced(r) && !r->no_memory &&
        __atomic_compare_exchange_n(&r->entry->dropping, &word, 0, false, __ATOMIC_ACQ_REL,
                                    __ATOMIC_RELAXED))
        DM_CRASH_POINT(recover_drop_ended);
}

static void finish_drop(struct recovery *r, uint32_t index, uint64_t done);

/* Go on with what somebody has begun: who died of it, or was replaced and made one store too many. */
static void finish_begun_drop(struct recovery *r) {
    uint64_t begun = now_dropping(r);
    if (begun && begun >> 32 <= r->dev->geo.max_refs)
        finish_drop(r, (uint32_t)(begun >> 32) - 1, 0);
    end_drop(r);
}

/* Write down that this Ref is being dropped, from page `done` on. False: this coordinator was replaced. */
static bool begin_drop(struct recovery *r, uint32_t index, uint64_t done) {
    while (!fenced(r) && !r->no_memory) {
        uint64_t word = now_dropping(r);
        if (word >> 32 == (uint64_t)index + 1)
            return true;
        if (word) {
            finish_begun_drop(r);
        } else if (__atomic_compare_exchange_n(&r->entry->dropping, &word, dropping(index, done),
                                               false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED)) {
            DM_CRASH_POINT(recover_drop_begun);
            return true;
        }
    }
    return false;
}

/* Drop the counts of a Ref from page `done` on. DM_OK; DM_ERR_CORRUPT; otherwise there is no going on now. */
static int drop_counts(struct recovery *r, uint32_t index, uint64_t done) {
    struct dm_runs runs;
    int s = runs_of(r, &r->dev->refs[index], &runs);
    if (s)
        return s;
    if (!begin_drop(r, index, done))
        s = r->no_memory ? DM_ERR_NO_MEMORY : DM_ERR_REPLACED;
    uint64_t at = 0;
    for (uint32_t i = 0; !s && i < runs.nr; i++)
        for (uint32_t k = 0; k < runs.list[i].count; k++, at++)
            if (now_dropping(r) == dropping(index, at) &&
                step(r, &r->entry->dropping, dropping(index, at), dropping(index, at + 1)) &&
                runs.list[i].pfn != DM_NO_FRAME)
                count_down(r, runs.list[i].pfn + k);
    dm_runs_free(&runs);
    return s;
}

/* Drop the counts of a Ref in state DROPPING that the dead host holds, from page `done` on, and free it. */
static void finish_drop(struct recovery *r, uint32_t index, uint64_t done) {
    struct dm_ref_entry *entry = &r->dev->refs[index];
    uint64_t word = __atomic_load_n(&entry->state, __ATOMIC_ACQUIRE), begun = now_dropping(r);
    if (dm_ref_state(word) != DM_REF_DROPPING || dm_ref_holder(word) != r->host)
        return;
    if (begun >> 32 == (uint64_t)index + 1)
        done = (uint32_t)begun;
    int s = done < entry->nr_pages ? drop_counts(r, index, done) : DM_OK;
    if (s == DM_ERR_CORRUPT &&
        !fenced(r)) /* nobody's: a later host of this id must not be taken for its holder */
        (void)__atomic_compare_exchange_n(&entry->state, &word,
                                          dm_ref_pack(DM_REF_DROPPING, 0, 0, dm_ref_gen(word)),
                                          false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED);
    if (s || fenced(r))
        return;
    /* From here on the list of runs may be incomplete, and is not needed: the word says so. */
    free_overflow(r, entry);
    make_free(entry, word);
    r->out->refs_dropped++;
}

static void drop(struct recovery *r, uint32_t index, uint64_t done) {
    finish_drop(r, index, done);
    end_drop(r);
}

static void drop_held_refs(struct recovery *r) {
    finish_begun_drop(r);
    for (uint32_t i = 0; i < r->dev->geo.max_refs && !r->no_memory && !fenced(r); i++) {
        struct dm_ref_entry *entry = &r->dev->refs[i];
        uint64_t word = __atomic_load_n(&entry->state, __ATOMIC_ACQUIRE);
        if (dm_ref_holder(word) != r->host)
            continue;
        switch (dm_ref_state(word)) {
        case DM_REF_BUILDING:
            free_overflow(r, entry);
            make_free(entry, word);
            break;
        case DM_REF_LIVE:
        case DM_REF_MAPPING:
        case DM_REF_CLONING:
            /* A live one may be accepted by somebody at this moment: then it is theirs. */
            if (__atomic_compare_exchange_n(
                    &entry->state, &word,
                    dm_ref_pack(DM_REF_DROPPING, 0, r->host, dm_ref_gen(word)), false,
                    __ATOMIC_ACQ_REL, __ATOMIC_RELAXED)) {
                DM_CRASH_POINT(recover_claimed);
                drop(r, i, 0);
            }
            break;
        case DM_REF_DROPPING:
            /* Claimed, and the intent not written yet: no count was dropped. */
            if (!r->damaged)
                drop(r, i, 0);
            break;
        default:
            break;
        }
    }
}

/* ---------------------------------------------------------------- the interrupted operation */

static bool ref_untouched(struct recovery *r) {
    return __atomic_load_n(&r->dev->refs[r->intent->ref].state, __ATOMIC_ACQUIRE) ==
           r->intent->ref_state;
}

static void clear_ptes(struct recovery *r) {
    for (uint64_t i = 0; i < r->intent->nr && !fenced(r); i++) {
        __atomic_store_n(&r->pt[r->intent->page + i], 0, __ATOMIC_RELEASE);
        DM_CRASH_POINT(recover_pte_undone);
    }
}

/* Counts that were taken for a Ref which never became live: the first `progress` of the mapping's pages. */
static void undo_share(struct recovery *r) {
    for (uint64_t left; (left = progress(r)) > 0 && !fenced(r);) {
        uint32_t pte = r->pt[r->intent->page + left - 1];
        if (step(r, &r->intent->progress, left, left - 1) && pte & DM_PTE_PRESENT)
            count_down(r, pte & DM_PTE_PFN);
    }
}

static void undo_clone(struct recovery *r) {
    struct dm_runs runs;
    if (runs_of(r, &r->dev->refs[r->intent->ref], &runs))
        return;
    uint64_t at = r->dev->refs[r->intent->ref].nr_pages;
    for (uint32_t i = runs.nr; i-- > 0;)
        for (uint32_t k = runs.list[i].count; k-- > 0;) {
            if (--at < progress(r) && step(r, &r->intent->progress, at + 1, at) &&
                runs.list[i].pfn != DM_NO_FRAME)
                count_down(r, runs.list[i].pfn + k);
        }
    dm_runs_free(&runs);
}

/* New frames that no PTE shows yet go back; a page that does show its new frame has left the old one behind. */
static void settle_new_frames(struct recovery *r, bool copied) {
    const struct dm_intent *in = r->intent;
    for (uint64_t i = 0; i < in->nr; i++) {
        uint32_t pfn = in->pfn + (uint32_t)i, pte = r->pt[in->page + i];
        bool shown = pte & DM_PTE_PRESENT && (pte & DM_PTE_PFN) == pfn;
        if (!shown)
            reclaim(r, pfn);
        else if (copied && i == progress(r) && step(r, &r->intent->progress, i, i + 1))
            /* Repointed, and the count of the old frame certainly not dropped: that comes after progress. */
            count_down(r, (uint32_t)in->old);
    }
}

/* An exclusive run that the host was freeing: each frame is in use by it alone, or free and its own already. The words do not
 * tell a frame that was reclaimed before, by a recovery that was interrupted: progress does. */
static void finish_free(struct recovery *r) {
    for (uint64_t i; (i = progress(r)) < r->intent->nr && !fenced(r);) {
        uint32_t pfn = r->intent->pfn + (uint32_t)i;
        if (pfn >= r->nr_frames)
            return;
        if (!step(r, &r->intent->progress, i, i + 1))
            continue;
        if (dm_frame_refcount(__atomic_load_n(&r->dev->frames[pfn], __ATOMIC_ACQUIRE)) == 1)
            count_down(r, pfn);
        else
            reclaim(r, pfn);
    }
}

/* Free frames that the host was handing to another: what was stored is that one's, which is told, unless it is gone, too. */
static void take_back(struct recovery *r) {
    const struct dm_intent *in = r->intent;
    if (in->page == DM_OWNER_POOL || in->page > r->dev->geo.max_hosts || in->pfn >= r->nr_frames ||
        in->nr > r->nr_frames - in->pfn)
        return;
    struct dm_host_entry *home = &r->dev->hosts[in->page - 1];
    for (uint64_t i = 0; i < in->nr; i++) {
        uint32_t pfn = in->pfn + (uint32_t)i;
        if (fenced(r))
            return;
        if (__atomic_load_n(&home->state, __ATOMIC_ACQUIRE) == DM_HOST_ACTIVE) {
            dm_leave_hint(home, in->pfn, (uint32_t)in->nr);
            DM_CRASH_POINT(recover_told_home);
            return;
        }
        uint64_t word = __atomic_load_n(&r->dev->frames[pfn], __ATOMIC_ACQUIRE);
        if (dm_frame_refcount(word) == 0 && dm_frame_owner(word) == in->page &&
            dm_frame_coming(word) &&
            __atomic_compare_exchange_n(&r->dev->frames[pfn], &word,
                                        dm_frame_pack(0, DM_OWNER_POOL, dm_frame_seq(word)), false,
                                        __ATOMIC_ACQ_REL, __ATOMIC_RELAXED)) {
            r->out->frames_reclaimed++;
            DM_CRASH_POINT(recover_reclaimed);
        }
    }
}

static bool intent_makes_sense(const struct recovery *r) {
    const struct dm_intent *in = r->intent;
    uint64_t pages = r->dev->geo.ptes_per_host;
    return in->op <= DM_INTENT_HOME && in->ref < r->dev->geo.max_refs && in->page <= pages &&
           in->nr <= pages - in->page && in->progress <= in->nr + 1;
}

static void settle_intent(struct recovery *r) {
    struct dm_intent *in = r->intent;
    if (__atomic_load_n(&in->op, __ATOMIC_ACQUIRE) == DM_INTENT_NONE)
        return; /* the other fields may be half written */
    if (!intent_makes_sense(r)) {
        r->out->refs_damaged++;
        r->damaged = true;
        return;
    }
    struct dm_ref_entry *entry = &r->dev->refs[in->ref];
    switch ((enum dm_intent_op)__atomic_load_n(&in->op, __ATOMIC_ACQUIRE)) {
    case DM_INTENT_ALLOC:
        clear_ptes(r);
        for (uint64_t i = 0; i < in->nr; i++)
            reclaim(r, in->pfn + (uint32_t)i);
        break;
    case DM_INTENT_FREE_X:
        clear_ptes(r);
        finish_free(r);
        break;
    case DM_INTENT_SHARE:
        if (ref_untouched(r))
            undo_share(r);
        break;
    case DM_INTENT_CLONE:
        if (ref_untouched(r))
            undo_clone(r);
        break;
    case DM_INTENT_MOVE:
        if (!ref_untouched(r)) /* the Ref went live: the counts are its own */
            clear_ptes(r);
        break;
    case DM_INTENT_MAP:
        if (in->progress == 0) {
            clear_ptes(r); /* the counts are still the Ref's, which step 2 drops */
        } else if (ref_untouched(r)) {
            free_overflow(r, entry); /* the counts are the mapping's, which step 3 drops */
            make_free(entry, in->ref_state);
        }
        break;
    case DM_INTENT_DROP:
        finish_drop(r, in->ref, in->progress);
        break;
    case DM_INTENT_COW:
        settle_new_frames(r, true);
        break;
    case DM_INTENT_FILL:
        settle_new_frames(r, false);
        break;
    case DM_INTENT_HOME:
        take_back(r);
        break;
    case DM_INTENT_NONE:
    case DM_INTENT_RETURN:
        break;
    }
    if (!r->no_memory && !fenced(r)) {
        __atomic_store_n(&in->op, DM_INTENT_NONE, __ATOMIC_RELEASE);
        DM_CRASH_POINT(recover_op_settled);
    }
    end_drop(r);
}

/* ---------------------------------------------------------------- pages and frames */

static void unmap_pages(struct recovery *r) {
    uint64_t n = r->dev->geo.ptes_per_host;
    for (uint64_t i = 0; i < n; i++) {
        if (!r->pt[i])
            continue;
        if (fenced(r))
            return;
        /* Two that recover the same host, one of them a moment too late: the entry is one's alone. */
        uint32_t pte = __atomic_exchange_n(&r->pt[i], 0, __ATOMIC_ACQ_REL);
        DM_CRASH_POINT(recover_pte_cleared);
        if (pte & DM_PTE_PRESENT) {
            count_down(r, pte & DM_PTE_PFN);
            r->out->pages_unmapped++;
        }
    }
}

static void take_free_frames(struct recovery *r) {
    /* Pairs with the one in home.c: whoever still found the host ACTIVE stored its words before we look at them. */
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    for (uint32_t pfn = 0; pfn < r->nr_frames; pfn++) {
        uint64_t word = __atomic_load_n(&r->dev->frames[pfn], __ATOMIC_RELAXED);
        if (dm_frame_refcount(word) == 0 && dm_frame_owner(word) == r->host)
            reclaim(r, pfn);
    }
}

int dm_recover_host(struct dm_device *dev, uint32_t host, struct dm_recovery *out,
                    struct dm_error *e) {
    uint64_t start = now_ns();
    memset(out, 0, sizeof *out);
    if (host == 0 || host > dev->geo.max_hosts)
        return dm_fail(e, DM_ERR_BAD_SIZE, "host %u: the device has hosts 1 to %u", host,
                       dev->geo.max_hosts);
    struct recovery r = {.dev = dev,
                         .entry = &dev->hosts[host - 1],
                         .intent = &dev->hosts[host - 1].intent,
                         .pt = dm_device_ptes(dev, host),
                         .host = (uint16_t)host,
                         .page_shift = (uint32_t)__builtin_ctz(dev->geo.page_size),
                         .nr_frames = (uint32_t)dev->geo.nr_frames,
                         .out = out};
    if (__atomic_load_n(&r.entry->state, __ATOMIC_ACQUIRE) == DM_HOST_FREE)
        return DM_OK;
    out->intent = r.intent->op;
    if (out->intent !=
        DM_INTENT_NONE) /* for `dmrpc fsck`: since which operation something is wrong */
        __atomic_store_n(&r.intent->died_in, out->intent, __ATOMIC_RELAXED);
    DM_CRASH_POINT(recover_begun);
    settle_intent(&r);
    DM_CRASH_POINT(recover_intent_done);
    if (!r.no_memory && !r.fenced)
        drop_held_refs(&r);
    DM_CRASH_POINT(recover_refs_done);
    if (r.no_memory)
        return dm_fail(e, DM_ERR_NO_MEMORY, "no memory to recover host %u", host);
    unmap_pages(&r);
    DM_CRASH_POINT(recover_pages_done);
    take_free_frames(&r);
    DM_CRASH_POINT(recover_ended);
    if (fenced(&r))
        return dm_fail(e, DM_ERR_REPLACED,
                       "another coordinator has taken over, and recovers host %u", host);
    r.entry->nr_free = r.entry->nr_reserved = 0;
    out->duration_ns = now_ns() - start;
    return DM_OK;
}
