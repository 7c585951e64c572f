/*
 * vma.c - mappings (one per ralloc, map_ref or view_ref) and the address space of the VMA area.
 *
 * Every page of a mapping names it in vma_of, so an address finds its mapping in one load, and the fault handler its bounds.
 * Slots are reused last-in first-out; slot 0 means none. The area's free address ranges are kept sorted and
 * merged; they are few, for Refs that need the area are.
 *
 * Context: host lock held; never blocks.
 */
#include <string.h>

#include "host.h"

uint32_t dm_vma_new(struct dm_host *h, uint32_t page, uint32_t nr_pages, uint64_t length,
                    uint32_t page_offset, uint32_t flags) {
    uint32_t id = h->vma_free;
    if (id)
        h->vma_free = h->vmas[id].next_free;
    else if (h->nr_vmas + 1 < h->nr_vma_slots)
        id = ++h->nr_vmas;
    else
        return DM_NO_VMA;
    h->vmas[id] = (struct dm_vma){.page = page,
                                  .nr_pages = nr_pages,
                                  .length = length,
                                  .page_offset = page_offset,
                                  .flags = flags | DM_VMA_USED,
                                  .next_fault = DM_NO_FRAME,
                                  .fault_window = 1};
    dm_fill(h->vma_of + page, id, nr_pages);
    return id;
}

void dm_vma_delete(struct dm_host *h, uint32_t id) {
    struct dm_vma *v = &h->vmas[id];
    memset(h->vma_of + v->page, 0, v->nr_pages * sizeof h->vma_of[0]);
    h->nr_reserved -= v->reserved;
    h->entry->nr_reserved = h->nr_reserved;
    v->flags = 0;
    v->buffer = NULL;
    v->next_free = h->vma_free;
    h->vma_free = id;
}

/* The mapping that addr lies in, DM_NO_VMA when none. */
uint32_t dm_vma_at(const struct dm_host *h, uint64_t addr) {
    return dm_addr_inside(h, addr) ? h->vma_of[dm_page_of(h, addr)] : DM_NO_VMA;
}

/* First fit. Returns the first page or DM_NO_FRAME. */
uint32_t dm_area_take(struct dm_host *h, uint32_t nr) {
    for (uint32_t i = 0; i < h->nr_extents; i++) {
        struct dm_extent *x = &h->extents[i];
        if (x->nr < nr)
            continue;
        uint32_t page = x->page;
        x->page += nr;
        x->nr -= nr;
        if (x->nr == 0) {
            h->nr_extents--;
            memmove(x, x + 1, (h->nr_extents - i) * sizeof *x);
        }
        return page;
    }
    return DM_NO_FRAME;
}

static uint32_t extent_after(const struct dm_host *h, uint32_t page) {
    uint32_t lo = 0, hi = h->nr_extents;
    while (lo < hi) {
        uint32_t mid = (lo + hi) / 2;
        if (h->extents[mid].page < page)
            lo = mid + 1;
        else
            hi = mid;
    }
    return lo;
}

/* Give back a range whose pages are in their normal state. */
int dm_area_give(struct dm_host *h, uint32_t page, uint32_t nr, struct dm_error *e) {
    uint32_t i = extent_after(h, page);
    bool left = i > 0 && h->extents[i - 1].page + h->extents[i - 1].nr == page;
    bool right = i < h->nr_extents && page + nr == h->extents[i].page;
    if (left && right) {
        h->extents[i - 1].nr += nr + h->extents[i].nr;
        h->nr_extents--;
        memmove(&h->extents[i], &h->extents[i + 1], (h->nr_extents - i) * sizeof h->extents[0]);
    } else if (left) {
        h->extents[i - 1].nr += nr;
    } else if (right) {
        h->extents[i].page = page;
        h->extents[i].nr += nr;
    } else {
        if (h->nr_extents == h->max_extents)
            return dm_fail(e, DM_ERR_NO_ADDRESS_SPACE, "the VMA area is too fragmented");
        memmove(&h->extents[i + 1], &h->extents[i], (h->nr_extents - i) * sizeof h->extents[0]);
        h->extents[i] = (struct dm_extent){page, nr};
        h->nr_extents++;
    }
    return DM_OK;
}
