/* scenes.c - see scenes.h. The table of scenarios is at the end. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "scenes.h"

#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "by_hand.h"
#include "check.h"
#include "fault.h"

#define PAGE BY_HAND_PAGE
#define OTHERS_FRAMES                                                                              \
    24u /* frames [0, 24) are other's: it holds frame 0, a number that looks like nothing */
#define GRANTED 84u /* frames [24, 84) are h's, the rest is the pool's */

static struct dm_error err;

/* ---------------------------------------------------------------- small steps */

static void scribble(struct dm_host *h, uint32_t id) {
    const struct dm_vma *v = &h->vmas[id];
    for (uint32_t i = 0; i < v->nr_pages; i++)
        if (h->pt[v->page + i] & DM_PTE_PRESENT)
            memset(by_hand_bytes(h, v->page + i), (int)(7 * id + i + 100 * h->id), PAGE);
}

static uint32_t allocated(struct dm_host *h, uint32_t nr) {
    uint32_t id = 0;
    EXPECT_OK(dm_ralloc(h, nr * PAGE, 0, false, &id, &err), &err);
    scribble(h, id);
    return id;
}

static struct dm_ref_wire moved(struct dm_host *h, uint32_t id) {
    struct dm_ref_wire w;
    EXPECT_OK(dm_move_ref(h, id, false, &w, &err), &err);
    return w;
}

static struct dm_ref_wire cloned(struct dm_host *h, struct dm_ref_wire *source) {
    struct dm_ref_wire w;
    EXPECT_OK(dm_ref_clone(h, source, false, &w, &err), &err);
    return w;
}

static uint32_t mapped(struct dm_host *h, const struct dm_ref_wire *w) {
    uint32_t id = 0;
    EXPECT_OK(dm_map_ref(h, w, 0, true, &id, &err), &err);
    return id;
}

static uint32_t viewed(struct dm_host *h, const struct dm_ref_wire *w) {
    uint32_t id = 0;
    EXPECT_OK(dm_view_ref(h, w, false, &id, &err), &err);
    EXPECT(h->vmas[id].flags & DM_VMA_VIEW);
    return id;
}

/* A Ref of h's to frames of which other holds a Ref, and a mapping in its shared window. */
static struct dm_ref_wire shared(struct scene *s, uint32_t nr) {
    struct dm_ref_wire w = moved(s->other, allocated(s->other, nr));
    struct dm_ref_wire a = cloned(s->other, &w), b = cloned(s->other, &w);
    (void)mapped(s->other, &a);
    EXPECT_OK(dm_ref_accept(s->h, &b, false, &err), &err);
    return b;
}

/* A mapping of nr frames in the VMA area, no two of them neighbours: so dm_ralloc makes it out of fragments. */
static uint32_t scattered(struct dm_host *h, uint32_t nr) {
    uint32_t page = dm_area_take(h, nr), pfn;
    EXPECT(page != DM_NO_FRAME && dm_freelist_take(&h->free, 2 * nr, &pfn));
    for (uint32_t i = 0; i < nr; i++) {
        dm_freelist_put_cold(&h->free, pfn + 2 * i + 1, 1);
        dm_frames_enter_use(h, pfn + 2 * i, 1);
        EXPECT_OK(dm_show(h, page + i, pfn + 2 * i, 1, false, &err), &err);
        dm_pt_set(h, page + i, pfn + 2 * i, 1, i ? 0 : DM_PTE_HEAD);
    }
    uint32_t id = dm_vma_new(h, page, nr, nr * PAGE, 0, DM_VMA_EXCLUSIVE | DM_VMA_DIRTY);
    scribble(h, id);
    return id;
}

enum { MANY = DM_REF_INLINE_RUNS + 2 }; /* runs: more than fit inline */

/* A Ref with so many runs that they fill one overflow frame and begin another: frames, then holes. */
static struct dm_ref_wire chain(struct dm_host *h) {
    enum { FRAMES = 6, RUNS = DM_REF_INLINE_RUNS + PAGE / sizeof(struct dm_run) + 3 };
    static struct dm_run runs[RUNS];
    struct dm_ref_wire w;
    uint32_t index, pfn;
    for (uint32_t i = 0; i < RUNS; i++)
        runs[i] = (struct dm_run){DM_NO_FRAME, 1};
    for (uint32_t i = 0; i < FRAMES; i++) { /* at the beginning, in the middle, and at the end */
        EXPECT(dm_freelist_take(&h->free, 1, &pfn));
        dm_frames_enter_use(h, pfn, 1);
        runs[i < 2 ? i : i < 4 ? 100 + 2 * i : RUNS - i + 3].pfn = pfn;
    }
    EXPECT_OK(dm_ref_slot(h, &index, &err), &err);
    EXPECT_OK(dm_ref_store_runs(h, index, runs, RUNS, false, &err), &err);
    h->refs[index].length = RUNS * PAGE;
    h->refs[index].page_offset = 0;
    h->refs[index].nr_pages = RUNS;
    EXPECT_EQ(h->refs[index].nr_overflow, 2);
    dm_ref_publish(h, index, 0, &w);
    return w;
}

