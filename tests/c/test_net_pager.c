/*
 * test_net_pager.c - memory that is fetched from a memory server when it is touched: real faults, real sockets, for the
 * sanitizers above all.
 */
#include <errno.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <string.h>

#include "check.h"
#include "memory.h"
#include "net_pager.h"

#define BYTES (37u * PAGE + 1234u)
#define PAGES 38u
#define THREADS 4
#define SECOND 1000000000ull

static struct net_pager *pager;
static struct process client, reader;
static uint8_t bytes[BYTES];

static void open_pager(uint64_t deadline_ns) {
    memory_start();
    memory_join(&client);
    memory_join(&reader);
    pager = net_pager_new(deadline_ns);
    if (!pager) {
        printf("userfaultfd is not allowed here: %s\n", strerror(errno));
        _exit(77);
    }
    for (uint16_t shard = 0; shard < SHARDS; shard++) {
        struct net_hello h = {.magic = NET_MAGIC,
                              .version = NET_VERSION,
                              .kind = NET_DATA,
                              .token = 99,
                              .pid = reader.pid,
                              .shard = shard};
        memcpy(h.secret, memory_secret, sizeof h.secret);
        EXPECT_EQ(
            net_pager_route(pager, (struct sockaddr *)&memory_place, sizeof memory_place, &h, 0),
            0);
    }
}

static void close_pager(void) {
    net_pager_free(pager);
    memory_leave(&reader);
    memory_leave(&client);
    memory_expect_all_free();
    memory_stop();
}

/* A Ref to new bytes at a shard: its key. */
static uint64_t put(uint32_t shard, uint64_t seed) {
    struct rng r = {seed};
    for (uint32_t i = 0; i < BYTES; i++)
        bytes[i] = (uint8_t)rng_next(&r);
    struct net_call c = {.request = {.op = NET_PUT, .payload = BYTES}, .payload = bytes};
    EXPECT_EQ(memory_call(&client, shard, &c), NET_OK);
    return c.a;
}

static void drop(uint32_t shard, uint64_t key) {
    (void)memory_asked(&client, shard,
                       (struct net_request){.op = NET_DROP_REF, .a = key, .b = BYTES});
}

static void show(struct net_region *r, uint16_t shard, uint64_t key, bool whole) {
    *r = (struct net_region){.base = net_pager_map(PAGES),
                             .nr_pages = PAGES,
                             .length = BYTES,
                             .key = key,
                             .shard = shard,
                             .whole = whole};
    EXPECT(r->base);
    EXPECT_EQ(net_pager_add(pager, r, false), 0);
}

static void hide(struct net_region *r) {
    net_pager_remove(pager, r);
    net_pager_unmap(r->base, r->nr_pages);
}

static uint64_t present(struct net_region *r) {
    net_pager_settle(pager, r);
    return net_region_present(r);
}

/* ---------------------------------------------------------------- tests */

static void pages_come_when_they_are_touched(void) {
    struct net_region r;
    struct rng draw = rng_start();
    open_pager(10 * SECOND);
    for (uint16_t shard = 0; shard < SHARDS; shard++) {
        uint64_t key = put(shard, 1000 + shard);
        show(&r, shard, key, false);
        for (int i = 0; i < 200; i++) {
            uint32_t at = rng_below(&draw, BYTES);
            EXPECT_EQ((uint8_t)r.base[at], bytes[at]);
            if (i == 0)
                EXPECT_EQ(present(&r), 1);
        }
        EXPECT(!memcmp(r.base, bytes, BYTES));
        for (uint32_t at = BYTES; at < PAGES * PAGE; at++)
            EXPECT_EQ(r.base[at], 0);
        EXPECT_EQ(present(&r), PAGES);
        EXPECT(!net_region_dirty(&r));
        hide(&r);
        drop(shard, key);
    }
    close_pager();
}

static void the_first_touch_brings_all_of_a_whole_region(void) {
    struct net_region r;
    struct net_pager_stats s;
    open_pager(10 * SECOND);
    uint64_t key = put(0, 5);
    show(&r, 0, key, true);
    EXPECT_EQ((uint8_t)r.base[20 * PAGE], bytes[20 * PAGE]);
    EXPECT_EQ(present(&r), PAGES);
    EXPECT(!memcmp(r.base, bytes, BYTES));
    net_pager_stats(pager, &s);
    EXPECT_EQ(s.nr_faults, 1);
    EXPECT_EQ(s.bytes_fetched, BYTES);
    hide(&r);
    drop(0, key);
    close_pager();
}

