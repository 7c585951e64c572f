/*
 * test_ref_race.c - several hosts accept, clone, drop, map, write and pass on the same Refs at once; then the audit must be
 * exact.
 *
 * Hosts are threads of this process (two threads share a host), each host with its own struct dm_host. Refs pass from one to
 * another through letter boxes, and are not taken out of them: whoever reads a letter may use it, so for every Ref there
 * are many who want it and one who gets it. The boxes are words written and read without any ordering. So nothing
 * but the Ref's state word and the frame words orders what the hosts do, and ThreadSanitizer sees whether they do.
 *
 * Every page says what it holds in three places, so a page that changed under its holder shows.
 */
#include <pthread.h>
#include <string.h>

#include "by_hand.h"
#include "check.h"
#include "fault.h"

#define NR_HOSTS 4u
#define NR_THREADS 6u
#define NR_FRAMES 400u
#define NR_REFS 48u
#define NR_BOXES 12u
#define MOST_PAGES 14u /* of a buffer: scattered ones fill an overflow frame */
#define MOST_BUFFERS 6u

static struct dm_device dev;
static struct dm_host *hosts[NR_HOSTS];
static bool has_uffd;
static uint64_t boxes[NR_BOXES][sizeof(struct dm_ref_wire) / 8];
static uint64_t nr_made, nr_used; /* Refs that came to life, Refs whose life ended */
static uint64_t nr_won[5], nr_lost;
static pthread_barrier_t start;

struct buffer {
    uint32_t id; /* of a mapping; 0: none */
    uint32_t nr_pages;
    uint64_t stamp[MOST_PAGES];
};

struct player {
    struct dm_host *h;
    struct rng rng;
    uint32_t steps;
    struct buffer buffers[MOST_BUFFERS];
};

static void counted(uint64_t *n) { __atomic_fetch_add(n, 1, __ATOMIC_RELAXED); }

/* ---------------------------------------------------------------- letter boxes */

static void put(struct player *p, const struct dm_ref_wire *w) {
    uint64_t words[sizeof *w / 8], *box = boxes[rng_below(&p->rng, NR_BOXES)];
    memcpy(words, w, sizeof *w);
    for (unsigned i = 0; i < sizeof *w / 8; i++)
        __atomic_store_n(&box[i], words[i], __ATOMIC_RELAXED);
}

/* False when the box is empty, or its letter half old and half new. */
static bool get(struct player *p, struct dm_ref_wire *w) {
    uint64_t words[sizeof *w / 8], *box = boxes[rng_below(&p->rng, NR_BOXES)];
    struct dm_error e;
    for (unsigned i = 0; i < sizeof *w / 8; i++)
        words[i] = __atomic_load_n(&box[i], __ATOMIC_RELAXED);
    memcpy(w, words, sizeof *w);
    return dm_ref_wire_check(w, dev.geo.fabric_id, &e) == DM_OK;
}

/* ---------------------------------------------------------------- pages */

static void stamp_page(uint64_t *words, uint32_t page, uint64_t stamp) {
    words[0] = stamp;
    words[100] = page;
    words[511] = stamp ^ page * 0x9e3779b97f4a7c15ull;
}

/* What page i of a buffer holds: read without the lock, as a user reads. */
static uint64_t read_page(struct player *p, uint32_t first, uint32_t i) {
    const uint64_t *words = (const uint64_t *)by_hand_bytes(p->h, first + i);
    EXPECT_EQ(words[100], i);
    EXPECT_EQ(words[511], words[0] ^ i * 0x9e3779b97f4a7c15ull);
    return words[0];
}

static void expect_unchanged(struct player *p, const struct buffer *b) {
    uint32_t page = p->h->vmas[b->id].page;
    for (uint32_t i = 0; i < b->nr_pages; i++)
        EXPECT_EQ(read_page(p, page, i), b->stamp[i]);
}

/* A store to one page: a fault first where the page is protected. */
static void write_page(struct player *p, struct buffer *b) {
    struct dm_host *h = p->h;
    struct dm_stray none = {0};
    uint32_t i = rng_below(&p->rng, b->nr_pages), page = h->vmas[b->id].page + i;
    dm_lock(h);
    bool writable = !(h->kstate[page] & DM_KS_PROTECTED);
    if (!writable && has_uffd)
        writable = dm_serve_fault(h, &none, dm_addr_of(h, page), 1) == DM_FAULT_SERVED;
    dm_unlock(h);
    if (!writable)
        return; /* no frame to copy to, or no way to remove protection */
    EXPECT(!(h->kstate[page] & DM_KS_PROTECTED));
    b->stamp[i] = rng_next(&p->rng);
    stamp_page((uint64_t *)by_hand_bytes(h, page), i, b->stamp[i]);
    expect_unchanged(p, b);
}

/* ---------------------------------------------------------------- moves */

