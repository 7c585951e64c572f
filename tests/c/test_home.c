/*
 * test_home.c - frames go home: where a received run is freed to, what hints may say, and what is found without them.
 * Deaths in their midst: scenes.c.
 */
#include <string.h>

#include "by_hand.h"
#include "check.h"

#define NR_FRAMES 256u
#define NR_REFS 64u
#define PAGE BY_HAND_PAGE
#define GRANTED 100u

static struct dm_device dev;
static struct dm_host *a, *b;
static struct dm_error err;

static struct dm_ref_wire moved(struct dm_host *h, uint32_t nr) {
    struct dm_ref_wire w;
    uint32_t id = 0;
    EXPECT_OK(dm_ralloc(h, nr * PAGE, 0, false, &id, &err), &err);
    EXPECT_OK(dm_move_ref(h, id, false, &w, &err), &err);
    return w;
}

static void viewed_and_freed(struct dm_host *h, const struct dm_ref_wire *w) {
    uint32_t id = 0;
    EXPECT_OK(dm_view_ref(h, w, false, &id, &err), &err);
    EXPECT_OK(dm_rfree(h, id, &err), &err);
}

static void mapped_and_freed(struct dm_host *h, const struct dm_ref_wire *w) {
    uint32_t id = 0;
    EXPECT_OK(dm_map_ref(h, w, 0, false, &id, &err), &err);
    EXPECT_OK(dm_rfree(h, id, &err), &err);
}

static void dropped(struct dm_host *h, const struct dm_ref_wire *w) {
    EXPECT_OK(dm_ref_drop(h, w, &err), &err);
}

static uint32_t first_of(const struct dm_ref_wire *w) { return dev.refs[w->entry].runs[0].pfn; }

static void expect_at_home(void) {
    dm_welcome_home(a);
    EXPECT_EQ(a->free.nr_free, GRANTED);
    EXPECT_EQ(b->free.nr_free, 0);
    EXPECT_EQ(a->entry->homecoming.nr_frames, 0);
    EXPECT_EQ(by_hand_exact(&dev)->free_of[1], GRANTED);
}

/* ---------------------------------------------------------------- the way home */

static void a_run_goes_home_however_it_is_freed(void) {
    void (*const ways[])(struct dm_host *, const struct dm_ref_wire *) = {
        viewed_and_freed, mapped_and_freed, dropped};
    for (unsigned i = 0; i < 3; i++) {
        struct dm_ref_wire w = moved(a, 7);
        uint32_t pfn = first_of(&w);
        ways[i](b, &w);
        EXPECT_EQ(b->free.nr_free, 0);
        EXPECT(dm_frame_coming(dev.frames[pfn]) && dm_frame_owner(dev.frames[pfn]) == a->id);
        EXPECT_EQ(by_hand_exact(&dev)->free_of[1], GRANTED); /* also before it is taken in */
        EXPECT_EQ(a->entry->homecoming.nr_frames, 7);
        w = moved(a, 7); /* the same run, while it is warm */
        EXPECT_EQ(first_of(&w), pfn);
        EXPECT(!dm_frame_coming(dev.frames[pfn]));
        dropped(a, &w);
        expect_at_home();
    }
}

static void what_one_host_frees_of_its_own_stays(void) {
    uint64_t sent = a->entry->counters[DM_CNT_frames_sent_home];
    struct dm_ref_wire w = moved(a, 3);
    viewed_and_freed(a, &w);
    EXPECT_EQ(a->entry->counters[DM_CNT_frames_sent_home], sent);
    expect_at_home();
}

static void frames_stay_when_home_is_not_there(void) {
    struct dm_ref_wire w = moved(a, 5);
    EXPECT_OK(dm_ref_accept(b, &w, false, &err), &err);
    a->entry->state = DM_HOST_DEAD;
    viewed_and_freed(b, &w);
    a->entry->state = DM_HOST_ACTIVE;
    EXPECT_EQ(b->free.nr_free, 5);
    uint32_t id = 0;
    EXPECT_OK(dm_ralloc(b, 5 * PAGE, 0, false, &id, &err), &err);
    EXPECT_OK(dm_move_ref(b, id, false, &w, &err), &err);
    a->nr_out = b->nr_out = 0;
    dropped(a, &w); /* to b */
    w = moved(b, 5);
    b->nr_out = 0;
    dev.refs[w.entry].creator = a->id;
    viewed_and_freed(b, &w);
    expect_at_home();
}

