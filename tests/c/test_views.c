/*
 * test_views.c - views: what is written to the device for one, when its Ref's bytes are stale, when a mapping is made instead,
 * and what becomes of a view whose Ref was taken away. Deaths in their midst: scenes.c.
 */
#include <string.h>

#include "by_hand.h"
#include "check.h"

#define NR_FRAMES 64u
#define NR_REFS 8u
#define PAGE BY_HAND_PAGE

static struct dm_device dev;
static struct dm_host *a, *b;
static struct dm_error err;
static uint64_t words[NR_FRAMES];

static struct dm_ref_wire moved(struct dm_host *h, uint32_t nr) {
    struct dm_ref_wire w;
    uint32_t id = 0;
    EXPECT_OK(dm_ralloc(h, nr * PAGE, 0, false, &id, &err), &err);
    EXPECT_OK(dm_move_ref(h, id, false, &w, &err), &err);
    return w;
}

/* Another Ref to the same frames. */
static struct dm_ref_wire cloned(struct dm_host *h, struct dm_ref_wire *w) {
    struct dm_ref_wire copy;
    EXPECT_OK(dm_ref_clone(h, w, false, &copy, &err), &err);
    return copy;
}

static uint32_t viewed(struct dm_host *h, const struct dm_ref_wire *w) {
    uint32_t id = 0;
    EXPECT_OK(dm_view_ref(h, w, false, &id, &err), &err);
    EXPECT(h->vmas[id].flags & DM_VMA_VIEW);
    return id;
}

static void freed(struct dm_host *h, uint32_t id) { EXPECT_OK(dm_rfree(h, id, &err), &err); }
static void dropped(struct dm_host *h, const struct dm_ref_wire *w) {
    EXPECT_OK(dm_ref_drop(h, w, &err), &err);
}
static uint64_t state_of(const struct dm_ref_wire *w) { return dev.refs[w->entry].state; }

static void expect_no_page_table_entry(const struct dm_host *h) {
    for (uint32_t page = 0; page < h->nr_ptes; page++)
        EXPECT_EQ(h->pt[page], 0);
}

/* ---------------------------------------------------------------- what a view is */

static void a_view_changes_no_count_and_no_page_table_entry(void) {
    struct dm_ref_wire alone = moved(a, 4), w = moved(a, 3), copy = cloned(a, &w);
    memcpy(words, dev.frames, sizeof words);
    uint32_t one = viewed(b, &alone), two = viewed(b, &copy);
    expect_no_page_table_entry(b);
    EXPECT(!memcmp(words, dev.frames, sizeof words));
    EXPECT_EQ(b->vmas[one].page, dev.refs[alone.entry].runs[0].pfn);
    EXPECT_EQ(b->vmas[two].page, NR_FRAMES + dev.refs[w.entry].runs[0].pfn);
    EXPECT(b->vmas[one].flags & DM_VMA_EXCLUSIVE && !(b->vmas[two].flags & DM_VMA_EXCLUSIVE));
    EXPECT_EQ(by_hand_exact(&dev)->live_refs, 3);
    EXPECT_EQ(dm_ref_holder(state_of(&alone)), b->id);
    struct dm_ref_wire out;
    EXPECT_OK(dm_move_ref(b, one, false, &out, &err), &err);
    EXPECT(!memcmp(words, dev.frames, sizeof words));
    EXPECT(out.entry == alone.entry && dm_ref_flags(state_of(&out)) & DM_REF_EXCLUSIVE);
    freed(a, viewed(a, &out));
    freed(b, two);
    dropped(a, &w);
}

