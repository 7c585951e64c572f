/*
 * test_refs.c - one Ref at a time: whose it is, when its bytes are stale, what they are worth when they were damaged or
 * forged, and what becomes of the counts.
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

static uint32_t allocated(struct dm_host *h, uint32_t nr) {
    uint32_t id = 0;
    EXPECT_OK(dm_ralloc(h, nr * PAGE, 0, false, &id, &err), &err);
    return id;
}

static struct dm_ref_wire moved(struct dm_host *h, uint32_t nr) {
    struct dm_ref_wire w;
    EXPECT_OK(dm_move_ref(h, allocated(h, nr), false, &w, &err), &err);
    return w;
}

static struct dm_ref_wire cloned(struct dm_host *h, struct dm_ref_wire *w) {
    struct dm_ref_wire copy;
    EXPECT_OK(dm_ref_clone(h, w, false, &copy, &err), &err);
    return copy;
}

static uint32_t mapped(struct dm_host *h, const struct dm_ref_wire *w) {
    uint32_t id = 0;
    EXPECT_OK(dm_map_ref(h, w, 0, true, &id, &err), &err);
    return id;
}

static void dropped(struct dm_host *h, const struct dm_ref_wire *w) {
    EXPECT_OK(dm_ref_drop(h, w, &err), &err);
}

static void freed(struct dm_host *h, uint32_t id) { EXPECT_OK(dm_rfree(h, id, &err), &err); }

/* Whatever is done with these bytes fails with that status, and changes nothing. */
static void expect_refused(const struct dm_ref_wire *w, int status) {
    struct dm_host *hosts[] = {a, b};
    uint64_t words[NR_FRAMES];
    struct dm_ref_entry refs[NR_REFS];
    memcpy(words, dev.frames, sizeof words);
    memcpy(refs, dev.refs, sizeof refs);
    for (int i = 0; i < 2; i++) {
        struct dm_ref_wire copy = *w, out;
        uint32_t id = 0;
        EXPECT_EQ(dm_ref_accept(hosts[i], &copy, false, &err), status);
        EXPECT_EQ(dm_ref_clone(hosts[i], &copy, false, &out, &err), status);
        EXPECT_EQ(dm_ref_drop(hosts[i], &copy, &err), status);
        EXPECT_EQ(dm_map_ref(hosts[i], &copy, 0, true, &id, &err), status);
        EXPECT_EQ(dm_map_ref(hosts[i], &copy, DM_MAP_COPY, true, &id, &err), status);
        EXPECT(!memcmp(&copy, w, sizeof copy));
    }
    EXPECT(!memcmp(words, dev.frames, sizeof words));
    EXPECT(!memcmp(refs, dev.refs, sizeof refs));
}

static uint32_t refcount_of(const struct dm_ref_wire *w) {
    uint32_t pfn = dev.refs[w->entry].runs[0].pfn;
    return dm_frame_refcount(__atomic_load_n(&dev.frames[pfn], __ATOMIC_RELAXED));
}

/* ---------------------------------------------------------------- whose it is */

static void a_ref_is_used_up_by_mapping_and_by_dropping(void) {
    struct dm_ref_wire w = moved(a, 3), v = moved(a, 3);
    freed(a, mapped(a, &w));
    expect_refused(&w, DM_ERR_REF_CONSUMED);
    dropped(a, &v);
    expect_refused(&v, DM_ERR_REF_CONSUMED);
    struct dm_ref_wire next = moved(a, 1); /* in an entry used before */
    EXPECT(next.entry == w.entry || next.entry == v.entry);
    expect_refused(&w, DM_ERR_REF_CONSUMED);
    expect_refused(&v, DM_ERR_REF_CONSUMED);
    dropped(a, &next);
}