static uint64_t sent_home(void) {
    return a->entry->counters[DM_CNT_frames_sent_home] +
           b->entry->counters[DM_CNT_frames_sent_home];
}

static void who_has_given_away_as_many_keeps_them(void) {
    struct dm_ref_wire w = moved(a, 6);
    EXPECT_OK(dm_ref_accept(b, &w, false, &err), &err);
    a->entry->state = DM_HOST_DEAD;
    viewed_and_freed(b, &w);
    a->entry->state = DM_HOST_ACTIVE;
    uint64_t sent = sent_home();
    for (unsigned i = 0; i < 3; i++) {
        w = moved(b, 6);
        mapped_and_freed(a, &w); /* for those that b got */
        EXPECT_EQ(a->free.nr_free, GRANTED);
        EXPECT_EQ(a->nr_out, 0);
        w = moved(a, 6);
        viewed_and_freed(b, &w);
        EXPECT_EQ(b->free.nr_free, 6);
        EXPECT_EQ(b->nr_out, 0);
    }
    EXPECT_EQ(sent_home(), sent);
    w = moved(b, 6);
    b->nr_out = 5; /* fewer than come */
    dropped(a, &w);
    w = moved(a, 6);
    viewed_and_freed(b, &w);
    EXPECT_EQ(sent_home(), sent + 6);
    b->nr_out = 0;
    expect_at_home();
}

/* ---------------------------------------------------------------- hints */

static void more_runs_than_hints_are_found_by_a_search(void) {
    enum { NR = DM_HINTS + 10 };
    struct dm_ref_wire all[NR];
    for (unsigned i = 0; i < NR; i++)
        all[i] = moved(a, 2);
    for (unsigned i = 0; i < NR; i++)
        viewed_and_freed(b, &all[i]);
    dm_welcome_home(a);
    EXPECT_EQ(a->free.nr_free, GRANTED - 2 * 10);
    EXPECT_EQ(a->entry->homecoming.nr_frames, 2 * 10);
    EXPECT(dm_search_home(a));
    EXPECT(!dm_search_home(a)); /* there is nothing more */
    expect_at_home();
}

static void hints_are_not_believed(void) {
    struct dm_ref_wire w = moved(a, 4), held = moved(a, 4);
    viewed_and_freed(b, &w);
    const uint64_t lies[] = {
        0xffffffffffffffffull,
        1ull << 32 | NR_FRAMES,
        (uint64_t)NR_FRAMES << 32 | 1,
        4ull << 32 | first_of(&held),               /* in use */
        4ull << 32 | (NR_FRAMES - 4),               /* the pool's */
        (uint64_t)NR_FRAMES << 32,                  /* everything */
        4ull << 32 | dev.refs[w.entry].runs[0].pfn, /* a second time */
        5,
    };
    for (unsigned i = 0; i < sizeof lies / sizeof lies[0]; i++)
        a->entry->homecoming.hints[(i + 7) % DM_HINTS] = lies[i];
    a->entry->homecoming.nr_hints++;
    dm_welcome_home(a);
    EXPECT_EQ(a->free.nr_free, GRANTED - 4);
    dropped(a, &held);
    expect_at_home();
}

int main(void) {
    by_hand_device(&dev, NR_FRAMES, 2, NR_REFS);
    by_hand_activate(&dev, 1);
    by_hand_activate(&dev, 2);
    a = by_hand_host(&dev, 1);
    b = by_hand_host(&dev, 2);
    a->batch_min = 8;
    dm_lock(a);
    dm_lock(b);
    by_hand_grant(a, 0, GRANTED);
    HOLDS(a_run_goes_home_however_it_is_freed);
    HOLDS(what_one_host_frees_of_its_own_stays);
    HOLDS(frames_stay_when_home_is_not_there);
    HOLDS(who_has_given_away_as_many_keeps_them);
    HOLDS(more_runs_than_hints_are_found_by_a_search);
    HOLDS(hints_are_not_believed);
    dm_unlock(a);
    dm_unlock(b);
    by_hand_host_free(b);
    by_hand_host_free(a);
    dm_device_close(&dev);
    return 0;
}
