/*
 * relay_peers.c - a relay, and who is connected to it.
 *
 * A forked child has copies of everything, made while another thread may have been at work, and shares the epoll instance,
 * the bells and the streams with its parent. It leaves all of it alone, memory included.
 */
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "host.h"
#include "relay.h"

/* ---------------------------------------------------------------- making and ending */

static char *copy_frame(const char *frame) {
    uint32_t size;
    memcpy(&size, frame, sizeof size);
    char *copy = malloc(size);
    return copy ? memcpy(copy, frame, size) : NULL;
}

static void unmake(struct dm_relay *y) {
    if (y->w)
        dm_waitset_put(y->w);
    pthread_mutex_destroy(&y->lock);
    free(y->overloaded);
    free(y->unreachable);
    free(y->backends);
    free(y->peers);
    free(y);
}

int dm_relay_create(uint32_t max_waiting, uint32_t max_peers, uint64_t max_backlog,
                    const char *overloaded, const char *unreachable, struct dm_relay **out,
                    struct dm_error *e) {
    if (!max_peers || max_peers > 1u << DM_PLACE_BITS)
        return dm_fail(e, DM_ERR_BAD_SIZE, "a relay has 1 to %u connections", 1u << DM_PLACE_BITS);
    struct dm_relay *y = calloc(1, sizeof *y);
    if (!y)
        return DM_ERR_NO_MEMORY;
    pthread_mutex_init(&y->lock, NULL);
    y->owner = getpid();
    y->max_waiting = max_waiting;
    y->max_peers = max_peers;
    y->max_backlog = max_backlog;
    dm_node_init(&y->ready);
    dm_node_init(&y->dirty);
    dm_node_init(&y->events);
    y->peers = calloc(max_peers, sizeof *y->peers);
    y->backends = calloc(max_peers, sizeof *y->backends);
    y->overloaded = copy_frame(overloaded);
    y->unreachable = copy_frame(unreachable);
    int s = dm_waitset_create(&y->w, e);
    if (!s && (!y->peers || !y->backends || !y->overloaded || !y->unreachable))
        s = DM_ERR_NO_MEMORY;
    if (s)
        unmake(y);
    else
        *out = y;
    return s;
}

static void free_peer(struct dm_peer *p) {
    uint32_t bucket = 0;
    for (struct dm_call *c; (c = dm_call_any(p, &bucket));)
        dm_call_free(c);
    free(p->calls.buckets);
    dm_stream_close(&p->stream);
    dm_node_leave(&p->ready);
    dm_node_leave(&p->dirty);
    dm_node_leave(&p->event);
    free(p);
}

void dm_relay_destroy(struct dm_relay *y) {
    if (y->owner != getpid())
        return;
    for (uint32_t i = 0; i < y->max_peers; i++) {
        struct dm_peer *p = y->peers[i];
        if (!p)
            continue;
        if (!p->dead)
            dm_relay_detach(y, p);
        free_peer(p);
    }
    unmake(y);
}

/* ---------------------------------------------------------------- connections */

struct dm_peer *dm_relay_peer(struct dm_relay *y, int64_t key) {
    uint64_t place = (uint64_t)key & ((1u << DM_PLACE_BITS) - 1);
    struct dm_peer *p = place < y->max_peers ? y->peers[place] : NULL;
    return p && p->key == key ? p : NULL;
}

static struct dm_peer *new_peer(enum dm_side side, struct dm_ring *ring, int fd,
                                uint32_t max_frame) {
    struct dm_peer *p = calloc(1, sizeof *p);
    if (!p)
        return NULL;
    p->side = side;
    p->control = ring ? fd : -1;
    dm_node_init(&p->delivered);
    dm_node_init(&p->ready);
    dm_node_init(&p->dirty);
    dm_node_init(&p->event);
    dm_stream_open(&p->stream, ring, ring ? -1 : fd, max_frame);
    return p;
}

static int attend(struct dm_relay *y, struct dm_peer *p, struct dm_error *e) {
    if (!p->stream.ring)
        return dm_waitset_add_fd(y->w, p->stream.fd, p->key, true, e);
    int s = dm_waitset_add_fd(y->w, p->control, p->key | DM_KEY_CONTROL, false, e);
    if (s)
        return s;
    if ((s = dm_waitset_add_ring(y->w, p->stream.ring, p->key, e)))
        (void)dm_waitset_remove(y->w, NULL, p->control, NULL);
    return s;
}

