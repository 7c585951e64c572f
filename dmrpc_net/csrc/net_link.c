/* net_link.c - see net_link.h. */
#define _GNU_SOURCE
#include "net_link.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define MAX_IOV 64
#define DIRECT_BYTES (8u << 10) /* an answer from here on is received where it belongs */

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

struct net_link *net_link_new(uint32_t max_calls) {
    pthread_condattr_t attr;
    struct net_link *l = calloc(1, sizeof *l);
    if (!l)
        return NULL;
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&l->changed, &attr);
    pthread_condattr_destroy(&attr);
    pthread_mutex_init(&l->lock, NULL);
    l->owner = getpid();
    l->fd = l->bell = -1;
    l->broken = true;
    l->failed = NET_PENDING;
    l->last = &l->first;
    l->next_id = 1;
    l->max_calls = max_calls > 2 * NET_UNDO_ROOM ? max_calls - NET_UNDO_ROOM : max_calls / 2;
    return l;
}

void net_link_free(struct net_link *l) {
    for (struct net_call *c = l->first, *next; c; c = next) {
        next = c->next;
        if (c->detached)
            free(c);
    }
    if (l->fd >= 0)
        close(l->fd);
    if (l->bell >= 0)
        close(l->bell);
    pthread_cond_destroy(&l->changed);
    pthread_mutex_destroy(&l->lock);
    free(l);
}

/* ---------------------------------------------------------------- ends; context: lock held */

