/*
 * map.c - map_ref: a Ref becomes a mapping; its counts pass over, none changes.
 *
 * Where it lands:
 *   exclusive, one run, its owned-window pages vacant  -> owned window, writable, no system call
 *   shared, one run, its shared-window pages vacant    -> shared window, read-only, no system call
 *   otherwise (scattered, mapped twice here, holes)    -> VMA area, one kernel mapping a run
 * view_ref (DM_MAP_VIEW) does the same without the page table in the first two cases, see view.c; otherwise it is map_ref.
 * A Ref is exclusive when it was made so, or when by now no frame has another count: nobody but a holder could add one.
 *
 * Context: host lock held; may_block as in alloc.c. Paper: V-B.3 (map_ref).
 */
#include <stdlib.h>
#include <string.h>

#include "dm.h"
#include "intent.h"

struct placing {
    struct dm_runs runs;
    uint32_t index, page, nr, vma_flags;
    uint64_t word;
    bool exclusive;
};

/*
 * Undo take_ref. The host that tried keeps the Ref: the same generation, so the bytes of it stay good for whoever has
 * them. Not the holder from before: it may have died meanwhile, and recovery passes over a Ref that somebody is mapping,
 * so nobody would ever look for it again; or its slot may be another process's by now. Release: the next claim's acquire.
 */
static void put_ref_back(struct dm_host *h, struct placing *p) {
    __atomic_store_n(&h->refs[p->index].state,
                     dm_ref_pack(DM_REF_LIVE, dm_ref_flags(p->word), h->id, dm_ref_gen(p->word)),
                     __ATOMIC_RELEASE);
    DM_CRASH_POINT(map_put_back);
}

static int take_ref(struct dm_host *h, const struct dm_ref_wire *w, struct placing *p,
                    struct dm_error *e) {
    int s = dm_ref_check(h, w, &p->index, &p->word, e);
    if (s)
        return s;
    uint64_t mine = dm_ref_pack(DM_REF_MAPPING, dm_ref_flags(p->word), h->id, dm_ref_gen(p->word));
    uint64_t expect = p->word;
    /* Acquire pairs with the release in dm_ref_publish: entry and frames are complete. */
    if (!__atomic_compare_exchange_n(&h->refs[p->index].state, &expect, mine, false,
                                     __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE))
        return dm_ref_state(expect) == DM_REF_CLONING
                   ? DM_REF_BUSY
                   : dm_fail(e, DM_ERR_REF_CONSUMED, "another holder took this Ref at this moment");
    DM_CRASH_POINT(map_claimed);
    struct dm_ref_entry *entry = &h->refs[p->index];
    p->nr = entry->nr_pages;
    s = dm_runs_of_entry(entry, h->physmap, h->page_shift, h->nr_frames, &p->runs);
    if (s == DM_ERR_CORRUPT)
        s = dm_fail(e, s, "Ref entry %u is damaged; run `dmrpc fabric verify`", p->index);
    if (s)
        put_ref_back(h, p);
    return s;
}

static bool has_holes(const struct dm_runs *runs) {
    for (uint32_t i = 0; i < runs->nr; i++)
        if (runs->list[i].pfn == DM_NO_FRAME)
            return true;
    return false;
}

static int show_runs(struct dm_host *h, struct placing *p, struct dm_error *e) {
    uint32_t at = p->page;
    for (uint32_t r = 0; r < p->runs.nr; r++) {
        struct dm_run *run = &p->runs.list[r];
        int s = run->pfn == DM_NO_FRAME ? dm_show_holes(h, at, run->count, e)
                                        : dm_show(h, at, run->pfn, run->count, false, e);
        if (!s && run->pfn != DM_NO_FRAME && !p->exclusive)
            s = dm_protect(h, at, run->count, e);
        if (s)
            return s;
        at += run->count;
    }
    return DM_OK;
}

static int place_in_area(struct dm_host *h, struct placing *p, struct dm_error *e) {
    if (h->vm_pieces + 2 * p->runs.nr > h->vm_piece_limit)
        return dm_fail(e, DM_ERR_NO_ADDRESS_SPACE,
                       "the Ref has %u runs and vm.max_map_count leaves room for %u more mappings; "
                       "map it with copy=True",
                       p->runs.nr, (h->vm_piece_limit - h->vm_pieces) / 2);
    p->page = dm_area_take(h, p->nr);
    if (p->page == DM_NO_FRAME)
        return dm_fail(e, DM_ERR_NO_ADDRESS_SPACE, "the VMA area has no %u free pages", p->nr);
    int s = show_runs(h, p, e);
    if (s) {
        struct dm_error ignored;
        if (dm_restore(h, p->page, p->nr, &ignored) == DM_OK)
            (void)dm_area_give(h, p->page, p->nr, &ignored);
        return s;
    }
    p->vma_flags |= DM_VMA_DIRTY | (has_holes(&p->runs) ? DM_VMA_HOLES : 0);
    DM_COUNT(h, map_scattered, 1);
    return DM_OK;
}

