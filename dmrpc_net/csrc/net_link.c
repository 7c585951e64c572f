/* net_link.c - see net_link.h: calls, who waits for them, and what becomes of those that nobody waits for. */
#define _GNU_SOURCE
#include "net_link.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define PUMP_TURNS 4 /* receives of one pump: an event loop has others to serve */

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
    int status = l->failed != NET_PENDING      ? l->failed
                 : l->nr_calls >= l->max_calls ? NET_CROWDED
                                               : 0;
    if (status == 0) {
        append(l, c);
        if (!cork && !l->broken && !l->sending)
            (void)net_link_send(l); /* a break is found by whoever waits */
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
            (void)net_link_send(l);
    }
    pthread_mutex_unlock(&l->lock);
    if (!room)
        free(c);
    return room;
}

/*
 * Signals are for the main thread, which may be asleep here: it wakes up now and then. One that came right before it fell asleep
 * does not wake it.
 */
#define LOOK_AROUND_MS 100

/* Wait for the socket with the lock let go: what poll says of it. 0: nothing yet; NET_INTERRUPTED: a signal, perhaps. */
static int poll_unlocked(struct net_link *l, short events, uint64_t deadline_ns, int longest_ms) {
    struct pollfd p = {.fd = l->fd, .events = events};
    int ms = longest_ms;
    if (deadline_ns) {
        uint64_t now = now_ns();
        uint64_t left = now < deadline_ns ? (deadline_ns - now + 999999) / 1000000 : 0;
        if (left < (uint64_t)ms)
            ms = (int)left;
    }
    pthread_mutex_unlock(&l->lock);
    int n = poll(&p, 1, ms);
    int error = errno;
    pthread_mutex_lock(&l->lock);
    l->nr_system_calls++;
    if (n == 0 && ms == LOOK_AROUND_MS)
        return NET_INTERRUPTED;
    return n < 0 ? (error == EINTR ? NET_INTERRUPTED : 0) : n ? p.revents : 0;
}

static void sleep_until_changed(struct net_link *l, uint64_t deadline_ns) {
    l->nr_sleeping++;
    if (deadline_ns) {
        struct timespec t = {(time_t)(deadline_ns / 1000000000u),
                             (long)(deadline_ns % 1000000000u)};
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
    int blocked = l->unsent && !l->sending ? net_link_send(l) : 0;
    if (blocked < 0)
        return blocked;
    if (!l->reading) {
        l->reading = true;
        int got = poll_unlocked(l, (short)(POLLIN | (blocked ? POLLOUT : 0)), deadline_ns,
                                LOOK_AROUND_MS);
        l->reading = false;
        if (got > 0 && (got & (POLLIN | POLLHUP | POLLERR)) && !state(l))
            status = net_link_receive(l);
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
    uint64_t soon = now_ns() + LOOK_AROUND_MS * 1000000ull;
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
            (void)net_link_broke(l);
        take_out(l, at);
        c->outcome = NET_DEADLINE;
    } else {
        struct net_call *rest = malloc(sizeof *rest);
        struct net_call *undo = needs_undo(&c->request) ? calloc(1, sizeof *undo) : NULL;
        if (!rest) { /* without a place for the answer, none must come */
            (void)net_link_broke(l);
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
                (void)net_link_send(l);
        }
    }
    pthread_mutex_unlock(&l->lock);
}

int net_link_pump(struct net_link *l) {
    pthread_mutex_lock(&l->lock);
    int status = state(l);
    int more = status == 0 && l->unsent && !l->sending ? net_link_send(l) : 0;
    if (status == 0 && more < 0)
        status = more;
    if (status == 0 && !l->reading) {
        for (int i = 0; i < PUMP_TURNS && (status = net_link_receive(l)) > 0; i++)
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
    l->generation++;
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
    (void)net_link_send(l);
    pthread_mutex_unlock(&l->lock);
    return 0;
}

void net_link_fail(struct net_link *l, int outcome) {
    pthread_mutex_lock(&l->lock);
    if (l->failed == NET_PENDING)
        (void)net_link_end(l, outcome);
    pthread_mutex_unlock(&l->lock);
}

int net_link_dup(struct net_link *l, uint32_t *generation) {
    pthread_mutex_lock(&l->lock);
    int fd = l->fd >= 0 ? fcntl(l->fd, F_DUPFD_CLOEXEC, 0) : -1;
    *generation = l->generation;
    pthread_mutex_unlock(&l->lock);
    return fd;
}

int net_link_state(struct net_link *l) {
    pthread_mutex_lock(&l->lock);
    int status = state(l);
    if (status == 0)
        status = l->unsent && !l->sending;
    pthread_mutex_unlock(&l->lock);
    return status;
}

bool net_link_healthy(struct net_link *l) {
    pthread_mutex_lock(&l->lock);
    bool healthy = !l->broken && l->failed == NET_PENDING;
    pthread_mutex_unlock(&l->lock);
    return healthy;
}
