/*
 * relay.c - a load balancer's loop: headers are checked and given other ids, frames go on as they are.
 *
 * - Nothing waits for one peer. What a connection does not take is kept for it, and beyond a limit it is dropped. A backend
 *   that is behind by half of that is given no more calls, or one client could have a backend dropped for all.
 * - A peer that fails, anywhere, is only marked: it is neither read nor written from then on, and its end is reported. Its
 *   calls are seen to when it is removed. So no frame under way finds a table changed under it.
 * - A peer that never stops sending does not keep the others from their turn: after so many frames or bytes it goes to
 *   the end of a list, and the wait set is asked in between.
 * - Whether a client took the Refs of a reply, we cannot know. The last replies with Refs are remembered, so that
 *   its DISCARD, or its end, reaches the backend. Of Refs taken the backend knows.
 *
 * - Whoever runs the relay may want to decide about every call. Then the loop stops at one, whose frame stays where it was
 *   received, and the client it came from waits in line like one that never stops sending.
 *
 * Small frames to a socket are gathered until the turn is over: one system call for all that a burst has for it.
 */
#define _GNU_SOURCE
#include "relay.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#include "host.h"

#define COUNT(counter, n)                                                                          \
    atomic_store_explicit(&(counter),                                                              \
                          atomic_load_explicit(&(counter), memory_order_relaxed) + (n),            \
                          memory_order_relaxed)

/* ---------------------------------------------------------------- the end of a peer */

static void report(struct dm_relay *y, struct dm_peer *p, enum dm_relay_what what,
                   const char *why) {
    p->what = what;
    snprintf(p->why, sizeof p->why, "%s", why);
    if (dm_node_alone(&p->event))
        dm_node_join(&y->events, &p->event);
}

void dm_relay_detach(struct dm_relay *y, struct dm_peer *p) {
    struct dm_error ignored;
    if (p->stream.ring)
        (void)dm_waitset_remove(y->w, p->stream.ring, -1, &ignored);
    if (p->control >= 0 && !p->gone)
        (void)dm_waitset_remove(y->w, NULL, p->control, &ignored);
    if (p->stream.fd >= 0)
        (void)dm_waitset_remove(y->w, NULL, p->stream.fd, &ignored);
}

static void drop(struct dm_relay *y, struct dm_peer *p, enum dm_relay_what what, const char *why) {
    if (p->dead)
        return;
    /* What is not sent yet would be torn by a last word. */
    if (what == DM_RELAY_BROKE && p->stream.backlog)
        what = DM_RELAY_ENDED;
    p->dead = true;
    dm_relay_detach(y, p);
    dm_node_leave(&p->ready);
    dm_node_leave(&p->dirty);
    report(y, p, what, why);
}

static void fail(struct dm_relay *y, struct dm_peer *p, int status, const struct dm_error *e) {
    drop(y, p, status == DM_ERR_PROTOCOL ? DM_RELAY_BROKE : DM_RELAY_ENDED,
         status == DM_ERR_NO_MEMORY ? "no memory" : e->text);
}

static void breach(struct dm_relay *y, struct dm_peer *p, const char *what, uint64_t n) {
    char text[128];
    snprintf(text, sizeof text, what, (unsigned long long)n);
    drop(y, p, DM_RELAY_BROKE, text);
}

/* ---------------------------------------------------------------- sending */

/* False: there is no such peer any more. from: see dm_stream_keep. */
static bool send_to(struct dm_relay *y, struct dm_peer *p, const char *bytes, uint64_t n,
                    struct dm_peer *from) {
    struct dm_stream *s = &p->stream;
    struct dm_error e = {0};
    uint64_t sent = 0;
    if (p->dead)
        return false;
    if (!s->backlog && (s->ring || n >= DM_STREAM_CORK)) {
        int64_t k = dm_stream_try(s, bytes, n, &e);
        if (k < 0) {
            fail(y, p, (int)k, &e);
            return false;
        }
        if ((sent = (uint64_t)k) == n)
            return true;
    }
    if (s->backlog > y->max_backlog) {
        snprintf(e.text, sizeof e.text, "it left %llu bytes unread",
                 (unsigned long long)s->backlog);
        fail(y, p, DM_ERR_PEER_GONE, &e);
        return false;
    }
    if (dm_stream_keep(s, bytes + sent, n - sent, from ? &from->stream : NULL)) {
        fail(y, p, DM_ERR_NO_MEMORY, &e);
        return false;
    }
    if (!s->ring && !s->blocked && dm_node_alone(&p->dirty))
        dm_node_join(&y->dirty, &p->dirty);
    return true;
}