/* No mapping at these pages of a window: no page-table entry, and no view, which has none. */
bool dm_window_vacant(const struct dm_host *h, uint32_t page, uint32_t nr) {
    return dm_all_zero(h->vma_of + page, nr) && dm_all_zero(h->pt + page, nr);
}

/* Can a window show it? Then p->page is where, once dm_make_ready has made that ready if it is exclusive. */
static bool fits_window(struct dm_host *h, struct placing *p) {
    p->exclusive =
        dm_ref_flags(p->word) & DM_REF_EXCLUSIVE || dm_all_exclusive(h, p->runs.list, p->runs.nr);
    p->vma_flags = p->exclusive ? DM_VMA_EXCLUSIVE : 0;
    if (p->runs.nr != 1 || p->runs.list[0].pfn == DM_NO_FRAME)
        return false;
    p->page = p->runs.list[0].pfn + (p->exclusive ? 0 : h->nr_frames);
    return dm_window_vacant(h, p->page, p->nr);
}

static int place(struct dm_host *h, struct placing *p, bool may_block, struct dm_error *e) {
    if (fits_window(h, p))
        return p->exclusive ? dm_make_ready(h, p->page, p->nr, e) : DM_OK;
    return may_block ? place_in_area(h, p, e) : DM_AGAIN_BLOCKING;
}

/* The counts change hands: PTEs first, then progress 1 (from here on they are the mapping's), then the entry. */
void dm_map_commit(struct dm_host *h, uint32_t index, uint32_t page, uint32_t nr,
                   const struct dm_runs *runs) {
    struct dm_ref_entry *entry = &h->refs[index];
    struct dm_intent *in = dm_intent_begin(h, DM_INTENT_MAP, page, nr, 0, index,
                                           __atomic_load_n(&entry->state, __ATOMIC_RELAXED));
    DM_CRASH_POINT(map_begun);
    uint32_t at = page, head = DM_PTE_HEAD;
    for (uint32_t r = 0; r < runs->nr; r++) {
        const struct dm_run *run = &runs->list[r];
        if (run->pfn == DM_NO_FRAME)
            dm_pt_set_holes(h, at, run->count, head);
        else
            dm_pt_set(h, at, run->pfn, run->count, head);
        at += run->count;
        head = 0;
    }
    DM_CRASH_POINT(map_shown);
    dm_intent_progress(in, 1);
    DM_CRASH_POINT(map_passed);
    dm_ref_free_overflow(h, entry);
    (void)dm_ref_make_free(h, index);
    dm_intent_end(in);
    DM_CRASH_POINT(map_ended);
}

static int reserve(struct dm_host *h, uint32_t nr, bool may_block, struct dm_error *e) {
    while (h->free.nr_free < h->nr_reserved + nr) {
        if (!may_block)
            return DM_AGAIN_BLOCKING;
        int s = dm_refill(h, &h->link, h->nr_reserved + nr - h->free.nr_free, 1, e);
        if (s)
            return s;
    }
    h->nr_reserved += nr;
    h->entry->nr_reserved = h->nr_reserved;
    return DM_OK;
}

static void unreserve(struct dm_host *h, uint32_t nr) {
    h->nr_reserved -= nr;
    h->entry->nr_reserved = h->nr_reserved;
}

/* map_ref(copy=True): the bytes go to a fresh run, the Ref is dropped. While the copy runs, without the lock, the
 * Ref stays claimed (MAPPING): nobody can take it, recovery finds its counts there. */