/* ring and the socket fd whose end is the peer's, or the socket fd alone. */
int dm_relay_add(struct dm_relay *y, enum dm_side side, struct dm_ring *ring, int fd,
                 uint32_t max_frame, const char *rest, uint64_t nr_rest, int64_t *key,
                 struct dm_error *e) {
    uint32_t place = 0;
    while (place < y->max_peers && y->peers[place])
        place++;
    if (place == y->max_peers)
        return dm_fail(e, DM_ERR_BUSY, "the relay has %u connections already", y->max_peers);
    struct dm_peer *p = new_peer(side, ring, fd, max_frame);
    if (!p)
        return DM_ERR_NO_MEMORY;
    if (nr_rest) {
        if (!(p->stream.buf = malloc(nr_rest))) {
            free_peer(p);
            return DM_ERR_NO_MEMORY;
        }
        memcpy(p->stream.buf, rest, nr_rest);
        p->stream.cap = p->stream.to = nr_rest;
    }
    y->generation = (y->generation + 1) & 0x7fffffff;
    p->key = (int64_t)y->generation << DM_PLACE_BITS | place;
    int s = attend(y, p, e);
    if (s) {
        free_peer(p);
        return s;
    }
    if (nr_rest) /* no event tells of these */
        dm_node_join(&y->ready, &p->ready);
    if (side == DM_BACKEND)
        y->backends[y->nr_backends++] = p;
    pthread_mutex_lock(&y->lock);
    y->peers[place] = p;
    pthread_mutex_unlock(&y->lock);
    *key = p->key;
    return DM_OK;
}

/* Its replies find nobody and are discarded then; the backends need not go on. */
static void end_client(struct dm_relay *y, struct dm_peer *p) {
    uint32_t bucket = 0;
    for (struct dm_call *c; (c = dm_call_any(p, &bucket));) {
        dm_relay_send_head(y, c->peer[DM_BACKEND],
                           c->delivered ? DM_FRAME_DISCARD : DM_FRAME_CANCEL, c->id[DM_BACKEND]);
        if (c->delivered)
            dm_call_free(c);
        else
            dm_call_unlink(c, DM_CLIENT);
    }
}

static void end_backend(struct dm_relay *y, struct dm_peer *p, const char *lost) {
    uint32_t bucket = 0;
    for (struct dm_call *c; (c = dm_call_any(p, &bucket));) {
        if (!c->delivered) {
            p->nr_waiting--;
            atomic_fetch_sub_explicit(&y->nr_waiting, 1, memory_order_relaxed);
            if (c->peer[DM_CLIENT])
                dm_relay_send_error(y, c->peer[DM_CLIENT], lost, c->id[DM_CLIENT]);
        }
        dm_call_free(c);
    }
    uint32_t at = 0;
    while (y->backends[at] != p)
        at++;
    y->nr_backends--;
    memmove(&y->backends[at], &y->backends[at + 1], (y->nr_backends - at) * sizeof *y->backends);
}

int dm_relay_remove(struct dm_relay *y, int64_t key, const char *lost, uint64_t *nr_forwarded) {
    struct dm_peer *p = dm_relay_peer(y, key);
    if (!p)
        return DM_ERR_BAD_ADDRESS;
    if (!p->dead)
        dm_relay_detach(y, p);
    p->dead = true;
    if (y->asked == p)
        y->asked = NULL;
    if (p->side == DM_CLIENT)
        end_client(y, p);
    else
        end_backend(y, p, lost);
    dm_relay_flush(y); /* it may be the last thing that is done */
    DM_CRASH_POINT(relay_ended);
    pthread_mutex_lock(&y->lock);
    y->peers[key & ((1 << DM_PLACE_BITS) - 1)] = NULL;
    *nr_forwarded = atomic_load(&p->nr_forwarded);
    pthread_mutex_unlock(&y->lock);
    free_peer(p);
    return DM_OK;
}

int dm_relay_leave_out(struct dm_relay *y, int64_t key) {
    struct dm_peer *p = dm_relay_peer(y, key);
    if (!p)
        return DM_ERR_BAD_ADDRESS;
    p->leaving = true;
    return DM_OK;
}

void dm_relay_set_policy(struct dm_relay *y, enum dm_relay_policy policy, bool asks) {
    y->policy = policy;
    y->asks = asks;
}

/* Context: any thread. */
uint64_t dm_relay_forwarded(struct dm_relay *y, int64_t key) {
    pthread_mutex_lock(&y->lock);
    struct dm_peer *p = dm_relay_peer(y, key);
    uint64_t n = p ? atomic_load(&p->nr_forwarded) : 0;
    pthread_mutex_unlock(&y->lock);
    return n;
}

/* ---------------------------------------------------------------- descriptors of the caller */

int dm_relay_watch(struct dm_relay *y, int fd, struct dm_error *e) {
    return dm_waitset_add_fd(y->w, fd, fd | DM_KEY_FD, false, e);
}

int dm_relay_unwatch(struct dm_relay *y, int fd, struct dm_error *e) {
    return dm_waitset_remove(y->w, NULL, fd, e);
}

/* Context: any thread. */
int dm_relay_kick(struct dm_relay *y, struct dm_error *e) { return dm_waitset_kick(y->w, 1, e); }