static int broke(struct net_link *l) {
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

static int fail(struct net_link *l, int outcome) {
    l->failed = outcome;
    (void)broke(l);
    while (l->first)
        finish(l, outcome, 0, 0);
    if (l->nr_sleeping)
        pthread_cond_broadcast(&l->changed);
    ring(l);
    return outcome;
}

/* ---------------------------------------------------------------- sending; context: lock held */

/* 1: the socket takes no more. 0: all is sent. */
static int send_calls(struct net_link *l) {
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
                iov[n++] = (struct iovec){(char *)(uintptr_t)c->payload + skip,
                                          c->request.payload - skip};
            skip = 0;
        }
        m.msg_iovlen = (size_t)n;
        ssize_t sent = sendmsg(l->fd, &m, MSG_NOSIGNAL | MSG_DONTWAIT);
        l->nr_system_calls++;
        if (sent < 0) {
            if (errno == EINTR)
                continue;
            return errno == EAGAIN || errno == ENOBUFS || errno == ENOMEM ? 1 : broke(l);
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

/* ---------------------------------------------------------------- receiving; context: lock held */

/* A whole header is there. */
static int head_arrived(struct net_link *l) {
    const struct net_answer *h = &l->head;
    struct net_call *c = l->first;
    l->head_got = 0;
    if (!c || c == l->unsent || h->id != c->request.id || h->op != c->request.op ||
        h->payload != (h->status == NET_OK ? c->into_bytes : 0))
        return fail(l, NET_GARBLED);
    if (h->payload) {
        l->body_left = h->payload;
        l->body_to = c->into;
        return 0;
    }
    finish(l, h->status, h->a, h->b);
    return 0;
}

static void body_arrived(struct net_link *l) {
    finish(l, l->head.status, l->head.a, l->head.b);
}

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
            return fail(l, NET_STARVED);
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
static int receive(struct net_link *l) {
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
        return errno == EAGAIN || errno == EINTR ? 0 : broke(l);
    if (got == 0)
        return broke(l);
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

/* ---------------------------------------------------------------- calls */

static int state(const struct net_link *l) {
    return l->failed != NET_PENDING ? l->failed : l->broken ? NET_BROKEN : 0;
}

static void append(struct net_link *l, struct net_call *c) {
    c->request.id = l->next_id++;
    c->outcome = NET_PENDING;
    c->next = NULL;
    *l->last = c;
    l->last = &c->next;
    l->nr_calls++;
    if (!l->unsent) {
        l->unsent = c;
        l->unsent_at = 0;
    }
}

int net_link_submit(struct net_link *l, struct net_call *c, bool cork) {
    pthread_mutex_lock(&l->lock);
    int status = l->failed != NET_PENDING ? l->failed : l->nr_calls >= l->max_calls ? NET_CROWDED : 0;
    if (status == 0) {
        append(l, c);
        if (!cork && !l->broken && !l->sending)
            (void)send_calls(l); /* a break is found by whoever waits */
    }
    pthread_mutex_unlock(&l->lock);
    return status;
}

bool net_link_post(struct net_link *l, const struct net_request *q) {
    struct net_call *c = calloc(1, sizeof *c);
    if (!c)
        return false;
    c->request = *q;
    c->detached = true;
    pthread_mutex_lock(&l->lock);
    bool room = l->failed == NET_PENDING && l->nr_calls < l->max_calls;
    if (room) {
        append(l, c);
        if (!l->broken && !l->sending)
            (void)send_calls(l);
    }
    pthread_mutex_unlock(&l->lock);
    if (!room)
        free(c);
    return room;
}

/* Wait for the socket with the lock let go. Returns what poll does. */
static int poll_unlocked(struct net_link *l, short events, uint64_t deadline_ns, int longest_ms) {
    struct pollfd p = {.fd = l->fd, .events = events};
    int ms = longest_ms;
    if (deadline_ns) {
        uint64_t now = now_ns();
        uint64_t left = now < deadline_ns ? (deadline_ns - now + 999999) / 1000000 : 0;
        if (ms < 0 || left < (uint64_t)ms)
            ms = left > 1000000000 ? 1000000000 : (int)left;
    }
    pthread_mutex_unlock(&l->lock);
    int n = poll(&p, 1, ms);
    int error = errno;
    pthread_mutex_lock(&l->lock);
    l->nr_system_calls++;
    return n < 0 ? (error == EINTR ? NET_INTERRUPTED : 0) : n ? p.revents : 0;
}

static void sleep_until_changed(struct net_link *l, uint64_t deadline_ns) {
    l->nr_sleeping++;
    if (deadline_ns) {
        struct timespec t = {(time_t)(deadline_ns / 1000000000u), (long)(deadline_ns % 1000000000u)};
        (void)pthread_cond_timedwait(&l->changed, &l->lock, &t);
    } else {
        (void)pthread_cond_wait(&l->changed, &l->lock);
    }
    l->nr_sleeping--;
}

/* One step towards an answer. 0, or why there will be none. */
static int step(struct net_link *l, uint64_t deadline_ns) {
    int status = state(l);
    if (status)
        return status;
    int blocked = l->unsent && !l->sending ? send_calls(l) : 0;
    if (blocked < 0)
        return blocked;
    if (!l->reading) {
        l->reading = true;
        int got = poll_unlocked(l, (short)(POLLIN | (blocked ? POLLOUT : 0)), deadline_ns, -1);
        l->reading = false;
        if (got > 0 && (got & (POLLIN | POLLHUP | POLLERR)) && !state(l))
            status = receive(l);
        if (l->nr_sleeping) /* an answer may be somebody's, and somebody has to read */
            pthread_cond_broadcast(&l->changed);
        return got == NET_INTERRUPTED ? got : status < 0 ? status : 0;
    }
    if (blocked) {
        l->sending = true;
        int got = poll_unlocked(l, POLLOUT, deadline_ns, 10); /* our answer may come meanwhile */
        l->sending = false;
        if (l->nr_sleeping)
            pthread_cond_broadcast(&l->changed);
        return got == NET_INTERRUPTED ? got : 0;
    }
    /* Signals are for the main thread, which may be asleep here: wake up now and then. */
    uint64_t soon = now_ns() + 100000000u;
    sleep_until_changed(l, deadline_ns && deadline_ns < soon ? deadline_ns : soon);
    return now_ns() >= soon ? NET_INTERRUPTED : 0;
}

int net_link_wait(struct net_link *l, struct net_call *c, uint64_t deadline_ns) {
    int status = 0;
    pthread_mutex_lock(&l->lock);
    while (c->outcome == NET_PENDING) {
        if (deadline_ns && now_ns() >= deadline_ns)
            status = NET_DEADLINE;
        else
            status = step(l, deadline_ns);
        if (status && c->outcome == NET_PENDING)
            break;
    }
    if (c->outcome != NET_PENDING)
        status = c->outcome;
    pthread_mutex_unlock(&l->lock);
    return status;
}

static bool needs_undo(const struct net_request *q) {
    switch (q->op) {
    case NET_RALLOC:
    case NET_CREATE_REF:
    case NET_MAP_REF:
    case NET_CLONE_REF:
    case NET_PUT:
        return true;
    case NET_GET:
        return !(q->flags & NET_KEEP);
    default:
        return false;
    }
}

static struct net_call **place_of(struct net_link *l, struct net_call *c) {
    struct net_call **at = &l->first;
    while (*at && *at != c)
        at = &(*at)->next;
    return at;
}

static void take_out(struct net_link *l, struct net_call **at) {
    struct net_call *c = *at;
    if (l->unsent == c) {
        l->unsent = c->next;
        l->unsent_at = 0;
    }
    *at = c->next;
    if (!c->next)
        l->last = at;
    l->nr_calls--;
}

void net_link_abandon(struct net_link *l, struct net_call *c) {
    pthread_mutex_lock(&l->lock);
    struct net_call **at = place_of(l, c);
    bool sent = true;
    for (struct net_call *u = l->unsent; u; u = u->next)
        sent &= u != c;
    if (*at != c) {
        /* answered after all */
    } else if (!sent) {
        if (l->unsent == c && l->unsent_at)
            (void)broke(l);
        take_out(l, at);
        c->outcome = NET_DEADLINE;
    } else {
        struct net_call *rest = malloc(sizeof *rest);
        struct net_call *undo = needs_undo(&c->request) ? calloc(1, sizeof *undo) : NULL;
        if (!rest) { /* without a place for the answer, none must come */
            (void)broke(l);
            take_out(l, at);
        } else {
            *rest = *c;
            rest->detached = rest->abandoned = true;
            rest->payload = rest->into = NULL;
            rest->bell = false;
            *at = rest;
            if (!rest->next)
                l->last = &rest->next;
            if (l->first == rest && l->body_left)
                l->body_to = NULL;
        }
        c->outcome = NET_DEADLINE;
        if (undo) {
            undo->request.op = NET_UNDO;
            undo->request.a = c->request.id;
            undo->detached = true;
            append(l, undo);
            if (!l->broken && !l->sending)
                (void)send_calls(l);
        }
    }
    pthread_mutex_unlock(&l->lock);
}

int net_link_pump(struct net_link *l) {
    pthread_mutex_lock(&l->lock);
    int status = state(l);
    int more = status == 0 && l->unsent && !l->sending ? send_calls(l) : 0;
    if (status == 0 && more < 0)
        status = more;
    if (status == 0 && !l->reading) {
        while ((status = receive(l)) > 0)
            ;
        if (l->nr_sleeping)
            pthread_cond_broadcast(&l->changed);
    }
    pthread_mutex_unlock(&l->lock);
    return status < 0 ? status : more;
}

int net_link_resume(struct net_link *l, int fd) {
    pthread_mutex_lock(&l->lock);
    if (!l->broken || l->failed != NET_PENDING) {
        int status = l->failed == NET_PENDING ? 0 : l->failed;
        pthread_mutex_unlock(&l->lock);
        close(fd);
        return status;
    }
    while (l->reading || l->sending) /* they poll the old descriptor, which is shut down */
        sleep_until_changed(l, 0);
    if (l->fd >= 0)
        close(l->fd);
    l->fd = fd;
    l->broken = false;
    l->head_got = 0;
    l->body_left = 0;
    /* What nobody waits for is not sent again; if it was carried out, the UNDO behind it sees to that. */
    for (struct net_call **at = &l->first; *at;) {
        struct net_call *c = *at;
        if (c->detached && c->abandoned) {
            take_out(l, at);
            free(c);
        } else {
            at = &c->next;
        }
    }
    l->unsent = l->first;
    l->unsent_at = 0;
    (void)send_calls(l);
    pthread_mutex_unlock(&l->lock);
    return 0;
}

void net_link_fail(struct net_link *l, int outcome) {
    pthread_mutex_lock(&l->lock);
    if (l->failed == NET_PENDING)
        (void)fail(l, outcome);
    pthread_mutex_unlock(&l->lock);
}

bool net_link_healthy(struct net_link *l) {
    pthread_mutex_lock(&l->lock);
    bool healthy = !l->broken && l->failed == NET_PENDING;
    pthread_mutex_unlock(&l->lock);
    return healthy;
}