void dm_relay_send_head(struct dm_relay *y, struct dm_peer *p, enum dm_frame_kind kind,
                        uint64_t id) {
    struct dm_frame h = {.size = DM_FRAME_HEADER, .kind = (uint8_t)kind, .call_id = id};
    (void)send_to(y, p, (const char *)&h, sizeof h, NULL);
}

/* An ERROR frame that was made before, for this call. */
void dm_relay_send_error(struct dm_relay *y, struct dm_peer *p, const char *frame, uint64_t id) {
    struct dm_frame h;
    memcpy(&h, frame, sizeof h);
    char *copy = malloc(h.size);
    if (!copy) {
        drop(y, p, DM_RELAY_ENDED, "no memory");
        return;
    }
    memcpy(copy, frame, h.size);
    memcpy(copy + offsetof(struct dm_frame, call_id), &id, sizeof id);
    (void)send_to(y, p, copy, h.size, NULL);
    free(copy);
}

static void flush(struct dm_relay *y, struct dm_peer *p) {
    struct dm_error e = {0};
    dm_node_leave(&p->dirty);
    int s = p->stream.backlog ? dm_stream_flush(&p->stream, &e) : DM_OK;
    if (s)
        fail(y, p, s, &e);
}

/* Send what was gathered. */
void dm_relay_flush(struct dm_relay *y) {
    while (!dm_node_alone(&y->dirty))
        flush(y, DM_OF(y->dirty.next, struct dm_peer, dirty));
}

/* ---------------------------------------------------------------- from clients */

static bool is_behind(const struct dm_relay *y, const struct dm_peer *p) {
    return p->stream.backlog > y->max_backlog / 2;
}

/* By policy. *crowded: there would be some, but they are behind. */
static struct dm_peer *choose(struct dm_relay *y, bool *crowded) {
    struct dm_peer *best = NULL;
    uint32_t n = y->nr_backends, first = n ? y->turn++ % n : 0;
    *crowded = false;
    for (uint32_t i = 0; i < n; i++) {
        struct dm_peer *p = y->backends[first + i < n ? first + i : first + i - n];
        if (p->dead || p->leaving)
            continue;
        if (is_behind(y, p))
            *crowded = true;
        else if (!best || (y->policy == DM_RELAY_LEAST_LOADED && p->nr_waiting < best->nr_waiting))
            best = p;
    }
    return best;
}

/* The one that was asked for, if it is to be had. */
static struct dm_peer *named(struct dm_relay *y, int64_t key, bool *crowded) {
    struct dm_peer *p = dm_relay_peer(y, key);
    if (!p || p->side != DM_BACKEND || p->dead || p->leaving)
        p = NULL;
    *crowded = p && is_behind(y, p);
    return *crowded ? NULL : p;
}

static bool in_order(struct dm_relay *y, struct dm_peer *client, const struct dm_frame *h) {
    if (h->call_id <= client->last_id) {
        char text[96];
        snprintf(text, sizeof text, "call %llu came after call %llu",
                 (unsigned long long)h->call_id, (unsigned long long)client->last_id);
        drop(y, client, DM_RELAY_BROKE, text);
        return false;
    }
    client->last_id = h->call_id;
    return true;
}

/* key: of a backend; 0: by policy. */
static void call(struct dm_relay *y, struct dm_peer *client, char *frame, const struct dm_frame *h,
                 int64_t key) {
    bool crowded;
    struct dm_peer *backend = key ? named(y, key, &crowded) : choose(y, &crowded);
    if (!backend && !crowded) {
        dm_relay_send_error(y, client, y->unreachable, h->call_id);
        return;
    }
    struct dm_call *c = NULL;
    if (backend && atomic_load_explicit(&y->nr_waiting, memory_order_relaxed) < y->max_waiting)
        c = dm_call_add(client, h->call_id, backend, backend->last_id + 1);
    if (!c) {
        dm_relay_send_error(y, client, y->overloaded, h->call_id);
        return;
    }
    uint64_t there = ++backend->last_id;
    memcpy(frame + offsetof(struct dm_frame, call_id), &there, sizeof there);
    backend->nr_waiting++;
    COUNT(y->nr_waiting, 1);
    COUNT(y->nr_forwarded, 1);
    COUNT(y->bytes_forwarded, h->size);
    COUNT(backend->nr_forwarded, 1);
    DM_CRASH_POINT(relay_noted);
    (void)send_to(y, backend, frame, h->size, client);
    DM_CRASH_POINT(relay_sent);
}

