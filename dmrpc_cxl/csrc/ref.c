/*
 * ref.c - the Ref table: entries, their state word, the form on the wire, accept, clone and drop.
 *
 * The state word decides everything: whoever moves it by compare-and-swap from the exact word it read has the Ref.
 * Its generation grows when a Ref is accepted by another holder, or anew, and when the entry becomes free, so bytes
 * that were passed on or used are recognised as stale for ever (32 bits of them).
 *
 *     FREE g -> BUILDING g -> LIVE g --map--> MAPPING g -> FREE g+1
 *                               |  \--drop--> DROPPING g -> FREE g+1
 *                               |  \--clone-> CLONING g -> LIVE g (not exclusive)
 *                               \--accept---> LIVE g+1, another holder
 *
 * Context: host lock held.
 */
#include <sched.h>
#include <stdlib.h>
#include <string.h>

#include "dm.h"
#include "intent.h"

/* ---------------------------------------------------------------- lists of runs */

void dm_runs_init(struct dm_runs *r) {
    r->list = r->small;
    r->nr = 0;
    r->max = sizeof r->small / sizeof r->small[0];
}

int dm_runs_add(struct dm_runs *r, uint32_t pfn, uint32_t count) {
    if (r->nr == r->max) {
        struct dm_run *bigger = malloc(2 * r->max * sizeof *bigger);
        if (!bigger)
            return DM_ERR_NO_MEMORY;
        memcpy(bigger, r->list, r->nr * sizeof *bigger);
        dm_runs_free(r);
        r->list = bigger;
        r->max *= 2;
    }
    r->list[r->nr++] = (struct dm_run){pfn, count};
    return DM_OK;
}

void dm_runs_free(struct dm_runs *r) {
    if (r->list != r->small)
        free(r->list);
    r->list = r->small;
}

static uint32_t runs_per_overflow(uint32_t page_shift) {
    return (uint32_t)((((size_t)1 << page_shift) - sizeof(struct dm_ref_overflow)) /
                      sizeof(struct dm_run));
}

/* Copy an entry's runs out, checking them: the device is shared, and a damaged entry must not lead outside it. */
int dm_runs_of_entry(const struct dm_ref_entry *entry, const char *physmap, uint32_t page_shift,
                     uint32_t nr_frames, struct dm_runs *r) {
    uint32_t left = entry->nr_runs,
             inline_runs = left < DM_REF_INLINE_RUNS ? left : DM_REF_INLINE_RUNS;
    uint64_t pages = 0;
    for (uint32_t i = 0; i < inline_runs; i++) {
        pages += entry->runs[i].count;
        if (dm_runs_add(r, entry->runs[i].pfn, entry->runs[i].count))
            return DM_ERR_NO_MEMORY;
    }
    left -= inline_runs;
    for (uint32_t link = entry->overflow; left;) {
        if (link == 0 || link > nr_frames)
            return DM_ERR_CORRUPT;
        const struct dm_ref_overflow *o =
            (const struct dm_ref_overflow *)(physmap + ((uint64_t)(link - 1) << page_shift));
        uint32_t n = o->nr_runs;
        if (n == 0 || n > left || n > runs_per_overflow(page_shift))
            return DM_ERR_CORRUPT;
        for (uint32_t i = 0; i < n; i++) {
            pages += o->runs[i].count;
            if (dm_runs_add(r, o->runs[i].pfn, o->runs[i].count))
                return DM_ERR_NO_MEMORY;
        }
        left -= n;
        link = o->next;
    }
    for (uint32_t i = 0; i < r->nr; i++)
        if (r->list[i].count == 0 ||
            (r->list[i].pfn != DM_NO_FRAME &&
             (r->list[i].pfn >= nr_frames || r->list[i].count > nr_frames - r->list[i].pfn)))
            return DM_ERR_CORRUPT;
    return pages == entry->nr_pages ? DM_OK : DM_ERR_CORRUPT;
}

/* ---------------------------------------------------------------- the wire form */

static uint32_t wire_checksum(const struct dm_ref_wire *w) {
    struct dm_ref_wire copy = *w;
    copy.check = 0;
    const unsigned char *p = (const unsigned char *)&copy;
    uint64_t hash = 0xcbf29ce484222325ull, word;
    for (size_t i = 0; i < sizeof copy; i += 8) {
        memcpy(&word, p + i, 8);
        hash = (hash ^ word) * 0x9e3779b97f4a7c15ull;
        hash ^= hash >> 29;
    }
    return (uint32_t)(hash ^ hash >> 32);
}

