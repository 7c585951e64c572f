/*
 * test_ring.c - the byte streams of ring.c and the wait sets of waitset.c: contents, wake-ups, and peers that lie.
 *
 * Both ends of a pair live in this process, or one of them in a forked child, which attaches anew. Under
 * ThreadSanitizer the two ends are threads with mappings of their own, so what it sees is the private state; that
 * the shared bytes are ordered is shown by their checksums.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>

#include "check.h"
#include "host.h"
#include "ring.h"

#define MAX_FRAME (1u << 26)

struct pair {
    struct dm_ring *server, *client;
};

static struct dm_error e;

static struct pair pair_of(uint64_t capacity) {
    struct pair p;
    EXPECT_OK(dm_ring_create(capacity, MAX_FRAME, &p.server, &e), &e);
    EXPECT_OK(dm_ring_attach(p.server->memfd, p.server->peer_bell, p.server->my_bell, MAX_FRAME,
                             &p.client, &e),
              &e);
    return p;
}

static void end(struct dm_ring *r) {
    dm_ring_close(r);
    dm_ring_put(r);
}

static void end_pair(struct pair p) {
    end(p.server);
    end(p.client);
}

/* ---------------------------------------------------------------- frames that are known by their number */

static void fill(char *frame, uint32_t size, uint64_t number) {
    struct rng r = {number};
    memcpy(frame, &size, 4);
    for (uint32_t i = 4; i < size; i++)
        frame[i] = (char)((i & 7) == 4 ? rng_next(&r) : (uint64_t)frame[i - 1] * 5 + i);
}

static void send_frame(struct dm_ring *r, char *frame, uint32_t size) {
    struct dm_error mine = {0};
    /* In three parts, one of them tiny. */
    struct iovec v[3] = {
        {frame, 5}, {frame + 5, size / 2}, {frame + 5 + size / 2, size - 5 - size / 2}};
    uint64_t done = 0;
    int s;
    do
        s = dm_ring_send(r, v, size, &done, DM_RING_NO_DEADLINE, &mine);
    while (s == DM_RING_INTERRUPTED);
    EXPECT_OK(s, &mine);
}

/* The next frame, or as much of it as is there: 0. */
static uint32_t take(struct dm_ring *r, char *frame) {
    struct dm_error mine = {0};
    uint64_t there;
    int64_t size = dm_ring_begin(r, &there, &mine);
    if (size < 0)
        FAIL("begin: %s", mine.text);
    if (size == 0)
        return 0;
    memcpy(frame, r->in.size_bytes, 4);
    int64_t n = dm_ring_fill(r, frame + r->in.got, (uint64_t)size - r->in.got, &mine);
    if (n < 0)
        FAIL("fill: %s", mine.text);
    if (r->in.got < size)
        return 0;
    r->in.size = r->in.got = 0;
    return (uint32_t)size;
}

static uint32_t receive(struct dm_ring *r, char *frame) {
    struct dm_error mine = {0};
    uint32_t size;
    EXPECT_OK(dm_ring_wait_open(r, &mine), &mine);
    while (!(size = take(r, frame))) {
        int s = dm_ring_wait(r, DM_RING_NO_DEADLINE, &mine);
        if (s != 1 && s != DM_RING_INTERRUPTED)
            FAIL("wait: %d %s", s, mine.text);
    }
    return size;
}

static uint32_t random_size(struct rng *r, uint32_t max) {
    switch (rng_below(r, 4)) {
    case 0:
        return DM_RING_MIN_FRAME;
    case 1:
        return DM_RING_MIN_FRAME + rng_below(r, 100);
    case 2:
        return DM_RING_MIN_FRAME + rng_below(r, max / 16);
    default:
        return DM_RING_MIN_FRAME + rng_below(r, max - DM_RING_MIN_FRAME);
    }
}

struct side {
    struct dm_ring *r;
    uint64_t seed;
    uint32_t nr, max;
};

static void *send_all(void *arg) {
    struct side *s = arg;
    struct rng r = {s->seed};
    char *frame = malloc(s->max);
    for (uint32_t i = 0; i < s->nr; i++) {
        uint32_t size = random_size(&r, s->max);
        fill(frame, size, s->seed + i);
        send_frame(s->r, frame, size);
    }
    free(frame);
    return NULL;
}

