/*
 * relay.h - frames passed on between connections: streams, the table of calls, and the loop of a load balancer.
 *
 * One thread uses a relay at a time; kicks, and reading counters that are atomic, are the exceptions. It knows nothing of
 * names, handshakes and error bodies: whoever runs it adds connections, and is told of those that ended.
 */
#ifndef DM_RELAY_H
#define DM_RELAY_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "frame.h"
#include "ring.h"
#include "status.h"

/* ---------------------------------------------------------------- lists: a node that is in none points to itself */

struct dm_node {
    struct dm_node *prev, *next;
};

static inline void dm_node_init(struct dm_node *n) { n->prev = n->next = n; }
static inline bool dm_node_alone(const struct dm_node *n) { return n->next == n; }
static inline void dm_node_leave(struct dm_node *n) {
    n->prev->next = n->next;
    n->next->prev = n->prev;
    dm_node_init(n);
}
/* At the end of the list that begins at head. */
static inline void dm_node_join(struct dm_node *head, struct dm_node *n) {
    n->prev = head->prev;
    n->next = head;
    head->prev->next = n;
    head->prev = n;
}
#define DM_OF(node, type, member) ((type *)(void *)((char *)(node) - offsetof(type, member)))

/* ---------------------------------------------------------------- relay_stream.c: frames in, frames out */

#define DM_STREAM_READ                                                                             \
    (64u << 10) /* what a socket is asked for at once; the first size of every buffer */
#define DM_STREAM_KEPT (5u << 20)   /* a buffer above this does not outlive its frame */
#define DM_STREAM_BLOCK (64u << 10) /* of a backlog, at least */
#define DM_STREAM_CORK (16u << 10)  /* to a socket, less than this waits for the end of the turn */

struct dm_block { /* bytes that are still to be sent */
    struct dm_block *next;
    char *data;
    uint64_t from, to, cap;
};

struct dm_stream {
    /* one of the two */
    struct dm_ring *ring;
    int fd;
    uint32_t max_frame;
    bool
        blocked; /* a socket that took less than it was given: the wait set will say when it takes more */

    /* in: bytes from.. to are read and not used. A ring's frame under way begins at 0; ring->in.got says how far it is */
    char *buf;
    uint64_t cap, from, to;

    /* out */
    struct dm_block *first, *last;
    uint64_t backlog;
};

void dm_stream_open(struct dm_stream *s, struct dm_ring *ring, int fd, uint32_t max_frame);
void dm_stream_close(struct dm_stream *s);
/* 1: a frame, whole, valid until the next call. 0: not yet. */
int dm_stream_recv(struct dm_stream *s, char **frame, uint32_t *size, struct dm_error *e);
/* Tell that the frame is not needed any more. */
void dm_stream_done(struct dm_stream *s);
/* Bytes taken at once; the stream has no backlog. */
int64_t dm_stream_try(struct dm_stream *s, const char *bytes, uint64_t n, struct dm_error *e);
/* Keep for later. from: the stream that received these bytes, whose buffer may be taken; or NULL. */
int dm_stream_keep(struct dm_stream *s, const char *bytes, uint64_t n, struct dm_stream *from);
/* Send of the backlog what can be sent. */
int dm_stream_flush(struct dm_stream *s, struct dm_error *e);

/* ---------------------------------------------------------------- relay_calls.c: who waits for which reply */

enum dm_side { DM_CLIENT, DM_BACKEND };

struct dm_peer;

struct dm_call {
    struct dm_peer *peer[2]; /* client: NULL once it is gone */
    uint64_t id[2];          /* the client's, and the one at the backend */
    struct dm_call *next[2]; /* in a bucket of each peer's table */
    struct dm_node order;    /* delivered: among the client's, oldest first */
    bool delivered; /* answered, with Refs; the client has not said that it does not want them */
};

struct dm_calls { /* by id, of one peer */
    struct dm_call **buckets;
    uint32_t mask, nr;
};

/* NULL: no memory. */
struct dm_call *dm_call_add(struct dm_peer *client, uint64_t here, struct dm_peer *backend,
                            uint64_t there);
struct dm_call *dm_call_find(struct dm_peer *p, uint64_t id);
struct dm_call *dm_call_any(struct dm_peer *p, uint32_t *bucket);
void dm_call_unlink(struct dm_call *c, enum dm_side side);
void dm_call_free(struct dm_call *c); /* and unlink it from both */

/* ---------------------------------------------------------------- relay.c */

#define DM_RELAY_DELIVERED 4096u /* replies with Refs remembered for each client */
#define DM_RELAY_FRAMES 64u      /* of one peer, before the others have their turn */
#define DM_RELAY_BYTES (1u << 20)

enum dm_relay_what {
    DM_RELAY_TIMEOUT,
    DM_RELAY_KICK,
    DM_RELAY_FD,      /* a descriptor that is watched is readable: key */
    DM_RELAY_ENDED,   /* a peer is gone, or is to go: remove it */
    DM_RELAY_BROKE,   /* a peer broke the protocol, and may be told so: remove it */
    DM_RELAY_LEAVING, /* a backend takes no new calls */
    DM_RELAY_CALL,    /* a client's call: answer it, see dm_relay_answer */
};

