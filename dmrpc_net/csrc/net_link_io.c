/*
 * net_link_io.c - what goes through a link's socket: requests out, answers in, and how a connection ends.
 *
 * An answer of any size is received where it belongs, if it is the next one and large: the header, the caller's memory and
 * some spare room are offered together. If the server then refuses, what was taken for the answer's bytes is other answers,
 * and is read again as such.
 *
 * Context: the link's lock is held, by all of this file.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include "net_link.h"

#define MAX_IOV 64
#define DIRECT_BYTES (8u << 10) /* an answer from here on is received where it belongs */

/* ---------------------------------------------------------------- ends */

int net_link_broke(struct net_link *l) {
    l->broken = true;
    if (l->fd >= 0)
        (void)shutdown(l->fd, SHUT_RDWR); /* wakes whoever polls it */
    if (l->nr_sleeping)
        pthread_cond_broadcast(&l->changed);
    return NET_BROKEN;
}

static void ring(struct net_link *l) {
    const uint64_t one = 1;
    if (l->bell < 0)
        return;
    ssize_t ignored = write(l->bell, &one, sizeof one);
    (void)ignored;
}

/* The oldest call is done. */
static void finish(struct net_link *l, int outcome, uint64_t a, uint64_t b) {
    struct net_call *c = l->first;
    l->first = c->next;
    if (!l->first)
        l->last = &l->first;
    if (l->unsent == c) {
        l->unsent = c->next;
        l->unsent_at = 0;
    }
    l->nr_calls--;
    l->nr_calls_done++;
    c->next = NULL;
    if (c->detached) {
        free(c);
        return;
    }
    c->a = a;
    c->b = b;
    const bool bell = c->bell;
    __atomic_store_n(&c->outcome, outcome, __ATOMIC_RELEASE); /* from here on it is the caller's */
    if (bell)
        ring(l);
}

int net_link_end(struct net_link *l, int outcome) {
    l->failed = outcome;
    (void)net_link_broke(l);
    while (l->first)
        finish(l, outcome, 0, 0);
    if (l->nr_sleeping)
        pthread_cond_broadcast(&l->changed);
    ring(l);
    return outcome;
}

/* ---------------------------------------------------------------- sending */

/* 1: the socket takes no more. 0: all is sent. */
int net_link_send(struct net_link *l) {
    while (l->unsent) {
        struct iovec iov[MAX_IOV];
        struct msghdr m = {.msg_iov = iov};
        uint64_t skip = l->unsent_at;
        int n = 0;
        for (struct net_call *c = l->unsent; c && n + 2 <= MAX_IOV; c = c->next) {
            if (skip == 0)
                c->request.oldest = l->first->request.id;
            if (skip < sizeof c->request) {
                iov[n++] = (struct iovec){(char *)&c->request + skip, sizeof c->request - skip};
                skip = 0;
            } else {
                skip -= sizeof c->request;
            }
            if (c->request.payload)
                iov[n++] =
                    (struct iovec){(char *)(uintptr_t)c->payload + skip, c->request.payload - skip};
            skip = 0;
        }
        m.msg_iovlen = (size_t)n;
        ssize_t sent = sendmsg(l->fd, &m, MSG_NOSIGNAL | MSG_DONTWAIT);
        l->nr_system_calls++;
        if (sent < 0) {
            if (errno == EINTR)
                continue;
            return errno == EAGAIN || errno == ENOBUFS || errno == ENOMEM ? 1 : net_link_broke(l);
        }
        l->bytes_out += (uint64_t)sent;
        uint64_t at = l->unsent_at + (uint64_t)sent;
        while (l->unsent && at >= sizeof l->unsent->request + l->unsent->request.payload) {
            at -= sizeof l->unsent->request + l->unsent->request.payload;
            l->unsent = l->unsent->next;
        }
        l->unsent_at = at;
    }
    return 0;
}

/* ---------------------------------------------------------------- receiving */

