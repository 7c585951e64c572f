/*
 * ring.h - the shared memory of two processes that exchange frames, and this side's state of it.
 *
 * A ring pair is one memfd, sealed at its size, and two eventfds, the bells. The memory holds two byte streams:
 *
 *     0       header       magic, version, capacity: written once, read once
 *     512     control 0    server -> client
 *     1024    control 1    client -> server
 *     4096    data 0       capacity bytes
 *     +cap    data 1       capacity bytes
 *
 * A control block has four words, each on cache lines of its own:
 *
 *     tail         bytes written so far; only the producer stores it
 *     head         bytes read so far; only the consumer stores it. Its low half is the futex of a blocked sender
 *     want_bell    the consumer sets it before it sleeps, the producer takes it and rings the consumer's bell
 *     want_space   the producer sets it when the stream is full, the consumer takes it and wakes the producer
 *
 * The other process is not trusted. Whatever is read from this memory is read once, into private memory, and checked
 * there; whatever is ours alone (our index, the frame under way) has its master copy in struct dm_ring.
 */
#ifndef DM_RING_H
#define DM_RING_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

#include "status.h"

#define DM_RING_MAGIC 0x676e697263506d44ull /* "DmPcring" */
#define DM_RING_VERSION 1u
#define DM_RING_DATA 4096u       /* where data 0 begins */
#define DM_RING_MIN_CAPACITY 64u /* a power of two */
#define DM_RING_MAX_CAPACITY (1u << 30)
#define DM_RING_MIN_FRAME 40u
#define DM_RING_NO_DEADLINE UINT64_MAX
#define DM_RING_INTERRUPTED (-92) /* not an error: look after signals, then call again */

#define DM_SPACE_BELL 1u  /* the producer waits for its bell, or for nothing: try_send */
#define DM_SPACE_FUTEX 2u /* the producer sleeps on head: send */

struct dm_ring_control {
    _Alignas(128) _Atomic uint64_t tail;
    _Alignas(128) _Atomic uint64_t head;
    _Alignas(128) _Atomic uint32_t want_bell;
    _Alignas(128) _Atomic uint32_t want_space;
};

struct dm_ring_shared {
    uint64_t magic;
    uint32_t version;
    uint32_t reserved;
    uint64_t capacity;
    _Alignas(512) struct dm_ring_control to_client, to_server;
};

/* Spin or not: an average of how often spinning was worth it. One thread uses it at a time. */
struct dm_spin {
    _Atomic uint32_t budget_ns; /* 0: never */
    uint32_t wins;              /* average, in 1/256 */
    uint32_t skipped;           /* waits since the last probe */
    _Atomic uint64_t won, lost;
};

/* The direction this side writes. Guarded by the caller's lock for sending. */
struct dm_ring_out {
    struct dm_ring_control *c;
    char *data;
    uint64_t tail, head_seen;
    bool broken; /* a part of a frame went out and the rest never will, or head was garbage */
    struct dm_spin spin;
    _Atomic uint64_t bytes, bells, waits;
};

/* The direction this side reads. Guarded by the caller's lock for receiving. */
struct dm_ring_in {
    struct dm_ring_control *c;
    const char *data;
    /* head is atomic for those who merely look whether there is something: wait, the spinner of a wait set. */
    _Atomic uint64_t head;
    uint64_t tail_seen;
    bool broken;
    /* the frame under way: its size once all 4 bytes of it are here, and how much of it was taken from the ring */
    uint8_t size_bytes[4];
    uint32_t size, got;
    struct dm_spin spin;
    _Atomic uint64_t bytes, bells, sleeps;
};

struct dm_ring {
    _Alignas(128) struct dm_ring_out out;
    _Alignas(128) struct dm_ring_in in;

    /* does not change */
    _Alignas(128) struct dm_ring_shared *shared;
    uint64_t capacity;
    uint32_t max_frame;
    uint32_t forks;                /* dm_ring_forks at birth */
    int memfd, my_bell, peer_bell; /* eventfds: who writes my_bell wakes me */
    int alarm;                     /* private eventfd: readable once the ring is closed */
    int epfd;                      /* of dm_ring_wait; made when it is first needed */

    _Alignas(128) _Atomic uint32_t refs;
    _Atomic bool closed, peer_gone, peer_spoke, in_set;
    _Atomic int peer_fd;         /* borrowed */
    _Atomic uint32_t armed;      /* this ring may be reported: whoever takes the 1 reports it */
    _Atomic uint32_t space_owed; /* try_send was short: to be reported when the bell rings */
};

