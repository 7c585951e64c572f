/*
 * test_relay.c - relay.c between clients and backends over rings and sockets: what arrives where, and what the end, the
 * garbage or the silence of one connection means to the others.
 *
 * All ends are streams in one thread, which looks at each in turn and waits for none. The relay works in the same thread,
 * step by step, or in one of its own.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <string.h>
#include <sys/socket.h>

#include "check.h"
#include "host.h"
#include "relay.h"

#define MAX_FRAME (64u << 20)
#define MAX_EVENTS 16
#define LOST 12u /* codes of ERROR frames */
#define OVERLOADED 4u
#define UNREACHABLE 99u

static struct dm_error e;
static struct rng rng;

/* ---------------------------------------------------------------- a relay */

struct party { /* both ends of a connection */
    struct dm_stream s;
    struct dm_ring *ring; /* the relay's */
    int far, near;        /* the relay's socket and ours */
    int64_t key;
    bool holds; /* a frame that was got */
};

struct scene {
    struct dm_relay *y;
    struct dm_relay_event events[MAX_EVENTS];
    uint32_t nr_events;
    pthread_t thread;
    _Atomic bool stop;
};

static struct dm_frame error_frame(uint32_t code) {
    return (struct dm_frame){.size = 40, .kind = DM_FRAME_ERROR, .method = code};
}

static struct scene begin(uint32_t max_waiting, uint64_t max_backlog) {
    struct scene c = {0};
    struct dm_frame overloaded = error_frame(OVERLOADED), unreachable = error_frame(UNREACHABLE);
    EXPECT_OK(dm_relay_create(max_waiting, 32, max_backlog, (char *)&overloaded,
                              (char *)&unreachable, &c.y, &e),
              &e);
    return c;
}

static struct party join(struct scene *c, enum dm_side side, bool over_ring) {
    struct party p = {0};
    struct dm_ring *mine = NULL;
    int fds[2];
    EXPECT(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, fds) == 0);
    p.far = fds[0];
    p.near = fds[1];
    if (over_ring) {
        EXPECT_OK(dm_ring_create(1u << 16, MAX_FRAME, &p.ring, &e), &e);
        EXPECT_OK(
            dm_ring_attach(p.ring->memfd, p.ring->peer_bell, p.ring->my_bell, MAX_FRAME, &mine, &e),
            &e);
    }
    dm_stream_open(&p.s, mine, p.near, MAX_FRAME);
    if (mine)
        dm_ring_put(mine);
    EXPECT_OK(dm_relay_add(c->y, side, p.ring, p.far, MAX_FRAME, NULL, 0, &p.key, &e), &e);
    return p;
}

/* Our end dies. */
static void die(struct party *p) {
    dm_stream_close(&p->s);
    close(p->near);
    p->near = -1;
}

/* The relay's end. */
static uint64_t forget(struct scene *c, struct party *p) {
    struct dm_frame lost = error_frame(LOST);
    uint64_t n;
    EXPECT(dm_relay_remove(c->y, p->key, (char *)&lost, &n) == DM_OK);
    if (p->ring)
        dm_ring_put(p->ring);
    close(p->far);
    return n;
}

static void leave(struct scene *c, struct party *p) {
    forget(c, p);
    die(p);
}

static void end(struct scene *c) {
    EXPECT_EQ(c->y->nr_waiting, 0);
    dm_relay_destroy(c->y);
}

static void step(struct scene *c) {
    struct dm_relay_event v;
    EXPECT_OK(dm_relay_run(c->y, dm_now_ns() + 200000, &v, &e), &e);
    if (v.what != DM_RELAY_TIMEOUT) {
        EXPECT(c->nr_events < MAX_EVENTS);
        c->events[c->nr_events++] = v;
    }
}

static void expect_event(struct scene *c, enum dm_relay_what what, const struct party *p,
                         const char *text) {
    for (int i = 0; !c->nr_events; i++) {
        EXPECT(i < 20000);
        step(c);
    }
    struct dm_relay_event v = c->events[0];
    memmove(c->events, c->events + 1, --c->nr_events * sizeof v);
    EXPECT_EQ(v.what, what);
    EXPECT_EQ(v.key, p->key);
    if (!strstr(v.text, text))
        FAIL("expected \"%s\" in \"%s\"", text, v.text);
}