/* Refs whose letters were overwritten are lost; their holder drops some, as dm_detach does: others may be faster. */
static void sweep(struct player *p) {
    struct dm_host *h = p->h;
    dm_lock(h);
    for (uint32_t i = 0; i < NR_REFS; i++) {
        uint64_t word = __atomic_load_n(&h->refs[i].state, __ATOMIC_ACQUIRE);
        uint64_t mine = dm_ref_pack(DM_REF_DROPPING, 0, h->id, dm_ref_gen(word));
        if (dm_ref_state(word) != DM_REF_LIVE || dm_ref_holder(word) != h->id ||
            rng_below(&p->rng, 2))
            continue;
        if (__atomic_compare_exchange_n(&h->refs[i].state, &word, mine, false, __ATOMIC_ACQ_REL,
                                        __ATOMIC_RELAXED)) {
            dm_ref_release(h, i);
            counted(&nr_used);
        }
    }
    dm_unlock(h);
}

/* Statuses that only tell that others were faster, or that something is used up. */
static bool was_in_vain(int status) {
    counted(&nr_lost);
    return status == DM_ERR_REF_CONSUMED || status == DM_REF_BUSY || status == DM_AGAIN_BLOCKING ||
           status == DM_ERR_NO_REF_SLOT || status == DM_ERR_OUT_OF_FRAMES ||
           status == DM_ERR_COORDINATOR_LOST || status == DM_ERR_NO_ADDRESS_SPACE ||
           (status == DM_ERR_SYSTEM && !has_uffd);
}

#define WON(what, call)                                                                            \
    ({                                                                                             \
        dm_lock(p->h);                                                                             \
        int status_ = call;                                                                        \
        dm_unlock(p->h);                                                                           \
        if (status_ && !was_in_vain(status_))                                                      \
            FAIL("expected: %s is won or lost, but status %d: %s", #call, status_, e.text);        \
        if (!status_)                                                                              \
            counted(&nr_won[what]);                                                                \
        else if (status_ == DM_ERR_NO_REF_SLOT || status_ == DM_AGAIN_BLOCKING)                    \
            sweep(p);                                                                              \
        status_ == DM_OK;                                                                          \
    })
enum { MAKE, ACCEPT, CLONE, DROP, MAP };

static struct buffer *buffer_of(struct player *p, bool used) {
    struct buffer *b = &p->buffers[rng_below(&p->rng, MOST_BUFFERS)];
    return !b->id == !used ? b : NULL;
}

static void make(struct player *p) {
    struct buffer *b = buffer_of(p, false);
    struct dm_error e;
    uint32_t nr = 1 + rng_below(&p->rng, rng_below(&p->rng, 3) ? 4 : MOST_PAGES);
    if (!b || !WON(MAKE, dm_ralloc(p->h, nr * BY_HAND_PAGE, 0, false, &b->id, &e)))
        return;
    b->nr_pages = nr;
    for (uint32_t i = 0; i < nr; i++) {
        b->stamp[i] = rng_next(&p->rng);
        stamp_page((uint64_t *)by_hand_bytes(p->h, p->h->vmas[b->id].page + i), i, b->stamp[i]);
    }
}

static void send(struct player *p, bool move) {
    struct buffer *b = buffer_of(p, true);
    struct dm_ref_wire w;
    struct dm_error e;
    if (!b)
        return;
    const struct dm_vma *v = &p->h->vmas[b->id];
    uint64_t addr = dm_addr_of(p->h, v->page);
    expect_unchanged(p, b);
    if (move ? !WON(MAKE, dm_move_ref(p->h, b->id, false, &w, &e))
             : !WON(MAKE, dm_create_ref(p->h, addr, v->length, false, &w, &e)))
        return;
    counted(&nr_made);
    if (move)
        b->id = 0;
    put(p, &w);
}

static void map(struct player *p, struct dm_ref_wire *w) {
    struct buffer *b = buffer_of(p, false);
    struct dm_error e;
    unsigned flags = rng_below(&p->rng, 4) ? 0 : DM_MAP_COPY;
    if (!b || !WON(MAP, dm_map_ref(p->h, w, flags, true, &b->id, &e)))
        return;
    counted(&nr_used);
    const struct dm_vma *v = &p->h->vmas[b->id];
    b->nr_pages = v->nr_pages;
    EXPECT(b->nr_pages <= MOST_PAGES);
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
        if (WON(ACCEPT, dm_ref_accept(p->h, &w, &e)))
            put(p, &w);
        break;
    case 1:
    case 2:
        if (WON(CLONE, dm_ref_clone(p->h, &w, false, &copy, &e))) {
            counted(&nr_made);
            put(p, &copy);
        }
        put(p, &w); /* as accepted; if it was lost, it is stale, and everybody finds out */
        break;
    case 3:
        if (WON(DROP, dm_ref_drop(p->h, &w, &e)))
            counted(&nr_used);
        break;
    default:
        map(p, &w);
    }
}

static void give_up(struct player *p) {
    struct buffer *b = buffer_of(p, true);
    struct dm_error e;
    if (!b)
        return;
    expect_unchanged(p, b);
    dm_lock(p->h);
    EXPECT_OK(dm_rfree(p->h, b->id, &e), &e);
    dm_unlock(p->h);
    b->id = 0;
}

