/*
 * relay_stream.c - frames from and to a ring or a socket, without waiting.
 *
 * - A frame is received into a buffer that the stream uses again, and sent from there. If the next connection does not
 *   take all of it at once, a large one is not copied: its buffer becomes part of the backlog.
 * - A frame is stored whole before any of it is passed on, however large. Passing it on as it comes would tie two
 *   connections together: a sender that stops in the middle would hold up everybody who shares the other one, and one
 *   that dies there would break it for all.
 * - No size is believed before bytes arrive: a buffer doubles when it is full.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "host.h"
#include "relay.h"

void dm_stream_open(struct dm_stream *s, struct dm_ring *ring, int fd, uint32_t max_frame) {
    *s = (struct dm_stream){.ring = ring, .fd = fd, .max_frame = max_frame};
    if (ring)
        dm_ring_get(ring);
}

static void free_block(struct dm_block *b) {
    free(b->data);
    free(b);
}

void dm_stream_close(struct dm_stream *s) {
    while (s->first) {
        struct dm_block *b = s->first;
        s->first = b->next;
        free_block(b);
    }
    free(s->buf);
    if (s->ring)
        dm_ring_put(s->ring);
    *s = (struct dm_stream){.fd = -1};
}

/* ---------------------------------------------------------------- receiving */

static int reserve(struct dm_stream *s, uint64_t cap) {
    if (cap < DM_STREAM_READ)
        cap = DM_STREAM_READ;
    if (cap <= s->cap)
        return DM_OK;
    char *more = realloc(s->buf, cap);
    if (!more)
        return DM_ERR_NO_MEMORY;
    s->buf = more;
    s->cap = cap;
    return DM_OK;
}

/* How large the buffer may be for a frame of which have bytes came. It grows when it is full. */
static uint64_t believed(const struct dm_stream *s, uint64_t size, uint64_t have) {
    uint64_t cap = s->cap > DM_FRAME_BELIEVED ? s->cap : DM_FRAME_BELIEVED;
    if (have >= cap)
        cap = 2 * have;
    return size < cap ? size : cap;
}

static int recv_ring(struct dm_stream *s, char **frame, uint32_t *size, struct dm_error *e) {
    struct dm_ring_in *in = &s->ring->in;
    uint64_t there;
    int64_t n = dm_ring_begin(s->ring, &there, e);
    if (n <= 0)
        return (int)n;
    for (;;) {
        uint64_t cap = believed(s, in->size, in->got + there);
        if (reserve(s, cap))
            return DM_ERR_NO_MEMORY;
        if (in->got == 4)
            memcpy(s->buf, in->size_bytes, 4);
        cap = s->cap < in->size ? s->cap : in->size;
        uint64_t want = cap - in->got;
        if ((n = dm_ring_fill(s->ring, s->buf + in->got, want, e)) < 0)
            return (int)n;
        if (in->got == in->size) {
            *frame = s->buf;
            *size = in->size;
            s->from = s->to = in->size;
            in->size = in->got = 0;
            return 1;
        }
        if ((uint64_t)n < want)
            return 0;
        there = 0;
    }
}

/* Bytes read, 0 when there are none now. */
static ssize_t read_some(struct dm_stream *s, uint64_t n, struct dm_error *e) {
    for (;;) {
        ssize_t got = recv(s->fd, s->buf + s->to, n, MSG_DONTWAIT);
        if (got > 0)
            return got;
        if (got == 0)
            return dm_fail(e, DM_ERR_PEER_GONE, "the peer closed the connection or died");
        if (errno == EAGAIN)
            return 0;
        if (errno != EINTR)
            return dm_fail(e, DM_ERR_PEER_GONE, "receiving failed: %s", strerrordesc_np(errno));
    }
}