static void *receive_all(void *arg) {
    struct side *s = arg;
    struct rng r = {s->seed};
    char *frame = malloc(MAX_FRAME), *want = malloc(s->max);
    for (uint32_t i = 0; i < s->nr; i++) {
        uint32_t size = random_size(&r, s->max);
        EXPECT_EQ(receive(s->r, frame), size);
        fill(want, size, s->seed + i);
        if (memcmp(frame, want, size))
            FAIL("frame %u of %u bytes has other contents", i, size);
    }
    free(frame);
    free(want);
    return NULL;
}

static struct rng rng;

/* Both directions at once, each end of each direction a thread of its own. */
static void stream(uint64_t capacity, uint32_t nr, uint32_t max, uint32_t spin_ns) {
    struct pair p = pair_of(capacity);
    p.server->in.spin.budget_ns = p.server->out.spin.budget_ns = spin_ns;
    p.client->in.spin.budget_ns = p.client->out.spin.budget_ns = spin_ns;
    uint64_t there = rng_next(&rng), back = rng_next(&rng);
    struct side sides[4] = {{p.server, there, nr, max},
                            {p.client, there, nr, max},
                            {p.client, back, nr, max},
                            {p.server, back, nr, max}};
    pthread_t t[4];
    for (int i = 0; i < 4; i++)
        EXPECT(!pthread_create(&t[i], NULL, i & 1 ? receive_all : send_all, &sides[i]));
    for (int i = 0; i < 4; i++)
        pthread_join(t[i], NULL);
    end_pair(p);
}

static void frames_of_any_size_stream_both_ways_at_once(void) {
    uint32_t scale = CHECK_SANITIZED ? 10 : 1;
    stream(1 << 16, 4000 / scale, 20000, 40000);
    stream(1 << 16, 4000 / scale, 20000, 0);
    stream(1 << 12, 1000 / scale, 100000, 40000);
}

static void frames_stream_through_the_tiniest_ring(void) {
    stream(DM_RING_MIN_CAPACITY, CHECK_SANITIZED ? 100 : 1000, 3000, 40000);
    stream(DM_RING_MIN_CAPACITY, CHECK_SANITIZED ? 100 : 1000, 3000, 0);
}

static void frames_arrive_in_another_process(void) {
    struct dm_ring *server;
    EXPECT_OK(dm_ring_create(1 << 14, MAX_FRAME, &server, &e), &e);
    struct side s = {server, rng_next(&rng), CHECK_SANITIZED ? 300 : 3000, 50000};
    pid_t child = fork();
    if (child == 0) {
        EXPECT(dm_ring_forked(server));
        EXPECT_OK(
            dm_ring_attach(server->memfd, server->peer_bell, server->my_bell, MAX_FRAME, &s.r, &e),
            &e);
        receive_all(&s);
        send_all(&s);
        _exit(0);
    }
    send_all(&s);
    receive_all(&s);
    int status;
    EXPECT_EQ(waitpid(child, &status, 0), child);
    EXPECT_EQ(status, 0);
    end(server);
}

/* ---------------------------------------------------------------- a full ring */

static void a_full_ring_takes_no_more_and_tells_when_there_is_room(void) {
    struct pair p = pair_of(256);
    char frame[400], got[400];
    fill(frame, 400, 1);
    struct iovec v = {frame, 400};
    EXPECT_EQ(dm_ring_try_send(p.server, &v, 400, 0, &e), 256);
    EXPECT_EQ(dm_ring_try_send(p.server, &v, 400, 256, &e), 0);
    uint64_t count;
    EXPECT(read(p.server->my_bell, &count, 8) < 0 && errno == EAGAIN);
    EXPECT_EQ(take(p.client, got), 0); /* takes all that is there */
    EXPECT_EQ(read(p.server->my_bell, &count, 8), 8);
    EXPECT_EQ(dm_ring_try_send(p.server, &v, 400, 256, &e), 144);
    EXPECT_EQ(take(p.client, got), 400);
    EXPECT(!memcmp(frame, got, 400));
    end_pair(p);
}

static void a_send_that_times_out_before_its_first_byte_changes_nothing(void) {
    struct pair p = pair_of(64);
    char frame[64], got[64];
    fill(frame, 64, 7);
    struct iovec v = {frame, 64};
    uint64_t done = 0;
    EXPECT_EQ(dm_ring_send(p.server, &v, 64, &done, 1, &e), DM_OK);
    done = 0;
    EXPECT_EQ(dm_ring_send(p.server, &v, 64, &done, dm_now_ns() + 1000000, &e), DM_ERR_DEADLINE);
    EXPECT_EQ(done, 0);
    EXPECT_EQ(take(p.client, got), 64);
    EXPECT_EQ(dm_ring_send(p.server, &v, 64, &done, 1, &e), DM_OK);
    EXPECT_EQ(take(p.client, got), 64);
    end_pair(p);
}

