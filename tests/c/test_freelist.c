/*
 * test_freelist.c - the free list alone: each kind of frame and each function, then all of them at random against
 * a model that knows only which frames are in the list and which of those are displaced.
 */
#include <stdbool.h>
#include <string.h>

#include "check.h"
#include "freelist.h"

static struct dm_freelist list_of(uint32_t nr_frames) {
    struct dm_freelist fl;
    EXPECT_EQ(dm_freelist_init(&fl, nr_frames), 0);
    return fl;
}

static void expect_taken(struct dm_freelist *fl, uint32_t nr, uint32_t want) {
    uint32_t pfn = DM_NO_FRAME;
    EXPECT(dm_freelist_take(fl, nr, &pfn));
    EXPECT_EQ(pfn, want);
}

static void expect_upto(struct dm_freelist *fl, uint32_t nr, uint32_t want_pfn, uint32_t want_nr) {
    uint32_t pfn = DM_NO_FRAME;
    EXPECT_EQ(dm_freelist_take_upto(fl, nr, &pfn), want_nr);
    EXPECT_EQ(pfn, want_pfn);
}

static void expect_evicted(struct dm_freelist *fl, uint32_t nr, uint32_t want_pfn,
                           uint32_t want_nr) {
    uint32_t pfn = DM_NO_FRAME;
    EXPECT_EQ(dm_freelist_evict(fl, nr, &pfn), want_nr);
    EXPECT_EQ(pfn, want_pfn);
}

/* ---------------------------------------------------------------- one at a time */

static void an_empty_list_gives_nothing(void) {
    struct dm_freelist fl = list_of(100);
    uint32_t pfn;
    EXPECT(!dm_freelist_take(&fl, 1, &pfn));
    EXPECT(!dm_freelist_take(&fl, 0, &pfn));
    EXPECT(!dm_freelist_take(&fl, 101, &pfn));
    EXPECT_EQ(dm_freelist_take_upto(&fl, 5, &pfn), 0);
    EXPECT_EQ(dm_freelist_evict(&fl, 5, &pfn), 0);
    dm_freelist_vacated(&fl, 7);
    for (uint32_t i = 0; i < 100; i++)
        EXPECT(!dm_freelist_has(&fl, i));
    EXPECT_EQ(fl.nr_free, 0);
    dm_freelist_destroy(&fl);
}

static void a_full_list_gives_every_length_up_to_all(void) {
    const uint32_t sizes[] = {1, 2, 63, 64, 65, 127, 128, 129, 1000};
    for (unsigned i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
        uint32_t n = sizes[i], pfn;
        struct dm_freelist fl = list_of(n);
        dm_freelist_put_cold(&fl, 0, n);
        for (uint32_t nr = 1; nr <= n; nr++) {
            EXPECT(dm_freelist_take(&fl, nr, &pfn));
            EXPECT(pfn + nr <= n);
            EXPECT_EQ(fl.nr_free, n - nr);
            dm_freelist_put(&fl, pfn, nr);
        }
        EXPECT(!dm_freelist_take(&fl, n + 1, &pfn));
        EXPECT_EQ(fl.nr_free, n);
        dm_freelist_destroy(&fl);
    }
}

static void a_run_freed_last_is_taken_back_first_if_its_length_fits(void) {
    struct dm_freelist fl = list_of(1000);
    dm_freelist_put_cold(&fl, 500, 100);
    dm_freelist_put(&fl, 10, 4);
    dm_freelist_put(&fl, 20, 4);
    dm_freelist_put(&fl, 30, 5);
    expect_taken(&fl, 4, 20);
    expect_taken(&fl, 4, 10);
    expect_taken(&fl, 4, 500);
    expect_taken(&fl, 5, 30);
    dm_freelist_destroy(&fl);
}