static void *play(void *arg) {
    struct player *p = arg;
    struct buffer *b;
    pthread_barrier_wait(&start);
    for (uint32_t n = 0; n < p->steps; n++)
        switch (rng_below(&p->rng, 10)) {
        case 0:
        case 1:
            make(p);
            break;
        case 2:
            send(p, true);
            break;
        case 3:
            send(p, false);
            break;
        case 4:
            give_up(p);
            break;
        case 5:
            if ((b = buffer_of(p, true)))
                write_page(p, b);
            break;
        default:
            receive(p);
        }
    return NULL;
}

/* ---------------------------------------------------------------- the end of it */

/* Drop the Refs that nobody took. */
static void drop_the_rest(void) {
    struct dm_error e;
    for (uint32_t i = 0; i < NR_REFS; i++) {
        uint64_t word = dev.refs[i].state;
        if (dm_ref_state(word) == DM_REF_FREE)
            continue;
        struct dm_host *h = hosts[dm_ref_holder(word) - 1];
        dm_lock(h);
        EXPECT_EQ(dm_ref_state(word), DM_REF_LIVE);
        dev.refs[i].state = dm_ref_pack(DM_REF_DROPPING, 0, h->id, dm_ref_gen(word));
        dm_ref_release(h, i);
        dm_unlock(h);
    }
    for (uint32_t i = 0; i < NR_HOSTS; i++)
        for (uint32_t id = 1; id <= hosts[i]->nr_vmas; id++)
            if (hosts[i]->vmas[id].flags & DM_VMA_USED)
                EXPECT_OK(dm_rfree(hosts[i], id, &e), &e);
}

static void counts_are_exact_after_hosts_fought_over_refs(void) {
    static struct player players[NR_THREADS];
    pthread_t threads[NR_THREADS];
    struct rng rng = rng_start();
    uint32_t steps = check_slow() ? 1000000 : CHECK_TSAN ? 40000 : CHECK_ASAN ? 100000 : 200000;
    for (uint32_t i = 0; i < NR_THREADS; i++) {
        players[i] = (struct player){hosts[i % NR_HOSTS], {rng_next(&rng)}, steps, {{0}}};
        EXPECT(!pthread_create(&threads[i], NULL, play, &players[i]));
    }
    for (uint32_t i = 0; i < NR_THREADS; i++)
        EXPECT(!pthread_join(threads[i], NULL));
    printf("made %llu, accepted %llu, cloned %llu, dropped %llu, mapped %llu, in vain %llu\n",
           (unsigned long long)nr_won[MAKE], (unsigned long long)nr_won[ACCEPT],
           (unsigned long long)nr_won[CLONE], (unsigned long long)nr_won[DROP],
           (unsigned long long)nr_won[MAP], (unsigned long long)nr_lost);
    for (int i = 0; i < 5; i++)
        EXPECT(nr_won[i] > 0);

    const struct dm_audit *audit = by_hand_exact(&dev);
    EXPECT_EQ(audit->live_refs, nr_made - nr_used);
    uint64_t pages = 0;
    for (uint32_t i = 0; i < NR_THREADS; i++)
        for (uint32_t b = 0; b < MOST_BUFFERS; b++)
            if (players[i].buffers[b].id) {
                expect_unchanged(&players[i], &players[i].buffers[b]);
                pages += players[i].buffers[b].nr_pages;
            }
    EXPECT_EQ(audit->mapped_pages, pages);
    for (uint32_t i = 0; i < NR_HOSTS; i++)
        EXPECT_EQ(audit->free_of[i + 1], hosts[i]->free.nr_free);

    drop_the_rest();
    audit = by_hand_exact(&dev);
    EXPECT_EQ(audit->in_use, 0);
    EXPECT_EQ(audit->live_refs, 0);
    for (uint32_t i = 0; i < NR_HOSTS; i++)
        EXPECT_EQ(audit->free_of[i + 1], hosts[i]->free.nr_free);
}

int main(void) {
    const char *why;
    has_uffd = by_hand_has_uffd(&why);
    if (!has_uffd)
        printf("without create_ref that shares and without copy-on-write: %s\n", why);
    by_hand_device(&dev, NR_FRAMES, NR_HOSTS, NR_REFS);
    for (uint16_t i = 0; i < NR_HOSTS; i++) {
        by_hand_activate(&dev, i + 1u);
        hosts[i] = by_hand_host(&dev, (uint16_t)(i + 1));
        by_hand_grant(hosts[i], i * (NR_FRAMES / NR_HOSTS), NR_FRAMES / NR_HOSTS);
    }
    EXPECT(!pthread_barrier_init(&start, NULL, NR_THREADS));
    HOLDS(counts_are_exact_after_hosts_fought_over_refs);
    for (uint32_t i = 0; i < NR_HOSTS; i++)
        by_hand_host_free(hosts[i]);
    dm_device_close(&dev);
    return 0;
}