static void a_send_that_times_out_within_a_frame_closes_the_ring_for_sending(void) {
    struct pair p = pair_of(64);
    char frame[100];
    fill(frame, 100, 7);
    struct iovec v = {frame, 100};
    uint64_t done = 0;
    EXPECT_EQ(dm_ring_send(p.server, &v, 100, &done, dm_now_ns() + 1000000, &e), DM_ERR_DEADLINE);
    EXPECT_EQ(done, 64);
    EXPECT(strstr(e.text, "closed for sending"));
    EXPECT_EQ(dm_ring_send(p.server, &v, 100, &done, 1, &e), DM_ERR_RING_CLOSED);
    EXPECT_EQ(dm_ring_try_send(p.server, &v, 100, 0, &e), DM_ERR_RING_CLOSED);
    end_pair(p);
}

/* ---------------------------------------------------------------- peers that lie */

static void an_impossible_write_index_is_an_error_and_stays_one(void) {
    static const uint64_t lies[] = {257, UINT64_MAX, 1ull << 32, 1ull << 63};
    for (size_t i = 0; i < sizeof lies / sizeof lies[0]; i++) {
        struct pair p = pair_of(256);
        uint64_t there;
        atomic_store(&p.server->out.c->tail, lies[i]);
        EXPECT_EQ(dm_ring_begin(p.client, &there, &e), DM_ERR_PROTOCOL);
        atomic_store(&p.server->out.c->tail, 0);
        EXPECT_EQ(dm_ring_begin(p.client, &there, &e), DM_ERR_PROTOCOL);
        end_pair(p);
    }
}

static void an_impossible_read_index_is_an_error_of_the_sender(void) {
    static const uint64_t lies[] = {65, UINT64_MAX, 1ull << 32, 1ull << 63};
    for (size_t i = 0; i < sizeof lies / sizeof lies[0]; i++) {
        struct pair p = pair_of(64);
        char frame[64];
        fill(frame, 64, 1);
        struct iovec v = {frame, 64};
        uint64_t done = 0;
        EXPECT_EQ(dm_ring_send(p.server, &v, 64, &done, 1, &e), DM_OK);
        atomic_store(&p.client->in.c->head, lies[i]);
        EXPECT(!dm_ring_fits(p.server, 64));
        done = 0;
        EXPECT_EQ(dm_ring_send(p.server, &v, 64, &done, 1, &e), DM_ERR_PROTOCOL);
        EXPECT_EQ(dm_ring_send(p.server, &v, 64, &done, 1, &e), DM_ERR_RING_CLOSED);
        end_pair(p);
    }
}

static void a_size_that_no_frame_has_is_an_error(void) {
    static const uint32_t sizes[] = {0, 39, MAX_FRAME + 1, UINT32_MAX};
    for (size_t i = 0; i < 4; i++) {
        struct pair p = pair_of(256);
        struct iovec v = {(void *)&sizes[i], 4};
        uint64_t there;
        EXPECT_EQ(dm_ring_try_send(p.server, &v, 4, 0, &e), 4);
        EXPECT_EQ(dm_ring_begin(p.client, &there, &e), DM_ERR_PROTOCOL);
        end_pair(p);
    }
}

/* Somebody writes nonsense into the control blocks all the time: an error or frames come of it, nothing else. */
struct liar {
    struct dm_ring_shared *s;
    _Atomic bool stop;
    uint64_t seed;
};

static void *lie(void *arg) {
    struct liar *l = arg;
    struct rng r = {l->seed};
    while (!atomic_load(&l->stop)) {
        struct dm_ring_control *c = rng_below(&r, 2) ? &l->s->to_client : &l->s->to_server;
        uint64_t near = atomic_load(&c->head) + rng_below(&r, 600) - 100;
        switch (rng_below(&r, 4)) {
        case 0:
            atomic_store(&c->tail, rng_below(&r, 4) ? near : rng_next(&r));
            break;
        case 1:
            atomic_store(&c->head, rng_below(&r, 4) ? near : rng_next(&r));
            break;
        case 2:
            atomic_store(&c->want_bell, (uint32_t)rng_next(&r));
            break;
        default:
            atomic_store(&c->want_space, (uint32_t)rng_next(&r));
            break;
        }
    }
    return NULL;
}

