/*
 * alloc.c - ralloc and rfree.
 *
 * Count before you map, unmap before you uncount: a crash between two steps leaves at most one frame with a
 * count too many, never one too few.
 *
 * Context: host lock held on entry and exit, dropped inside while the coordinator is asked; may_block says whether that
 * is allowed (never with the GIL).
 */
#include <string.h>

#include "dm.h"
#include "intent.h"

/* With crash points armed the two below go from entry to entry; otherwise they have no branch for that. */
static __attribute__((cold, noinline)) void set_one_by_one(uint32_t *pt, uint32_t first,
                                                           uint32_t nr, uint32_t head) {
    for (uint32_t i = 0; i < nr; i++) {
        pt[i] = first + i;
        DM_CRASH_POINT(pte_set);
    }
    pt[0] |= head;
    DM_CRASH_POINT(pte_set);
}

static __attribute__((cold, noinline)) void clear_one_by_one(uint32_t *pt, uint32_t nr) {
    for (uint32_t i = 0; i < nr; i++) {
        pt[i] = 0;
        DM_CRASH_POINT(pte_cleared);
    }
}

/* PTEs for one run. Plain stores: readers come after this process is gone, or take a snapshot. */
void dm_pt_set(struct dm_host *h, uint32_t page, uint32_t pfn, uint32_t nr, uint32_t head) {
    uint32_t *pt = h->pt + page, first = DM_PTE_PRESENT | pfn, i = 0;
    dm_quad four = {first, first + 1, first + 2, first + 3};
    if (DM_CRASH_IS_ARMED) {
        set_one_by_one(pt, first, nr, head);
        return;
    }
    for (; i + 4 <= nr; i += 4, four += 4)
        *(dm_quad *)(pt + i) = four;
    for (; i < nr; i++)
        pt[i] = first + i;
    pt[0] |= head;
}

/* Nobody's entries any more; their counts are not theirs, or known to be the last. */
void dm_pt_clear(struct dm_host *h, uint32_t page, uint32_t nr) {
    if (DM_CRASH_IS_ARMED)
        clear_one_by_one(h->pt + page, nr);
    memset(h->pt + page, 0, nr * sizeof h->pt[0]);
}

void dm_pt_set_holes(struct dm_host *h, uint32_t page, uint32_t nr, uint32_t head) {
    for (uint32_t i = 0; i < nr; i++) {
        h->pt[page + i] = DM_PTE_HOLE;
        DM_CRASH_POINT(pte_hole);
    }
    h->pt[page] |= head;
    DM_CRASH_POINT(pte_hole);
}

static int pages_of(const struct dm_host *h, uint64_t size, uint32_t *nr, struct dm_error *e) {
    uint64_t rest = size & (((uint64_t)1 << h->page_shift) - 1);
    uint64_t pages = (size >> h->page_shift) + (rest != 0);
    if (size == 0)
        return dm_fail(e, DM_ERR_BAD_SIZE, "a size of 0 bytes");
    if (pages > h->nr_frames)
        return dm_fail(e, DM_ERR_OUT_OF_FRAMES, "%llu bytes asked for, the device has %llu",
                       (unsigned long long)size, (unsigned long long)h->nr_frames << h->page_shift);
    *nr = (uint32_t)pages;
    return DM_OK;
}

static int no_slots(struct dm_error *e) {
    return dm_fail(e, DM_ERR_NO_ADDRESS_SPACE, "too many mappings in this host");
}

/* Take back what a failed scattered allocation got so far. */
static void undo_scattered(struct dm_host *h, uint32_t page, uint32_t done, uint32_t nr) {
    struct dm_error ignored;
    if (done && dm_restore(h, page, done, &ignored))
        return; /* the range stays mapped and counted; recovery finds it when this host leaves */
    dm_uncount_pages(h, page, done);
    (void)dm_area_give(h, page, nr, &ignored);
}