/* ---------------------------------------------------------------- frames */

static void put(struct party *p, const char *bytes, uint64_t n) {
    int64_t sent = p->s.backlog ? 0 : dm_stream_try(&p->s, bytes, n, &e);
    EXPECT(sent >= 0);
    if ((uint64_t)sent < n)
        EXPECT(dm_stream_keep(&p->s, bytes + sent, n - (uint64_t)sent, NULL) == DM_OK);
}

static void put_head(struct party *p, enum dm_frame_kind kind, uint64_t id, uint16_t nr_refs) {
    char frame[40 + 3 * 40] = {0};
    struct dm_frame h = {
        .size = 40u + 40u * nr_refs, .kind = (uint8_t)kind, .call_id = id, .nr_refs = nr_refs};
    memcpy(frame, &h, sizeof h);
    put(p, frame, h.size);
}

/* The next frame, or NULL: valid until the next call. */
static char *get(struct party *p, struct dm_frame *h) {
    char *frame;
    uint32_t size;
    if (p->holds)
        dm_stream_done(&p->s);
    p->holds = false;
    int n = dm_stream_recv(&p->s, &frame, &size, &e);
    if (n < 0)
        FAIL("recv: %s", e.text);
    if (n == 0)
        return NULL;
    memcpy(h, frame, sizeof *h);
    EXPECT_OK(dm_frame_check(h, size, &e), &e);
    p->holds = true;
    return frame;
}

static struct dm_frame expect(struct scene *c, struct party *p, enum dm_frame_kind kind,
                              uint64_t id) {
    struct dm_frame h;
    for (int i = 0; !get(p, &h); i++) {
        EXPECT(i < 20000);
        step(c);
    }
    EXPECT_EQ(h.kind, kind);
    EXPECT_EQ(h.call_id, id);
    return h;
}

static void expect_error(struct scene *c, struct party *p, uint64_t id, uint32_t code) {
    EXPECT_EQ(expect(c, p, DM_FRAME_ERROR, id).method, code);
}

static void expect_nothing(struct scene *c, struct party *p) {
    struct dm_frame h;
    for (int i = 0; i < 3; i++)
        step(c);
    EXPECT(!get(p, &h));
}

/* ---------------------------------------------------------------- what happens to calls */

static bool both[] = {true, false};
#define EACH(over_ring) for (int r_ = 0, over_ring; r_ < 2 && (over_ring = both[r_], 1); r_++)

static void calls_are_renumbered_and_come_back(void) {
    EACH(over_ring) {
        struct scene c = begin(10, 1 << 20);
        struct party a = join(&c, DM_CLIENT, over_ring), b = join(&c, DM_CLIENT, !over_ring);
        struct party s = join(&c, DM_BACKEND, over_ring);
        put_head(&a, DM_FRAME_CALL, 7, 2);
        EXPECT_EQ(expect(&c, &s, DM_FRAME_CALL, 1).nr_refs, 2);
        put_head(&b, DM_FRAME_CALL, 7, 0);
        expect(&c, &s, DM_FRAME_CALL, 2);
        EXPECT_EQ(c.y->nr_waiting, 2);
        put_head(&s, DM_FRAME_REPLY, 2, 0);
        put_head(&s, DM_FRAME_ERROR, 1, 0);
        expect(&c, &b, DM_FRAME_REPLY, 7);
        expect(&c, &a, DM_FRAME_ERROR, 7);
        EXPECT_EQ(c.y->nr_forwarded, 2);
        EXPECT_EQ(c.y->bytes_forwarded, 120 + 3 * 40);
        EXPECT_EQ(dm_relay_forwarded(c.y, s.key), 2);
        leave(&c, &a);
        leave(&c, &b);
        leave(&c, &s);
        end(&c);
    }
}