static void garbled_indices_never_do_worse_than_an_error(void) {
    static char frame[600], got[MAX_FRAME];
    uint32_t errors = 0;
    for (int round = 0; round < (CHECK_SANITIZED ? 100 : 1000); round++) {
        struct pair p = pair_of(512);
        struct liar l = {p.client->shared, false, rng_next(&rng)};
        pthread_t t;
        EXPECT(!pthread_create(&t, NULL, lie, &l));
        for (int i = 0; i < 200; i++) {
            uint32_t size = 40 + rng_below(&rng, 500);
            uint64_t done = 0, there;
            fill(frame, size, (uint64_t)i);
            struct iovec v = {frame, size};
            (void)dm_ring_fits(p.server, size);
            int s = dm_ring_send(p.server, &v, size, &done, 1, &e);
            int64_t n = dm_ring_begin(p.server, &there, &e);
            if (n > 0)
                n = dm_ring_fill(p.server, got, (uint64_t)n - p.server->in.got, &e);
            if (p.server->in.size && p.server->in.got == p.server->in.size)
                p.server->in.size = p.server->in.got = 0;
            errors += s < 0 || n < 0;
            EXPECT(n >= 0 || n == DM_ERR_PROTOCOL);
        }
        atomic_store(&l.stop, true);
        pthread_join(t, NULL);
        end_pair(p);
    }
    EXPECT(errors > 0);
}

/* ---------------------------------------------------------------- closing */

static void *wait_for_ever(void *arg) {
    struct dm_ring *r = arg;
    struct dm_error mine = {0};
    int s;
    do
        s = dm_ring_wait(r, DM_RING_NO_DEADLINE, &mine);
    while (s == DM_RING_INTERRUPTED);
    EXPECT_EQ(s, DM_ERR_RING_CLOSED);
    dm_ring_put(r);
    return NULL;
}

static void *send_for_ever(void *arg) {
    struct dm_ring *r = arg;
    struct dm_error mine = {0};
    char frame[100];
    fill(frame, 100, 1);
    struct iovec v = {frame, 100};
    uint64_t done = 0;
    int s;
    do
        s = dm_ring_send(r, &v, 100, &done, DM_RING_NO_DEADLINE, &mine);
    while (s == DM_RING_INTERRUPTED);
    EXPECT_EQ(s, DM_ERR_RING_CLOSED);
    dm_ring_put(r);
    return NULL;
}

static void closing_wakes_who_waits_and_who_sends(void) {
    for (int i = 0; i < 200; i++) {
        struct pair p = pair_of(64);
        pthread_t t[2];
        EXPECT_OK(dm_ring_wait_open(p.server, &e), &e);
        dm_ring_get(p.server);
        dm_ring_get(p.server);
        EXPECT(!pthread_create(&t[0], NULL, wait_for_ever, p.server));
        EXPECT(!pthread_create(&t[1], NULL, send_for_ever, p.server));
        while (i & 1 && !(atomic_load(&p.server->armed) && atomic_load(&p.server->out.waits)))
            ;
        end(p.server);
        pthread_join(t[0], NULL);
        pthread_join(t[1], NULL);
        end(p.client);
    }
}

/* ---------------------------------------------------------------- wait sets */

#define NR_RINGS 8
#define NR_THREADS 4

static struct {
    struct dm_waitset *w;
    struct pair pairs[NR_RINGS];
    pthread_mutex_t lock[NR_RINGS];
    char frames[NR_RINGS][2048];
    uint64_t sum[NR_RINGS];
    _Atomic uint32_t handled;
    uint32_t nr;
} crew;

static void serve_ring(int64_t key) {
    char *frame = crew.frames[key]; /* one thread may begin a frame and another go on with it */
    struct dm_ring *r = crew.pairs[key].server;
    uint32_t size;
    pthread_mutex_lock(&crew.lock[key]);
    do
        while ((size = take(r, frame))) {
            uint64_t number;
            memcpy(&number, frame + 8, 8);
            crew.sum[key] += number;
            if (atomic_fetch_add(&crew.handled, 1) + 1 == crew.nr * NR_RINGS)
                EXPECT_OK(dm_waitset_kick(crew.w, NR_THREADS, &e), &e);
        }
    while (dm_ring_arm(r));
    pthread_mutex_unlock(&crew.lock[key]);
}