/* A coordinator that has answered in advance: replies wait in the socket, questions are read by nobody. */
static void answer(int fd, uint16_t type, uint64_t request, uint32_t status, const void *payload,
                   uint32_t length) {
    struct dm_msg_header head = {.magic = DM_WIRE_MAGIC,
                                 .version = DM_WIRE_VERSION,
                                 .type = type,
                                 .status = status,
                                 .length = length,
                                 .request = request};
    EXPECT_EQ(write(fd, &head, sizeof head), sizeof head);
    EXPECT_EQ(write(fd, payload, length), length);
}

static int connect_to_nobody(struct dm_host *h) {
    int ends[2];
    struct stat st;
    EXPECT(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) && !fstat(ends[0], &st));
    h->link = (struct dm_link){
        .fd = ends[0], .dev = (uint64_t)st.st_dev, .ino = (uint64_t)st.st_ino, .epoch = 1};
    h->deadline_ns = 60000000000u;
    return ends[1];
}

/* ---------------------------------------------------------------- situations */

static void nothing_more(struct scene *s) { (void)s; }

static void pool_in_pieces(struct scene *s) {
    static struct dm_run runs[8];
    uint64_t moved_frames;
    int fd = connect_to_nobody(s->h);
    uint32_t pfn;
    while (s->h->free.nr_free > 2)
        EXPECT(dm_freelist_take(&s->h->free, 1, &pfn));
    /* The frames that the answer grants are h's before it arrives, and no two are neighbours. */
    for (uint32_t i = 0; i < 6; i++) {
        runs[i] = (struct dm_run){GRANTED + 2 * i, 1};
        EXPECT_OK(dm_device_transfer(s->dev, runs[i].pfn, 1, DM_OWNER_POOL, SCENE_DEAD,
                                     &moved_frames, &err),
                  &err);
    }
    answer(fd, DM_MSG_GRANT, 1, DM_WIRE_NO_FRAMES, "", 0);
    answer(fd, DM_MSG_RETURN, 2, DM_WIRE_OK, "", 0);
    answer(fd, DM_MSG_GRANT, 3, DM_WIRE_NO_FRAMES, "", 0);
    answer(fd, DM_MSG_GRANT, 4, DM_WIRE_OK, runs, 6 * sizeof runs[0]);
}

static void coordinator_that_takes(struct scene *s) {
    answer(connect_to_nobody(s->h), DM_MSG_RETURN, 1, DM_WIRE_OK, "", 0);
}

static void own_buffer(struct scene *s) { s->id = allocated(s->h, 4); }
static void own_scattered_buffer(struct scene *s) { s->id = scattered(s->h, MANY); }
static void own_ref(struct scene *s) { s->ref = moved(s->h, allocated(s->h, 4)); }
static void own_scattered_ref(struct scene *s) { s->ref = moved(s->h, scattered(s->h, MANY)); }
static void shared_ref(struct scene *s) { s->ref = shared(s, 4); }
static void shared_mapping(struct scene *s) {
    s->ref = shared(s, 4);
    s->id = mapped(s->h, &s->ref);
}
static void long_ref(struct scene *s) { s->ref = chain(s->h); }

static void own_view(struct scene *s) {
    own_ref(s);
    s->id = viewed(s->h, &s->ref);
}

static void shared_view(struct scene *s) {
    s->ref = shared(s, 4);
    s->id = viewed(s->h, &s->ref);
}

static void view_of_what_other_made(struct scene *s) {
    struct dm_ref_wire w = moved(s->other, allocated(s->other, 4));
    s->id = viewed(s->h, &w);
}

/* In the shared window, and the only holder by now. */
static void view_shared_by_nobody_any_more(struct scene *s) {
    struct dm_ref_wire w = moved(s->h, allocated(s->h, 4)), copy = cloned(s->h, &w);
    s->id = viewed(s->h, &copy);
    EXPECT_OK(dm_ref_drop(s->h, &w, &err), &err);
}

