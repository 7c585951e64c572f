/*
 * waitset.c - many rings and descriptors, waited for by many threads.
 *
 * The contract. A ring is armed or not; armed is one word of this process, ring->armed.
 *
 * - add_ring and arm make it armed. A ring that is armed and has data, then or later, is reported: wait returns its
 *   key to one thread, and it is not armed any more. Whoever takes the 1 out of ring->armed, by exchange, reports it;
 *   so there is one report for each time it was armed, however many bells ring and threads wait.
 * - The thread that got the key takes its caller's lock of that connection, calls recv until there is nothing,
 *   sends what is waiting to be sent, and calls arm. If arm says True, it took the 1 back itself: data came in between
 *   and it goes on reading. If arm says False, the ring is armed, and what comes is reported to some thread: perhaps
 *   while this one still holds its lock, which is why there is a lock.
 * - A report may find no data: an old stroke of the bell arrives after the ring is armed again. Read, arm, wait.
 * - A ring whose try_send was short is reported once there is room, too, armed or not, and does not lose its being armed
 *   unless it was.
 * - A descriptor added with edge=True is reported once for each event, to one thread; with edge=False to any
 *   number of threads as long as it is ready.
 * - kick(n) makes n calls of wait return DM_KICKED, now or later.
 *
 * Why no wake-up is lost: arm stores armed, then want_bell, fences, and looks for data (ring.c). Data that arm does
 * not see finds want_bell set and rings. The stroke is an edge of the bell's eventfd, which epoll hands to one thread;
 * that thread comes after arm's stores and takes the 1. If it finds 0, somebody else has taken it, and will arm again,
 * and look.
 *
 * Spinning: one thread at a time looks at the tails of the armed rings before it sleeps. It first takes their want_bell
 * flags away, so that producers need no system call, and at the end sets them again, fences, and looks once
 * more: what came meanwhile it reports itself, or wakes another thread for by ringing the ring's own bell. Rings armed
 * while it spins have their flag set and ring. It ends when there is a kick, and every 16th time in a row it looks
 * at the other descriptors first.
 *
 * Nothing is used after it is removed: the set holds a reference to each ring, entries are used under the lock alone, and
 * what epoll returns is an index with a generation.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <limits.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "host.h"
#include "ring.h"

#define SPIN_RINGS 64u /* with more, looking at all of them takes longer than sleeping */
#define SPIN_IN_A_ROW 16u
#define KICK_TAG UINT64_MAX

struct entry {
    struct dm_ring *ring; /* NULL: fd */
    int fd;               /* -1: free */
    uint32_t gen;
    int64_t key;
};

struct dm_waitset {
    int epfd, kick_fd;
    _Atomic uint32_t refs, kicks;
    _Atomic bool closed, spinning;
    _Atomic uint64_t sleeps;
    _Atomic uint32_t in_a_row; /* waits that spinning ended */
    struct dm_spin spin;       /* the spinner's */

    pthread_mutex_t lock; /* the entries; never held while sleeping */
    struct entry *entries;
    uint32_t nr, max, nr_rings; /* nr: entries ever used */
};

static int closed_error(struct dm_error *e) {
    return dm_fail(e, DM_ERR_RING_CLOSED, "the wait set is closed");
}

/* ---------------------------------------------------------------- making */

static void unmake(struct dm_waitset *w) {
    for (uint32_t i = 0; i < w->nr; i++)
        if (w->entries[i].ring) {
            atomic_store(&w->entries[i].ring->in_set, false);
            dm_ring_put(w->entries[i].ring);
        }
    if (w->epfd >= 0)
        close(w->epfd);
    if (w->kick_fd >= 0)
        close(w->kick_fd);
    pthread_mutex_destroy(&w->lock);
    free(w->entries);
    free(w);
}