static void the_least_loaded_gets_the_call_and_equals_take_turns(void) {
    struct scene c = begin(100, 1 << 20);
    struct party a = join(&c, DM_CLIENT, true);
    struct party s = join(&c, DM_BACKEND, true), t = join(&c, DM_BACKEND, false);
    for (uint64_t i = 1; i <= 6; i++)
        put_head(&a, DM_FRAME_CALL, i, 0);
    for (uint64_t i = 1; i <= 3; i++) {
        expect(&c, &s, DM_FRAME_CALL, i);
        expect(&c, &t, DM_FRAME_CALL, i);
    }
    for (uint64_t i = 1; i <= 3; i++)
        put_head(&t, DM_FRAME_REPLY, i, 0);
    for (int i = 0; i < 3; i++)
        EXPECT_EQ(expect(&c, &a, DM_FRAME_REPLY, 2 * (uint64_t)i + 2).size, 40);
    put_head(&a, DM_FRAME_CALL, 7, 0);
    put_head(&a, DM_FRAME_CALL, 8, 0);
    expect(&c, &t, DM_FRAME_CALL, 4);
    expect(&c, &t, DM_FRAME_CALL, 5);
    put_head(&t, DM_FRAME_GOAWAY, 0, 0);
    expect_event(&c, DM_RELAY_LEAVING, &t, "");
    put_head(&a, DM_FRAME_CALL, 9, 0);
    expect(&c, &s, DM_FRAME_CALL, 4);
    put_head(&t, DM_FRAME_REPLY, 4, 0);
    expect(&c, &a, DM_FRAME_REPLY, 7);
    leave(&c, &a);
    leave(&c, &t);
    leave(&c, &s);
    end(&c);
}

static void in_turn_means_whatever_their_load(void) {
    struct scene c = begin(100, 1 << 20);
    dm_relay_set_policy(c.y, DM_RELAY_IN_TURN, false);
    struct party a = join(&c, DM_CLIENT, true);
    struct party s = join(&c, DM_BACKEND, true), t = join(&c, DM_BACKEND, false);
    for (uint64_t i = 1; i <= 4; i++) {
        put_head(&a, DM_FRAME_CALL, 2 * i - 1, 0);
        put_head(&a, DM_FRAME_CALL, 2 * i, 0);
        expect(&c, &s, DM_FRAME_CALL, i);
        expect(&c, &t, DM_FRAME_CALL, i);
        put_head(&t, DM_FRAME_REPLY, i, 0); /* the other one keeps its own */
        expect(&c, &a, DM_FRAME_REPLY, 2 * i);
    }
    put_head(&s, DM_FRAME_GOAWAY, 0, 0);
    expect_event(&c, DM_RELAY_LEAVING, &s, "");
    for (uint64_t i = 9; i <= 11; i++) {
        put_head(&a, DM_FRAME_CALL, i, 0);
        expect(&c, &t, DM_FRAME_CALL, i - 4);
    }
    leave(&c, &a);
    leave(&c, &t);
    leave(&c, &s);
    end(&c);
}

/* ---------------------------------------------------------------- asking about each call */

static struct scene begin_asking(void) {
    struct scene c = begin(10, 1 << 20);
    dm_relay_set_policy(c.y, DM_RELAY_LEAST_LOADED, true);
    return c;
}

/* The next call that is asked about, which is that client's. */
static uint64_t asked(struct scene *c, const struct party *p) {
    expect_event(c, DM_RELAY_CALL, p, "");
    return c->y->asked_header.call_id;
}

static void a_call_goes_where_the_answer_says(void) {
    EACH(over_ring) {
        struct scene c = begin_asking();
        struct party a = join(&c, DM_CLIENT, over_ring), b = join(&c, DM_CLIENT, !over_ring);
        struct party s = join(&c, DM_BACKEND, over_ring), t = join(&c, DM_BACKEND, !over_ring);
        for (uint64_t i = 1; i <= 3; i++)
            put_head(&a, DM_FRAME_CALL, i, 1);
        for (uint64_t i = 1; i <= 3; i++) {
            EXPECT_EQ(asked(&c, &a), i);
            EXPECT_EQ(asked(&c, &a), i); /* it is asked until there is an answer */
            EXPECT(dm_relay_answer(c.y, t.key, NULL) == DM_OK);
            EXPECT_EQ(expect(&c, &t, DM_FRAME_CALL, i).nr_refs, 1);
        }
        EXPECT(dm_relay_answer(c.y, t.key, NULL) == DM_ERR_BAD_ADDRESS);
        put_head(&b, DM_FRAME_CALL, 1, 0);
        asked(&c, &b);
        EXPECT(dm_relay_answer(c.y, 0, NULL) == DM_OK); /* by policy: the other one has three */
        expect(&c, &s, DM_FRAME_CALL, 1);
        put_head(&t, DM_FRAME_REPLY, 2, 0);
        expect(&c, &a, DM_FRAME_REPLY, 2);
        EXPECT_EQ(c.y->nr_waiting, 3);
        leave(&c, &a);
        leave(&c, &b);
        leave(&c, &s);
        leave(&c, &t);
        end(&c);
    }
}

