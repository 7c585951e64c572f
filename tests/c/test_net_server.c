/*
 * test_net_server.c - a memory server's threads and a client's link, over real sockets: for the sanitizers above all.
 */
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/socket.h>

#include "check.h"
#include "memory.h"
#include "net_server.h"

/* ---------------------------------------------------------------- tests */

static void what_was_written_is_read(void) {
    struct process p;
    struct rng r = rng_start();
    memory_start();
    memory_join(&p);
    enum { BYTES = 300000 };
    uint8_t *bytes = malloc(BYTES), *back = malloc(BYTES);
    for (uint32_t shard = 0; shard < SHARDS; shard++) {
        uint64_t a = memory_asked(&p, shard, (struct net_request){.op = NET_RALLOC, .a = BYTES});
        for (int i = 0; i < 50; i++) {
            uint32_t n = 1 + rng_below(&r, BYTES), at = rng_below(&r, BYTES - n + 1);
            for (uint32_t k = 0; k < n; k++)
                bytes[k] = (uint8_t)rng_next(&r);
            memory_write(&p, shard, a + at, bytes, n);
            memset(back, 0, n);
            memory_read(&p, shard, a + at, back, n);
            EXPECT(!memcmp(bytes, back, n));
        }
        (void)memory_asked(&p, shard, (struct net_request){.op = NET_RFREE, .a = a});
    }
    free(bytes);
    free(back);
    memory_leave(&p);
    memory_expect_all_free();
    memory_stop();
}

static void answers_that_refuse_do_not_confuse_what_follows(void) {
    struct process p;
    memory_start();
    memory_join(&p);
    enum { N = 60, BYTES = 20000 };
    static struct net_call calls[N];
    static uint8_t into[N][BYTES];
    uint64_t a = memory_asked(&p, 0, (struct net_request){.op = NET_RALLOC, .a = BYTES});
    memset(into[0], 7, BYTES);
    memory_write(&p, 0, a, into[0], BYTES);
    for (int i = 0; i < N; i++) { /* each second one is refused, where much was expected */
        calls[i] = (struct net_call){
            .request = {.op = NET_RREAD, .a = i & 1 ? a + (1ull << 40) : a, .b = BYTES},
            .into = into[i],
            .into_bytes = BYTES};
        EXPECT_EQ(net_link_submit(p.links[0], &calls[i], i % 7 != 0), 0);
    }
    for (int i = N; i-- > 0;) {
        EXPECT_EQ(net_link_wait(p.links[0], &calls[i], 0), i & 1 ? NET_BAD_ADDRESS : NET_OK);
        for (int k = 0; !(i & 1) && k < BYTES; k++)
            EXPECT_EQ(into[i][k], 7);
    }
    memory_leave(&p);
    memory_expect_all_free();
    memory_stop();
}

#define THREADS 4

static struct process shared;
static _Atomic int running;

static void *reader_and_writer(void *arg) {
    const uint32_t me = (uint32_t)(uintptr_t)arg;
    static uint8_t bytes[THREADS][64 * 1024], back[THREADS][64 * 1024];
    struct rng r = {me + 1};
    uint64_t at =
        memory_asked(&shared, 0, (struct net_request){.op = NET_RALLOC, .a = sizeof bytes[0]});
    for (int i = 0; i < 150; i++) {
        uint32_t n = 1 + rng_below(&r, sizeof bytes[0]);
        memset(bytes[me], (int)rng_next(&r), n);
        memory_write(&shared, 0, at, bytes[me], n);
        memory_read(&shared, 0, at, back[me], n);
        EXPECT(!memcmp(bytes[me], back[me], n));
    }
    atomic_fetch_sub(&running, 1);
    return NULL;
}

static void threads_share_a_connection(void) {
    pthread_t threads[THREADS];
    memory_start();
    memory_join(&shared);
    atomic_store(&running, THREADS);
    for (uintptr_t i = 0; i < THREADS; i++)
        EXPECT_EQ(pthread_create(&threads[i], NULL, reader_and_writer, (void *)i), 0);
    for (int i = 0; i < THREADS; i++)
        pthread_join(threads[i], NULL);
    memory_leave(&shared);
    memory_expect_all_free();
    memory_stop();
}

/* One that breaks the shared connection again and again, while others use it. */
static void *breaker(void *arg) {
    struct net_link *l = shared.links[0];
    (void)arg;
    while (atomic_load(&running)) {
        pthread_mutex_lock(&l->lock);
        if (!l->broken)
            (void)shutdown(l->fd, SHUT_RDWR);
        pthread_mutex_unlock(&l->lock);
        (void)poll(NULL, 0, 3);
    }
    return NULL;
}

static void a_connection_that_breaks_again_and_again_loses_nothing(void) {
    pthread_t threads[THREADS], wrecker;
    memory_start();
    memory_join(&shared);
    atomic_store(&running, THREADS);
    EXPECT_EQ(pthread_create(&wrecker, NULL, breaker, NULL), 0);
    for (uintptr_t i = 0; i < THREADS; i++)
        EXPECT_EQ(pthread_create(&threads[i], NULL, reader_and_writer, (void *)i), 0);
    for (int i = 0; i < THREADS; i++)
        pthread_join(threads[i], NULL);
    pthread_join(wrecker, NULL);
    memory_leave(&shared);
    memory_expect_all_free();
    memory_stop();
}

/* Processes that hand Refs to each other through a table, die in the midst of it, and come again. */
static uint64_t table[16];
static pthread_mutex_t table_lock = PTHREAD_MUTEX_INITIALIZER;

