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
#include <sys/mman.h>

#include "check.h"
#include "memory.h"
#include "net_pager.h"

#define BYTES (37u * PAGE + 1234u)
#define PAGES 38u
#define THREADS 4
#define SECOND 1000000000ull

static struct net_pager *pager;
static struct net_arena *arena;
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
    EXPECT(arena = net_arena_new());
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
    net_arena_free(arena);
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
    *r = (struct net_region){.length = BYTES, .key = key, .shard = shard, .whole = whole};
    EXPECT(net_arena_take(arena, PAGES, false, &r->run));
    EXPECT_EQ(net_pager_add(pager, r, false), 0);
}

static void hide(struct net_region *r) {
    bool plain = net_pager_remove(pager, r);
    EXPECT(plain);
    net_arena_give(arena, &r->run, net_region_failed(r));
}

static void expect_whole(const struct net_region *r) {
    EXPECT(!memcmp(r->run.front, bytes, BYTES));
    for (uint32_t at = BYTES; at < PAGES * PAGE; at++)
        EXPECT_EQ(r->run.front[at], 0);
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
            EXPECT_EQ((uint8_t)r.run.front[at], bytes[at]);
            if (i == 0)
                EXPECT_EQ(present(&r), 1);
        }
        expect_whole(&r);
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
    EXPECT_EQ((uint8_t)r.run.front[20 * PAGE], bytes[20 * PAGE]);
    EXPECT_EQ(present(&r), PAGES);
    EXPECT(!memcmp(r.run.front, bytes, BYTES));
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
    EXPECT_EQ((uint8_t)r.run.front[0], bytes[0]);
    net_pager_settle(pager, &r);
    EXPECT(!net_region_dirty(&r));
    r.run.front[3 * PAGE] ^= 0x55;
    net_pager_settle(pager, &r);
    EXPECT(net_region_dirty(&r));
    EXPECT_EQ((uint8_t)r.run.front[3 * PAGE], bytes[3 * PAGE] ^ 0x55);
    show(&again, 0, key, false);
    EXPECT(!memcmp(again.run.front, bytes, BYTES));
    EXPECT_EQ(net_pager_protect(pager, &r), 0); /* as when its bytes have been sent anew */
    EXPECT(!net_region_dirty(&r));
    r.run.front[5] ^= 1;
    net_pager_settle(pager, &r);
    EXPECT(net_region_dirty(&r));
    hide(&again);
    hide(&r);
    drop(0, key);
    close_pager();
}

static void bytes_that_were_supplied_do_not_hide_stores_and_are_not_fetched(void) {
    struct net_region r;
    struct net_pager_stats s;
    open_pager(10 * SECOND);
    uint64_t key = put(0, 9);
    show(&r, 0, key, false);
    r.run.front[20 * PAGE] ^= 0x55;
    EXPECT_EQ(net_pager_supply(pager, &r, (char *)bytes), 0);
    bytes[20 * PAGE] ^= 0x55;
    expect_whole(&r);
    net_pager_stats(pager, &s);
    EXPECT_EQ(s.bytes_fetched, PAGE);
    EXPECT(net_region_dirty(&r));
    hide(&r);
    drop(0, key);
    close_pager();
}

/* Memory is used again: with what others left in it, at the front and at the back. */
static void regions_that_follow_each_other_at_one_place_have_their_own_bytes(void) {
    struct net_region r;
    struct rng draw = rng_start();
    char *place = NULL;
    open_pager(10 * SECOND);
    for (int round = 0; round < 40; round++) {
        uint64_t key = put(round % SHARDS, 300 + (uint64_t)round);
        show(&r, round % SHARDS, key, rng_below(&draw, 2));
        EXPECT(!place || r.run.front == place);
        place = r.run.front;
        for (int i = 0; i < 20; i++) {
            uint32_t at = rng_below(&draw, BYTES);
            EXPECT_EQ((uint8_t)r.run.front[at], bytes[at]);
            EXPECT(!net_region_dirty(&r));
        }
        if (rng_below(&draw, 2)) {
            uint32_t at = rng_below(&draw, BYTES);
            r.run.front[at] = (char)~bytes[at];
            net_pager_settle(pager, &r);
            EXPECT(net_region_dirty(&r));
        }
        hide(&r);
        drop(round % SHARDS, key);
        if (rng_below(&draw, 2)) { /* and somebody uses it without a pager */
            struct net_run run;
            EXPECT(net_arena_take(arena, PAGES - 1, true, &run));
            EXPECT(run.front == place);
            for (uint32_t at = 0; at < (PAGES - 1) * PAGE; at += 64)
                EXPECT_EQ(run.front[at], 0);
            memset(run.front, 0xaa, (PAGES - 1) * PAGE);
            net_arena_give(arena, &run, false);
        }
    }
    close_pager();
}