static void a_store_is_private_and_is_noticed(void) {
    struct net_region r, again;
    open_pager(10 * SECOND);
    uint64_t key = put(0, 6);
    show(&r, 0, key, true);
    EXPECT_EQ((uint8_t)r.base[0], bytes[0]);
    net_pager_settle(pager, &r);
    EXPECT(!net_region_dirty(&r));
    r.base[3 * PAGE] ^= 0x55;
    net_pager_settle(pager, &r);
    EXPECT(net_region_dirty(&r));
    EXPECT_EQ((uint8_t)r.base[3 * PAGE], bytes[3 * PAGE] ^ 0x55);
    show(&again, 0, key, false);
    EXPECT(!memcmp(again.base, bytes, BYTES));
    EXPECT_EQ(net_pager_protect(pager, &r), 0); /* as when its bytes have been sent anew */
    EXPECT(!net_region_dirty(&r));
    r.base[5] ^= 1;
    net_pager_settle(pager, &r);
    EXPECT(net_region_dirty(&r));
    hide(&again);
    hide(&r);
    drop(0, key);
    close_pager();
}

static void what_shows_nothing_is_zeros(void) {
    struct net_region r;
    open_pager(10 * SECOND);
    show(&r, 0, 0, false);
    for (uint32_t at = 0; at < PAGES * PAGE; at += 511)
        EXPECT_EQ(r.base[at], 0);
    r.base[7] = 1;
    net_pager_settle(pager, &r);
    EXPECT(net_region_dirty(&r));
    hide(&r);
    close_pager();
}

static struct net_region regions[3];
static uint8_t expected[3][BYTES];
static _Atomic int running;

static void *toucher(void *arg) {
    struct rng draw = {(uintptr_t)arg + 1};
    for (int i = 0; i < 400; i++) {
        uint32_t which = rng_below(&draw, 3), at = rng_below(&draw, BYTES);
        EXPECT_EQ((uint8_t)regions[which].base[at], expected[which][at]);
    }
    atomic_fetch_sub(&running, 1);
    return NULL;
}

static void threads_that_touch_the_same_pages_find_the_same_bytes(void) {
    pthread_t threads[THREADS];
    uint64_t keys[3];
    open_pager(10 * SECOND);
    for (int round = 0; round < 8; round++) {
        for (uint16_t i = 0; i < 3; i++) {
            keys[i] = put(i % SHARDS, 70 + 3 * (uint64_t)round + i);
            memcpy(expected[i], bytes, BYTES);
            show(&regions[i], i % SHARDS, keys[i], i == 2);
        }
        atomic_store(&running, THREADS);
        for (uintptr_t i = 0; i < THREADS; i++)
            EXPECT_EQ(pthread_create(&threads[i], NULL, toucher, (void *)i), 0);
        while (atomic_load(&running)) { /* others come and go meanwhile */
            struct net_region r;
            show(&r, 0, keys[0], true);
            EXPECT_EQ((uint8_t)r.base[PAGE], expected[0][PAGE]);
            hide(&r);
        }
        for (int i = 0; i < THREADS; i++)
            pthread_join(threads[i], NULL);
        for (uint16_t i = 0; i < 3; i++) {
            hide(&regions[i]);
            drop(i % SHARDS, keys[i]);
        }
    }
    close_pager();
}

static sigjmp_buf back;

static void jump(int number) {
    (void)number;
    siglongjmp(back, 1);
}

static void bytes_that_cannot_be_had_end_who_touches_them_and_others_stay(void) {
    struct net_region r;
    struct net_pager_stats s;
    struct sigaction before, on_bus = {.sa_handler = jump};
    open_pager(SECOND / 5);
    if (!net_pager_poisons(
            pager)) { /* the whole process is ended: for processes of their own to test */
        close_pager();
        return;
    }
    uint64_t key = put(0, 8);
    show(&r, 0, key, false);
    EXPECT_EQ((uint8_t)r.base[0], bytes[0]);
    drop(0, key); /* while it is shown: the Ref is gone, as after its server has died */
    EXPECT_EQ(sigaction(SIGBUS, &on_bus, &before), 0);
    volatile bool ended = true;
    if (!sigsetjmp(back, 1)) {
        volatile char c = r.base[30 * PAGE];
        (void)c;
        ended = false;
    }
    EXPECT_EQ(sigaction(SIGBUS, &before, NULL), 0);
    EXPECT(ended);
    EXPECT_EQ((uint8_t)r.base[0], bytes[0]);
    net_pager_settle(pager, &r);
    EXPECT(net_region_failed(&r));
    net_pager_stats(pager, &s);
    EXPECT_EQ(s.nr_failed, 1);
    hide(&r);
    close_pager();
}

int main(void) {
    signal(SIGPIPE, SIG_IGN);
    HOLDS(pages_come_when_they_are_touched);
    HOLDS(the_first_touch_brings_all_of_a_whole_region);
    HOLDS(a_store_is_private_and_is_noticed);
    HOLDS(what_shows_nothing_is_zeros);
    HOLDS(threads_that_touch_the_same_pages_find_the_same_bytes);
    HOLDS(bytes_that_cannot_be_had_end_who_touches_them_and_others_stay);
    return 0;
}