int dm_waitset_create(struct dm_waitset **out, struct dm_error *e) {
    struct dm_waitset *w = calloc(1, sizeof *w);
    if (!w)
        return DM_ERR_NO_MEMORY;
    atomic_init(&w->refs, 1);
    pthread_mutex_init(&w->lock, NULL);
    dm_spin_init(&w->spin);
    w->epfd = epoll_create1(EPOLL_CLOEXEC);
    w->kick_fd = eventfd(0, EFD_SEMAPHORE | EFD_NONBLOCK | EFD_CLOEXEC);
    /* Level-triggered: as long as it is readable, each thread that wakes wakes the next. */
    struct epoll_event ev = {.events = EPOLLIN, .data.u64 = KICK_TAG};
    if (w->epfd < 0 || w->kick_fd < 0 || epoll_ctl(w->epfd, EPOLL_CTL_ADD, w->kick_fd, &ev) < 0) {
        int s = dm_fail_sys(e, "epoll_create1 or eventfd", 0);
        unmake(w);
        return s;
    }
    *out = w;
    return DM_OK;
}

void dm_waitset_get(struct dm_waitset *w) { atomic_fetch_add(&w->refs, 1); }

void dm_waitset_put(struct dm_waitset *w) {
    if (atomic_fetch_sub(&w->refs, 1) == 1)
        unmake(w);
}

/* Waiting threads come back; the rings are let go when the last of them has. */
void dm_waitset_close(struct dm_waitset *w) {
    uint64_t many = 1u << 20;
    atomic_store(&w->closed, true);
    ssize_t ignored = write(w->kick_fd, &many, sizeof many);
    (void)ignored;
}

void dm_waitset_spin(struct dm_waitset *w, uint32_t budget_ns) {
    atomic_store(&w->spin.budget_ns, budget_ns);
}

void dm_waitset_stats(struct dm_waitset *w, uint64_t *sleeps, uint64_t *won, uint64_t *lost) {
    *sleeps = atomic_load(&w->sleeps);
    *won = atomic_load(&w->spin.won);
    *lost = atomic_load(&w->spin.lost);
}

/* ---------------------------------------------------------------- entries */

static struct entry *free_entry(struct dm_waitset *w) {
    for (uint32_t i = 0; i < w->nr; i++)
        if (w->entries[i].fd < 0)
            return &w->entries[i];
    if (w->nr == w->max) {
        uint32_t max = w->max ? 2 * w->max : 16;
        struct entry *more = realloc(w->entries, max * sizeof *more);
        if (!more)
            return NULL;
        w->entries = more;
        w->max = max;
    }
    w->entries[w->nr] = (struct entry){.fd = -1};
    return &w->entries[w->nr++];
}

static int add(struct dm_waitset *w, struct dm_ring *r, int fd, int64_t key, uint32_t events,
               struct dm_error *e) {
    struct entry *x = free_entry(w);
    if (!x)
        return DM_ERR_NO_MEMORY;
    x->gen++;
    uint64_t tag = (uint64_t)(x->gen & 0x7fffffff) << 32 | (uint64_t)(x - w->entries);
    struct epoll_event ev = {.events = events, .data.u64 = tag};
    if (epoll_ctl(w->epfd, EPOLL_CTL_ADD, fd, &ev) < 0)
        return dm_fail_sys(e, "epoll_ctl", 0);
    x->fd = fd;
    x->key = key;
    x->ring = r;
    if (r) {
        dm_ring_get(r);
        w->nr_rings++;
    }
    return DM_OK;
}

int dm_waitset_add_fd(struct dm_waitset *w, int fd, int64_t key, bool edge, struct dm_error *e) {
    pthread_mutex_lock(&w->lock);
    int s = add(w, NULL, fd, key, EPOLLIN | EPOLLRDHUP | (edge ? EPOLLET | EPOLLOUT : 0), e);
    pthread_mutex_unlock(&w->lock);
    return s;
}