/* What was never touched at the front, or is taken from it, comes back from the back; its stores are noticed. */
static void pages_that_the_front_has_lost_sight_of_come_back(void) {
    struct net_region r = {.length = BYTES};
    struct net_pager_stats s;
    open_pager(10 * SECOND);
    EXPECT(net_arena_take(arena, PAGES, true, &r.run));
    memset(r.run.front, 7, 5 * PAGE);
    EXPECT_EQ(net_pager_add(pager, &r, true), 0);
    EXPECT_EQ(net_pager_protect(pager, &r), 0);
    EXPECT_EQ(madvise(r.run.front, 3 * PAGE, MADV_DONTNEED), 0);
    for (uint32_t at = 0; at < PAGES * PAGE; at += PAGE)
        EXPECT_EQ(r.run.front[at], at < 5 * PAGE ? 7 : 0);
    net_pager_settle(pager, &r);
    EXPECT(!net_region_dirty(&r));
    r.run.front[PAGE] = 8;
    net_pager_settle(pager, &r);
    EXPECT(net_region_dirty(&r));
    r.run.front[30 * PAGE] = 9;
    EXPECT_EQ(r.run.front[PAGE] + r.run.front[30 * PAGE], 17);
    net_pager_stats(pager, &s);
    EXPECT_EQ(s.nr_requests, 0);
    hide(&r);
    close_pager();
}

static _Atomic bool enough;

static void *neighbour(void *arg) {
    struct net_run *run = arg;
    while (!enough) {
        EXPECT_EQ(madvise(run->front, PAGE, MADV_DONTNEED), 0);
        EXPECT_EQ(run->front[0], 1);
    }
    return NULL;
}

/* The kernel maps pages around a fault, also those that lie there from before. */
static void faults_next_to_a_region_do_not_show_what_was_there_before(void) {
    struct net_region r;
    struct net_run next;
    pthread_t thread;
    open_pager(10 * SECOND);
    uint64_t key = put(0, 12);
    EXPECT(net_arena_take(arena, 64, true, &next));
    memset(next.front, 1, 64 * PAGE);
    enough = false;
    EXPECT_EQ(pthread_create(&thread, NULL, neighbour, &next), 0);
    for (int round = 0; round < 1000; round++) {
        show(&r, 0, key, false);
        for (uint32_t page = 0; page < 4; page++)
            EXPECT_EQ((uint8_t)r.run.front[page * PAGE], bytes[page * PAGE]);
        r.run.front[PAGE] ^= 1;
        net_pager_settle(pager, &r);
        EXPECT(net_region_dirty(&r));
        memset(r.run.front, 0xaa, PAGES * PAGE);
        hide(&r);
    }
    enough = true;
    pthread_join(thread, NULL);
    net_arena_give(arena, &next, false);
    drop(0, key);
    close_pager();
}

static void memory_that_somebody_locked_is_as_good_as_any(void) {
    struct net_region r;
    struct net_run run;
    open_pager(10 * SECOND);
    uint64_t key = put(0, 13);
    EXPECT(net_arena_take(arena, PAGES, true, &run));
    memset(run.front, 0xaa, PAGES * PAGE);
    if (mlock(run.front, PAGES * PAGE))
        printf("mlock is not allowed here\n");
    net_arena_give(arena, &run, false);
    show(&r, 0, key, true);
    EXPECT(r.run.front == run.front);
    EXPECT(!memcmp(r.run.front, bytes, BYTES));
    hide(&r);
    drop(0, key);
    close_pager();
}

/* At vm.max_map_count the kernel cannot cut a region out of its neighbours. Nobody who gets its memory next may hang. */
static void memory_that_the_kernel_goes_on_watching_is_not_used_again(void) {
    enum { MANY = 70000 };
    static struct net_region many[MANY];
    unsigned most = 0;
    FILE *limit = fopen("/proc/sys/vm/max_map_count", "r");
    if (limit) {
        EXPECT_EQ(fscanf(limit, "%u", &most), 1);
        (void)fclose(limit);
    }
    if (most >= MANY || CHECK_ASAN || CHECK_TSAN) { /* which need mappings themselves */
        printf("vm.max_map_count is %u: not reached\n", most);
        return;
    }
    open_pager(10 * SECOND);
    for (uint32_t i = 0; i < MANY; i++) {
        many[i] = (struct net_region){.length = PAGE};
        EXPECT(net_arena_take(arena, 1, true, &many[i].run));
        EXPECT_EQ(net_pager_add(pager, &many[i], false), 0);
    }
    uint32_t nr_watched = 0;
    for (uint32_t i = 0; i < MANY; i += 2) {
        bool plain = net_pager_remove(pager, &many[i]);
        nr_watched += !plain;
        net_arena_give(arena, &many[i].run, !plain);
    }
    EXPECT(nr_watched > 0);
    for (uint32_t i = 0; i < MANY; i += 2) {
        EXPECT(net_arena_take(arena, 1, true, &many[i].run));
        memset(many[i].run.front, 1, PAGE);
    }
    for (uint32_t i = 0; i < MANY; i += 2)
        net_arena_give(arena, &many[i].run, false);
    for (uint32_t i = 1; i < MANY; i += 2)
        net_arena_give(arena, &many[i].run, !net_pager_remove(pager, &many[i]));
    close_pager();
}

