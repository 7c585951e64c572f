/*
 * test_vma.c - mappings and the address space of the VMA area, against models that are an array and no more.
 */
#include <stdlib.h>
#include <string.h>

#include "by_hand.h"
#include "check.h"

static struct dm_device dev;
static struct dm_host *h;
static struct dm_error err;

static uint32_t first_area_page(void) { return 2 * h->nr_frames; }

/* ---------------------------------------------------------------- mappings */

static void an_address_finds_its_mapping_by_any_of_its_pages(void) {
    uint32_t a = dm_vma_new(h, 3, 2, 5000, 100, DM_VMA_EXCLUSIVE);
    uint32_t b = dm_vma_new(h, 5, 1, 1, 0, 0);
    EXPECT(a != DM_NO_VMA && b != DM_NO_VMA && a != b);
    EXPECT_EQ(dm_vma_at(h, dm_addr_of(h, 3) - 1), DM_NO_VMA);
    EXPECT_EQ(dm_vma_at(h, dm_addr_of(h, 3)), a);
    EXPECT_EQ(dm_vma_at(h, dm_addr_of(h, 5) - 1), a);
    EXPECT_EQ(dm_vma_at(h, dm_addr_of(h, 5)), b);
    EXPECT_EQ(dm_vma_at(h, dm_addr_of(h, 6)), DM_NO_VMA);
    const struct dm_vma *v = &h->vmas[a];
    EXPECT(v->page == 3 && v->nr_pages == 2 && v->length == 5000 && v->page_offset == 100);
    EXPECT(v->flags == (DM_VMA_EXCLUSIVE | DM_VMA_USED) && !v->buffer && !v->reserved);
    dm_vma_delete(h, a);
    EXPECT_EQ(dm_vma_at(h, dm_addr_of(h, 4)), DM_NO_VMA);
    EXPECT_EQ(dm_vma_at(h, dm_addr_of(h, 5)), b);
    dm_vma_delete(h, b);
}

static void addresses_outside_the_views_have_no_mapping(void) {
    uint32_t last = h->nr_ptes - 1, a = dm_vma_new(h, 0, 1, 1, 0, 0),
             b = dm_vma_new(h, last, 1, 1, 0, 0);
    EXPECT_EQ(dm_vma_at(h, dm_addr_of(h, 0) - 1), DM_NO_VMA);
    EXPECT_EQ(dm_vma_at(h, dm_addr_of(h, 0)), a);
    EXPECT_EQ(dm_vma_at(h, dm_addr_of(h, last + 1) - 1), b);
    EXPECT_EQ(dm_vma_at(h, dm_addr_of(h, last + 1)), DM_NO_VMA);
    EXPECT_EQ(dm_vma_at(h, 0), DM_NO_VMA);
    EXPECT_EQ(dm_vma_at(h, UINT64_MAX), DM_NO_VMA);
    /* As far away as a page number of 32 bits can count, and a page further. */
    EXPECT_EQ(dm_vma_at(h, dm_addr_of(h, 0) + ((uint64_t)1 << (32 + h->page_shift))), DM_NO_VMA);
    dm_vma_delete(h, a);
    dm_vma_delete(h, b);
}

static void slots_are_reused_last_first_and_run_out(void) {
    uint32_t before = h->nr_vma_slots, ids[6];
    h->nr_vma_slots = h->nr_vmas + 1; /* none but those used before */
    uint32_t free_slots = 0;
    for (uint32_t id = h->vma_free; id; id = h->vmas[id].next_free)
        free_slots++;
    EXPECT_EQ(free_slots, h->nr_vmas);
    h->nr_vma_slots = h->nr_vmas + 3; /* two more */
    uint32_t n = free_slots + 2;
    EXPECT(n <= 6);
    for (uint32_t i = 0; i < n; i++) {
        ids[i] = dm_vma_new(h, i, 1, 1, 0, 0);
        EXPECT(ids[i] != DM_NO_VMA && ids[i] < h->nr_vma_slots);
        for (uint32_t k = 0; k < i; k++)
            EXPECT(ids[k] != ids[i]);
    }
    EXPECT_EQ(dm_vma_new(h, n, 1, 1, 0, 0), DM_NO_VMA);
    EXPECT_EQ(h->vma_of[n], DM_NO_VMA);
    dm_vma_delete(h, ids[0]);
    dm_vma_delete(h, ids[1]);
    EXPECT_EQ(dm_vma_new(h, 0, 1, 1, 0, 0), ids[1]);
    EXPECT_EQ(dm_vma_new(h, 1, 1, 1, 0, 0), ids[0]);
    EXPECT_EQ(dm_vma_new(h, n, 1, 1, 0, 0), DM_NO_VMA);
    for (uint32_t i = 0; i < n; i++)
        dm_vma_delete(h, h->vma_of[i]);
    h->nr_vma_slots = before;
}

