/* traffic.c - see traffic.h. */
#include "traffic.h"

#include <string.h>

#include "fault.h"

static void counted(uint64_t *n) { __atomic_fetch_add(n, 1, __ATOMIC_RELAXED); }

/* ---------------------------------------------------------------- letter boxes */

static void put(struct player *p, const struct dm_ref_wire *w) {
    uint64_t words[sizeof *w / 8], *box = p->traffic->boxes[rng_below(&p->rng, TRAFFIC_BOXES)];
    memcpy(words, w, sizeof *w);
    for (unsigned i = 0; i < sizeof *w / 8; i++)
        __atomic_store_n(&box[i], words[i], __ATOMIC_RELAXED);
}

/* False when the box is empty, or its letter half old and half new. */
static bool get(struct player *p, struct dm_ref_wire *w) {
    uint64_t words[sizeof *w / 8], *box = p->traffic->boxes[rng_below(&p->rng, TRAFFIC_BOXES)];
    struct dm_error e;
    for (unsigned i = 0; i < sizeof *w / 8; i++)
        words[i] = __atomic_load_n(&box[i], __ATOMIC_RELAXED);
    memcpy(w, words, sizeof *w);
    return dm_ref_wire_check(w, p->h->fabric_id, &e) == DM_OK;
}

/* ---------------------------------------------------------------- pages */

static void stamp_page(uint64_t *words, uint32_t page, uint64_t stamp) {
    words[0] = stamp;
    words[100] = page;
    words[511] = stamp ^ page * 0x9e3779b97f4a7c15ull;
}

/* A page of a view shows its own frame, whatever its page-table entry says. */
static char *shown_bytes(struct dm_host *h, uint32_t page) {
    if (h->vmas[h->vma_of[page]].flags & DM_VMA_VIEW)
        return dm_frame_data(h, dm_identity(h, page));
    return by_hand_bytes(h, page);
}

/* What page i of a buffer holds: read without the lock, as a user reads. */
static uint64_t read_page(struct player *p, uint32_t first, uint32_t i) {
    const uint64_t *words = (const uint64_t *)shown_bytes(p->h, first + i);
    EXPECT_EQ(words[100], i);
    EXPECT_EQ(words[511], words[0] ^ i * 0x9e3779b97f4a7c15ull);
    return words[0];
}

void traffic_expect_unchanged(struct player *p, const struct traffic_buffer *b) {
    uint32_t page = p->h->vmas[b->id].page;
    for (uint32_t i = 0; i < b->nr_pages; i++)
        EXPECT_EQ(read_page(p, page, i), b->stamp[i]);
}

/* A store to one page: a fault first where the page is protected. */
static void write_page(struct player *p, struct traffic_buffer *b) {
    struct dm_host *h = p->h;
    struct dm_stray none = {0};
    uint32_t i = rng_below(&p->rng, b->nr_pages), page = h->vmas[b->id].page + i;
    dm_lock(h);
    bool writable = !(h->kstate[page] & DM_KS_PROTECTED);
    if (!writable && p->has_uffd)
        writable = dm_serve_fault(h, &none, dm_addr_of(h, page), 1) == DM_FAULT_SERVED;
    dm_unlock(h);
    if (!writable)
        return; /* no frame to copy to, or no way to remove protection */
    EXPECT(!(h->kstate[page] & DM_KS_PROTECTED));
    b->stamp[i] = rng_next(&p->rng);
    stamp_page((uint64_t *)shown_bytes(h, page), i, b->stamp[i]);
    traffic_expect_unchanged(p, b);
}

/* ---------------------------------------------------------------- moves */

static bool is_viewed(const struct dm_host *h, uint32_t ref) {
    for (uint32_t id = 1; id <= h->nr_vmas; id++)
        if (h->vmas[id].flags & DM_VMA_VIEW && h->vmas[id].ref == ref)
            return true;
    return false;
}

/* Refs whose letters were overwritten are lost; their holder drops some, as dm_detach does: others may be faster. */
static void sweep(struct player *p) {
    struct dm_host *h = p->h;
    dm_lock(h);
    for (uint32_t i = 0; i < h->max_refs; i++) {
        uint64_t word = __atomic_load_n(&h->refs[i].state, __ATOMIC_ACQUIRE);
        uint64_t mine = dm_ref_pack(DM_REF_DROPPING, 0, h->id, dm_ref_gen(word));
        if (dm_ref_state(word) != DM_REF_LIVE || dm_ref_holder(word) != h->id || is_viewed(h, i) ||
            rng_below(&p->rng, 2))
            continue;
        if (__atomic_compare_exchange_n(&h->refs[i].state, &word, mine, false, __ATOMIC_ACQ_REL,
                                        __ATOMIC_RELAXED)) {
            dm_ref_release(h, i);
            counted(&p->traffic->nr_used);
        }
    }
    dm_unlock(h);
}

/* Statuses that only tell that others were faster, or that something is used up. */
static bool was_in_vain(struct player *p, int status) {
    counted(&p->traffic->nr_lost);
    return status == DM_ERR_REF_CONSUMED || status == DM_REF_BUSY || status == DM_AGAIN_BLOCKING ||
           status == DM_ERR_NO_REF_SLOT || status == DM_ERR_OUT_OF_FRAMES ||
           status == DM_ERR_COORDINATOR_LOST || status == DM_ERR_NO_ADDRESS_SPACE ||
           (status == DM_ERR_SYSTEM && !p->has_uffd);
}