static void a_call_that_is_refused_goes_nowhere_and_the_next_is_asked_about(void) {
    EACH(over_ring) {
        struct scene c = begin_asking();
        struct party a = join(&c, DM_CLIENT, over_ring), s = join(&c, DM_BACKEND, over_ring);
        struct dm_frame refusal = error_frame(77);
        put_head(&a, DM_FRAME_CALL, 5, 2);
        put_head(&a, DM_FRAME_CALL, 6, 2);
        EXPECT_EQ(asked(&c, &a), 5);
        EXPECT(dm_relay_answer(c.y, 0, (char *)&refusal) == DM_OK);
        expect_error(&c, &a, 5, 77);
        EXPECT_EQ(asked(&c, &a), 6);
        EXPECT(dm_relay_answer(c.y, 0, NULL) == DM_OK);
        expect(&c, &s, DM_FRAME_CALL, 1);
        EXPECT_EQ(c.y->nr_forwarded, 1);
        put_head(&a, DM_FRAME_CALL, 7, 0);
        asked(&c, &a);
        EXPECT(dm_relay_answer(c.y, a.key, NULL) == DM_OK); /* that is no backend */
        expect_error(&c, &a, 7, UNREACHABLE);
        leave(&c, &a);
        leave(&c, &s);
        end(&c);
    }
}

static void a_client_that_ends_is_asked_about_no_more(void) {
    struct scene c = begin_asking();
    struct party a = join(&c, DM_CLIENT, true), b = join(&c, DM_CLIENT, true);
    struct party s = join(&c, DM_BACKEND, true);
    put_head(&a, DM_FRAME_CALL, 1, 0);
    asked(&c, &a);
    leave(&c, &a);
    EXPECT(dm_relay_answer(c.y, s.key, NULL) == DM_ERR_BAD_ADDRESS);
    put_head(&b, DM_FRAME_CALL, 1, 0);
    asked(&c, &b);
    EXPECT(dm_relay_answer(c.y, s.key, NULL) == DM_OK);
    expect(&c, &s, DM_FRAME_CALL, 1);
    leave(&c, &b);
    leave(&c, &s);
    end(&c);
}

static void a_client_that_never_stops_calling_does_not_keep_others_from_being_asked_about(void) {
    struct scene c = begin_asking();
    struct party a = join(&c, DM_CLIENT, true), b = join(&c, DM_CLIENT, true);
    struct party s = join(&c, DM_BACKEND, true);
    struct dm_frame refusal = error_frame(77);
    for (uint64_t i = 1; i <= 200; i++)
        put_head(&a, DM_FRAME_CALL, i, 0);
    asked(&c, &a);
    put_head(&b, DM_FRAME_CALL, 1, 0);
    int before_b = 0;
    while (c.y->asked == dm_relay_peer(c.y, a.key)) {
        EXPECT(before_b++ < 100);
        EXPECT(dm_relay_answer(c.y, 0, (char *)&refusal) == DM_OK);
        struct dm_relay_event v;
        EXPECT_OK(dm_relay_run(c.y, DM_RING_NO_DEADLINE, &v, &e), &e);
        EXPECT_EQ(v.what, DM_RELAY_CALL);
    }
    EXPECT(c.y->asked == dm_relay_peer(c.y, b.key));
    EXPECT(dm_relay_answer(c.y, s.key, NULL) == DM_OK);
    expect(&c, &s, DM_FRAME_CALL, 1);
    leave(&c, &a);
    leave(&c, &b);
    leave(&c, &s);
    end(&c);
}