static void viewing_moves_the_generation_on_even_for_who_holds_the_ref(void) {
    struct dm_ref_wire w = moved(a, 2), out;
    uint32_t index;
    uint64_t word;
    for (int i = 0; i < 3; i++) {
        uint32_t id = viewed(a, &w);
        EXPECT_EQ(dm_ref_gen(state_of(&w)), w.generation + 1);
        EXPECT(!dm_ref_held(a, &w));
        EXPECT_EQ(dm_ref_check(a, &w, &index, &word, &err), DM_ERR_REF_CONSUMED);
        uint32_t second = 0;
        EXPECT_EQ(dm_view_ref(a, &w, true, &second, &err), DM_ERR_REF_CONSUMED);
        EXPECT_OK(dm_move_ref(a, id, false, &out, &err), &err);
        EXPECT(dm_ref_held(b, &out) && !dm_ref_held(b, &w));
        w = out;
    }
    dropped(a, &w);
}

static void a_ref_that_was_its_frames_last_holder_is_exclusive_once_viewed(void) {
    struct dm_ref_wire w = moved(a, 2), copy = cloned(a, &w), out;
    dropped(a, &copy);
    EXPECT(!(dm_ref_flags(state_of(&w)) & DM_REF_EXCLUSIVE));
    uint32_t id = viewed(b, &w);
    EXPECT(b->vmas[id].flags & DM_VMA_EXCLUSIVE && b->vmas[id].page < NR_FRAMES);
    EXPECT_OK(dm_move_ref(b, id, false, &out, &err), &err);
    EXPECT(dm_ref_flags(state_of(&out)) & DM_REF_EXCLUSIVE);
    dropped(b, &out);
}

static void a_view_becomes_the_mapping_that_map_ref_would_have_made(void) {
    for (int shared = 0; shared < 2; shared++) {
        struct dm_ref_wire w = moved(a, 5), copy = w;
        if (shared)
            copy = cloned(a, &w);
        uint32_t id = viewed(b, &copy), pfn = dev.refs[w.entry].runs[0].pfn;
        memcpy(words, dev.frames, sizeof words);
        dm_view_materialise(b, id);
        const struct dm_vma *v = &b->vmas[id];
        EXPECT(!(v->flags & DM_VMA_VIEW) && dm_ref_state(state_of(&copy)) == DM_REF_FREE);
        for (uint32_t i = 0; i < 5; i++)
            EXPECT_EQ(b->pt[v->page + i], DM_PTE_PRESENT | (i ? 0 : DM_PTE_HEAD) | (pfn + i));
        EXPECT(!memcmp(words, dev.frames, sizeof words));
        EXPECT_EQ(by_hand_exact(&dev)->mapped_pages, 5);
        freed(b, id);
        expect_no_page_table_entry(b);
        if (shared)
            dropped(a, &w);
    }
}

/* ---------------------------------------------------------------- what is no view */

/* But for its holder: whoever tried keeps it, under the same generation (put_ref_back in map.c). */
static void a_ref_that_cannot_be_viewed_at_once_stays_good(void) {
    struct dm_ref_wire w = moved(a, 4), copy = cloned(a, &w), third = cloned(a, &w);
    uint32_t id = 0, first = viewed(b, &copy);
    uint64_t before = state_of(&third);
    uint64_t after = dm_ref_pack(DM_REF_LIVE, dm_ref_flags(before), b->id, dm_ref_gen(before));
    EXPECT_EQ(dm_view_ref(b, &third, false, &id, &err),
              DM_AGAIN_BLOCKING); /* its pages are taken */
    EXPECT_EQ(dm_map_ref(b, &third, 0, false, &id, &err), DM_AGAIN_BLOCKING);
    EXPECT_EQ(state_of(&third), after);
    freed(b, first);
    freed(b, viewed(b, &third)); /* vacant again */
    dropped(a, &w);
}

