/*
 * view.c - view_ref: a Ref is shown without becoming a mapping's, for those who read it, or only pass it on.
 *
 * A view is a mapping (struct dm_vma, flag DM_VMA_VIEW) over window pages, without page-table entries. Its counts stay with
 * its Ref, which stays LIVE and is held by this host: so recovery, the audit and detach have nothing to know of
 * views. A dead host's views are Refs that it held, and are dropped as such.
 *
 * Whose it is. Making a view moves the generation on, also when this host held the Ref before: no bytes of the new one
 * exist outside this host until dm_view_move writes them, and the view is gone by then. So nobody can use the Ref while
 * it is shown. That is why an exclusive view may be written by plain stores: nobody can ask what the Ref denotes
 * meanwhile. The word in the entry is remembered (ref_state), and the view ends by a compare-and-swap from it:
 *
 *     MAPPING g -- dm_view_new --> LIVE g+1 -- materialise --> MAPPING g+1 -- (as map_ref) --> FREE g+2
 *                                           -- free ---------> DROPPING g+1 -- (as drop) ----> FREE g+2
 *                                           -- move ---------> LIVE g+1, its bytes are handed out
 *
 * Only recovery could interfere, when the coordinator has declared this host dead, and then nothing is its own any more.
 *
 * Where it lies. Shared: in the shared window, always protected, so the first store faults and materialises the view
 * before anything else looks at its page table. Exclusive: in the owned window, made writable. Each page shows its own
 * frame as long as it is a view (copy-on-write comes after materialising), so DM_VMA_DIRTY is never set.
 *
 * Which pages are vacant. Who puts a mapping at window pages asks dm_window_vacant, which knows views by vma_of. The others
 * decide by the page table alone, and may:
 * - dm_frame_freed and add_granted ask whether the owned-window page of a *free* frame is occupied. By a view it cannot
 *   be: a view at that page shows that very frame, and its Ref holds a count of it. When freeing a view drops the
 *   last counts, its pages look vacant a moment before vma_of says so, under the same lock.
 * - ralloc takes frames from the free list, hence owned-window pages that are vacant by the same argument.
 * - A displaced frame (free, page occupied by another frame's contents) is no view's either, and a view has no contents but
 *   its own frames': nothing is displaced by it, nothing waits for it to be vacated.
 * - copyable, runs_of_pages, dm_zero look at entries of one mapping, which is materialised first or never was a view.
 *
 * Context: host lock held; nothing here blocks or takes memory. Paper: none; map_ref (V-B.3) without its page table.
 */
#include "dm.h"
#include "intent.h"

/* The view's Ref, which must be as it was left, changes its state. False: this host was declared dead. */
static bool claim(struct dm_host *h, const struct dm_vma *v, uint8_t state) {
    uint64_t word = v->ref_state;
    uint64_t mine = dm_ref_pack(state, dm_ref_flags(word), h->id, dm_ref_gen(word));
    dm_charge_ref(h, v->ref);
    /* Against recovery alone, and a release: what was done with the frames came before their next holder's acquire. */
    return __atomic_compare_exchange_n(&h->refs[v->ref].state, &word, mine, false, __ATOMIC_ACQ_REL,
                                       __ATOMIC_RELAXED);
}

/*
 * Show Ref `index` at window pages that are vacant and ready. The caller has claimed it (MAPPING), `before` is the word that
 * it had. On failure it is still claimed, or, with DM_ERR_FENCED, not this host's.
 */
int dm_view_new(struct dm_host *h, uint32_t index, uint64_t before, uint32_t page, bool exclusive,
                uint32_t *id, struct dm_error *e) {
    struct dm_ref_entry *entry = &h->refs[index];
    uint32_t gen = dm_ref_gen(before);
    uint8_t flags = dm_ref_flags(before);
    *id = dm_vma_new(h, page, entry->nr_pages, entry->length, entry->page_offset,
                     DM_VMA_VIEW | (exclusive ? DM_VMA_EXCLUSIVE : 0));
    if (!*id)
        return dm_fail(e, DM_ERR_NO_ADDRESS_SPACE, "too many mappings in this host");
    struct dm_vma *v = &h->vmas[*id];
    uint64_t mine = dm_ref_pack(DM_REF_MAPPING, flags, h->id, gen);
    v->ref = index;
    v->ref_state =
        dm_ref_pack(DM_REF_LIVE, exclusive ? flags | DM_REF_EXCLUSIVE : flags, h->id, gen + 1);
    /* Release: as every state that others may look at. A crash before it finds the Ref claimed, after it held. */
    if (!__atomic_compare_exchange_n(&entry->state, &mine, v->ref_state, false, __ATOMIC_ACQ_REL,
                                     __ATOMIC_RELAXED)) {
        dm_vma_delete(h, *id);
        return dm_fail(e, DM_ERR_FENCED, "the coordinator declared this host dead");
    }
    DM_CRASH_POINT(view_shown);
    DM_COUNT(h, map_views, 1);
    if (exclusive)
        DM_COUNT(h, map_exclusive, 1);
    return DM_OK;
}

/* Make it an ordinary mapping: the same pages, with entries of their own. Also called by the fault handler. */
void dm_view_materialise(struct dm_host *h, uint32_t id) {
    struct dm_vma *v = &h->vmas[id];
    struct dm_runs runs;
    if (!claim(h, v, DM_REF_MAPPING))
        dm_fatal(h, "the Ref of a view is no longer this host's: the coordinator declared it dead");
    DM_CRASH_POINT(view_claimed);
    dm_runs_init(&runs);
    (void)dm_runs_add(&runs, dm_identity(h, v->page), v->nr_pages); /* has room for the first */
    v->home = v->flags & DM_VMA_EXCLUSIVE ? h->refs[v->ref].creator : DM_OWNER_POOL;
    dm_map_commit(h, v->ref, v->page, v->nr_pages, &runs);
    v->flags &= ~DM_VMA_VIEW;
    DM_COUNT(h, views_materialised, 1);
}

/* rfree: drop the Ref. */
void dm_view_free(struct dm_host *h, uint32_t id) {
    if (claim(h, &h->vmas[id], DM_REF_DROPPING)) {
        DM_CRASH_POINT(view_dropping);
        dm_ref_release(h, h->vmas[id].ref);
    }
    dm_vma_delete(h, id);
}

/* create_ref(move=True): hand out the Ref that is there. No count and no page-table entry changes, nor does the Ref's word,
 * but it is written once more. */
int dm_view_move(struct dm_host *h, uint32_t id, struct dm_ref_wire *out, struct dm_error *e) {
    const struct dm_vma *v = &h->vmas[id];
    if (h->strict && v->page < h->nr_frames) {
        int s = dm_protect(h, v->page, v->nr_pages, e);
        if (s)
            return s;
    }
    dm_ref_wire_of(h, v->ref, out);
    if (!claim(h, v, DM_REF_LIVE))
        return dm_fail(e, DM_ERR_FENCED, "the coordinator declared this host dead");
    DM_CRASH_POINT(view_moved);
    DM_COUNT(h, bytes_referenced, v->length);
    dm_vma_delete(h, id);
    DM_COUNT(h, move_ref_calls, 1);
    return DM_OK;
}