static void a_new_mapping_knows_nothing_of_the_slots_last_one(void) {
    uint32_t id = dm_vma_new(h, 1, 4, 4, 4, DM_VMA_DIRTY | DM_VMA_HOLES);
    struct dm_vma *v = &h->vmas[id];
    v->next_fault = 7;
    v->fault_window = 64;
    v->buffer = &dev;
    h->nr_reserved = 10;
    v->reserved = 3;
    dm_vma_delete(h, id);
    EXPECT(!(v->flags & DM_VMA_USED) && !v->buffer);
    EXPECT_EQ(h->nr_reserved, 7); /* its promise ends with it */
    EXPECT_EQ(h->entry->nr_reserved, 7);
    h->nr_reserved = h->entry->nr_reserved = 0;
    EXPECT_EQ(dm_vma_new(h, 1, 1, 1, 0, 0), id);
    EXPECT(v->flags == DM_VMA_USED && v->next_fault == DM_NO_FRAME && v->fault_window == 1);
    EXPECT(!v->buffer && !v->reserved);
    dm_vma_delete(h, id);
}

static void random_mappings_agree_with_a_naive_model(void) {
    struct rng r = rng_start();
    uint32_t *model = calloc(h->nr_ptes, sizeof *model); /* id by page */
    EXPECT(model);
    for (uint32_t n = 0, steps = CHECK_SANITIZED ? 5000 : 40000; n < steps; n++) {
        uint32_t page = rng_below(&r, h->nr_ptes), most = 1 + rng_below(&r, 40), nr = 0;
        if (model[page]) {
            uint32_t id = model[page];
            EXPECT_EQ(dm_vma_at(h, dm_addr_of(h, page) + rng_below(&r, BY_HAND_PAGE)), id);
            dm_vma_delete(h, id);
            for (uint32_t i = 0; i < h->nr_ptes; i++)
                model[i] = model[i] == id ? 0 : model[i];
        } else {
            while (nr < most && page + nr < h->nr_ptes && !model[page + nr])
                nr++;
            uint32_t id = dm_vma_new(h, page, nr, nr, 0, 0);
            EXPECT(id != DM_NO_VMA);
            for (uint32_t i = 0; i < h->nr_ptes; i++)
                EXPECT(model[i] != id);
            for (uint32_t i = 0; i < nr; i++)
                model[page + i] = id;
        }
        if (n % 64 == 0)
            EXPECT(!memcmp(model, h->vma_of, h->nr_ptes * sizeof *model));
    }
    EXPECT(!memcmp(model, h->vma_of, h->nr_ptes * sizeof *model));
    for (uint32_t i = 0; i < h->nr_ptes; i++)
        if (h->vma_of[i])
            dm_vma_delete(h, h->vma_of[i]);
    free(model);
}

/* ---------------------------------------------------------------- the VMA area */

/* The extents are exactly the free pages of the model: sorted, not empty, nowhere touching. */
static void compare_extents(const bool *taken) {
    uint32_t at = 0, nr_pages = h->nr_ptes - first_area_page();
    for (uint32_t i = 0; i < h->nr_extents; i++) {
        const struct dm_extent *x = &h->extents[i];
        EXPECT(x->nr > 0);
        EXPECT(x->page >= first_area_page() + at);
        for (; at < x->page - first_area_page(); at++)
            EXPECT(taken[at]);
        for (; at < x->page + x->nr - first_area_page(); at++)
            EXPECT(!taken[at]);
        EXPECT(at == nr_pages || taken[at]);
    }
    for (; at < nr_pages; at++)
        EXPECT(taken[at]);
}

static uint32_t first_fit(const bool *taken, uint32_t nr) {
    uint32_t run = 0, nr_pages = h->nr_ptes - first_area_page();
    for (uint32_t i = 0; i < nr_pages; i++) {
        run = taken[i] ? 0 : run + 1;
        if (run == nr)
            return first_area_page() + i + 1 - nr;
    }
    return DM_NO_FRAME;
}