static void view_of_a_strict_host(struct scene *s) {
    own_view(s);
    s->h->strict = true;
}

static void ref_and_a_view_of_the_same(struct scene *s) {
    s->ref = shared(s, 4);
    struct dm_ref_wire copy = cloned(s->h, &s->ref);
    (void)viewed(s->h, &copy);
}

static void buffer_received_from_other(struct scene *s) {
    struct dm_ref_wire w = moved(s->other, allocated(s->other, 4));
    s->id = mapped(s->h, &w); /* exclusive, and the frame words name the other host */
}

static void run_on_its_way_home(struct scene *s) {
    struct dm_ref_wire w = moved(s->h, allocated(s->h, 4));
    s->other->nr_out = 0;
    EXPECT_OK(dm_rfree(s->other, mapped(s->other, &w), &err), &err);
}

/* Refcount 1, in the shared window, not known to be exclusive. */
static void mapping_shared_by_nobody_any_more(struct scene *s) {
    struct dm_ref_wire w = moved(s->h, allocated(s->h, 4)), copy = cloned(s->h, &w);
    s->id = mapped(s->h, &copy);
    EXPECT_OK(dm_ref_drop(s->h, &w, &err), &err);
}

/* The frames are other's as well, the list of runs is not. */
static void shared_scattered_ref(struct scene *s) {
    s->ref = moved(s->h, scattered(s->h, MANY));
    struct dm_ref_wire copy = cloned(s->h, &s->ref);
    EXPECT_OK(dm_ref_accept(s->other, &copy, false, &err), &err);
}

static void shared_scattered_mapping(struct scene *s) {
    shared_scattered_ref(s);
    s->id = mapped(s->h, &s->ref);
}

static void shared_long_ref(struct scene *s) {
    s->ref = chain(s->h);
    struct dm_ref_wire copy = cloned(s->h, &s->ref);
    EXPECT_OK(dm_ref_accept(s->other, &copy, false, &err), &err);
}

static void ref_of_other(struct scene *s) {
    s->ref = moved(s->other, allocated(s->other, 4));
    s->handed = s->ref.entry;
}

static void ref_and_a_mapping_of_the_same(struct scene *s) {
    s->ref = shared(s, 4);
    struct dm_ref_wire copy = cloned(s->h, &s->ref);
    (void)mapped(s->h, &copy);
}

/* The third frame has as many holders as there can be. */
static void crowd(struct scene *s, uint32_t pfn) {
    uint32_t refcount = dm_frame_refcount(s->dev->frames[pfn]);
    s->crowded = pfn;
    s->crowd = DM_REFCOUNT_MAX - refcount;
    s->dev->frames[pfn] += s->crowd;
}

static void crowded_mapping(struct scene *s) {
    shared_mapping(s);
    crowd(s, s->h->pt[s->h->vmas[s->id].page + 2] & DM_PTE_PFN);
}

static void crowded_ref(struct scene *s) {
    shared_scattered_ref(s);
    crowd(s, s->h->refs[s->ref.entry].runs[5].pfn);
}

static void no_frame_left(struct dm_host *h) {
    for (uint32_t pfn; h->free.nr_free;)
        EXPECT(dm_freelist_take_upto(&h->free, h->free.nr_free, &pfn));
}

static void ref_of_other_and_no_slot(struct scene *s) {
    ref_of_other(s);
    s->h->vma_free = DM_NO_VMA;
    s->h->nr_vma_slots = s->h->nr_vmas + 1;
}

static void ref_of_other_and_no_frame(struct scene *s) {
    ref_of_other(s);
    no_frame_left(s->h);
}

static void scattered_buffer_and_no_frame(struct scene *s) {
    own_scattered_buffer(s);
    no_frame_left(s->h);
}

static void scattered_ref_and_no_frame(struct scene *s) {
    own_scattered_ref(s);
    no_frame_left(s->h);
}

static void buffer_of_a_strict_host(struct scene *s) {
    own_buffer(s);
    s->h->strict = true;
}

static void lazy_buffer(struct scene *s) {
    EXPECT_OK(dm_ralloc(s->h, 5 * PAGE, DM_ALLOC_LAZY, true, &s->id, &err), &err);
}

static void as_if_written_in_order(struct scene *s) {
    s->h->vmas[s->id].next_fault = s->h->vmas[s->id].page;
}