static void the_bytes_are_stale_once_another_holder_accepted(void) {
    struct dm_ref_wire sent = moved(a, 2), got = sent;
    EXPECT_OK(dm_ref_accept(b, &got, false, &err), &err);
    EXPECT_EQ(dm_ref_holder(dev.refs[got.entry].state), b->id);
    expect_refused(&sent, DM_ERR_REF_CONSUMED);
    struct dm_ref_wire again = got;
    EXPECT_OK(dm_ref_accept(b, &again, false, &err),
              &err); /* by who holds it already: nothing changes */
    EXPECT(!memcmp(&again, &got, sizeof got));
    dropped(b, &got);
}

static void a_holder_that_accepts_anew_makes_its_own_bytes_stale(void) {
    struct dm_ref_wire sent = moved(a, 2), got = sent;
    EXPECT_OK(dm_ref_accept(a, &got, true, &err), &err);
    EXPECT_EQ(dm_ref_holder(dev.refs[got.entry].state), a->id);
    EXPECT_EQ(dm_ref_flags(dev.refs[got.entry].state), DM_REF_EXCLUSIVE);
    expect_refused(&sent, DM_ERR_REF_CONSUMED);
    dropped(a, &got);
}

static void a_ref_under_clone_is_busy_not_gone(void) {
    struct dm_ref_wire w = moved(a, 2);
    uint64_t *state = &dev.refs[w.entry].state, live = *state;
    *state = dm_ref_pack(DM_REF_CLONING, dm_ref_flags(live), a->id, dm_ref_gen(live));
    expect_refused(&w, DM_REF_BUSY);
    *state = live;
    dropped(a, &w);
}

/* ---------------------------------------------------------------- bytes that are no Ref */

static void a_ref_with_any_flipped_bit_is_refused(void) {
    struct dm_ref_wire w = moved(a, 1), bad;
    for (unsigned bit = 0; bit < 8 * sizeof w; bit++) {
        bad = w;
        ((unsigned char *)&bad)[bit / 8] ^= (unsigned char)(1u << bit % 8);
        EXPECT_EQ(dm_ref_wire_check(&bad, a->fabric_id, &err), DM_ERR_BAD_REF);
        EXPECT_EQ(dm_ref_drop(a, &bad, &err), DM_ERR_BAD_REF);
    }
    dropped(a, &w);
}

static void a_forged_ref_is_told_from_a_used_one(void) {
    struct dm_ref_wire w = moved(a, 1);
    dev.refs[w.entry].nonce ^= 1; /* as if the bytes had another one */
    expect_refused(&w, DM_ERR_BAD_REF);
    dev.refs[w.entry].nonce ^= 1;
    uint32_t max_refs = a->max_refs;
    a->max_refs = b->max_refs =
        w.entry; /* as if they named an entry that the device does not have */
    expect_refused(&w, DM_ERR_BAD_REF);
    a->max_refs = b->max_refs = max_refs;
    a->fabric_id = b->fabric_id = ~w.fabric_id; /* as if they came from elsewhere */
    expect_refused(&w, DM_ERR_BAD_REF);
    a->fabric_id = b->fabric_id = w.fabric_id;
    dropped(a, &w);
}

static void nonces_do_not_repeat(void) {
    uint64_t seen[200];
    for (unsigned i = 0; i < 200; i++) {
        struct dm_host *h = i % 2 ? a : b;
        struct dm_ref_wire w = moved(h, 1);
        seen[i] = w.nonce;
        dropped(h, &w);
        for (unsigned k = 0; k < i; k++)
            EXPECT(seen[k] != seen[i]);
    }
}

/* ---------------------------------------------------------------- what becomes of the counts */