static int map_copy(struct dm_host *h, struct placing *p, uint32_t *id, struct dm_error *e) {
    const struct dm_ref_entry *entry = &h->refs[p->index];
    uint64_t page_bytes = (uint64_t)1 << h->page_shift;
    int s = dm_ralloc(h, p->nr * page_bytes, 0, true, id, e);
    if (s) {
        put_ref_back(h, p);
        return s;
    }
    struct dm_vma *v = &h->vmas[*id];
    v->length = entry->length;
    v->page_offset = entry->page_offset;
    uint32_t page = v->page;
    dm_unlock(h);
    uint32_t at = page;
    for (uint32_t r = 0; r < p->runs.nr; r++) {
        struct dm_run *run = &p->runs.list[r];
        for (uint32_t i = 0; i < run->count; i++, at++) {
            char *to = dm_frame_data(h, h->pt[at] & DM_PTE_PFN);
            if (run->pfn == DM_NO_FRAME)
                memset(to, 0, page_bytes);
            else
                memcpy(to, dm_frame_data(h, run->pfn + i), page_bytes);
        }
    }
    dm_latency_bytes(&h->latency, 2 * p->nr * page_bytes);
    dm_lock(h);
    DM_CRASH_POINT(map_copied);
    __atomic_store_n(&h->refs[p->index].state,
                     dm_ref_pack(DM_REF_DROPPING, 0, h->id, dm_ref_gen(p->word)), __ATOMIC_RELEASE);
    DM_CRASH_POINT(map_dropping);
    dm_ref_release(h, p->index);
    DM_COUNT(h, eager_copies, 1);
    DM_COUNT(h, bytes_copied, p->nr * page_bytes);
    return DM_OK;
}

static int map_shared(struct dm_host *h, struct placing *p, unsigned flags, bool may_block,
                      uint32_t *id, struct dm_error *e) {
    const struct dm_ref_entry *entry = &h->refs[p->index];
    uint32_t promised = 0;
    int s = DM_OK;
    if (flags & DM_MAP_RESERVE) {
        /* Asked before it is known whether the Ref is exclusive: frames may be needed for holes too. */
        s = reserve(h, p->nr, may_block, e);
        promised = s ? 0 : p->nr;
    }
    if (!s)
        s = place(h, p, may_block, e);
    if (!s) {
        *id = dm_vma_new(h, p->page, p->nr, entry->length, entry->page_offset, p->vma_flags);
        if (!*id) {
            struct dm_error ignored;
            if (p->page >= 2 * h->nr_frames && dm_restore(h, p->page, p->nr, &ignored) == DM_OK)
                (void)dm_area_give(h, p->page, p->nr, &ignored);
            s = dm_fail(e, DM_ERR_NO_ADDRESS_SPACE, "too many mappings in this host");
        }
    }
    if (s) {
        unreserve(h, promised);
        put_ref_back(h, p);
        return s;
    }
    h->vmas[*id].home = p->exclusive ? entry->creator : DM_OWNER_POOL;
    DM_CRASH_POINT(map_placed);
    dm_map_commit(h, p->index, p->page, p->nr, &p->runs);
    if (promised && p->exclusive && !(p->vma_flags & DM_VMA_HOLES)) {
        unreserve(h, promised);
        promised = 0;
    }
    h->vmas[*id].reserved = promised;
    if (p->exclusive)
        DM_COUNT(h, map_exclusive, 1);
    return DM_OK;
}

/* DM_AGAIN_BLOCKING, and nothing has changed, when it takes a mapping: holes, several runs, pages that are taken. */
static int map_view(struct dm_host *h, struct placing *p, uint32_t *id, struct dm_error *e) {
    if (!fits_window(h, p))
        return DM_AGAIN_BLOCKING;
    int s = p->exclusive ? dm_make_ready(h, p->page, p->nr, e) : DM_OK;
    if (!s)
        s = dm_view_new(h, p->index, p->word, p->page, p->exclusive, id, e);
    if (s && s != DM_ERR_FENCED)
        put_ref_back(h, p);
    return s;
}

int dm_map_ref(struct dm_host *h, const struct dm_ref_wire *w, unsigned flags, bool may_block,
               uint32_t *id, struct dm_error *e) {
    if (flags & DM_MAP_COPY && !may_block)
        return DM_AGAIN_BLOCKING;
    struct placing p;
    p.exclusive = false;
    p.vma_flags = 0;
    dm_runs_init(&p.runs);
    int s = take_ref(h, w, &p, e);
    if (!s && flags & DM_MAP_VIEW) {
        s = map_view(h, &p, id, e);
        if (s != DM_AGAIN_BLOCKING)
            return s; /* one run: no list to free */
        s = DM_OK;
    }
    if (!s)
        s = flags & DM_MAP_COPY ? map_copy(h, &p, id, e)
                                : map_shared(h, &p, flags, may_block, id, e);
    dm_runs_free(&p.runs);
    if (!s)
        DM_COUNT(h, map_ref_calls, 1);
    return s;
}