static void from_client(struct dm_relay *y, struct dm_peer *client, char *frame,
                        const struct dm_frame *h) {
    switch (h->kind) {
    case DM_FRAME_CALL:
        if (!in_order(y, client, h))
            return;
        if (!y->asks) {
            call(y, client, frame, h, 0);
            return;
        }
        y->asked = client;
        y->asked_frame = frame;
        y->asked_header = *h;
        return;
    case DM_FRAME_CANCEL:
    case DM_FRAME_DISCARD: {
        struct dm_call *c = dm_call_find(client, h->call_id);
        if (!c || (c->delivered && h->kind == DM_FRAME_CANCEL))
            return;
        dm_relay_send_head(y, c->peer[DM_BACKEND], h->kind, c->id[DM_BACKEND]);
        if (c->delivered)
            dm_call_free(c);
        return;
    }
    default:
        breach(y, client, "a client does not send frames of kind %llu", h->kind);
    }
}

/* ---------------------------------------------------------------- from backends */

static void remember(struct dm_call *c) {
    struct dm_peer *client = c->peer[DM_CLIENT];
    c->delivered = true;
    dm_node_join(&client->delivered, &c->order);
    if (++client->nr_delivered > DM_RELAY_DELIVERED)
        dm_call_free(DM_OF(client->delivered.next, struct dm_call, order));
}

static void reply(struct dm_relay *y, struct dm_peer *backend, char *frame,
                  const struct dm_frame *h) {
    struct dm_call *c = dm_call_find(backend, h->call_id);
    if (!c || c->delivered) {
        breach(y, backend, "a reply to call %llu, which was not made", h->call_id);
        return;
    }
    struct dm_peer *client = c->peer[DM_CLIENT];
    bool sent = false;
    backend->nr_waiting--;
    COUNT(y->nr_waiting, -1u);
    if (client) {
        memcpy(frame + offsetof(struct dm_frame, call_id), &c->id[DM_CLIENT], 8);
        COUNT(y->bytes_forwarded, h->size);
        DM_CRASH_POINT(relay_answered);
        sent = send_to(y, client, frame, h->size, backend);
        DM_CRASH_POINT(relay_replied);
    }
    if (sent && h->nr_refs) {
        remember(c);
        return;
    }
    dm_call_free(c);
    if (h->nr_refs)
        dm_relay_send_head(y, backend, DM_FRAME_DISCARD, h->call_id);
}

static void from_backend(struct dm_relay *y, struct dm_peer *backend, char *frame,
                         const struct dm_frame *h) {
    if ((h->kind == DM_FRAME_REPLY || h->kind == DM_FRAME_ERROR) && h->call_id) {
        reply(y, backend, frame, h);
    } else if (h->kind == DM_FRAME_GOAWAY) {
        if (!backend->leaving)
            report(y, backend, DM_RELAY_LEAVING, "");
        backend->leaving = true;
    } else {
        breach(y, backend, "a server does not send frames of kind %llu", h->kind);
    }
}

/* ---------------------------------------------------------------- turns */

static void used_up(struct dm_peer *p, uint64_t size) {
    dm_stream_done(&p->stream);
    if (p->gone)
        p->left -= size < p->left ? size : p->left;
}