static void moving_and_mapping_change_no_count(void) {
    uint64_t words[NR_FRAMES];
    uint32_t id = allocated(a, 4), page = a->vmas[id].page;
    struct dm_ref_wire w;
    memcpy(words, dev.frames, sizeof words);
    EXPECT_OK(dm_move_ref(a, id, false, &w, &err), &err);
    EXPECT(dm_ref_flags(dev.refs[w.entry].state) & DM_REF_EXCLUSIVE);
    EXPECT(!memcmp(words, dev.frames, sizeof words));
    EXPECT(dm_window_vacant(a, page, 4));
    id = mapped(b, &w);
    EXPECT(!memcmp(words, dev.frames, sizeof words));
    EXPECT(b->vmas[id].flags & DM_VMA_EXCLUSIVE);
    EXPECT_EQ(b->vmas[id].page,
              page); /* the owned window shows a frame at the page of its number */
    by_hand_exact(&dev);
    freed(b, id);
}

static void a_clone_adds_one_count_and_ends_exclusiveness(void) {
    struct dm_ref_wire w = moved(a, 4), copy = cloned(a, &w), third = cloned(b, &copy);
    EXPECT_EQ(refcount_of(&w), 3);
    const struct dm_ref_wire *all[] = {&w, &copy, &third};
    for (int i = 0; i < 3; i++) {
        const struct dm_ref_entry *entry = &dev.refs[all[i]->entry];
        EXPECT(!(dm_ref_flags(entry->state) & DM_REF_EXCLUSIVE));
        EXPECT(entry->nr_pages == 4 && entry->length == 4 * PAGE && all[i]->length == 4 * PAGE);
    }
    uint32_t id = mapped(b, &third);
    EXPECT(b->vmas[id].page >= NR_FRAMES && !(b->vmas[id].flags & DM_VMA_EXCLUSIVE));
    EXPECT_EQ(refcount_of(&w), 3);
    by_hand_exact(&dev);
    dropped(a, &copy);
    freed(b, id);
    EXPECT_EQ(refcount_of(&w), 1);
    id = mapped(b, &w); /* nobody else any more: exclusive again */
    EXPECT(b->vmas[id].flags & DM_VMA_EXCLUSIVE);
    freed(b, id);
}

static void who_drops_last_gets_the_frames(void) {
    dm_welcome_home(a);
    dm_welcome_home(b);
    uint32_t of_a = a->free.nr_free, of_b = b->free.nr_free;
    struct dm_ref_wire w = moved(a, 5), copy = cloned(a, &w);
    EXPECT_OK(dm_ref_accept(b, &copy, false, &err), &err);
    dropped(a, &w);
    EXPECT_EQ(a->free.nr_free, of_a - 5);
    dropped(b, &copy);
    EXPECT_EQ(b->free.nr_free, of_b + 5);
    const struct dm_audit *audit = by_hand_exact(&dev);
    EXPECT_EQ(audit->free_of[1], of_a - 5);
    EXPECT_EQ(audit->free_of[2], of_b + 5);
}

static void a_full_table_refuses_and_changes_nothing(void) {
    struct dm_ref_wire all[NR_REFS], more;
    for (uint32_t i = 0; i < NR_REFS; i++)
        all[i] = moved(a, 1);
    uint32_t id = allocated(a, 1), page = a->vmas[id].page;
    EXPECT_EQ(dm_move_ref(a, id, false, &more, &err), DM_ERR_NO_REF_SLOT);
    EXPECT(a->pt[page] & DM_PTE_PRESENT && a->vma_of[page] == id);
    EXPECT_EQ(dm_ref_clone(a, &all[0], false, &more, &err), DM_ERR_NO_REF_SLOT);
    EXPECT(dm_ref_flags(dev.refs[all[0].entry].state) & DM_REF_EXCLUSIVE);
    by_hand_exact(&dev);
    for (uint32_t i = 0; i < NR_REFS; i++)
        dropped(a, &all[i]);
    freed(a, id);
}

/* ---------------------------------------------------------------- entries that are damaged */

static int status_of(const struct dm_ref_entry *entry) {
    struct dm_runs runs;
    dm_runs_init(&runs);
    int s = dm_runs_of_entry(entry, (const char *)dev.data, 12, NR_FRAMES, &runs);
    dm_runs_free(&runs);
    return s;
}