static void random_extents_agree_with_a_naive_model(void) {
    struct rng r = rng_start();
    uint32_t nr_pages = h->nr_ptes - first_area_page(), most = nr_pages / 8;
    bool *taken = calloc(nr_pages, sizeof *taken);
    struct dm_extent *held = calloc(nr_pages, sizeof *held);
    uint32_t nr_held = 0;
    EXPECT(taken && held);
    for (uint32_t n = 0, steps = CHECK_SANITIZED ? 4000 : 30000; n < steps; n++) {
        snprintf(check_doing, sizeof check_doing, "step %u", n);
        if (n % 1000 == 0) /* small pieces, large pieces */
            most = 1 + rng_below(&r, nr_pages / (1u << rng_below(&r, 9)));
        if (nr_held && rng_below(&r, 16) < 7) {
            uint32_t i = rng_below(&r, nr_held);
            struct dm_extent x = held[i];
            held[i] = held[--nr_held];
            EXPECT_OK(dm_area_give(h, x.page, x.nr, &err), &err);
            memset(taken + x.page - first_area_page(), 0, x.nr);
        } else {
            uint32_t nr = 1 + rng_below(&r, most), want = first_fit(taken, nr);
            EXPECT_EQ(dm_area_take(h, nr), want);
            if (want != DM_NO_FRAME) {
                held[nr_held++] = (struct dm_extent){want, nr};
                memset(taken + want - first_area_page(), 1, nr);
            }
        }
        compare_extents(taken);
    }
    check_doing[0] = 0;
    while (nr_held--)
        EXPECT_OK(dm_area_give(h, held[nr_held].page, held[nr_held].nr, &err), &err);
    EXPECT(h->nr_extents == 1 && h->extents[0].nr == nr_pages);
    free(taken);
    free(held);
}

static void the_area_can_be_taken_to_its_last_page(void) {
    uint32_t nr_pages = h->nr_ptes - first_area_page();
    EXPECT_EQ(dm_area_take(h, nr_pages + 1), DM_NO_FRAME);
    EXPECT_EQ(dm_area_take(h, nr_pages), first_area_page());
    EXPECT_EQ(dm_area_take(h, 1), DM_NO_FRAME);
    EXPECT_EQ(h->nr_extents, 0);
    EXPECT_OK(dm_area_give(h, first_area_page(), nr_pages, &err), &err);
    EXPECT_EQ(h->nr_extents, 1);
}

static void the_table_holds_the_worst_fragmentation_there_can_be(void) {
    uint32_t nr_pages = h->nr_ptes - first_area_page();
    for (uint32_t i = 0; i < nr_pages; i++)
        EXPECT_EQ(dm_area_take(h, 1), first_area_page() + i);
    for (uint32_t i = 0; i < nr_pages; i += 2)
        EXPECT_OK(dm_area_give(h, first_area_page() + i, 1, &err), &err);
    EXPECT_EQ(h->nr_extents, (nr_pages + 1) / 2);
    EXPECT_EQ(dm_area_take(h, 2), DM_NO_FRAME);
    for (uint32_t i = 1; i < nr_pages; i += 2)
        EXPECT_OK(dm_area_give(h, first_area_page() + i, 1, &err), &err);
    EXPECT_EQ(h->nr_extents, 1);
}

static void a_full_table_refuses_and_keeps_what_it_has(void) {
    uint32_t before = h->max_extents, page = dm_area_take(h, 5);
    h->max_extents = 1;
    EXPECT_EQ(dm_area_give(h, page + 1, 1, &err), DM_ERR_NO_ADDRESS_SPACE);
    EXPECT_EQ(h->nr_extents, 1);
    EXPECT_EQ(h->extents[0].page, page + 5);
    EXPECT_OK(dm_area_give(h, page + 4, 1, &err), &err); /* one that merges needs no room */
    h->max_extents = before;
    EXPECT_OK(dm_area_give(h, page, 4, &err), &err);
    EXPECT_EQ(h->nr_extents, 1);
}

int main(void) {
    by_hand_device(&dev, 100, 1, 8);
    by_hand_activate(&dev, 1);
    h = by_hand_host(&dev, 1);
    HOLDS(an_address_finds_its_mapping_by_any_of_its_pages);
    HOLDS(addresses_outside_the_views_have_no_mapping);
    HOLDS(slots_are_reused_last_first_and_run_out);
    HOLDS(a_new_mapping_knows_nothing_of_the_slots_last_one);
    HOLDS(random_mappings_agree_with_a_naive_model);
    HOLDS(random_extents_agree_with_a_naive_model);
    HOLDS(the_area_can_be_taken_to_its_last_page);
    HOLDS(the_table_holds_the_worst_fragmentation_there_can_be);
    HOLDS(a_full_table_refuses_and_keeps_what_it_has);
    by_hand_host_free(h);
    dm_device_close(&dev);
    return 0;
}