static void shared_mapping_written_in_order(struct scene *s) {
    shared_mapping(s);
    as_if_written_in_order(s);
}

/* Other holds a Ref to the frames, but lets go of it once the copying has begun. */
static void mapping_soon_shared_by_nobody(struct scene *s) {
    s->ref = moved(s->h, allocated(s->h, 4));
    s->others = cloned(s->h, &s->ref);
    EXPECT_OK(dm_ref_accept(s->other, &s->others, false, &err), &err);
    s->handed = s->others.entry;
    s->id = mapped(s->h, &s->ref);
    as_if_written_in_order(s);
}

static void shared_view_written_in_order(struct scene *s) {
    shared_view(s);
    as_if_written_in_order(s);
}

/* A Ref that was used, one of other's that was not, one of h's. */
static struct dm_ref_wire letters[3];
static void refs_that_were_sent(struct scene *s) {
    letters[0] = moved(s->h, allocated(s->h, 1));
    EXPECT_OK(dm_ref_drop(s->h, &letters[0], &err), &err);
    letters[1] = moved(s->other, allocated(s->other, 2));
    s->handed = letters[1].entry;
    letters[2] = shared(s, 2);
}

static void lazy_buffer_written_in_order(struct scene *s) {
    lazy_buffer(s);
    as_if_written_in_order(s);
}

/* ---------------------------------------------------------------- operations */

static int ralloc(struct scene *s) { return dm_ralloc(s->h, 4 * PAGE, 0, true, &s->id, &err); }
static int ralloc_lazy(struct scene *s) {
    return dm_ralloc(s->h, 4 * PAGE, DM_ALLOC_LAZY, true, &s->id, &err);
}
static int rfree(struct scene *s) { return dm_rfree(s->h, s->id, &err); }
static int create_ref(struct scene *s) { /* all but the first page */
    const struct dm_vma *v = &s->h->vmas[s->id];
    return dm_create_ref(s->h, dm_addr_of(s->h, v->page + 1) + 9, v->length - PAGE - 9, true,
                         &s->out, &err);
}
static int create_ref_of_all(struct scene *s) {
    const struct dm_vma *v = &s->h->vmas[s->id];
    return dm_create_ref(s->h, dm_addr_of(s->h, v->page), v->length, true, &s->out, &err);
}
static int move_ref(struct scene *s) { return dm_move_ref(s->h, s->id, true, &s->out, &err); }
static int map_ref(struct scene *s) { return dm_map_ref(s->h, &s->ref, 0, true, &s->id, &err); }
static int view_ref(struct scene *s) { return dm_view_ref(s->h, &s->ref, true, &s->id, &err); }
static int materialise(struct scene *s) {
    dm_view_materialise(s->h, s->id);
    return DM_OK;
}
static int drop_refs(struct scene *s) {
    bool busy;
    EXPECT_EQ(dm_refs_drop(s->h, letters, 3, &busy), 2);
    return DM_OK;
}
static int map_ref_reserve(struct scene *s) {
    return dm_map_ref(s->h, &s->ref, DM_MAP_RESERVE, true, &s->id, &err);
}
static int map_ref_copy(struct scene *s) {
    return dm_map_ref(s->h, &s->ref, DM_MAP_COPY, true, &s->id, &err);
}
static int clone_ref(struct scene *s) { return dm_ref_clone(s->h, &s->ref, true, &s->out, &err); }
static int drop_ref(struct scene *s) { return dm_ref_drop(s->h, &s->ref, &err); }
static int accept_ref(struct scene *s) { return dm_ref_accept(s->h, &s->ref, false, &err); }
static int give_back(struct scene *s) { return dm_give_back(s->h, &s->h->link, 2, &err); }
static int store(struct scene *s) { /* what the fault handler does for a store to the first page */
    struct dm_stray none = {0};
    return dm_serve_fault(s->h, &none, dm_addr_of(s->h, s->h->vmas[s->id].page), 1);
}

static void other_lets_go(struct scene *s) {
    EXPECT_OK(dm_ref_drop(s->other, &s->others, &err), &err);
}