static void *serve(void *arg) {
    (void)arg;
    for (;;) {
        struct dm_error mine = {0};
        int64_t key;
        int s = dm_waitset_wait(crew.w, DM_RING_NO_DEADLINE, &key, &mine);
        if (s == DM_RING_INTERRUPTED)
            continue;
        EXPECT_EQ(s, 1);
        if (key == DM_KICKED)
            return NULL;
        serve_ring(key);
    }
}

static void *ask(void *arg) {
    uint64_t k = (uint64_t)(uintptr_t)arg;
    struct rng r = {k};
    char frame[2000];
    for (uint64_t i = 1; i <= crew.nr; i++) {
        uint32_t size = 40 + rng_below(&r, 1000);
        fill(frame, size, i);
        memcpy(frame + 8, &i, 8);
        send_frame(crew.pairs[k].client, frame, size);
        if (!rng_below(&r, 8))
            sched_yield();
    }
    return NULL;
}

static void serve_with_a_crew(uint32_t nr, uint32_t spin_ns) {
    pthread_t threads[NR_THREADS], clients[NR_RINGS];
    memset(&crew, 0, sizeof crew);
    crew.nr = nr;
    EXPECT_OK(dm_waitset_create(&crew.w, &e), &e);
    dm_waitset_spin(crew.w, spin_ns);
    for (int k = 0; k < NR_RINGS; k++) {
        pthread_mutex_init(&crew.lock[k], NULL);
        crew.pairs[k] = pair_of(4096);
    }
    for (int i = 0; i < NR_THREADS; i++)
        EXPECT(!pthread_create(&threads[i], NULL, serve, NULL));
    for (int k = 0; k < NR_RINGS; k++)
        EXPECT(!pthread_create(&clients[k], NULL, ask, (void *)(uintptr_t)k));
    for (int k = 0; k < NR_RINGS; k++) /* added while all wait, some with data already */
        EXPECT_OK(dm_waitset_add_ring(crew.w, crew.pairs[k].server, k, &e), &e);
    for (int k = 0; k < NR_RINGS; k++)
        pthread_join(clients[k], NULL);
    for (int i = 0; i < NR_THREADS; i++)
        pthread_join(threads[i], NULL);
    for (int k = 0; k < NR_RINGS; k++) {
        EXPECT_EQ(crew.sum[k], (uint64_t)nr * (nr + 1) / 2);
        EXPECT_OK(dm_waitset_remove(crew.w, crew.pairs[k].server, -1, &e), &e);
        end_pair(crew.pairs[k]);
    }
    dm_waitset_close(crew.w);
    dm_waitset_put(crew.w);
}

static void every_frame_is_handled_once_by_some_thread_of_a_crew(void) {
    uint32_t nr = CHECK_SANITIZED ? 1000 : 10000;
    serve_with_a_crew(nr, 0);
    serve_with_a_crew(nr, 40000);
}

static int64_t next_key(struct dm_waitset *w) {
    int64_t key = -2;
    int s = dm_waitset_wait(w, 1, &key, &e);
    EXPECT(s >= 0);
    return s ? key : -2;
}

static void a_ring_is_reported_once_each_time_it_is_armed(void) {
    struct pair p = pair_of(4096);
    struct dm_waitset *w;
    char frame[64], got[64];
    EXPECT_OK(dm_waitset_create(&w, &e), &e);
    fill(frame, 64, 1);
    send_frame(p.client, frame, 64);
    EXPECT_OK(dm_waitset_add_ring(w, p.server, 5, &e), &e); /* has data when it is added */
    EXPECT_EQ(next_key(w), 5);
    EXPECT_EQ(next_key(w), -2);
    send_frame(p.client, frame, 64); /* not armed: not reported */
    EXPECT_EQ(next_key(w), -2);
    EXPECT_EQ(take(p.server, got), 64);
    EXPECT(dm_ring_arm(p.server)); /* there is more */
    EXPECT_EQ(take(p.server, got), 64);
    EXPECT(!dm_ring_arm(p.server));
    EXPECT_EQ(next_key(w), -2);
    send_frame(p.client, frame, 64);
    send_frame(p.client, frame, 64);
    EXPECT_EQ(next_key(w), 5);
    EXPECT_EQ(next_key(w), -2);
    EXPECT_EQ(dm_waitset_add_ring(w, p.server, 6, &e), DM_ERR_BUSY);
    EXPECT_OK(dm_waitset_remove(w, p.server, -1, &e), &e);
    EXPECT_EQ(dm_waitset_remove(w, p.server, -1, &e), DM_ERR_BAD_ADDRESS);
    dm_waitset_close(w);
    dm_waitset_put(w);
    end_pair(p);
}