extern uint32_t
    dm_ring_forks; /* how many forks lie between this process and the one that loaded us */

/* Making and ending. attach duplicates the descriptors. */
int dm_ring_create(uint64_t capacity, uint32_t max_frame, struct dm_ring **out, struct dm_error *e);
int dm_ring_attach(int memfd, int my_bell, int peer_bell, uint32_t max_frame, struct dm_ring **out,
                   struct dm_error *e);
void dm_ring_close(struct dm_ring *r);
static inline void dm_ring_get(struct dm_ring *r) { atomic_fetch_add(&r->refs, 1); }
void dm_ring_put(struct dm_ring *r);
static inline bool dm_ring_forked(const struct dm_ring *r) { return r->forks != dm_ring_forks; }

/* Sending: bytes skip.. of what iov gathers, total bytes in all. */
int64_t dm_ring_try_send(struct dm_ring *r, const struct iovec *iov, uint64_t total, uint64_t skip,
                         struct dm_error *e);
int dm_ring_send(struct dm_ring *r, const struct iovec *iov, uint64_t total, uint64_t *done,
                 uint64_t deadline_ns, struct dm_error *e);
void dm_ring_break_sending(struct dm_ring *r, uint64_t done, uint64_t total, struct dm_error *e);
bool dm_ring_fits(struct dm_ring *r, uint64_t total);

/* Receiving. begin: the size of the frame that comes next or is under way, 0 when that is not known yet; *there: bytes
 * in the ring. fill: takes as much as there is, up to want, and says how much. */
int64_t dm_ring_begin(struct dm_ring *r, uint64_t *there, struct dm_error *e);
int64_t dm_ring_fill(struct dm_ring *r, char *to, uint64_t want, struct dm_error *e);

/* Waiting. wait: 1 data, 0 time is up or the peer is gone or spoke. */
static inline bool dm_ring_has_data(struct dm_ring *r) {
    /* Acquire, with the producer's release of tail; what is copied is ordered again by the load in begin. */
    return atomic_load_explicit(&r->in.c->tail, memory_order_acquire) !=
           atomic_load_explicit(&r->in.head, memory_order_relaxed);
}
bool dm_ring_arm(struct dm_ring *r);
int dm_ring_wait_open(struct dm_ring *r, struct dm_error *e);
int dm_ring_wait(struct dm_ring *r, uint64_t deadline_ns, struct dm_error *e);
int dm_ring_set_peer_fd(struct dm_ring *r, int fd, struct dm_error *e);
void dm_ring_drain_bell(struct dm_ring *r);
void dm_ring_wake_self(struct dm_ring *r);
int dm_wait_ms(uint64_t deadline_ns);

/* ---------------------------------------------------------------- spinning */

static inline void dm_pause(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield" ::: "memory");
#endif
}

void dm_spin_init(struct dm_spin *s);
bool dm_spin_worth(struct dm_spin *s);
bool dm_spin(struct dm_spin *s, bool (*ready)(void *), void *arg);

/* ---------------------------------------------------------------- waitset.c: many rings, many threads */

struct dm_waitset;

#define DM_KICKED (-1) /* the key of a kick */

int dm_waitset_create(struct dm_waitset **out, struct dm_error *e);
void dm_waitset_close(struct dm_waitset *w);
void dm_waitset_get(struct dm_waitset *w);
void dm_waitset_put(struct dm_waitset *w);
int dm_waitset_add_ring(struct dm_waitset *w, struct dm_ring *r, int64_t key, struct dm_error *e);
int dm_waitset_add_fd(struct dm_waitset *w, int fd, int64_t key, bool edge, struct dm_error *e);
int dm_waitset_remove(struct dm_waitset *w, struct dm_ring *r, int fd, struct dm_error *e);
int dm_waitset_wait(struct dm_waitset *w, uint64_t deadline_ns, int64_t *key, struct dm_error *e);
int dm_waitset_kick(struct dm_waitset *w, uint32_t n, struct dm_error *e);
void dm_waitset_spin(struct dm_waitset *w, uint32_t budget_ns);
void dm_waitset_stats(struct dm_waitset *w, uint64_t *sleeps, uint64_t *won, uint64_t *lost);

#endif