const struct scenario scenarios[] = {
    {"ralloc", 0, 0, nothing_more, ralloc, NULL},
    {"ralloc of fragments", 0, 0, pool_in_pieces, ralloc, NULL},
    {"ralloc of a run that comes home", 0, 0, run_on_its_way_home, ralloc, NULL},
    {"ralloc(lazy)", SCENE_UFFD, 0, nothing_more, ralloc_lazy, NULL},
    {"rfree, exclusive", 0, 0, own_buffer, rfree, NULL},
    {"rfree, exclusive, received", 0, 0, buffer_received_from_other, rfree, NULL},
    {"rfree, shared", 0, 0, shared_mapping, rfree, NULL},
    {"rfree, last holder", 0, 0, mapping_shared_by_nobody_any_more, rfree, NULL},
    {"rfree, scattered", 0, 0, own_scattered_buffer, rfree, NULL},
    {"rfree, scattered, shared", SCENE_UFFD, 0, shared_scattered_mapping, rfree, NULL},
    {"create_ref", SCENE_UFFD, 0, own_buffer, create_ref, NULL},
    {"create_ref, shared", 0, 0, shared_mapping, create_ref, NULL},
    {"create_ref, overflow", SCENE_UFFD | SCENE_DATA, 0, own_scattered_buffer, create_ref, NULL},
    {"create_ref, overflow, shared", SCENE_UFFD | SCENE_DATA, 0, shared_scattered_mapping,
     create_ref, NULL},
    {"create_ref, refused", SCENE_UFFD, DM_ERR_TOO_MANY_REFS, crowded_mapping, create_ref_of_all,
     NULL},
    {"create_ref, no frame", 0, DM_ERR_COORDINATOR_LOST, scattered_buffer_and_no_frame, create_ref,
     NULL},
    {"create_ref(move)", 0, 0, own_buffer, move_ref, NULL},
    {"create_ref(move), shared", 0, 0, shared_mapping, move_ref, NULL},
    {"create_ref(move), overflow", SCENE_DATA, 0, own_scattered_buffer, move_ref, NULL},
    {"create_ref(move), overflow, shared", SCENE_UFFD | SCENE_DATA, 0, shared_scattered_mapping,
     move_ref, NULL},
    {"create_ref(move), strict", SCENE_UFFD, 0, buffer_of_a_strict_host, move_ref, NULL},
    {"map_ref, exclusive", 0, 0, own_ref, map_ref, NULL},
    {"map_ref, exclusive, of another holder", 0, 0, ref_of_other, map_ref, NULL},
    {"map_ref, shared", 0, 0, shared_ref, map_ref, NULL},
    {"map_ref, overflow", SCENE_DATA, 0, own_scattered_ref, map_ref, NULL},
    {"map_ref, overflow, shared", SCENE_UFFD | SCENE_DATA, 0, shared_scattered_ref, map_ref, NULL},
    {"map_ref, mapped twice", SCENE_UFFD, 0, ref_and_a_mapping_of_the_same, map_ref, NULL},
    {"map_ref, refused", 0, DM_ERR_NO_ADDRESS_SPACE, ref_of_other_and_no_slot, map_ref, NULL},
    {"map_ref(reserve)", 0, 0, shared_ref, map_ref_reserve, NULL},
    {"map_ref(copy)", 0, 0, shared_ref, map_ref_copy, NULL},
    {"map_ref(copy), overflow", 0, 0, shared_scattered_ref, map_ref_copy, NULL},
    {"map_ref(copy), no frame", 0, DM_ERR_COORDINATOR_LOST, ref_of_other_and_no_frame, map_ref_copy,
     NULL},
    {"map_ref, viewed already", SCENE_UFFD, 0, ref_and_a_view_of_the_same, map_ref, NULL},
    {"view_ref, exclusive", 0, 0, own_ref, view_ref, NULL},
    {"view_ref, exclusive, of another holder", 0, 0, ref_of_other, view_ref, NULL},
    {"view_ref, shared", 0, 0, shared_ref, view_ref, NULL},
    {"view_ref, overflow", SCENE_DATA, 0, own_scattered_ref, view_ref, NULL},
    {"view_ref, viewed already", SCENE_UFFD, 0, ref_and_a_view_of_the_same, view_ref, NULL},
    {"view_ref, refused", 0, DM_ERR_NO_ADDRESS_SPACE, ref_of_other_and_no_slot, view_ref, NULL},
    {"view becomes a mapping, exclusive", 0, 0, own_view, materialise, NULL},
    {"view becomes a mapping, shared", 0, 0, shared_view, materialise, NULL},
    {"rfree of a view, exclusive", 0, 0, own_view, rfree, NULL},
    {"rfree of a view, exclusive, received", 0, 0, view_of_what_other_made, rfree, NULL},
    {"rfree of a view, shared", 0, 0, shared_view, rfree, NULL},
    {"rfree of a view, last holder", 0, 0, view_shared_by_nobody_any_more, rfree, NULL},
    {"create_ref of a view", SCENE_UFFD, 0, own_view, create_ref, NULL},
    {"create_ref of a view, shared", 0, 0, shared_view, create_ref, NULL},
    {"create_ref(move) of a view", 0, 0, own_view, move_ref, NULL},
    {"create_ref(move) of a view, received", 0, 0, view_of_what_other_made, move_ref, NULL},
    {"create_ref(move) of a view, shared", 0, 0, shared_view, move_ref, NULL},
    {"create_ref(move) of a view, strict", SCENE_UFFD, 0, view_of_a_strict_host, move_ref, NULL},
    {"accept", 0, 0, ref_of_other, accept_ref, NULL},
    {"clone", 0, 0, own_ref, clone_ref, NULL},
    {"clone, shared", 0, 0, shared_ref, clone_ref, NULL},
    {"clone, of another holder", 0, 0, ref_of_other, clone_ref, NULL},
    {"clone, overflow", SCENE_DATA, 0, own_scattered_ref, clone_ref, NULL},
    {"clone, overflow, shared", SCENE_DATA, 0, shared_scattered_ref, clone_ref, NULL},
    {"clone, two overflow frames", SCENE_LONG, 0, shared_long_ref, clone_ref, NULL},
    {"clone, refused", SCENE_DATA, DM_ERR_TOO_MANY_REFS, crowded_ref, clone_ref, NULL},
    {"clone, no frame", 0, DM_ERR_COORDINATOR_LOST, scattered_ref_and_no_frame, clone_ref, NULL},
    {"drop", 0, 0, own_ref, drop_ref, NULL},
    {"drop, shared", 0, 0, shared_ref, drop_ref, NULL},
    {"drop, overflow", SCENE_DATA, 0, own_scattered_ref, drop_ref, NULL},
    {"drop, overflow, shared", SCENE_DATA, 0, shared_scattered_ref, drop_ref, NULL},
    {"drop, two overflow frames", SCENE_LONG, 0, long_ref, drop_ref, NULL},
    {"drop of several", 0, 0, refs_that_were_sent, drop_refs, NULL},
    {"copy-on-write", 0, 0, shared_mapping, store, NULL},
    {"copy-on-write of a view", 0, 0, shared_view, store, NULL},
    {"copy-on-write of a view, several pages", 0, 0, shared_view_written_in_order, store, NULL},
    {"copy-on-write, several pages", 0, 0, shared_mapping_written_in_order, store, NULL},
    {"copy-on-write, last holder", 0, 0, mapping_soon_shared_by_nobody, store, other_lets_go},
    {"fill", SCENE_UFFD, 0, lazy_buffer, store, NULL},
    {"fill, several pages", SCENE_UFFD, 0, lazy_buffer_written_in_order, store, NULL},
    {"frames given back", 0, 0, coordinator_that_takes, give_back, NULL},
};
const unsigned nr_scenarios = sizeof scenarios / sizeof scenarios[0];