static void freed_runs_that_lie_side_by_side_make_one_run(void) {
    struct dm_freelist fl = list_of(1000);
    for (uint32_t i = 0; i < 8; i++)
        dm_freelist_put(&fl, 64 + 8 * (7 - i), 8);
    expect_taken(&fl, 64, 64);
    EXPECT_EQ(fl.nr_free, 0);
    dm_freelist_destroy(&fl);
}

static void more_freed_runs_than_the_quick_list_holds_lose_none(void) {
    enum { RUNS = 5 * DM_QUICK_RUNS };
    struct dm_freelist fl = list_of(3 * RUNS);
    for (uint32_t i = 0; i < RUNS; i++)
        dm_freelist_put(&fl, 3 * i, 2);
    EXPECT_EQ(fl.nr_free, 2 * RUNS);
    for (uint32_t i = 0; i < 3 * RUNS; i++)
        EXPECT_EQ(dm_freelist_has(&fl, i), i % 3 != 2);
    for (uint32_t i = 0, pfn; i < RUNS; i++)
        EXPECT(dm_freelist_take(&fl, 2, &pfn) && pfn % 3 == 0);
    EXPECT_EQ(fl.nr_free, 0);
    dm_freelist_destroy(&fl);
}

static void the_search_goes_on_behind_the_last_run_and_wraps_around(void) {
    struct dm_freelist fl = list_of(200);
    dm_freelist_put_cold(&fl, 0, 200);
    expect_taken(&fl, 50, 0);
    expect_taken(&fl, 50, 50);
    dm_freelist_put_cold(&fl, 0, 40);
    expect_taken(&fl, 90, 100); /* 190 .. 199 are left behind it */
    expect_taken(&fl, 20, 0);
    expect_taken(&fl, 20, 20);
    expect_taken(&fl, 10, 190);
    EXPECT_EQ(fl.nr_free, 0);
    dm_freelist_destroy(&fl);
}

static void a_run_that_lies_across_the_cursor_is_found(void) {
    struct dm_freelist fl = list_of(256);
    dm_freelist_put_cold(&fl, 0, 256);
    expect_taken(&fl, 100, 0);
    dm_freelist_put_cold(&fl, 60, 40); /* the cursor is at 100, in the middle of 60 .. 255 */
    expect_taken(&fl, 196, 60);
    dm_freelist_destroy(&fl);
}

static void displaced_frames_serve_copies_first_and_runs_never(void) {
    struct dm_freelist fl = list_of(300);
    uint32_t pfn;
    for (uint32_t i = 100; i < 104; i++)
        dm_freelist_put_displaced(&fl, i);
    dm_freelist_put_cold(&fl, 10, 2);
    EXPECT_EQ(fl.nr_free, 6);
    EXPECT_EQ(fl.nr_displaced, 4);
    EXPECT(!dm_freelist_take(&fl, 3, &pfn));
    expect_upto(&fl, 3, 100, 3);
    expect_upto(&fl, 3, 103, 1);
    expect_upto(&fl, 3, 10, 2);
    EXPECT_EQ(fl.nr_free, 0);
    dm_freelist_destroy(&fl);
}

static void a_displaced_frame_is_ordinary_once_its_page_is_vacant(void) {
    struct dm_freelist fl = list_of(300);
    dm_freelist_put_displaced(&fl, 70);
    dm_freelist_put_displaced(&fl, 71);
    dm_freelist_vacated(&fl, 72); /* not in the list */
    dm_freelist_vacated(&fl, 70);
    EXPECT_EQ(fl.nr_free, 2);
    EXPECT_EQ(fl.nr_displaced, 1);
    expect_taken(&fl, 1, 70);
    dm_freelist_vacated(&fl, 71);
    dm_freelist_vacated(&fl, 71); /* twice is once */
    EXPECT_EQ(fl.nr_free, 1);
    expect_taken(&fl, 1, 71);
    dm_freelist_destroy(&fl);
}