/* A whole header is there. */
static int head_arrived(struct net_link *l) {
    const struct net_answer *h = &l->head;
    struct net_call *c = l->first;
    l->head_got = 0;
    if (!c || c == l->unsent || h->id != c->request.id || h->op != c->request.op ||
        h->payload != (h->status == NET_OK ? c->into_bytes : 0))
        return net_link_end(l, NET_GARBLED);
    if (h->payload) {
        l->body_left = h->payload;
        l->body_to = c->into;
        return 0;
    }
    finish(l, h->status, h->a, h->b);
    return 0;
}

static void body_arrived(struct net_link *l) { finish(l, l->head.status, l->head.a, l->head.b); }

static int take_bytes(struct net_link *l, const uint8_t *bytes, uint64_t n) {
    while (n) {
        uint64_t k;
        if (l->body_left) {
            k = n < l->body_left ? n : l->body_left;
            if (l->body_to) {
                memcpy(l->body_to, bytes, k);
                l->body_to += k;
            }
            l->body_left -= k;
            if (!l->body_left)
                body_arrived(l);
        } else {
            k = sizeof l->head - l->head_got;
            k = n < k ? n : k;
            memcpy((char *)&l->head + l->head_got, bytes, k);
            l->head_got += (uint32_t)k;
            if (l->head_got == sizeof l->head) {
                int status = head_arrived(l);
                if (status)
                    return status;
            }
        }
        bytes += k;
        n -= k;
    }
    return 0;
}

/* Bytes of the body have been received where they belong. */
static void body_got(struct net_link *l, uint64_t k) {
    l->body_to += k;
    l->body_left -= k;
    if (!l->body_left)
        body_arrived(l);
}

/* Was offered: the header, then into_bytes where they belong, then spare. */
static int take_expected(struct net_link *l, uint64_t n) {
    uint8_t *into = l->first->into;
    const uint64_t expected = l->first->into_bytes;
    if (n < sizeof l->head) {
        l->head_got = (uint32_t)n;
        return 0;
    }
    n -= sizeof l->head;
    const uint64_t inside = n < expected ? n : expected;
    const bool as_expected = l->head.payload == expected;
    uint8_t *misplaced = NULL;
    if (!as_expected && inside) { /* refused: these bytes are other answers */
        if (!(misplaced = malloc(inside)))
            return net_link_end(l, NET_STARVED);
        memcpy(misplaced, into, inside);
    }
    int status = head_arrived(l);
    if (status == 0 && as_expected && inside)
        body_got(l, inside);
    if (status == 0 && misplaced)
        status = take_bytes(l, misplaced, inside);
    free(misplaced);
    return status ? status : take_bytes(l, l->spare, n - inside);
}

/* One receive. 1: something came. 0: nothing there. */
int net_link_receive(struct net_link *l) {
    struct iovec iov[3];
    struct msghdr m = {.msg_iov = iov};
    const bool body = l->body_left && l->body_to;
    const bool expected = !l->body_left && !l->head_got && l->first && l->first != l->unsent &&
                          l->first->into && l->first->into_bytes >= DIRECT_BYTES;
    uint64_t left = l->body_left;
    if (body) {
        iov[m.msg_iovlen++] = (struct iovec){l->body_to, left};
    } else if (expected) {
        iov[m.msg_iovlen++] = (struct iovec){&l->head, sizeof l->head};
        iov[m.msg_iovlen++] = (struct iovec){l->first->into, l->first->into_bytes};
    }
    iov[m.msg_iovlen++] = (struct iovec){l->spare, sizeof l->spare};
    ssize_t got = recvmsg(l->fd, &m, MSG_DONTWAIT);
    l->nr_system_calls++;
    if (got < 0)
        return errno == EAGAIN || errno == EINTR ? 0 : net_link_broke(l);
    if (got == 0)
        return net_link_broke(l);
    l->bytes_in += (uint64_t)got;
    uint64_t n = (uint64_t)got;
    int status;
    if (expected) {
        status = take_expected(l, n);
    } else if (body) {
        uint64_t k = n < left ? n : left;
        body_got(l, k);
        status = take_bytes(l, l->spare, n - k);
    } else {
        status = take_bytes(l, l->spare, n);
    }
    return status ? status : 1;
}