int dm_ref_wire_check(const struct dm_ref_wire *w, uint64_t fabric_id, struct dm_error *e) {
    if (w->magic != DM_REF_MAGIC || w->reserved != 0 || w->check != wire_checksum(w))
        return dm_fail(e, DM_ERR_BAD_REF, "these bytes are not a Ref, or were damaged on the way");
    if (w->fabric_id != fabric_id)
        return dm_fail(e, DM_ERR_BAD_REF,
                       "a Ref of another fabric (%016llx, this host is on %016llx)",
                       (unsigned long long)w->fabric_id, (unsigned long long)fabric_id);
    return DM_OK;
}

static int consumed(struct dm_error *e) {
    return dm_fail(e, DM_ERR_REF_CONSUMED,
                   "this Ref was mapped, dropped, or accepted by another holder before");
}

/* Find the live entry that w names. *word is the state to compare-and-swap from. */
int dm_ref_check(struct dm_host *h, const struct dm_ref_wire *w, uint32_t *index, uint64_t *word,
                 struct dm_error *e) {
    int s = dm_ref_wire_check(w, h->fabric_id, e);
    if (s)
        return s;
    if (w->entry >= h->max_refs)
        return dm_fail(e, DM_ERR_BAD_REF, "a forged Ref: the device has no entry %u", w->entry);
    const struct dm_ref_entry *entry = &h->refs[w->entry];
    dm_charge_ref(h, w->entry);
    *word = __atomic_load_n(&entry->state, __ATOMIC_ACQUIRE);
    if (dm_ref_gen(*word) != w->generation)
        return consumed(e);
    bool fits = __atomic_load_n(&entry->nonce, __ATOMIC_RELAXED) == w->nonce &&
                __atomic_load_n(&entry->length, __ATOMIC_RELAXED) == w->length;
    if (!fits) {
        /* As in a seqlock: the entry may have been used up and filled in anew since its state was read. */
        __atomic_thread_fence(__ATOMIC_ACQUIRE);
        if (__atomic_load_n(&entry->state, __ATOMIC_RELAXED) != *word)
            return consumed(e);
        return dm_fail(e, DM_ERR_BAD_REF, "a forged Ref: its nonce or length is wrong");
    }
    if (dm_ref_state(*word) == DM_REF_CLONING)
        return DM_REF_BUSY;
    if (dm_ref_state(*word) != DM_REF_LIVE)
        return consumed(e);
    *index = w->entry;
    return DM_OK;
}

static int claim(struct dm_host *h, uint32_t index, uint64_t *word, uint8_t state,
                 struct dm_error *e) {
    uint64_t mine = dm_ref_pack(state, dm_ref_flags(*word), h->id, dm_ref_gen(*word));
    /* Acquire: what the holder wrote in the entry and its frames is visible once the claim succeeds. */
    if (!__atomic_compare_exchange_n(&h->refs[index].state, word, mine, false, __ATOMIC_ACQ_REL,
                                     __ATOMIC_ACQUIRE)) {
        if (dm_ref_state(*word) == DM_REF_CLONING)
            return DM_REF_BUSY;
        return dm_fail(e, DM_ERR_REF_CONSUMED, "another holder took this Ref at this moment");
    }
    *word = mine;
    return DM_OK;
}

/* ---------------------------------------------------------------- entries */

/* SipHash-1-3 of a counter under a key drawn at attach: unguessable without a system call per Ref. */
static uint64_t next_nonce(struct dm_host *h) {
    uint64_t k0 = h->nonce_key[0], k1 = h->nonce_key[1], m = ++h->nonce_counter;
    uint64_t v0 = k0 ^ 0x736f6d6570736575ull, v1 = k1 ^ 0x646f72616e646f6dull,
             v2 = k0 ^ 0x6c7967656e657261ull, v3 = k1 ^ 0x7465646279746573ull;
#define ROTL(x, b) ((x) << (b) | (x) >> (64 - (b)))
#define ROUND                                                                                      \
    do {                                                                                           \
        v0 += v1, v1 = ROTL(v1, 13), v1 ^= v0, v0 = ROTL(v0, 32);                                  \
        v2 += v3, v3 = ROTL(v3, 16), v3 ^= v2;                                                     \
        v0 += v3, v3 = ROTL(v3, 21), v3 ^= v0;                                                     \
        v2 += v1, v1 = ROTL(v1, 17), v1 ^= v2, v2 = ROTL(v2, 32);                                  \
    } while (0)
    v3 ^= m;
    ROUND;
    v0 ^= m;
    v2 ^= 0xff;
    ROUND;
    ROUND;
    ROUND;
#undef ROUND
#undef ROTL
    return v0 ^ v1 ^ v2 ^ v3;
}