static void a_client_that_ends_has_its_calls_cancelled_and_its_replies_discarded(void) {
    EACH(over_ring) {
        struct scene c = begin(10, 1 << 20);
        struct party a = join(&c, DM_CLIENT, over_ring), s = join(&c, DM_BACKEND, true);
        for (uint64_t i = 1; i <= 4; i++)
            put_head(&a, DM_FRAME_CALL, i, 0);
        for (uint64_t i = 1; i <= 4; i++)
            expect(&c, &s, DM_FRAME_CALL, i);
        put_head(&s, DM_FRAME_REPLY, 1, 1);
        put_head(&s, DM_FRAME_REPLY, 2, 1);
        put_head(&s, DM_FRAME_REPLY, 3, 0);
        expect(&c, &a, DM_FRAME_REPLY, 1);
        expect(&c, &a, DM_FRAME_REPLY, 2);
        expect(&c, &a, DM_FRAME_REPLY, 3);
        put_head(&a, DM_FRAME_CANCEL, 2, 0); /* answered: means nothing */
        put_head(&a, DM_FRAME_DISCARD, 2, 0);
        expect(&c, &s, DM_FRAME_DISCARD, 2);
        put_head(&a, DM_FRAME_DISCARD, 2, 0); /* again: means nothing */
        die(&a);
        expect_event(&c, DM_RELAY_ENDED, &a, "closed the connection");
        forget(&c, &a);
        struct dm_frame h[2] = {expect(&c, &s, DM_FRAME_DISCARD, 1),
                                expect(&c, &s, DM_FRAME_CANCEL, 4)};
        (void)h;
        put_head(&s, DM_FRAME_REPLY, 4, 3);
        expect(&c, &s, DM_FRAME_DISCARD, 4);
        expect_nothing(&c, &s);
        leave(&c, &s);
        end(&c);
    }
}

static void delivered_replies_are_remembered_up_to_a_limit(void) {
    struct scene c = begin(10, 1 << 20);
    struct party a = join(&c, DM_CLIENT, true), s = join(&c, DM_BACKEND, false);
    uint32_t nr = DM_RELAY_DELIVERED + 100;
    for (uint32_t i = 1; i <= nr; i++) {
        put_head(&a, DM_FRAME_CALL, 3 * i, 0);
        expect(&c, &s, DM_FRAME_CALL, i);
        put_head(&s, DM_FRAME_REPLY, i, 1);
        expect(&c, &a, DM_FRAME_REPLY, 3 * i);
    }
    put_head(&a, DM_FRAME_DISCARD, 3 * 100, 0);
    expect_nothing(&c, &s);
    put_head(&a, DM_FRAME_DISCARD, 3 * 101, 0);
    expect(&c, &s, DM_FRAME_DISCARD, 101);
    leave(&c, &s); /* what it held is gone with it */
    put_head(&a, DM_FRAME_DISCARD, 3 * 102, 0);
    expect_nothing(&c, &a);
    leave(&c, &a);
    end(&c);
}

static void a_lost_backend_fails_its_calls_alone(void) {
    EACH(over_ring) {
        struct scene c = begin(10, 1 << 20);
        struct party a = join(&c, DM_CLIENT, !over_ring), s = join(&c, DM_BACKEND, over_ring);
        struct party t = join(&c, DM_BACKEND, over_ring);
        put_head(&a, DM_FRAME_CALL, 1, 0);
        put_head(&a, DM_FRAME_CALL, 2, 0);
        expect(&c, &s, DM_FRAME_CALL, 1);
        expect(&c, &t, DM_FRAME_CALL, 1);
        die(&s);
        expect_event(&c, DM_RELAY_ENDED, &s, "closed the connection");
        EXPECT_EQ(forget(&c, &s), 1);
        expect_error(&c, &a, 1, LOST);
        put_head(&t, DM_FRAME_REPLY, 1, 0);
        expect(&c, &a, DM_FRAME_REPLY, 2);
        put_head(&a, DM_FRAME_CALL, 3, 0);
        expect(&c, &t, DM_FRAME_CALL, 2);
        leave(&c, &t);
        expect_error(&c, &a, 3, LOST);
        put_head(&a, DM_FRAME_CALL, 4, 0);
        expect_error(&c, &a, 4, UNREACHABLE);
        leave(&c, &a);
        end(&c);
    }
}