static void read_from(struct dm_relay *y, struct dm_peer *p) {
    struct dm_stream *s = &p->stream;
    uint64_t bytes = 0;
    for (uint32_t n = 0; !p->dead;) {
        struct dm_error e = {0};
        struct dm_frame h;
        char *frame;
        uint32_t size;
        if (n == DM_RELAY_FRAMES || bytes >= DM_RELAY_BYTES) {
            if (dm_node_alone(&p->ready))
                dm_node_join(&y->ready, &p->ready);
            return;
        }
        if (p->gone && !p->left) {
            drop(y, p, DM_RELAY_ENDED, "the peer closed the connection or died");
            return;
        }
        int got = dm_stream_recv(s, &frame, &size, &e);
        if (got == 0) {
            if (p->gone)
                p->left = 0;
            else if (!s->ring || !dm_ring_arm(s->ring))
                return;
            continue;
        }
        if (got > 0) {
            memcpy(&h, frame, sizeof h);
            got = dm_frame_check(&h, size, &e);
        }
        if (got < 0) {
            fail(y, p, got, &e);
            return;
        }
        if (p->side == DM_CLIENT)
            from_client(y, p, frame, &h);
        else
            from_backend(y, p, frame, &h);
        if (y->asked)
            return;
        used_up(p, size);
        n++;
        bytes += size;
    }
}

static void turn(struct dm_relay *y, struct dm_peer *p) {
    dm_node_leave(&p->ready);
    if (p->stream.backlog)
        flush(y, p);
    read_from(y, p);
}

/* Its control socket is readable: whether it ended or the peer spoke, nothing more is taken but what is in the ring. */
static void ended(struct dm_relay *y, struct dm_peer *p) {
    char c;
    struct dm_error ignored;
    if (p->gone || (recv(p->control, &c, 1, MSG_PEEK | MSG_DONTWAIT) < 0 && errno == EAGAIN))
        return;
    (void)dm_waitset_remove(y->w, NULL, p->control, &ignored);
    p->gone = true;
    p->left = p->stream.ring->capacity;
    turn(y, p);
}

/* True: it is for the caller. */
static bool event(struct dm_relay *y, int64_t key, struct dm_relay_event *out) {
    if (key == DM_KICKED || (key & DM_KEY_FD)) {
        *out = (struct dm_relay_event){.what = key == DM_KICKED ? DM_RELAY_KICK : DM_RELAY_FD,
                                       .key = key & ~DM_KEY_FD};
        return true;
    }
    struct dm_peer *p = dm_relay_peer(y, key & ~DM_KEY_CONTROL);
    if (p && !p->dead) {
        if (key & DM_KEY_CONTROL)
            ended(y, p);
        else
            turn(y, p);
    }
    return false;
}

static bool take_event(struct dm_relay *y, struct dm_relay_event *out) {
    if (dm_node_alone(&y->events))
        return false;
    struct dm_peer *p = DM_OF(y->events.next, struct dm_peer, event);
    dm_node_leave(&p->event);
    *out = (struct dm_relay_event){.what = p->what, .key = p->key};
    memcpy(out->text, p->why, sizeof out->text);
    return true;
}

int dm_relay_answer(struct dm_relay *y, int64_t backend, const char *refusal) {
    struct dm_peer *p = y->asked;
    if (!p)
        return DM_ERR_BAD_ADDRESS;
    y->asked = NULL;
    if (refusal)
        dm_relay_send_error(y, p, refusal, y->asked_header.call_id);
    else
        call(y, p, y->asked_frame, &y->asked_header, backend);
    used_up(p, y->asked_header.size);
    if (!p->dead && dm_node_alone(&p->ready)) /* it may have more, of which no event tells */
        dm_node_join(&y->ready, &p->ready);
    return DM_OK;
}

int dm_relay_run(struct dm_relay *y, uint64_t deadline_ns, struct dm_relay_event *out,
                 struct dm_error *e) {
    for (;;) {
        int64_t key;
        if (y->asked) {
            *out = (struct dm_relay_event){.what = DM_RELAY_CALL, .key = y->asked->key};
            return DM_OK;
        }
        dm_relay_flush(y);
        if (take_event(y, out))
            return DM_OK;
        bool busy = !dm_node_alone(&y->ready);
        int s = dm_waitset_wait(y->w, busy ? 0 : deadline_ns, &key, e);
        if (s < 0)
            return s;
        if (s && event(y, key, out))
            return DM_OK;
        if (busy && !y->asked && !dm_node_alone(&y->ready))
            turn(y, DM_OF(y->ready.next, struct dm_peer, ready));
        if (deadline_ns != DM_RING_NO_DEADLINE && !y->asked && dm_node_alone(&y->events) &&
            dm_now_ns() >= deadline_ns) {
            *out = (struct dm_relay_event){.what = DM_RELAY_TIMEOUT};
            return DM_OK;
        }
    }
}