static bool try_slot(struct dm_host *h, uint32_t index) {
    uint64_t word = __atomic_load_n(&h->refs[index].state, __ATOMIC_RELAXED);
    if (dm_ref_state(word) != DM_REF_FREE)
        return false;
    uint64_t mine = dm_ref_pack(DM_REF_BUILDING, 0, h->id, dm_ref_gen(word));
    /* Acquire pairs with the release that freed the entry: its last user is done with the fields. */
    return __atomic_compare_exchange_n(&h->refs[index].state, &word, mine, false, __ATOMIC_ACQUIRE,
                                       __ATOMIC_RELAXED);
}

/*
 * Take a free entry. Refs in flight are used up in about the order they were made: the oldest entry this host took lately
 * is probably free again, and its cache lines and page-table entry are warm. Otherwise go round the table; the new
 * entry takes the place of one that lives long.
 */
int dm_ref_slot(struct dm_host *h, uint32_t *index, struct dm_error *e) {
    for (unsigned i = 0; i < 4; i++) {
        uint32_t at = (h->ref_ring_at + i) % DM_REF_RING;
        if (try_slot(h, h->ref_ring[at])) {
            *index = h->ref_ring[at];
            h->ref_ring_at = (at + 1) % DM_REF_RING;
            goto found;
        }
    }
    for (uint32_t i = 0; i < h->max_refs; i++) {
        uint32_t at =
            h->ref_cursor + i < h->max_refs ? h->ref_cursor + i : h->ref_cursor + i - h->max_refs;
        if (try_slot(h, at)) {
            *index = at;
            h->ref_cursor = at + 1 < h->max_refs ? at + 1 : 0;
            h->ref_ring[h->ref_ring_at] = at;
            h->ref_ring_at = (h->ref_ring_at + 1) % DM_REF_RING;
            goto found;
        }
    }
    return dm_fail(
        e, DM_ERR_NO_REF_SLOT,
        "all %u entries of the Ref table are in use; drop Refs, or create the fabric with "
        "more (max_refs)",
        h->max_refs);
found:;
    DM_CRASH_POINT(slot_taken);
    struct dm_ref_entry *entry = &h->refs[*index];
    entry->nr_runs = 0;
    entry->nr_pages = 0;
    entry->nr_overflow = 0;
    entry->creator = h->id;
    return DM_OK;
}

/* Free the entry for good: the next generation. Release: its fields are no longer ours. */
uint64_t dm_ref_make_free(struct dm_host *h, uint32_t index) {
    uint64_t word = __atomic_load_n(&h->refs[index].state, __ATOMIC_RELAXED);
    uint64_t next = dm_ref_pack(DM_REF_FREE, 0, 0, dm_ref_gen(word) + 1);
    __atomic_store_n(&h->refs[index].state, next, __ATOMIC_RELEASE);
    DM_CRASH_POINT(ref_freed);
    return next;
}

void dm_ref_slot_undo(struct dm_host *h, uint32_t index) {
    dm_ref_free_overflow(h, &h->refs[index]);
    (void)dm_ref_make_free(h, index);
}

/* Unlink first, then drop: a crash leaves at most one overflow frame behind. */
void dm_ref_free_overflow(struct dm_host *h, struct dm_ref_entry *entry) {
    while (entry->overflow) {
        uint32_t pfn = entry->overflow - 1;
        const struct dm_ref_overflow *o = (const struct dm_ref_overflow *)dm_frame_data(h, pfn);
        __atomic_store_n(&entry->overflow, o->next, __ATOMIC_RELEASE);
        DM_CRASH_POINT(overflow_unlinked);
        if (dm_count_down(h, pfn)) {
            dm_frame_freed(h, pfn, 1);
            DM_COUNT(h, frames_freed, 1);
        }
    }
}

/* Write runs into an entry being built. An overflow frame is linked before its count is taken, so recovery
 * finds it whatever the moment. May drop the lock. */
