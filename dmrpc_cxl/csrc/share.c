/*
 * share.c - create_ref, sharing and moving.
 *
 * Sharing: protect first, then count. Between the two a store by another thread faults, waits for the lock, and then
 * sees a count above one: it copies. The Ref denotes the bytes at the moment its pages were protected.
 *
 * Moving: the mapping's counts become the Ref's with the single store that makes the Ref live. Until then recovery finds
 * the counts at the mapping, from then on at the Ref (intent DM_INTENT_MOVE).
 *
 * Context: host lock held; may_block as in alloc.c. Paper: V-B.2 (create_ref).
 */
#include <string.h>

#include "dm.h"
#include "intent.h"

static int runs_of_pages(const struct dm_host *h, uint32_t page, uint32_t nr, struct dm_runs *r) {
    const uint32_t *pt = h->pt + page;
    const struct dm_vma *v = &h->vmas[h->vma_of[page]];
    if (!(v->flags & DM_VMA_DIRTY)) /* every page shows its own frame */
        return dm_runs_add(r, dm_identity(h, page), nr);
    for (uint32_t i = 0, n; i < nr; i += n) {
        uint32_t pte = pt[i] & ~DM_PTE_HEAD;
        n = 1;
        if (pte & DM_PTE_HOLE)
            while (i + n < nr && pt[i + n] == DM_PTE_HOLE)
                n++;
        else
            while (i + n < nr && pt[i + n] == pte + n)
                n++;
        if (dm_runs_add(r, pte & DM_PTE_HOLE ? DM_NO_FRAME : pte & DM_PTE_PFN, n))
            return DM_ERR_NO_MEMORY;
    }
    return DM_OK;
}

/* Undo the first `done` counts, from the end, so that progress stays true. */
static int uncount_range(struct dm_host *h, struct dm_intent *in, uint32_t page, uint32_t done) {
    while (done-- > 0) {
        dm_intent_progress(in, done);
        DM_CRASH_POINT(share_undoing);
        if (h->pt[page + done] & DM_PTE_PRESENT)
            (void)dm_count_down(h, h->pt[page + done] & DM_PTE_PFN); /* never the last */
    }
    return DM_ERR_TOO_MANY_REFS;
}

/* +1 on every frame of the range, in page order; all or none. */
static int count_range(struct dm_host *h, struct dm_intent *in, uint32_t page, uint32_t nr) {
    const uint32_t *pt = h->pt + page;
    for (uint32_t i = 0; i < nr && i < DM_COUNTS_AHEAD; i += 8)
        __builtin_prefetch(&h->frames[pt[i] & DM_PTE_PFN], 1);
    for (uint32_t i = 0; i < nr; i++) {
        uint32_t pte = pt[i];
        __builtin_prefetch(&h->frames[(pte & DM_PTE_PFN) + DM_COUNTS_AHEAD], 1);
        if (pte & DM_PTE_PRESENT && dm_count_up(h, pte & DM_PTE_PFN))
            return uncount_range(h, in, page, i);
        DM_CRASH_POINT(share_counted);
        dm_intent_progress(in, i + 1);
        DM_CRASH_POINT(share_progress);
    }
    return DM_OK;
}

static int prepare_entry(struct dm_host *h, uint32_t page, uint32_t nr, bool may_block,
                         uint32_t *index, struct dm_runs *runs, struct dm_error *e) {
    dm_runs_init(runs);
    int s = runs_of_pages(h, page, nr, runs);
    if (!s)
        s = dm_ref_slot(h, index, e);
    if (!s) {
        s = dm_ref_store_runs(h, *index, runs->list, runs->nr, may_block, e);
        if (s)
            dm_ref_slot_undo(h, *index);
    }
    if (s)
        dm_runs_free(runs);
    return s;
}

/* prepare_entry may have dropped the lock while it asked for frames. The buffer is pinned by the caller, but a store may
 * have copied some of its pages meanwhile: then the stored runs are stale. */
static bool still_the_same(const struct dm_host *h, uint32_t page, uint32_t nr,
                           const struct dm_runs *runs) {
    struct dm_runs now;
    dm_runs_init(&now);
    bool same = !runs_of_pages(h, page, nr, &now) && now.nr == runs->nr &&
                !memcmp(now.list, runs->list, now.nr * sizeof now.list[0]);
    dm_runs_free(&now);
    return same;
}

/*
 * create_ref(address, size): any part of one mapping. The caller keeps its mapping; its pages become read-only.
 */