static void more_calls_than_allowed_are_refused(void) {
    struct scene c = begin(2, 1 << 20);
    struct party a = join(&c, DM_CLIENT, true), s = join(&c, DM_BACKEND, true);
    for (uint64_t i = 1; i <= 3; i++)
        put_head(&a, DM_FRAME_CALL, i, 0);
    expect_error(&c, &a, 3, OVERLOADED);
    expect(&c, &s, DM_FRAME_CALL, 1);
    expect(&c, &s, DM_FRAME_CALL, 2);
    put_head(&s, DM_FRAME_REPLY, 1, 0);
    expect(&c, &a, DM_FRAME_REPLY, 1);
    put_head(&a, DM_FRAME_CALL, 4, 0);
    expect(&c, &s, DM_FRAME_CALL, 3);
    leave(&c, &a);
    leave(&c, &s);
    end(&c);
}

/* ---------------------------------------------------------------- peers that misbehave */

static void who_breaks_the_protocol_is_reported_and_no_other_suffers(void) {
    const struct {
        enum dm_side side;
        struct dm_frame h;
        const char *text;
    } cases[] = {
        {DM_CLIENT, {.size = 39}, "39 bytes"},
        {DM_CLIENT, {.size = 0xffffffff}, "4294967295 bytes"},
        {DM_CLIENT, {.size = 40, .kind = 0}, "unknown kind 0"},
        {DM_CLIENT, {.size = 40, .kind = 9}, "unknown kind 9"},
        {DM_CLIENT, {.size = 40, .kind = DM_FRAME_CALL, .flags = 64}, "unknown flags"},
        {DM_CLIENT, {.size = 40, .kind = DM_FRAME_CALL, .body_bytes = 1}, "the parts"},
        {DM_CLIENT, {.size = 40, .kind = DM_FRAME_CALL, .nr_refs = 0xffff}, "the parts"},
        {DM_CLIENT, {.size = 40, .kind = DM_FRAME_CALL, .body_bytes = 0xffffffff}, "the parts"},
        {DM_CLIENT, {.size = 40, .kind = DM_FRAME_CALL, .meta_bytes = 1 << 17}, "metadata"},
        {DM_CLIENT, {.size = 40, .kind = DM_FRAME_CALL, .inline_at = 64}, "inline data"},
        {DM_CLIENT, {.size = 40, .kind = DM_FRAME_CALL}, "call 0 came after call 0"},
        {DM_CLIENT, {.size = 40, .kind = DM_FRAME_HELLO}, "a client does not send"},
        {DM_CLIENT, {.size = 40, .kind = DM_FRAME_REPLY, .call_id = 1}, "a client does not send"},
        {DM_BACKEND, {.size = 40, .kind = DM_FRAME_REPLY, .call_id = 9}, "reply to call 9"},
        {DM_BACKEND, {.size = 40, .kind = DM_FRAME_ERROR}, "a server does not send"},
        {DM_BACKEND, {.size = 40, .kind = DM_FRAME_CALL, .call_id = 1}, "a server does not send"},
    };
    EACH(over_ring) {
        struct scene c = begin(10, 1 << 20);
        struct party a = join(&c, DM_CLIENT, true), s = join(&c, DM_BACKEND, false);
        for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
            struct party bad = join(&c, cases[i].side, over_ring);
            put(&bad, (const char *)&cases[i].h, sizeof cases[i].h);
            put_head(&bad, DM_FRAME_CALL, 5, 0); /* not read any more */
            expect_event(&c, DM_RELAY_BROKE, &bad, cases[i].text);
            leave(&c, &bad);
        }
        put_head(&a, DM_FRAME_CALL, 1, 0);
        expect(&c, &s, DM_FRAME_CALL, 1);
        leave(&c, &a);
        leave(&c, &s);
        end(&c);
    }
}

static void random_bytes_harm_nobody(void) {
    struct scene c = begin(10, 1 << 20);
    struct party s = join(&c, DM_BACKEND, true);
    for (int i = 0; i < 300; i++) {
        struct party bad =
            join(&c, rng_below(&rng, 2) ? DM_CLIENT : DM_BACKEND, rng_below(&rng, 2));
        char bytes[4096];
        uint32_t n = 1 + rng_below(&rng, sizeof bytes - 1);
        for (uint32_t k = 0; k < n; k++)
            bytes[k] = (char)rng_next(&rng);
        uint32_t size = 40 + rng_below(&rng, 200);
        if (rng_below(&rng, 2))
            memcpy(bytes, &size, 4);
        put(&bad, bytes, n);
        for (int k = 0; k < 2; k++)
            step(&c);
        leave(&c, &bad);
        c.nr_events = 0;
    }
    leave(&c, &s);
    end(&c);
}