static void a_damaged_list_of_runs_leads_nowhere(void) {
    const uint32_t at = 20;
    struct dm_ref_overflow *o = (struct dm_ref_overflow *)(dev.data + at * PAGE);
    struct dm_ref_entry good = {.nr_runs = DM_REF_INLINE_RUNS + 2,
                                .nr_pages = DM_REF_INLINE_RUNS + 3,
                                .overflow = at + 1,
                                .nr_overflow = 1};
    for (uint32_t i = 0; i < DM_REF_INLINE_RUNS; i++)
        good.runs[i] = (struct dm_run){i % 2 ? DM_NO_FRAME : 2 * i, 1};
    o->next = 0;
    o->nr_runs = 2;
    o->runs[0] = (struct dm_run){NR_FRAMES - 2, 2};
    o->runs[1] = (struct dm_run){DM_NO_FRAME, 1};
    EXPECT_EQ(status_of(&good), DM_OK);

    const struct {
        uint32_t *field, value;
    } damages[] = {
        {&good.nr_pages, DM_REF_INLINE_RUNS + 4},
        {&good.runs[0].count, 0},
        {&good.runs[0].count, NR_FRAMES + 1},
        {&good.runs[0].pfn, NR_FRAMES},
        {&good.runs[0].pfn, DM_NO_FRAME - 1},
        {&good.overflow, 0},
        {&good.overflow, NR_FRAMES + 1},
        {&good.overflow, UINT32_MAX},
        {&good.nr_runs, DM_REF_INLINE_RUNS + 3}, /* the chain ends too early */
        {&good.nr_runs, DM_REF_INLINE_RUNS + 1}, /* or too late */
        {&good.nr_runs, UINT32_MAX},
        {&o->nr_runs, 0},
        {&o->nr_runs, UINT32_MAX},
        {&o->runs[0].pfn, NR_FRAMES - 1},
        {&o->runs[1].count, UINT32_MAX},
    };
    for (unsigned i = 0; i < sizeof damages / sizeof damages[0]; i++) {
        uint32_t before = *damages[i].field;
        *damages[i].field = damages[i].value;
        snprintf(check_doing, sizeof check_doing, "damage %u", i);
        EXPECT_EQ(status_of(&good), DM_ERR_CORRUPT);
        *damages[i].field = before;
    }
    o->next = at + 1; /* a ring */
    good.nr_runs = 100000;
    EXPECT_EQ(status_of(&good), DM_ERR_CORRUPT);
    check_doing[0] = 0;
}

int main(void) {
    by_hand_device(&dev, NR_FRAMES, 2, NR_REFS);
    by_hand_activate(&dev, 1);
    by_hand_activate(&dev, 2);
    a = by_hand_host(&dev, 1);
    b = by_hand_host(&dev, 2);
    dm_lock(a);
    dm_lock(b);
    by_hand_grant(a, 0, 32);
    by_hand_grant(b, 32, 32);
    HOLDS(a_ref_is_used_up_by_mapping_and_by_dropping);
    HOLDS(the_bytes_are_stale_once_another_holder_accepted);
    HOLDS(a_holder_that_accepts_anew_makes_its_own_bytes_stale);
    HOLDS(a_ref_under_clone_is_busy_not_gone);
    HOLDS(a_ref_with_any_flipped_bit_is_refused);
    HOLDS(a_forged_ref_is_told_from_a_used_one);
    HOLDS(nonces_do_not_repeat);
    HOLDS(moving_and_mapping_change_no_count);
    HOLDS(a_clone_adds_one_count_and_ends_exclusiveness);
    HOLDS(who_drops_last_gets_the_frames);
    HOLDS(a_full_table_refuses_and_changes_nothing);
    HOLDS(a_damaged_list_of_runs_leads_nowhere);
    EXPECT_EQ(by_hand_exact(&dev)->in_use, 0);
    dm_unlock(a);
    dm_unlock(b);
    by_hand_host_free(a);
    by_hand_host_free(b);
    dm_device_close(&dev);
    return 0;
}