static void room_after_a_short_try_send_is_reported_whether_armed_or_not(void) {
    struct pair p = pair_of(256);
    struct dm_waitset *w;
    char frame[300], got[300];
    fill(frame, 300, 1);
    struct iovec v = {frame, 300};
    EXPECT_OK(dm_waitset_create(&w, &e), &e);
    EXPECT_OK(dm_waitset_add_ring(w, p.server, 5, &e), &e);
    atomic_store(&p.server->armed, 0); /* as if some thread were reading */
    EXPECT_EQ(dm_ring_try_send(p.server, &v, 300, 0, &e), 256);
    EXPECT_EQ(next_key(w), -2);
    EXPECT_EQ(take(p.client, got), 0);
    EXPECT_EQ(next_key(w), 5);
    EXPECT_EQ(next_key(w), -2);
    dm_waitset_close(w); /* with the ring in it */
    dm_waitset_put(w);
    end_pair(p);
}

static void *come_and_go(void *arg) {
    struct rng r = {*(uint64_t *)arg};
    struct dm_error mine = {0};
    char frame[64];
    fill(frame, 64, 1);
    for (int i = 0; i < (CHECK_SANITIZED ? 200 : 2000); i++) {
        struct pair p = pair_of(256);
        EXPECT_OK(dm_waitset_add_ring(crew.w, p.server, 1000, &mine), &mine);
        send_frame(p.client, frame, 64);
        bool closed = rng_below(&r, 2); /* before it is removed: the set still holds it */
        if (closed)
            end(p.server);
        EXPECT_OK(dm_waitset_remove(crew.w, p.server, -1, &mine), &mine);
        if (!closed)
            end(p.server);
        end(p.client);
    }
    return NULL;
}

static void *only_wait(void *arg) {
    (void)arg;
    struct dm_error mine = {0};
    int64_t key;
    int s;
    while ((s = dm_waitset_wait(crew.w, DM_RING_NO_DEADLINE, &key, &mine)) >= 0 ||
           s == DM_RING_INTERRUPTED)
        EXPECT(s < 0 || key == 1000);
    EXPECT_EQ(s, DM_ERR_RING_CLOSED);
    dm_waitset_put(crew.w);
    return NULL;
}

static void rings_come_and_go_while_others_wait_and_closing_wakes_all(void) {
    pthread_t waiting[NR_THREADS], changing[2];
    uint64_t seeds[2] = {rng_next(&rng), rng_next(&rng)};
    EXPECT_OK(dm_waitset_create(&crew.w, &e), &e);
    for (int i = 0; i < NR_THREADS; i++) {
        dm_waitset_get(crew.w);
        EXPECT(!pthread_create(&waiting[i], NULL, only_wait, NULL));
    }
    for (int i = 0; i < 2; i++)
        EXPECT(!pthread_create(&changing[i], NULL, come_and_go, &seeds[i]));
    for (int i = 0; i < 2; i++)
        pthread_join(changing[i], NULL);
    dm_waitset_close(crew.w);
    for (int i = 0; i < NR_THREADS; i++)
        pthread_join(waiting[i], NULL);
    dm_waitset_put(crew.w);
}

int main(void) {
    rng = rng_start();
    HOLDS(frames_of_any_size_stream_both_ways_at_once);
    HOLDS(frames_stream_through_the_tiniest_ring);
    if (!CHECK_TSAN) /* a fork of a process that has had threads */
        HOLDS(frames_arrive_in_another_process);
    HOLDS(a_full_ring_takes_no_more_and_tells_when_there_is_room);
    HOLDS(a_send_that_times_out_before_its_first_byte_changes_nothing);
    HOLDS(a_send_that_times_out_within_a_frame_closes_the_ring_for_sending);
    HOLDS(an_impossible_write_index_is_an_error_and_stays_one);
    HOLDS(an_impossible_read_index_is_an_error_of_the_sender);
    HOLDS(a_size_that_no_frame_has_is_an_error);
    HOLDS(garbled_indices_never_do_worse_than_an_error);
    HOLDS(closing_wakes_who_waits_and_who_sends);
    HOLDS(a_ring_is_reported_once_each_time_it_is_armed);
    HOLDS(room_after_a_short_try_send_is_reported_whether_armed_or_not);
    HOLDS(every_frame_is_handled_once_by_some_thread_of_a_crew);
    HOLDS(rings_come_and_go_while_others_wait_and_closing_wakes_all);
    return 0;
}