int dm_waitset_add_ring(struct dm_waitset *w, struct dm_ring *r, int64_t key, struct dm_error *e) {
    if (atomic_exchange(&r->in_set, true))
        return dm_fail(e, DM_ERR_BUSY, "the ring is in a wait set");
    pthread_mutex_lock(&w->lock);
    int s = add(w, r, r->my_bell, key, EPOLLIN | EPOLLET, e);
    pthread_mutex_unlock(&w->lock);
    if (s) {
        atomic_store(&r->in_set, false);
        return s;
    }
    if (dm_ring_arm(
            r)) { /* data already: armed after all, and an edge for somebody to take it by */
        atomic_store(&r->armed, 1);
        dm_ring_wake_self(r);
    }
    return DM_OK;
}

int dm_waitset_remove(struct dm_waitset *w, struct dm_ring *r, int fd, struct dm_error *e) {
    int s = dm_fail(e, DM_ERR_BAD_ADDRESS, "not in this wait set");
    pthread_mutex_lock(&w->lock);
    for (uint32_t i = 0; i < w->nr; i++) {
        struct entry *x = &w->entries[i];
        if (x->fd < 0 || x->ring != r || (!r && x->fd != fd))
            continue;
        (void)epoll_ctl(w->epfd, EPOLL_CTL_DEL, x->fd, NULL); /* fails when it was closed before */
        *x = (struct entry){.fd = -1, .gen = x->gen + 1};
        if (r)
            w->nr_rings--;
        s = DM_OK;
        break;
    }
    pthread_mutex_unlock(&w->lock);
    if (!s && r) {
        atomic_store(&r->armed, 0);
        atomic_store(&r->in_set, false);
        dm_ring_put(r);
    }
    return s;
}

/* ---------------------------------------------------------------- spinning */

/* Take the flags away: producers need not ring while somebody looks. */
static void begin_looking(struct dm_waitset *w) {
    pthread_mutex_lock(&w->lock);
    for (uint32_t i = 0; i < w->nr; i++) {
        struct dm_ring *r = w->entries[i].ring;
        if (r && atomic_load_explicit(&r->armed, memory_order_relaxed))
            atomic_store_explicit(&r->in.c->want_bell, 0, memory_order_relaxed);
    }
    pthread_mutex_unlock(&w->lock);
}

struct look {
    struct dm_waitset *w;
    int64_t key;
    bool found, stop;
};

static bool claim(struct entry *x, struct look *l) {
    struct dm_ring *r = x->ring;
    if (!r || !atomic_load_explicit(&r->armed, memory_order_relaxed) || !dm_ring_has_data(r) ||
        atomic_load_explicit(&r->closed, memory_order_relaxed) || !atomic_exchange(&r->armed, 0))
        return false;
    l->key = x->key;
    return l->found = true;
}

static bool look_once(void *arg) {
    struct look *l = arg;
    struct dm_waitset *w = l->w;
    if (atomic_load_explicit(&w->kicks, memory_order_relaxed) ||
        atomic_load_explicit(&w->closed, memory_order_relaxed))
        return l->stop = true;
    pthread_mutex_lock(&w->lock);
    for (uint32_t i = 0; i < w->nr && !l->found; i++)
        claim(&w->entries[i], l);
    pthread_mutex_unlock(&w->lock);
    return l->found;
}

/* Set the flags again and look once more; see the head of this file. */
static void end_looking(struct dm_waitset *w, struct look *l) {
    pthread_mutex_lock(&w->lock);
    for (uint32_t i = 0; i < w->nr; i++) {
        struct dm_ring *r = w->entries[i].ring;
        if (r && atomic_load_explicit(&r->armed, memory_order_seq_cst))
            atomic_store_explicit(&r->in.c->want_bell, 1, memory_order_relaxed);
    }
    /* The consumer's half of Dekker's handshake, for all of them; see ring.c. */
    atomic_thread_fence(memory_order_seq_cst);
    for (uint32_t i = 0; i < w->nr; i++) {
        struct dm_ring *r = w->entries[i].ring;
        if (!l->found)
            claim(&w->entries[i], l);
        else if (r && atomic_load(&r->armed) && dm_ring_has_data(r))
            dm_ring_wake_self(r);
    }
    pthread_mutex_unlock(&w->lock);
}