static void take_upto_settles_for_less(void) {
    struct dm_freelist fl = list_of(300);
    dm_freelist_put_cold(&fl, 5, 3);
    dm_freelist_put(&fl, 100, 1);
    uint32_t pfn, got, total = 0;
    while ((got = dm_freelist_take_upto(&fl, 8, &pfn)))
        total += got;
    EXPECT_EQ(total, 4);
    dm_freelist_destroy(&fl);
}

static void asking_for_none_gives_none(void) {
    struct dm_freelist fl = list_of(300);
    uint32_t pfn;
    for (int displaced = 0; displaced < 2; displaced++) {
        if (displaced)
            dm_freelist_put_displaced(&fl, 9);
        else
            dm_freelist_put_cold(&fl, 5, 3);
        EXPECT(!dm_freelist_take(&fl, 0, &pfn));
        EXPECT_EQ(dm_freelist_take_upto(&fl, 0, &pfn), 0);
        EXPECT_EQ(dm_freelist_evict(&fl, 0, &pfn), 0);
        EXPECT_EQ(fl.nr_free, 3 + displaced);
    }
    dm_freelist_destroy(&fl);
}

static void eviction_spares_what_was_freed_last(void) {
    struct dm_freelist fl = list_of(300);
    dm_freelist_put(&fl, 10, 2);
    dm_freelist_put(&fl, 20, 2);
    dm_freelist_put(&fl, 30, 2);
    dm_freelist_put_cold(&fl, 200, 3);
    dm_freelist_put_displaced(&fl, 100);
    expect_evicted(&fl, 9, 100, 1);
    expect_evicted(&fl, 2, 200, 2);
    expect_evicted(&fl, 2, 202, 1);
    expect_evicted(&fl, 9, 10, 2);
    expect_taken(&fl, 2, 30);
    expect_taken(&fl, 2, 20);
    EXPECT_EQ(fl.nr_free, 0);
    dm_freelist_destroy(&fl);
}

/* ---------------------------------------------------------------- at random */

enum { ABSENT, ORDINARY, DISPLACED };

struct model {
    struct dm_freelist fl;
    uint8_t *is;
    uint32_t nr_frames;
};

static uint32_t counted(const struct model *m, uint8_t what) {
    uint32_t n = 0;
    for (uint32_t i = 0; i < m->nr_frames; i++)
        n += m->is[i] == what;
    return n;
}

/* Length of the run of frames alike that begins at pfn, at most max. */
static uint32_t run_at(const struct model *m, uint32_t pfn, uint8_t what, uint32_t max) {
    uint32_t n = 0;
    while (n < max && pfn + n < m->nr_frames && m->is[pfn + n] == what)
        n++;
    return n;
}

static bool has_run(const struct model *m, uint32_t nr) {
    for (uint32_t i = 0, n; i < m->nr_frames; i += n + 1)
        if ((n = run_at(m, i, ORDINARY, m->nr_frames)) >= nr)
            return true;
    return false;
}

static void remove_run(struct model *m, uint32_t pfn, uint32_t nr, uint8_t what) {
    EXPECT(pfn < m->nr_frames && nr <= m->nr_frames - pfn);
    EXPECT_EQ(run_at(m, pfn, what, nr), nr);
    memset(m->is + pfn, ABSENT, nr);
}

static void compare(const struct model *m) {
    uint32_t displaced = counted(m, DISPLACED);
    EXPECT_EQ(m->fl.nr_free, counted(m, ORDINARY) + displaced);
    EXPECT_EQ(m->fl.nr_displaced, displaced);
    for (uint32_t i = 0; i < m->nr_frames; i++)
        EXPECT_EQ(dm_freelist_has(&m->fl, i), m->is[i] != ABSENT);
}