enum dm_relay_policy {
    DM_RELAY_LEAST_LOADED, /* among equals in turn */
    DM_RELAY_IN_TURN,      /* strictly, whatever their load */
};

struct dm_relay_event {
    enum dm_relay_what what;
    int64_t key;
    char text[192];
};

struct dm_peer {
    struct dm_stream stream;
    enum dm_side side;
    int64_t key;
    int control;         /* of a ring: a socket whose end is the peer's; -1 */
    bool gone;           /* nothing new comes from it; what is there is read */
    bool dead;           /* neither read nor written any more */
    bool leaving;        /* is given no calls */
    uint64_t last_id;    /* the client's, or what the backend was given */
    uint64_t left;       /* gone: bytes that are read at most */
    uint32_t nr_waiting; /* calls without reply */
    uint32_t nr_delivered;
    struct dm_calls calls;
    struct dm_node delivered;           /* of a client */
    struct dm_node ready, dirty, event; /* in the lists of the relay */
    enum dm_relay_what what;
    char why[192];
    _Atomic uint64_t nr_forwarded; /* calls given to this backend */
};

struct dm_relay {
    struct dm_waitset *w;
    pid_t owner; /* a forked child may only let go */
    uint32_t max_waiting, max_peers;
    uint64_t max_backlog;
    struct dm_peer **peers; /* max_peers; a key is a generation and a place here */
    pthread_mutex_t lock;   /* over places in peers and over nr_forwarded of those that go */
    uint32_t generation;
    struct dm_peer **backends;
    uint32_t nr_backends, turn;
    enum dm_relay_policy policy;
    bool asks;             /* the caller decides about every call */
    struct dm_peer *asked; /* whose call waits for that; its frame is the stream's until then */
    char *asked_frame;
    struct dm_frame asked_header;
    struct dm_node ready, dirty, events;
    char *overloaded, *unreachable; /* ERROR frames, but for the call id */
    _Atomic uint64_t nr_forwarded, bytes_forwarded;
    _Atomic uint32_t nr_waiting, nr_peers;
};

/* Keys: a descriptor that is only watched; the control socket of a peer; otherwise a generation and a place. */
#define DM_KEY_FD (1ll << 62)
#define DM_KEY_CONTROL (1ll << 61)
#define DM_PLACE_BITS 16

/* Between relay.c and relay_peers.c */
struct dm_peer *dm_relay_peer(struct dm_relay *y, int64_t key);
void dm_relay_detach(struct dm_relay *y, struct dm_peer *p); /* from the wait set */
void dm_relay_flush(struct dm_relay *y);
void dm_relay_send_head(struct dm_relay *y, struct dm_peer *p, enum dm_frame_kind kind,
                        uint64_t id);
void dm_relay_send_error(struct dm_relay *y, struct dm_peer *p, const char *frame, uint64_t id);

int dm_relay_create(uint32_t max_waiting, uint32_t max_peers, uint64_t max_backlog,
                    const char *overloaded, const char *unreachable, struct dm_relay **out,
                    struct dm_error *e);
void dm_relay_destroy(struct dm_relay *y);

/* A connection; ring or fd. rest: bytes that were read from fd already. Descriptors stay the caller's. */
int dm_relay_add(struct dm_relay *y, enum dm_side side, struct dm_ring *ring, int fd,
                 uint32_t max_frame, const char *rest, uint64_t nr_rest, int64_t *key,
                 struct dm_error *e);
/* Forget a peer. Its calls: a client's are cancelled, a backend's are answered with the frame lost. */
int dm_relay_remove(struct dm_relay *y, int64_t key, const char *lost, uint64_t *nr_forwarded);
int dm_relay_leave_out(struct dm_relay *y, int64_t key);
int dm_relay_watch(struct dm_relay *y, int fd, struct dm_error *e);
int dm_relay_unwatch(struct dm_relay *y, int fd, struct dm_error *e);
/* Work until there is something for the caller. */
int dm_relay_run(struct dm_relay *y, uint64_t deadline_ns, struct dm_relay_event *out,
                 struct dm_error *e);
int dm_relay_kick(struct dm_relay *y, struct dm_error *e);
uint64_t dm_relay_forwarded(struct dm_relay *y, int64_t key);
/* Before the first connection: who gets a call, and whether the caller is asked about each. */
void dm_relay_set_policy(struct dm_relay *y, enum dm_relay_policy policy, bool asks);
/* After DM_RELAY_CALL, which comes again until then: the call goes to that backend, or for key 0 to one by policy; or its
 * client gets the ERROR frame refusal. Nothing that was asked: DM_ERR_BAD_ADDRESS. */
int dm_relay_answer(struct dm_relay *y, int64_t backend, const char *refusal);

#endif