int dm_create_ref(struct dm_host *h, uint64_t addr, uint64_t size, bool may_block,
                  struct dm_ref_wire *out, struct dm_error *e) {
    uint32_t id = dm_vma_at(h, addr);
    if (!id)
        return dm_fail(e, DM_ERR_BAD_ADDRESS, "no mapping of this host there");
    struct dm_vma *v = &h->vmas[id];
    uint64_t start = dm_addr_of(h, v->page) + v->page_offset;
    if (size == 0 || addr < start || size > v->length || addr - start > v->length - size)
        return dm_fail(e, DM_ERR_BAD_SIZE,
                       "%llu bytes there reach outside the mapping of %llu bytes",
                       (unsigned long long)size, (unsigned long long)v->length);
    /* Counting, and undoing it after a crash, goes by page-table entries. */
    if (v->flags & DM_VMA_VIEW)
        dm_view_materialise(h, id);
    uint32_t page = dm_page_of(h, addr);
    uint32_t nr = dm_page_of(h, addr + size - 1) - page + 1;
    uint32_t index;
    struct dm_runs runs;
    int s = prepare_entry(h, page, nr, may_block, &index, &runs, e);
    if (s)
        return s;
    if (may_block && !still_the_same(h, page, nr, &runs))
        s = DM_REF_BUSY;
    dm_runs_free(&runs);
    if (!s)
        s = dm_protect(h, page, nr, e);
    if (s) {
        dm_ref_slot_undo(h, index);
        return s;
    }
    struct dm_ref_entry *entry = &h->refs[index];
    dm_ref_set_length(entry, size);
    entry->page_offset = (uint32_t)(addr & (((uint64_t)1 << h->page_shift) - 1));
    entry->nr_pages = nr;
    DM_CRASH_POINT(share_protected);
    struct dm_intent *in = dm_intent_begin(h, DM_INTENT_SHARE, page, nr, 0, index,
                                           __atomic_load_n(&entry->state, __ATOMIC_RELAXED));
    DM_CRASH_POINT(share_begun);
    s = count_range(h, in, page, nr);
    if (s) {
        dm_intent_end(in);
        DM_CRASH_POINT(share_undone);
        dm_ref_slot_undo(h, index);
        return dm_fail(e, s, "a frame of this range has %u holders already", DM_REFCOUNT_MAX);
    }
    v->flags &= ~DM_VMA_EXCLUSIVE;
    dm_ref_publish(h, index, 0, out);
    dm_intent_end(in);
    DM_CRASH_POINT(share_ended);
    DM_COUNT(h, create_ref_calls, 1);
    DM_COUNT(h, bytes_referenced, size);
    return DM_OK;
}

/*
 * create_ref(..., move=True): the whole mapping becomes the Ref. The caller has made sure that nobody views it.
 */
int dm_move_ref(struct dm_host *h, uint32_t id, bool may_block, struct dm_ref_wire *out,
                struct dm_error *e) {
    struct dm_vma *v = &h->vmas[id];
    if (v->flags & DM_VMA_VIEW)
        return dm_view_move(h, id, out, e);
    uint32_t page = v->page, nr = v->nr_pages, index;
    struct dm_runs runs;
    int s = prepare_entry(h, page, nr, may_block, &index, &runs, e);
    if (s)
        return s;
    /* Before the counts pass on, this host must stop showing the frames writable at other pages than their own. */
    if (v->flags & DM_VMA_DIRTY)
        s = dm_restore(h, page, nr, e);
    if (!s && h->strict && page < h->nr_frames)
        s = dm_protect(h, page, nr, e);
    if (s) {
        dm_ref_slot_undo(h, index);
        dm_runs_free(&runs);
        return s;
    }
    uint8_t flags = 0;
    if (v->flags & DM_VMA_EXCLUSIVE || dm_all_exclusive(h, runs.list, runs.nr))
        flags = DM_REF_EXCLUSIVE;
    dm_runs_free(&runs);
    struct dm_ref_entry *entry = &h->refs[index];
    dm_ref_set_length(entry, v->length);
    entry->page_offset = v->page_offset;
    entry->nr_pages = nr;
    DM_COUNT(h, bytes_referenced, v->length);
    struct dm_intent *in = dm_intent_begin(h, DM_INTENT_MOVE, page, nr, 0, index,
                                           __atomic_load_n(&entry->state, __ATOMIC_RELAXED));
    DM_CRASH_POINT(move_begun);
    dm_ref_publish(h, index, flags, out);
    __atomic_signal_fence(__ATOMIC_SEQ_CST); /* the PTEs go after the Ref is live, see intent.h */
    DM_CRASH_POINT(move_passed);
    dm_pt_clear(h, page, nr);
    dm_intent_end(in);
    DM_CRASH_POINT(move_ended);
    if (page < h->nr_frames && h->free.nr_displaced)
        for (uint32_t i = 0; i < nr; i++)
            dm_freelist_vacated(&h->free, page + i);
    if (page >= 2 * h->nr_frames)
        (void)dm_area_give(h, page, nr, e);
    if (flags & DM_REF_EXCLUSIVE && v->home == DM_OWNER_POOL)
        dm_gave_away(h, nr);
    dm_vma_delete(h, id);
    DM_COUNT(h, move_ref_calls, 1);
    return DM_OK;
}