int dm_ref_store_runs(struct dm_host *h, uint32_t index, const struct dm_run *runs,
                      uint32_t nr_runs, bool may_block, struct dm_error *e) {
    struct dm_ref_entry *entry = &h->refs[index];
    uint32_t done = nr_runs < DM_REF_INLINE_RUNS ? nr_runs : DM_REF_INLINE_RUNS;
    memcpy(entry->runs, runs, done * sizeof runs[0]);
    uint32_t end = nr_runs, per = runs_per_overflow(h->page_shift);
    while (end > done) { /* last part first: the chain is built from its end */
        uint32_t n = (end - done) % per ? (end - done) % per : per, pfn;
        int s = dm_take_one(h, may_block, &pfn, e);
        if (s)
            return s;
        struct dm_ref_overflow *o = (struct dm_ref_overflow *)dm_frame_data(h, pfn);
        o->next = entry->overflow;
        o->nr_runs = n;
        memcpy(o->runs, runs + end - n, n * sizeof runs[0]);
        __atomic_store_n(&entry->overflow, pfn + 1, __ATOMIC_RELEASE);
        DM_CRASH_POINT(overflow_linked);
        dm_frames_enter_use(h, pfn, 1);
        entry->nr_overflow++;
        DM_CRASH_POINT(overflow_counted);
        end -= n;
    }
    entry->nr_runs = nr_runs;
    DM_CRASH_POINT(runs_stored);
    return DM_OK;
}

/* The bytes that stand for an entry of this host's as it is now. */
void dm_ref_wire_of(const struct dm_host *h, uint32_t index, struct dm_ref_wire *out) {
    const struct dm_ref_entry *entry = &h->refs[index];
    *out = (struct dm_ref_wire){.magic = DM_REF_MAGIC,
                                .entry = index,
                                .generation =
                                    dm_ref_gen(__atomic_load_n(&entry->state, __ATOMIC_RELAXED)),
                                .fabric_id = h->fabric_id,
                                .nonce = entry->nonce,
                                .length = entry->length};
    out->check = wire_checksum(out);
}

/* BUILDING -> LIVE. Release: whoever accepts it sees entry and frames complete. */
void dm_ref_publish(struct dm_host *h, uint32_t index, uint8_t flags, struct dm_ref_wire *out) {
    struct dm_ref_entry *entry = &h->refs[index];
    uint32_t gen = dm_ref_gen(__atomic_load_n(&entry->state, __ATOMIC_RELAXED));
    /* Relaxed: who reads it before the state below does not fit it, see dm_ref_check. */
    __atomic_store_n(&entry->nonce, next_nonce(h), __ATOMIC_RELAXED);
    dm_ref_wire_of(h, index, out);
    dm_charge_ref(h, index);
    DM_CRASH_POINT(ref_filled);
    __atomic_store_n(&entry->state, dm_ref_pack(DM_REF_LIVE, flags, h->id, gen), __ATOMIC_RELEASE);
    DM_CRASH_POINT(ref_published);
}

/* ---------------------------------------------------------------- accept, clone, drop */

/* Become the holder. The bytes the Ref came in are stale afterwards; w gets the new ones. Who holds it already keeps them,
 * unless it says `anew`: two parts of one process that pass a Ref on must not both be able to drop it. */
int dm_ref_accept(struct dm_host *h, struct dm_ref_wire *w, bool anew, struct dm_error *e) {
    uint32_t index;
    uint64_t word;
    int s = dm_ref_check(h, w, &index, &word, e);
    if (s)
        return s;
    if (dm_ref_holder(word) == h->id && !anew)
        return DM_OK;
    uint64_t mine = dm_ref_pack(DM_REF_LIVE, dm_ref_flags(word), h->id, dm_ref_gen(word) + 1);
    if (!__atomic_compare_exchange_n(&h->refs[index].state, &word, mine, false, __ATOMIC_ACQ_REL,
                                     __ATOMIC_ACQUIRE))
        return dm_ref_state(word) == DM_REF_CLONING
                   ? DM_REF_BUSY
                   : dm_fail(e, DM_ERR_REF_CONSUMED, "another holder took this Ref at this moment");
    DM_CRASH_POINT(ref_accepted);
    w->generation = dm_ref_gen(mine);
    w->check = wire_checksum(w);
    DM_COUNT(h, accept_calls, 1);
    return DM_OK;
}

/* Progress first: a crash may leave one count too many, never take one twice. Returns how many counts were the last. */
static uint32_t drop_shared(struct dm_host *h, struct dm_intent *in, const struct dm_run *run,
                            uint64_t progress, struct dm_run *freed) {
    uint32_t nr_freed = 0;
    for (uint32_t i = 0; i < run->count; i++) {
        __builtin_prefetch(&h->frames[run->pfn + i + DM_COUNTS_AHEAD], 1);
        dm_intent_progress(in, ++progress);
        DM_CRASH_POINT(drop_progress);
        if (dm_count_down(h, run->pfn + i)) {
            dm_freed_add(h, freed, run->pfn + i);
            nr_freed++;
        }
    }
    return nr_freed;
}