/* Enough frames, but no run that long, or their window pages are taken: piece them together in the VMA area. */
static int ralloc_scattered(struct dm_host *h, uint32_t nr, uint64_t size, uint32_t *id,
                            struct dm_error *e) {
    uint32_t page = dm_area_take(h, nr);
    if (page == DM_NO_FRAME)
        return dm_fail(e, DM_ERR_NO_ADDRESS_SPACE, "the VMA area has no %u free pages", nr);
    uint32_t done = 0;
    while (done < nr) {
        struct dm_run run;
        if (h->vm_pieces + 4 > h->vm_piece_limit) {
            undo_scattered(h, page, done, nr);
            return dm_fail(
                e, DM_ERR_NO_ADDRESS_SPACE,
                "%u pages can only be had in more pieces than half of vm.max_map_count (%u)", nr,
                h->vm_piece_limit);
        }
        if (!dm_take_upto(h, nr - done, 0, &run)) {
            int s = dm_refill(h, &h->link, nr - done, 1, e);
            if (s) {
                undo_scattered(h, page, done, nr);
                return s;
            }
            continue;
        }
        struct dm_intent *in =
            dm_intent_begin(h, DM_INTENT_ALLOC, page + done, run.count, run.pfn, 0, 0);
        DM_CRASH_POINT(scatter_begun);
        dm_frames_enter_use(h, run.pfn, run.count);
        int s = dm_show(h, page + done, run.pfn, run.count, true, e);
        DM_CRASH_POINT(scatter_shown);
        if (!s)
            dm_pt_set(h, page + done, run.pfn, run.count, done ? 0 : DM_PTE_HEAD);
        else
            dm_frames_leave_use(h, run.pfn, run.count);
        dm_intent_end(in);
        DM_CRASH_POINT(scatter_ended);
        if (s) {
            dm_frame_freed(h, run.pfn, run.count);
            undo_scattered(h, page, done, nr);
            return s;
        }
        done += run.count;
    }
    *id = dm_vma_new(h, page, nr, size, 0, DM_VMA_EXCLUSIVE | DM_VMA_DIRTY);
    if (!*id) {
        undo_scattered(h, page, nr, nr);
        return no_slots(e);
    }
    return DM_OK;
}

static int ralloc_lazy(struct dm_host *h, uint32_t nr, uint64_t size, uint32_t *id,
                       struct dm_error *e) {
    uint32_t page = dm_area_take(h, nr);
    if (page == DM_NO_FRAME)
        return dm_fail(e, DM_ERR_NO_ADDRESS_SPACE, "the VMA area has no %u free pages", nr);
    int s = dm_show_holes(h, page, nr, e);
    if (!s) {
        dm_pt_set_holes(h, page, nr, DM_PTE_HEAD);
        *id = dm_vma_new(h, page, nr, size, 0, DM_VMA_EXCLUSIVE | DM_VMA_DIRTY | DM_VMA_HOLES);
        if (*id)
            return DM_OK;
        s = no_slots(e);
    }
    struct dm_error ignored;
    memset(h->pt + page, 0, nr * sizeof h->pt[0]);
    if (dm_restore(h, page, nr, &ignored) == DM_OK)
        (void)dm_area_give(h, page, nr, &ignored);
    return s;
}

/*
 * ralloc: a mapping of size bytes, frames and all. DM_ALLOC_LAZY takes address space only.
 * Zeroing is the caller's next step (dm_zero), without the lock. Paper: Table II, V-B.
 */
int dm_ralloc(struct dm_host *h, uint64_t size, unsigned flags, bool may_block, uint32_t *id,
              struct dm_error *e) {
    uint32_t nr = 0, pfn;
    int s = pages_of(h, size, &nr, e);
    if (s)
        return s;
    if (flags & DM_ALLOC_LAZY) {
        if (!may_block)
            return DM_AGAIN_BLOCKING;
        DM_COUNT(h, ralloc_calls, 1);
        return ralloc_lazy(h, nr, size, id, e);
    }
    s = dm_take_run(h, nr, may_block, &pfn, e);
    if (s == DM_ERR_OUT_OF_FRAMES && may_block) {
        struct dm_error second = {0};
        int t = ralloc_scattered(h, nr, size, id, &second);
        if (t == DM_OK) {
            DM_COUNT(h, ralloc_calls, 1);
            return DM_OK;
        }
        if (t == DM_ERR_NO_ADDRESS_SPACE) {
            *e = second;
            return t;
        }
    }
    if (s)
        return s;
    if ((s = dm_make_ready(h, pfn, nr, e))) {
        dm_frame_freed(h, pfn, nr);
        return s;
    }
    struct dm_intent *in = dm_intent_begin(h, DM_INTENT_ALLOC, pfn, nr, pfn, 0, 0);
    DM_CRASH_POINT(alloc_begun);
    dm_frames_enter_use(h, pfn, nr);
    dm_pt_set(h, pfn, pfn, nr, DM_PTE_HEAD);
    dm_intent_end(in);
    DM_CRASH_POINT(alloc_ended);
    *id = dm_vma_new(h, pfn, nr, size, 0, DM_VMA_EXCLUSIVE);
    if (!*id) {
        dm_uncount_pages(h, pfn, nr);
        return no_slots(e);
    }
    DM_COUNT(h, ralloc_calls, 1);
    return DM_OK;
}