static bool may_spin(struct dm_waitset *w) {
    if (atomic_load(&w->in_a_row) >= SPIN_IN_A_ROW) {
        atomic_store(&w->in_a_row, 0);
        return false;
    }
    pthread_mutex_lock(&w->lock);
    bool sensible = w->nr_rings && w->nr_rings <= SPIN_RINGS;
    pthread_mutex_unlock(&w->lock);
    return sensible && !atomic_load(&w->kicks) && !atomic_exchange(&w->spinning, true);
}

/* True: *key is to be reported. */
static bool spin_over_rings(struct dm_waitset *w, int64_t *key) {
    struct look l = {.w = w};
    if (!may_spin(w))
        return false;
    if (dm_spin_worth(&w->spin)) {
        begin_looking(w);
        (void)dm_spin(&w->spin, look_once, &l);
        end_looking(w, &l);
    }
    atomic_store(&w->spinning, false);
    if (l.found)
        atomic_fetch_add(&w->in_a_row, 1);
    *key = l.key;
    return l.found;
}

/* ---------------------------------------------------------------- waiting */

/* Is what epoll returned to be reported? */
static bool take_event(struct dm_waitset *w, uint64_t tag, int64_t *key) {
    bool take = false;
    pthread_mutex_lock(&w->lock);
    uint32_t i = (uint32_t)tag;
    struct entry *x = i < w->nr ? &w->entries[i] : NULL;
    if (x && x->fd >= 0 && (x->gen & 0x7fffffff) == tag >> 32) {
        *key = x->key;
        /* Both are taken, so that one stroke for data and space is one report. */
        take = !x->ring || (bool)((int)atomic_exchange(&x->ring->armed, 0) |
                                  (int)atomic_exchange(&x->ring->space_owed, 0));
    }
    pthread_mutex_unlock(&w->lock);
    return take;
}

static bool take_kick(struct dm_waitset *w) {
    uint64_t one;
    if (read(w->kick_fd, &one, sizeof one) != sizeof one)
        return false;
    atomic_fetch_sub(&w->kicks, 1);
    return true;
}

int dm_waitset_wait(struct dm_waitset *w, uint64_t deadline_ns, int64_t *key, struct dm_error *e) {
    for (;;) {
        struct epoll_event ev;
        if (atomic_load(&w->closed))
            return closed_error(e);
        if (deadline_ns && spin_over_rings(w, key))
            return 1;
        atomic_fetch_add_explicit(&w->sleeps, 1, memory_order_relaxed);
        int n = epoll_wait(w->epfd, &ev, 1, dm_wait_ms(deadline_ns));
        if (n < 0 && errno == EINTR)
            return DM_RING_INTERRUPTED;
        if (n < 0)
            return dm_fail_sys(e, "epoll_wait", 0);
        if (atomic_load(&w->closed))
            return closed_error(e);
        atomic_store_explicit(&w->in_a_row, 0, memory_order_relaxed);
        if (n && ev.data.u64 == KICK_TAG) {
            *key = DM_KICKED;
            if (take_kick(w))
                return 1;
        } else if (n && take_event(w, ev.data.u64, key)) {
            return 1;
        }
        if (dm_now_ns() >= deadline_ns)
            return 0;
    }
}

int dm_waitset_kick(struct dm_waitset *w, uint32_t n, struct dm_error *e) {
    uint64_t count = n;
    atomic_fetch_add(&w->kicks, n); /* before the descriptor: the spinner looks here */
    if (n && write(w->kick_fd, &count, sizeof count) != sizeof count) {
        atomic_fetch_sub(&w->kicks, n);
        return dm_fail_sys(e, "write to an eventfd", 0);
    }
    return DM_OK;
}