static void who_does_not_read_is_dropped_and_holds_up_nobody(void) {
    EACH(over_ring) {
        struct scene c = begin(10000, 1 << 20);
        struct party slow = join(&c, DM_CLIENT, over_ring), a = join(&c, DM_CLIENT, over_ring);
        struct party s = join(&c, DM_BACKEND, true);
        uint32_t size = 40 + (100 << 10);
        char *large = calloc(1, size);
        uint64_t id = 0, dropped = 0;
        for (uint64_t n = 1; !dropped; n++) {
            EXPECT(n < 1000);
            put_head(&slow, DM_FRAME_CALL, n, 0);
            expect(&c, &s, DM_FRAME_CALL, ++id);
            struct dm_frame h = {
                .size = size, .kind = DM_FRAME_REPLY, .call_id = id, .body_bytes = size - 40};
            memcpy(large, &h, sizeof h);
            put(&s, large, size);
            put_head(&a, DM_FRAME_CALL, n, 0);
            for (int i = 0; s.s.backlog; i++) {
                EXPECT(i < 20000);
                step(&c);
                EXPECT_OK(dm_stream_flush(&s.s, &e), &e);
            }
            expect(&c, &s, DM_FRAME_CALL, ++id);
            put_head(&s, DM_FRAME_REPLY, id, 0);
            expect(&c, &a, DM_FRAME_REPLY, n);
            dropped = c.nr_events;
        }
        expect_event(&c, DM_RELAY_ENDED, &slow, "bytes unread");
        free(large);
        leave(&c, &slow);
        leave(&c, &a);
        leave(&c, &s);
        end(&c);
    }
}

static void a_backend_that_does_not_read_is_given_no_more_calls(void) {
    struct scene c = begin(10000, 1 << 20);
    struct party a = join(&c, DM_CLIENT, true), s = join(&c, DM_BACKEND, true);
    uint32_t size = 40 + (100 << 10);
    char *large = calloc(1, size);
    struct dm_frame h = {.size = size, .kind = DM_FRAME_CALL, .body_bytes = size - 40}, got;
    for (bool refused = false; !refused;) {
        EXPECT(++h.call_id < 100);
        memcpy(large, &h, sizeof h);
        put(&a, large, size);
        for (int i = 0; i == 0 || a.s.backlog; i++) {
            step(&c);
            EXPECT_OK(dm_stream_flush(&a.s, &e), &e);
        }
        for (int i = 0; i < 5 && !refused; i++) {
            refused = get(&a, &got);
            step(&c);
        }
    }
    EXPECT_EQ(got.kind, DM_FRAME_ERROR);
    EXPECT_EQ(got.method, OVERLOADED);
    for (uint64_t id = 1; id < got.call_id; id++) /* none of the others is lost */
        EXPECT_EQ(expect(&c, &s, DM_FRAME_CALL, id).size, size);
    free(large);
    leave(&c, &a);
    leave(&c, &s);
    end(&c);
}

/* ---------------------------------------------------------------- traffic */

#define CLIENTS 4
#define BACKENDS 3
#define WINDOW 4

static void *work(void *arg) {
    struct scene *c = arg;
    struct dm_error mine = {0};
    struct dm_relay_event v;
    while (!atomic_load(&c->stop)) {
        EXPECT_OK(dm_relay_run(c->y, DM_RING_NO_DEADLINE, &v, &mine), &mine);
        EXPECT_EQ(v.what, DM_RELAY_KICK);
    }
    return NULL;
}

static uint32_t random_size(void) {
    uint32_t most = CHECK_SANITIZED ? 2u << 20 : 16u << 20;
    switch (rng_below(&rng, 20)) {
    case 0:
        return 40 + rng_below(&rng, most);
    case 1:
    case 2:
    case 3:
        return 40 + rng_below(&rng, 300u << 10);
    default:
        return 40 + rng_below(&rng, 3000);
    }
}

/* A frame all of which follows from its header. */
static void put_marked(struct party *p, enum dm_frame_kind kind, uint64_t id, uint64_t mark,
                       uint32_t size) {
    struct dm_frame h = {.size = size,
                         .kind = (uint8_t)kind,
                         .call_id = id,
                         .time_left_us = mark,
                         .body_bytes = size - 40};
    char *frame = malloc(size);
    memcpy(frame, &h, sizeof h);
    memset(frame + 40, (int)(mark * 31 + size), size - 40);
    put(p, frame, size);
    free(frame);
}