/* Zero a fresh mapping through the physmap. Context: no lock; nobody else knows the mapping yet. */
void dm_zero(struct dm_host *h, uint32_t id) {
    const struct dm_vma *v = &h->vmas[id];
    uint64_t page_bytes = (uint64_t)1 << h->page_shift;
    for (uint32_t i = 0, n; i < v->nr_pages; i += n) {
        uint32_t pfn = h->pt[v->page + i] & DM_PTE_PFN;
        for (n = 1; i + n < v->nr_pages && (h->pt[v->page + i + n] & DM_PTE_PFN) == pfn + n;)
            n++;
        memset(dm_frame_data(h, pfn), 0, n * page_bytes);
    }
    DM_COUNT(h, bytes_zeroed, v->nr_pages * page_bytes);
    dm_latency_bytes(&h->latency, v->nr_pages * page_bytes);
}

/* Frames that come free one after the other, put on the free list as runs. */
void dm_freed_add(struct dm_host *h, struct dm_run *run, uint32_t pfn) {
    if (run->count && run->pfn + run->count == pfn) {
        run->count++;
        return;
    }
    if (run->count)
        dm_frame_freed(h, run->pfn, run->count);
    *run = (struct dm_run){pfn, 1};
}

void dm_freed_end(struct dm_host *h, struct dm_run *run) {
    if (run->count)
        dm_frame_freed(h, run->pfn, run->count);
    run->count = 0;
}

/* Clear PTEs and drop their counts, page by page: a crash leaves at most one frame counted once too often. */
void dm_uncount_pages(struct dm_host *h, uint32_t page, uint32_t nr) {
    struct dm_run freed = {0, 0};
    uint32_t nr_freed = 0;
    for (uint32_t i = 0; i < nr; i++) {
        uint32_t pte = h->pt[page + i];
        __builtin_prefetch(&h->frames[(pte & DM_PTE_PFN) + DM_COUNTS_AHEAD], 1);
        __atomic_store_n(&h->pt[page + i], 0, __ATOMIC_RELEASE);
        DM_CRASH_POINT(pte_uncounted);
        if (h->free.nr_displaced && page + i < h->nr_frames)
            dm_freelist_vacated(&h->free, page + i);
        if (pte & DM_PTE_PRESENT && dm_count_down(h, pte & DM_PTE_PFN)) {
            dm_freed_add(h, &freed, pte & DM_PTE_PFN);
            nr_freed++;
        }
    }
    dm_freed_end(h, &freed);
    DM_COUNT(h, frames_freed, nr_freed);
}

/* rfree of a whole mapping. On failure (restoring the windows needs the kernel) nothing has changed for others
 * and the mapping stands. */
int dm_rfree(struct dm_host *h, uint32_t id, struct dm_error *e) {
    struct dm_vma *v = &h->vmas[id];
    uint32_t page = v->page, nr = v->nr_pages;
    if (v->flags & DM_VMA_VIEW) {
        dm_view_free(h, id);
        DM_COUNT(h, rfree_calls, 1);
        return DM_OK;
    }
    if ((v->flags & (DM_VMA_EXCLUSIVE | DM_VMA_DIRTY)) == DM_VMA_EXCLUSIVE) {
        struct dm_intent *in = dm_intent_begin(h, DM_INTENT_FREE_X, page, nr, page, 0, 0);
        DM_CRASH_POINT(free_begun);
        dm_pt_clear(h, page, nr);
        dm_frames_leave_use(h, page, nr);
        dm_intent_end(in);
        DM_COUNT(h, frames_freed, nr);
        DM_CRASH_POINT(free_ended);
        if (!v->home || !dm_send_home(h, v->home, page, nr)) {
            dm_freelist_put(&h->free, page, nr);
            h->entry->nr_free = h->free.nr_free;
        }
    } else {
        int s = v->flags & DM_VMA_DIRTY ? dm_restore(h, page, nr, e) : DM_OK;
        if (s)
            return s;
        dm_uncount_pages(h, page, nr);
        if (page >= 2 * h->nr_frames && (s = dm_area_give(h, page, nr, e)))
            return s;
    }
    dm_vma_delete(h, id);
    DM_COUNT(h, rfree_calls, 1);
    return DM_OK;
}