/* Drop the counts of an entry this host holds in state DROPPING, then free it. Of an exclusive Ref each count is the last,
 * and nobody else may touch the frame words. Progress is noted run by run then: a frame that was let go is free and names
 * this host as its owner, so recovery finds no count to drop twice, and takes it with the other free ones. */
void dm_ref_release(struct dm_host *h, uint32_t index) {
    struct dm_ref_entry *entry = &h->refs[index];
    struct dm_runs runs;
    dm_runs_init(&runs);
    dm_charge_ref(h, index);
    int s = dm_runs_of_entry(entry, h->physmap, h->page_shift, h->nr_frames, &runs);
    if (s)
        dm_fatal(h, "Ref entry %u is damaged (status %d); run `dmrpc fabric verify`", index, s);
    uint64_t word = __atomic_load_n(&entry->state, __ATOMIC_RELAXED);
    struct dm_intent *in = dm_intent_begin(h, DM_INTENT_DROP, 0, entry->nr_pages, 0, index, word);
    DM_CRASH_POINT(drop_begun);
    struct dm_run freed = {0, 0};
    uint64_t progress = 0, nr_freed = 0;
    for (uint32_t r = 0; r < runs.nr; r++) {
        const struct dm_run *run = &runs.list[r];
        if (run->pfn != DM_NO_FRAME && !(dm_ref_flags(word) & DM_REF_EXCLUSIVE)) {
            nr_freed += drop_shared(h, in, run, progress, &freed);
        } else if (run->pfn != DM_NO_FRAME) {
            dm_frames_leave_use(h, run->pfn, run->count);
            nr_freed += run->count;
        }
        progress += run->count;
        dm_intent_progress(in, progress); /* complete: the runs are not needed any more */
        DM_CRASH_POINT(drop_run_done);
    }
    dm_freed_end(h, &freed);
    uint16_t home = entry->creator;
    dm_ref_free_overflow(h, entry);
    (void)dm_ref_make_free(h, index);
    dm_intent_end(in);
    DM_COUNT(h, frames_freed, nr_freed);
    DM_CRASH_POINT(drop_ended);
    if (dm_ref_flags(word) & DM_REF_EXCLUSIVE)
        for (uint32_t r = 0; r < runs.nr; r++) {
            const struct dm_run *run = &runs.list[r];
            if (run->pfn != DM_NO_FRAME && !dm_send_home(h, home, run->pfn, run->count))
                dm_frame_freed(h, run->pfn, run->count);
        }
    dm_runs_free(&runs);
}

/* Give a Ref back. DM_ERR_REF_CONSUMED when it is no longer the one w names. */
int dm_ref_drop(struct dm_host *h, const struct dm_ref_wire *w, struct dm_error *e) {
    uint32_t index;
    uint64_t word;
    int s = dm_ref_check(h, w, &index, &word, e);
    if (s || (s = claim(h, index, &word, DM_REF_DROPPING, e)))
        return s;
    DM_CRASH_POINT(drop_claimed);
    dm_ref_release(h, index);
    DM_COUNT(h, drop_calls, 1);
    return DM_OK;
}

static struct dm_ref_wire wire_at(const void *bytes, size_t i) {
    struct dm_ref_wire w;
    memcpy(&w, (const char *)bytes + i * sizeof w, sizeof w);
    return w;
}

/* Is the Ref in these bytes still live under exactly them? Changes nothing. Context: any thread, no lock: what is looked at
 * is atomic or never changes, and the answer may be out of date as soon as it is given anyway. */
bool dm_ref_held(struct dm_host *h, const void *bytes) {
    struct dm_ref_wire w = wire_at(bytes, 0);
    uint32_t index;
    uint64_t word;
    /* Most that are asked for were used up: told by one look, before the checksum. */
    if (w.entry >= h->max_refs ||
        dm_ref_gen(__atomic_load_n(&h->refs[w.entry].state, __ATOMIC_RELAXED)) != w.generation)
        return false;
    int s = dm_ref_check(h, &w, &index, &word, NULL);
    return s == DM_OK || s == DM_REF_BUSY;
}

/* Drop each of nr Refs, 40 bytes one after the other, that is still live under exactly its bytes. Returns how many this call
 * released; *busy: some were just being cloned, and stand. */