static void expect_marked(const char *frame, const struct dm_frame *h) {
    char want = (char)(h->time_left_us * 31 + h->size);
    for (uint32_t i = 40; i < h->size; i++)
        if (frame[i] != want)
            FAIL("byte %u of %u is %d, not %d", i, h->size, frame[i], want);
}

static void frames_of_any_size_pass_both_ways_at_once(void) {
    struct scene c = begin(1000, 1ull << 30);
    struct party a[CLIENTS], s[BACKENDS];
    uint64_t sent[CLIENTS] = {0}, answered[CLIENTS] = {0}, served = 0;
    uint64_t nr = CHECK_TSAN ? 200 : 1000;
    for (int i = 0; i < CLIENTS; i++)
        a[i] = join(&c, DM_CLIENT, i % 2);
    for (int i = 0; i < BACKENDS; i++)
        s[i] = join(&c, DM_BACKEND, i % 2);
    EXPECT(pthread_create(&c.thread, NULL, work, &c) == 0);
    for (uint64_t all = 0; all < nr * CLIENTS;) {
        struct dm_frame h;
        char *frame;
        for (int i = 0; i < CLIENTS; i++) {
            EXPECT_OK(dm_stream_flush(&a[i].s, &e), &e);
            if (sent[i] < nr && sent[i] - answered[i] < WINDOW) {
                sent[i]++;
                put_marked(&a[i], DM_FRAME_CALL, sent[i], sent[i] * CLIENTS + (uint64_t)i,
                           random_size());
            }
            while ((frame = get(&a[i], &h))) {
                EXPECT_EQ(h.kind, DM_FRAME_REPLY);
                EXPECT_EQ(h.time_left_us, h.call_id * CLIENTS + (uint64_t)i);
                expect_marked(frame, &h);
                answered[i]++;
                all++;
            }
        }
        for (int i = 0; i < BACKENDS; i++) {
            EXPECT_OK(dm_stream_flush(&s[i].s, &e), &e);
            while ((frame = get(&s[i], &h))) {
                EXPECT_EQ(h.kind, DM_FRAME_CALL);
                expect_marked(frame, &h);
                put_marked(&s[i], DM_FRAME_REPLY, h.call_id, h.time_left_us, random_size());
                served++;
            }
        }
        sched_yield();
    }
    EXPECT_EQ(served, nr * CLIENTS);
    EXPECT_EQ(c.y->nr_forwarded, nr * CLIENTS);
    atomic_store(&c.stop, true);
    EXPECT_OK(dm_relay_kick(c.y, &e), &e);
    pthread_join(c.thread, NULL);
    for (int i = 0; i < CLIENTS; i++)
        leave(&c, &a[i]);
    for (int i = 0; i < BACKENDS; i++)
        leave(&c, &s[i]);
    end(&c);
}

int main(void) {
    rng = rng_start();
    HOLDS(calls_are_renumbered_and_come_back);
    HOLDS(the_least_loaded_gets_the_call_and_equals_take_turns);
    HOLDS(in_turn_means_whatever_their_load);
    HOLDS(a_call_goes_where_the_answer_says);
    HOLDS(a_call_that_is_refused_goes_nowhere_and_the_next_is_asked_about);
    HOLDS(a_client_that_ends_is_asked_about_no_more);
    HOLDS(a_client_that_never_stops_calling_does_not_keep_others_from_being_asked_about);
    HOLDS(a_client_that_ends_has_its_calls_cancelled_and_its_replies_discarded);
    HOLDS(delivered_replies_are_remembered_up_to_a_limit);
    HOLDS(a_lost_backend_fails_its_calls_alone);
    HOLDS(more_calls_than_allowed_are_refused);
    HOLDS(who_breaks_the_protocol_is_reported_and_no_other_suffers);
    HOLDS(random_bytes_harm_nobody);
    HOLDS(who_does_not_read_is_dropped_and_holds_up_nobody);
    HOLDS(a_backend_that_does_not_read_is_given_no_more_calls);
    HOLDS(frames_of_any_size_pass_both_ways_at_once);
    return 0;
}