/* Put back some of what is not in the list. */
static void give(struct model *m, struct rng *r) {
    uint32_t pfn = rng_below(r, m->nr_frames), most = 1 + rng_below(r, rng_below(r, 4) ? 8 : 200);
    uint32_t nr = run_at(m, pfn, ABSENT, most);
    if (!nr)
        return;
    switch (rng_below(r, 4)) {
    case 0:
        dm_freelist_put_cold(&m->fl, pfn, nr);
        memset(m->is + pfn, ORDINARY, nr);
        break;
    case 1:
        dm_freelist_put_displaced(&m->fl, pfn);
        m->is[pfn] = DISPLACED;
        break;
    default:
        dm_freelist_put(&m->fl, pfn, nr);
        memset(m->is + pfn, ORDINARY, nr);
    }
}

static void take_or_evict(struct model *m, struct rng *r, bool evict) {
    uint32_t nr = rng_below(r, rng_below(r, 4) ? 10 : 200), pfn = DM_NO_FRAME;
    uint32_t got =
        evict ? dm_freelist_evict(&m->fl, nr, &pfn) : dm_freelist_take_upto(&m->fl, nr, &pfn);
    if (nr == 0 || counted(m, ABSENT) == m->nr_frames)
        EXPECT_EQ(got, 0);
    else
        EXPECT(got >= 1 && got <= nr);
    if (got)
        remove_run(m, pfn, got, counted(m, DISPLACED) ? DISPLACED : ORDINARY);
}

static void step(struct model *m, struct rng *r) {
    uint32_t nr, pfn = rng_below(r, m->nr_frames);
    switch (rng_below(r, 10)) {
    case 0:
    case 1:
    case 2:
        nr = rng_below(r, rng_below(r, 4) ? 10 : m->nr_frames + 2);
        if (dm_freelist_take(&m->fl, nr, &pfn)) {
            EXPECT(nr > 0);
            remove_run(m, pfn, nr, ORDINARY);
        } else if (nr > 0) {
            EXPECT(!has_run(m, nr));
        }
        break;
    case 3:
        take_or_evict(m, r, false);
        break;
    case 4:
        take_or_evict(m, r, true);
        break;
    case 5:
        dm_freelist_vacated(&m->fl, pfn);
        if (m->is[pfn] == DISPLACED)
            m->is[pfn] = ORDINARY;
        break;
    default:
        give(m, r);
    }
}

static void random_steps_agree_with_a_naive_model(void) {
    const uint32_t sizes[] = {1, 2, 63, 64, 65, 128, 200, 1000};
    struct rng r = rng_start();
    uint32_t steps = check_slow() ? 400000 : CHECK_SANITIZED ? 4000 : 20000;
    for (unsigned i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
        struct model m = {list_of(sizes[i]), calloc(sizes[i], 1), sizes[i]};
        EXPECT(m.is);
        for (uint32_t n = 0; n < steps; n++) {
            snprintf(check_doing, sizeof check_doing, "%u frames, step %u", sizes[i], n);
            step(&m, &r);
            if (n % 16 == 0)
                compare(&m);
        }
        compare(&m);
        dm_freelist_destroy(&m.fl);
        free(m.is);
    }
    check_doing[0] = 0;
}

int main(void) {
    HOLDS(an_empty_list_gives_nothing);
    HOLDS(a_full_list_gives_every_length_up_to_all);
    HOLDS(a_run_freed_last_is_taken_back_first_if_its_length_fits);
    HOLDS(freed_runs_that_lie_side_by_side_make_one_run);
    HOLDS(more_freed_runs_than_the_quick_list_holds_lose_none);
    HOLDS(the_search_goes_on_behind_the_last_run_and_wraps_around);
    HOLDS(a_run_that_lies_across_the_cursor_is_found);
    HOLDS(displaced_frames_serve_copies_first_and_runs_never);
    HOLDS(a_displaced_frame_is_ordinary_once_its_page_is_vacant);
    HOLDS(take_upto_settles_for_less);
    HOLDS(asking_for_none_gives_none);
    HOLDS(eviction_spares_what_was_freed_last);
    HOLDS(random_steps_agree_with_a_naive_model);
    return 0;
}