static void where_pages_cannot_come_protected_they_count_as_changed(void) {
    struct net_region r;
    open_pager(10 * SECOND);
    net_pager_never_protect(pager);
    uint64_t key = put(0, 10);
    show(&r, 0, key, true);
    EXPECT(!net_region_dirty(&r)); /* there is nothing to change yet */
    EXPECT(!memcmp(r.run.front, bytes, BYTES));
    EXPECT(net_region_dirty(&r));
    r.run.front[3] ^= 1;
    EXPECT_EQ((uint8_t)r.run.front[3], bytes[3] ^ 1);
    EXPECT_EQ(net_pager_protect(pager, &r), 0); /* as when its bytes have been sent anew */
    EXPECT(!net_region_dirty(&r));
    r.run.front[5] ^= 1;
    net_pager_settle(pager, &r);
    EXPECT(net_region_dirty(&r));
    hide(&r);
    drop(0, key);
    close_pager();
}

static void what_shows_nothing_is_zeros(void) {
    struct net_region r;
    open_pager(10 * SECOND);
    show(&r, 0, 0, false);
    for (uint32_t at = 0; at < PAGES * PAGE; at += 511)
        EXPECT_EQ(r.run.front[at], 0);
    r.run.front[7] = 1;
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
        EXPECT_EQ((uint8_t)regions[which].run.front[at], expected[which][at]);
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
            EXPECT_EQ((uint8_t)r.run.front[PAGE], expected[0][PAGE]);
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
    EXPECT_EQ((uint8_t)r.run.front[0], bytes[0]);
    drop(0, key); /* while it is shown: the Ref is gone, as after its server has died */
    EXPECT_EQ(sigaction(SIGBUS, &on_bus, &before), 0);
    volatile bool ended = true;
    if (!sigsetjmp(back, 1)) {
        volatile char c = r.run.front[30 * PAGE];
        (void)c;
        ended = false;
    }
    EXPECT_EQ(sigaction(SIGBUS, &before, NULL), 0);
    EXPECT(ended);
    EXPECT_EQ((uint8_t)r.run.front[0], bytes[0]);
    net_pager_settle(pager, &r);
    EXPECT(net_region_failed(&r));
    net_pager_stats(pager, &s);
    EXPECT_EQ(s.nr_failed, 1);
    char *place = r.run.front;
    hide(&r);
    key = put(1, 11); /* its memory is as good as any */
    show(&r, 1, key, true);
    EXPECT(r.run.front == place);
    EXPECT(!memcmp(r.run.front, bytes, BYTES));
    hide(&r);
    drop(1, key);
    close_pager();
}

int main(void) {
    signal(SIGPIPE, SIG_IGN);
    HOLDS(pages_come_when_they_are_touched);
    HOLDS(the_first_touch_brings_all_of_a_whole_region);
    HOLDS(a_store_is_private_and_is_noticed);
    HOLDS(bytes_that_were_supplied_do_not_hide_stores_and_are_not_fetched);
    HOLDS(regions_that_follow_each_other_at_one_place_have_their_own_bytes);
    HOLDS(pages_that_the_front_has_lost_sight_of_come_back);
    HOLDS(faults_next_to_a_region_do_not_show_what_was_there_before);
    HOLDS(memory_that_somebody_locked_is_as_good_as_any);
    HOLDS(memory_that_the_kernel_goes_on_watching_is_not_used_again);
    HOLDS(where_pages_cannot_come_protected_they_count_as_changed);
    HOLDS(what_shows_nothing_is_zeros);
    HOLDS(threads_that_touch_the_same_pages_find_the_same_bytes);
    HOLDS(bytes_that_cannot_be_had_end_who_touches_them_and_others_stay);
    return 0;
}