uint64_t dm_refs_drop(struct dm_host *h, const void *bytes, size_t nr, bool *busy) {
    uint64_t dropped = 0;
    *busy = false;
    for (size_t i = 0; i < nr; i++) {
        struct dm_ref_wire w = wire_at(bytes, i);
        if (!dm_ref_held(h, &w))
            continue;
        int s = dm_ref_drop(h, &w, NULL);
        dropped += s == DM_OK;
        *busy |= s == DM_REF_BUSY;
    }
    return dropped;
}

/* Frame i of a list, counted through its runs; DM_NO_FRAME for holes. */
static uint32_t frame_at(const struct dm_runs *runs, uint64_t i) {
    uint32_t r = 0;
    while (i >= runs->list[r].count)
        i -= runs->list[r++].count;
    return runs->list[r].pfn == DM_NO_FRAME ? DM_NO_FRAME : runs->list[r].pfn + (uint32_t)i;
}

/* +1 on every frame, in order; all or none. Undone from the end, so that progress stays true. */
static int count_runs(struct dm_host *h, struct dm_intent *in, const struct dm_runs *runs) {
    uint64_t progress = 0;
    for (uint32_t r = 0; r < runs->nr; r++) {
        for (uint32_t i = 0; i < runs->list[r].count; i++) {
            if (runs->list[r].pfn != DM_NO_FRAME && dm_count_up(h, runs->list[r].pfn + i)) {
                while (progress > 0) {
                    uint32_t pfn = frame_at(runs, --progress);
                    dm_intent_progress(in, progress);
                    DM_CRASH_POINT(clone_undoing);
                    if (pfn != DM_NO_FRAME)
                        (void)dm_count_down(h, pfn); /* the source's stays: never the last */
                }
                return DM_ERR_TOO_MANY_REFS;
            }
            DM_CRASH_POINT(clone_counted);
            dm_intent_progress(in, ++progress);
            DM_CRASH_POINT(clone_progress);
        }
    }
    return DM_OK;
}

/* Another Ref to the same bytes. The source is accepted first if it is not ours, so its bytes may change. */
int dm_ref_clone(struct dm_host *h, struct dm_ref_wire *source, bool may_block,
                 struct dm_ref_wire *out, struct dm_error *e) {
    int s = dm_ref_accept(h, source, false, e);
    uint32_t index, copy;
    uint64_t word;
    if (s || (s = dm_ref_check(h, source, &index, &word, e)) ||
        (s = claim(h, index, &word, DM_REF_CLONING, e)))
        return s;
    DM_CRASH_POINT(clone_claimed);
    struct dm_ref_entry *from = &h->refs[index];
    struct dm_runs runs;
    dm_runs_init(&runs);
    s = dm_runs_of_entry(from, h->physmap, h->page_shift, h->nr_frames, &runs);
    if (s == DM_ERR_CORRUPT)
        s = dm_fail(e, s, "Ref entry %u is damaged; run `dmrpc fabric verify`", index);
    if (!s)
        s = dm_ref_slot(h, &copy, e);
    uint8_t flags = dm_ref_flags(word);
    if (!s) {
        s = dm_ref_store_runs(h, copy, runs.list, runs.nr, may_block, e);
        if (!s) {
            struct dm_ref_entry *to = &h->refs[copy];
            dm_ref_set_length(to, from->length);
            to->page_offset = from->page_offset;
            to->nr_pages = from->nr_pages;
            struct dm_intent *in = dm_intent_begin(h, DM_INTENT_CLONE, 0, from->nr_pages, 0, copy,
                                                   __atomic_load_n(&to->state, __ATOMIC_RELAXED));
            DM_CRASH_POINT(clone_begun);
            s = count_runs(h, in, &runs);
            if (!s) {
                flags &= (uint8_t)~DM_REF_EXCLUSIVE;
                dm_ref_publish(h, copy, 0, out);
            }
            dm_intent_end(in);
            DM_CRASH_POINT(clone_ended);
        }
        if (s)
            dm_ref_slot_undo(h, copy);
    }
    /* Release: the source is as it was, but for its flag, before anybody can claim it again. */
    __atomic_store_n(&from->state, dm_ref_pack(DM_REF_LIVE, flags, h->id, dm_ref_gen(word)),
                     __ATOMIC_RELEASE);
    DM_CRASH_POINT(clone_released);
    dm_runs_free(&runs);
    if (!s)
        DM_COUNT(h, clone_calls, 1);
    return s;
}