static int recv_socket(struct dm_stream *s, char **frame, uint32_t *size, struct dm_error *e) {
    for (;;) {
        uint64_t have = s->to - s->from, goal = DM_STREAM_READ;
        uint32_t claimed = 0;
        if (have >= 4) {
            memcpy(&claimed, s->buf + s->from, 4);
            if (claimed < DM_FRAME_HEADER || claimed > s->max_frame)
                return dm_fail(e, DM_ERR_PROTOCOL, "a frame of %u bytes; allowed are %u to %u",
                               claimed, (unsigned)DM_FRAME_HEADER, s->max_frame);
            if (claimed <= have) {
                *frame = s->buf + s->from;
                *size = claimed;
                s->from += claimed;
                return 1;
            }
        }
        if (s->from) {
            memmove(s->buf, s->buf + s->from, have);
            s->from = 0;
            s->to = have;
        }
        /* Of a large frame not a byte beyond it is read, so its buffer can be given away. */
        if (claimed > goal)
            goal = believed(s, claimed, have);
        if (reserve(s, goal))
            return DM_ERR_NO_MEMORY;
        ssize_t n = read_some(s, goal - s->to, e);
        if (n <= 0)
            return (int)n;
        s->to += (uint64_t)n;
    }
}

int dm_stream_recv(struct dm_stream *s, char **frame, uint32_t *size, struct dm_error *e) {
    return s->ring ? recv_ring(s, frame, size, e) : recv_socket(s, frame, size, e);
}

void dm_stream_done(struct dm_stream *s) {
    if (s->ring || s->from == s->to) {
        s->from = s->to = 0;
        if (s->cap > DM_STREAM_KEPT) {
            free(s->buf);
            s->buf = NULL;
            s->cap = 0;
        }
    }
}

/* ---------------------------------------------------------------- sending */

static int64_t try_socket(struct dm_stream *s, const char *bytes, uint64_t n, struct dm_error *e) {
    uint64_t sent = 0;
    while (sent < n) {
        ssize_t k = send(s->fd, bytes + sent, n - sent, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (k >= 0) {
            sent += (uint64_t)k;
        } else if (errno == EAGAIN) {
            s->blocked = true;
            break;
        } else if (errno != EINTR) {
            return dm_fail(e, DM_ERR_PEER_GONE, "sending failed: %s", strerrordesc_np(errno));
        }
    }
    return (int64_t)sent;
}

int64_t dm_stream_try(struct dm_stream *s, const char *bytes, uint64_t n, struct dm_error *e) {
    if (!s->ring)
        return try_socket(s, bytes, n, e);
    struct iovec v = {(void *)(uintptr_t)bytes, n};
    return dm_ring_try_send(s->ring, &v, n, 0, e);
}

/* A block at the end with room for n bytes, or a new one. NULL: no memory. */
static struct dm_block *block_for(struct dm_stream *s, uint64_t n, char *data) {
    struct dm_block *b = s->last;
    if (!data && b && b->cap - b->to >= n)
        return b;
    if (!(b = calloc(1, sizeof *b)))
        return NULL;
    b->cap = n > DM_STREAM_BLOCK || data ? n : DM_STREAM_BLOCK;
    b->data = data ? data : malloc(b->cap);
    if (!b->data) {
        free(b);
        return NULL;
    }
    if (s->last)
        s->last->next = b;
    else
        s->first = b;
    return s->last = b;
}

int dm_stream_keep(struct dm_stream *s, const char *bytes, uint64_t n, struct dm_stream *from) {
    /* Its last bytes, and all before them are used. */
    bool take =
        from && n > DM_STREAM_BLOCK && from->from == from->to && bytes + n == from->buf + from->to;
    uint64_t offset = take ? (uint64_t)(bytes - from->buf) : 0;
    struct dm_block *b = block_for(s, n, take ? from->buf : NULL);
    if (!b)
        return DM_ERR_NO_MEMORY;
    if (take) {
        b->from = offset;
        b->to = b->cap = offset + n;
        from->buf = NULL;
        from->cap = from->from = from->to = 0;
    } else {
        memcpy(b->data + b->to, bytes, n);
        b->to += n;
    }
    s->backlog += n;
    return DM_OK;
}

int dm_stream_flush(struct dm_stream *s, struct dm_error *e) {
    s->blocked = false;
    while (s->backlog) {
        struct dm_block *b = s->first;
        if (b->from < b->to) {
            int64_t n = dm_stream_try(s, b->data + b->from, b->to - b->from, e);
            if (n < 0)
                return (int)n;
            b->from += (uint64_t)n;
            s->backlog -= (uint64_t)n;
        }
        if (b->from < b->to)
            break;
        if (b == s->last && b->cap == DM_STREAM_BLOCK) { /* used again */
            b->from = b->to = 0;
            break;
        }
        s->first = b->next;
        if (!s->first)
            s->last = NULL;
        free_block(b);
    }
    return DM_OK;
}