static void a_ref_under_clone_is_busy_not_gone(void) {
    struct dm_ref_wire w = moved(a, 2);
    uint64_t *state = &dev.refs[w.entry].state, live = *state;
    uint32_t id;
    bool busy;
    *state = dm_ref_pack(DM_REF_CLONING, dm_ref_flags(live), a->id, dm_ref_gen(live));
    EXPECT_EQ(dm_view_ref(b, &w, true, &id, &err), DM_REF_BUSY);
    EXPECT(dm_ref_held(b, &w));
    EXPECT_EQ(dm_refs_drop(b, &w, 1, &busy), 0);
    EXPECT(busy);
    *state = live;
    EXPECT_EQ(dm_refs_drop(b, &w, 1, &busy), 1);
    EXPECT(!busy && !dm_ref_held(b, &w));
}

static void frames_freed_with_a_view_are_handed_out_again(void) {
    dm_welcome_home(a);
    dm_welcome_home(b);
    uint32_t of_a = a->free.nr_free, of_b = b->free.nr_free, id = 0;
    struct dm_ref_wire w = moved(a, 6), copy = cloned(a, &w);
    id = viewed(b, &copy);
    dropped(a, &w);
    EXPECT_EQ(b->free.nr_free, of_b);
    freed(b, id); /* the last holder, though viewed when shared */
    EXPECT(a->free.nr_free == of_a - 6 && b->free.nr_free == of_b + 6);
    EXPECT_EQ(b->free.nr_displaced, 0);
    EXPECT_OK(dm_ralloc(b, 6 * PAGE, 0, false, &id, &err), &err);
    EXPECT_EQ(b->vmas[id].page, dev.refs[w.entry].runs[0].pfn);
    freed(b, id);
    by_hand_exact(&dev);
}

/* ---------------------------------------------------------------- a host declared dead that lives on */

static void a_view_whose_ref_was_taken_away_is_gone_and_nothing_else(void) {
    struct dm_ref_wire w = moved(a, 3), out;
    uint32_t id = viewed(b, &w);
    uint64_t live = state_of(&w);
    dev.refs[w.entry].state = dm_ref_pack(DM_REF_FREE, 0, 0, dm_ref_gen(live) + 1);
    memcpy(words, dev.frames, sizeof words);
    EXPECT_EQ(dm_move_ref(b, id, false, &out, &err), DM_ERR_FENCED);
    EXPECT(b->vmas[id].flags & DM_VMA_VIEW);
    freed(b, id);
    EXPECT(!memcmp(words, dev.frames, sizeof words));
    EXPECT(dm_window_vacant(b, dev.refs[w.entry].runs[0].pfn, 3));
    dev.refs[w.entry].state = dm_ref_pack(DM_REF_DROPPING, 0, b->id, dm_ref_gen(live));
    dm_ref_release(b, w.entry);
}

int main(void) {
    by_hand_device(&dev, NR_FRAMES, 2, NR_REFS);
    by_hand_activate(&dev, 1);
    by_hand_activate(&dev, 2);
    a = by_hand_host(&dev, 1);
    b = by_hand_host(&dev, 2);
    dm_lock(a);
    dm_lock(b);
    by_hand_grant(a, 0, 48);
    by_hand_grant(b, 48, 16);
    HOLDS(a_view_changes_no_count_and_no_page_table_entry);
    HOLDS(viewing_moves_the_generation_on_even_for_who_holds_the_ref);
    HOLDS(a_ref_that_was_its_frames_last_holder_is_exclusive_once_viewed);
    HOLDS(a_view_becomes_the_mapping_that_map_ref_would_have_made);
    HOLDS(a_ref_that_cannot_be_viewed_at_once_stays_good);
    HOLDS(a_ref_under_clone_is_busy_not_gone);
    HOLDS(frames_freed_with_a_view_are_handed_out_again);
    HOLDS(a_view_whose_ref_was_taken_away_is_gone_and_nothing_else);
    EXPECT_EQ(by_hand_exact(&dev)->in_use, 0);
    dm_unlock(a);
    dm_unlock(b);
    by_hand_host_free(a);
    by_hand_host_free(b);
    dm_device_close(&dev);
    return 0;
}