/* ---------------------------------------------------------------- the stage */

void scene_device(struct dm_device *dev) {
    by_hand_device(dev, SCENE_FRAMES, 2, SCENE_REFS);
    by_hand_activate(dev, SCENE_DEAD);
    by_hand_activate(dev, SCENE_OTHER);
}

void scene_prepare(struct scene *s, struct dm_device *dev, const struct scenario *what) {
    *s = (struct scene){.dev = dev, .handed = DM_NO_FRAME, .crowded = DM_NO_FRAME};
    s->h = by_hand_host(dev, SCENE_DEAD);
    s->other = by_hand_host(dev, SCENE_OTHER);
    dm_lock(s->h);
    dm_lock(s->other);
    by_hand_grant(s->other, 0, OTHERS_FRAMES);
    by_hand_grant(s->h, OTHERS_FRAMES, GRANTED - OTHERS_FRAMES);
    (void)allocated(s->other, 2);
    (void)moved(s->other, allocated(s->other, 1));
    /* What h holds besides: more pages in a Ref than the operation has, and frames that other has, too. */
    (void)allocated(s->h, 2);
    (void)moved(s->h, allocated(s->h, 7));
    struct dm_ref_wire a = shared(s, 2), b = shared(s, 1);
    (void)mapped(s->h, &a);
    (void)b;
    what->prepare(s);
    /* What was prepared shall not keep frames from going home. */
    s->h->nr_out = s->other->nr_out = 0;
}