#define WON(what, call)                                                                            \
    ({                                                                                             \
        dm_lock(p->h);                                                                             \
        int status_ = call;                                                                        \
        dm_unlock(p->h);                                                                           \
        if (status_ && !was_in_vain(p, status_))                                                   \
            FAIL("expected: %s is won or lost, but status %d: %s", #call, status_, e.text);        \
        if (!status_)                                                                              \
            counted(&p->traffic->nr_won[what]);                                                    \
        else if (status_ == DM_ERR_NO_REF_SLOT || status_ == DM_AGAIN_BLOCKING)                    \
            sweep(p);                                                                              \
        status_ == DM_OK;                                                                          \
    })

static struct traffic_buffer *buffer_of(struct player *p, bool used) {
    struct traffic_buffer *b = &p->buffers[rng_below(&p->rng, TRAFFIC_BUFFERS)];
    return !b->id == !used ? b : NULL;
}

static void make(struct player *p) {
    struct traffic_buffer *b = buffer_of(p, false);
    struct dm_error e;
    uint32_t nr = 1 + rng_below(&p->rng, rng_below(&p->rng, 3) ? 4 : TRAFFIC_MOST_PAGES);
    if (!b || !WON(TRAFFIC_MAKE, dm_ralloc(p->h, nr * BY_HAND_PAGE, 0, false, &b->id, &e)))
        return;
    b->nr_pages = nr;
    for (uint32_t i = 0; i < nr; i++) {
        b->stamp[i] = rng_next(&p->rng);
        stamp_page((uint64_t *)by_hand_bytes(p->h, p->h->vmas[b->id].page + i), i, b->stamp[i]);
    }
}

static void send(struct player *p, bool move) {
    struct traffic_buffer *b = buffer_of(p, true);
    struct dm_ref_wire w;
    struct dm_error e;
    if (!b)
        return;
    const struct dm_vma *v = &p->h->vmas[b->id];
    uint64_t addr = dm_addr_of(p->h, v->page);
    traffic_expect_unchanged(p, b);
    if (move ? !WON(TRAFFIC_MAKE, dm_move_ref(p->h, b->id, false, &w, &e))
             : !WON(TRAFFIC_MAKE, dm_create_ref(p->h, addr, v->length, false, &w, &e)))
        return;
    counted(&p->traffic->nr_made);
    if (move)
        b->id = 0;
    put(p, &w);
}

static void map(struct player *p, struct dm_ref_wire *w) {
    struct traffic_buffer *b = buffer_of(p, false);
    struct dm_error e;
    static const unsigned any[] = {0, DM_MAP_COPY, DM_MAP_VIEW, DM_MAP_VIEW};
    unsigned flags = any[rng_below(&p->rng, 4)];
    if (!b || !WON(TRAFFIC_MAP, dm_map_ref(p->h, w, flags, true, &b->id, &e)))
        return;
    counted(&p->traffic->nr_used);
    const struct dm_vma *v = &p->h->vmas[b->id];
    b->nr_pages = v->nr_pages;
    EXPECT(b->nr_pages <= TRAFFIC_MOST_PAGES);
    for (uint32_t i = 0; i < b->nr_pages; i++)
        b->stamp[i] = read_page(p, v->page, i);
}

static void receive(struct player *p) {
    struct dm_ref_wire w, copy;
    struct dm_error e = {0};
    if (!get(p, &w))
        return;
    switch (rng_below(&p->rng, 6)) {
    case 0:
        if (WON(TRAFFIC_ACCEPT, dm_ref_accept(p->h, &w, false, &e)))
            put(p, &w);
        break;
    case 1:
    case 2:
        if (WON(TRAFFIC_CLONE, dm_ref_clone(p->h, &w, false, &copy, &e))) {
            counted(&p->traffic->nr_made);
            put(p, &copy);
        }
        put(p, &w); /* as accepted; if it was lost, it is stale, and everybody finds out */
        break;
    case 3:
        if (WON(TRAFFIC_DROP, dm_ref_drop(p->h, &w, &e)))
            counted(&p->traffic->nr_used);
        break;
    default:
        map(p, &w);
    }
}

static void give_up(struct player *p) {
    struct traffic_buffer *b = buffer_of(p, true);
    struct dm_error e;
    if (!b)
        return;
    traffic_expect_unchanged(p, b);
    dm_lock(p->h);
    EXPECT_OK(dm_rfree(p->h, b->id, &e), &e);
    dm_unlock(p->h);
    b->id = 0;
}

void traffic_step(struct player *p) {
    struct traffic_buffer *b;
    switch (rng_below(&p->rng, 10)) {
    case 0:
    case 1:
        make(p);
        break;
    case 2:
        send(p, true);
        break;
    case 3:
        if (p->has_uffd)
            send(p, false);
        break;
    case 4:
        give_up(p);
        break;
    case 5:
        if ((b = buffer_of(p, true)))
            for (uint32_t pages = 1 + rng_below(&p->rng, 8); pages; pages--)
                write_page(p, b);
        break;
    default:
        receive(p);
    }
}