static void *come_and_go(void *arg) {
    struct rng r = {(uintptr_t)arg * 7919 + 1};
    static uint8_t block[3 * PAGE];
    for (int life = 0; life < 12; life++) {
        struct process p;
        memory_join(&p);
        for (int i = 0; i < 60; i++) {
            const uint32_t shard = 0, slot = rng_below(&r, 16);
            uint8_t back[100];
            struct net_call put = {
                .request = {.op = NET_PUT, .payload = sizeof block, .flags = NET_KEEP},
                .payload = block};
            EXPECT_EQ(memory_call(&p, shard, &put), NET_OK);
            pthread_mutex_lock(&table_lock);
            uint64_t theirs = table[slot];
            table[slot] = put.a;
            pthread_mutex_unlock(&table_lock);
            memory_write(&p, shard, put.b + rng_below(&r, PAGE), "changed", 7);
            struct net_call map = {.request = {.op = NET_MAP_REF, .a = theirs, .b = sizeof block}};
            if (theirs && memory_call(&p, shard, &map) == NET_OK) {
                memory_read(&p, shard, map.a, back, sizeof back);
                for (uint32_t k = 0; k < sizeof back; k++)
                    EXPECT_EQ(back[k], 0);
                memory_write(&p, shard, map.a, "mine", 4);
                (void)memory_asked(&p, shard, (struct net_request){.op = NET_RFREE, .a = map.a});
            } else if (theirs) {
                EXPECT_EQ(map.outcome, NET_REF_CONSUMED);
            }
            (void)memory_asked(&p, shard, (struct net_request){.op = NET_RFREE, .a = put.b});
        }
        memory_leave(&p);
    }
    return NULL;
}

static void processes_that_come_and_go_leave_nothing_behind(void) {
    pthread_t threads[THREADS];
    memory_start();
    for (uintptr_t i = 0; i < THREADS; i++)
        EXPECT_EQ(pthread_create(&threads[i], NULL, come_and_go, (void *)i), 0);
    for (int i = 0; i < THREADS; i++)
        pthread_join(threads[i], NULL);
    memory_expect_all_free();
    memory_stop();
}

static void a_call_whose_time_is_over_gives_back_what_it_got(void) {
    struct process p;
    static uint8_t into[PAGE];
    memory_start();
    memory_join(&p);
    for (int i = 0; i < 200; i++) {
        /* Sent, and then nobody waits: whether it was carried out by then or not. */
        struct net_call *c = calloc(1, sizeof *c);
        c->request = i % 3 == 0   ? (struct net_request){.op = NET_RALLOC, .a = 3 * PAGE}
                     : i % 3 == 1 ? (struct net_request){.op = NET_PUT, .payload = PAGE}
                                  : (struct net_request){.op = NET_STATS};
        c->payload = i % 3 == 1 ? into : NULL;
        c->into = i % 3 == 2 ? into : NULL;
        c->into_bytes = i % 3 == 2 ? NET_NR_COUNTERS * sizeof(uint64_t) : 0;
        EXPECT_EQ(net_link_submit(p.links[1], c, i % 2), 0);
        if (i % 5 == 0)
            (void)net_link_wait(p.links[1], c, net_now_ns() + rng_below(&(struct rng){i}, 50000));
        if (net_call_done(c) && c->outcome == NET_OK) {
            struct net_request give = {.op = NET_RFREE, .a = c->a};
            if (c->request.op == NET_PUT)
                give = (struct net_request){.op = NET_DROP_REF, .a = c->a, .b = PAGE};
            if (c->request.op != NET_STATS)
                (void)memory_asked(&p, 1, give);
        } else {
            net_link_abandon(p.links[1], c);
        }
        free(c);
    }
    struct net_audit found = memory_audit(&p, 1);
    EXPECT_EQ(found.nr_ranges, 0);
    EXPECT_EQ(found.nr_refs, 0);
    EXPECT_EQ(found.nr_free, found.nr_pages);
    memory_leave(&p);
    memory_stop();
}

static void strangers_are_let_in_with_the_secret_only(void) {
    struct net_welcome w;
    struct net_hello h = {
        .magic = NET_MAGIC, .version = NET_VERSION, .kind = NET_CONTROL, .token = 1};
    memory_start();
    close(memory_greeted(&h, &w));
    EXPECT_EQ(w.status, NET_DENIED);
    for (uint32_t i = 0; i < NET_SECRET_BYTES; i++) {
        memcpy(h.secret, memory_secret, sizeof memory_secret);
        h.secret[i] ^= 1;
        close(memory_greeted(&h, &w));
        EXPECT_EQ(w.status, NET_DENIED);
        EXPECT_EQ(w.pid, 0);
    }
    memcpy(h.secret, memory_secret, sizeof memory_secret);
    h.version++;
    close(memory_greeted(&h, &w));
    EXPECT_EQ(w.status, NET_OTHER_VERSION);
    h.version = NET_VERSION;
    h.kind = NET_DATA;
    h.pid = 12345;
    close(memory_greeted(&h, &w));
    EXPECT_EQ(w.status, NET_NO_PROCESS);
    memory_stop();
}

int main(void) {
    signal(SIGPIPE, SIG_IGN);
    HOLDS(strangers_are_let_in_with_the_secret_only);
    HOLDS(what_was_written_is_read);
    HOLDS(answers_that_refuse_do_not_confuse_what_follows);
    HOLDS(threads_share_a_connection);
    HOLDS(a_connection_that_breaks_again_and_again_loses_nothing);
    HOLDS(processes_that_come_and_go_leave_nothing_behind);
    HOLDS(a_call_whose_time_is_over_gives_back_what_it_got);
    return 0;
}
