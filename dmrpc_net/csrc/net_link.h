/*
 * net_link.h - the client's end of a data connection: calls out, answers in, straight from and into the caller's memory.
 *
 * Any number of threads may use a link. There is no thread of its own: whoever waits for an answer reads, and hands the
 * others theirs. While one reads, the others send what is theirs and sleep. So a caller that is alone
 * makes three system calls: send, poll, receive.
 *
 * A connection that breaks leaves its calls where they are. Whoever opens the next one gives it to net_link_resume, and
 * what has not been answered is sent again, in order. Or the link fails for good, and with it its calls.
 *
 * A call whose time is over is abandoned. What of it is still to come is thrown away, and an UNDO is sent behind it
 * where it may have taken something that nobody would free. One that is sent in part cannot be taken back: the connection is broken
 * then, for a server that does not read is of no use to anybody.
 */
#ifndef NET_LINK_H
#define NET_LINK_H

#include <pthread.h>
#include <stdbool.h>
#include <sys/types.h>

#include "net_wire.h"

/* Beside enum net_status. */
enum net_outcome {
    NET_PENDING = -1,
    NET_BROKEN = -2, /* no connection: resume or fail */
    NET_DEADLINE = -3,
    NET_INTERRUPTED = -4, /* a signal: look at it, and wait again */
    NET_CROWDED = -5,     /* as many calls as may be outstanding */
    NET_LOST = -6,        /* the server is, and what it held of ours */
    NET_CLOSED = -7,
    NET_GARBLED = -8, /* the server broke the protocol */
    NET_STARVED = -9, /* no memory */
};

#define NET_SPARE_BYTES (64u << 10)
#define NET_UNDO_ROOM 64u /* of the calls that may be outstanding, kept for UNDO */

struct net_call {
    struct net_request request;
    const void *payload; /* request.payload bytes */
    void *into;          /* into_bytes are expected if all goes well */
    uint64_t into_bytes;
    int outcome; /* NET_PENDING until it is an enum net_status, or says how the link ended */
    uint64_t a, b;
    bool detached;  /* nobody waits for it: freed with its answer */
    bool abandoned; /* its time is over, and its payload is gone */
    bool bell;      /* ring when it is done and somebody else saw to it */
    struct net_call *next;
};

struct net_link {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    pid_t owner;
    int fd;              /* -1: none */
    uint32_t generation; /* how many there were */
    bool broken;
    int failed; /* NET_PENDING, or how the link ended */
    int bell;   /* an eventfd for whoever cannot wait in here; -1 */

    struct net_call *first, **last; /* without answer, by id */
    struct net_call *unsent;        /* the first that is not sent, or not wholly */
    uint64_t unsent_at;             /* bytes of it that are sent */
    uint64_t next_id;
    uint32_t nr_calls, max_calls;
    bool reading, sending; /* a thread is in poll */
    uint32_t nr_sleeping;

    uint32_t head_got;
    struct net_answer head;
    uint64_t body_left;
    uint8_t *body_to; /* NULL: thrown away */
    uint64_t nr_calls_done, nr_system_calls, bytes_in, bytes_out;
    uint8_t spare[NET_SPARE_BYTES];
};

struct net_link *net_link_new(uint32_t max_calls);
void net_link_free(struct net_link *l); /* nobody uses it any more; its descriptor is closed */

/* Give the call an id and send it, or with cork leave that to whoever sends or waits next. NET_OK, or why not. */
int net_link_submit(struct net_link *l, struct net_call *c, bool cork);
/* Send a request whose answer nobody waits for. False: there is no room for it now. */
bool net_link_post(struct net_link *l, const struct net_request *q);
/* Wait for a call that was submitted: its outcome, or NET_BROKEN, NET_DEADLINE, NET_INTERRUPTED. deadline 0: none. */
int net_link_wait(struct net_link *l, struct net_call *c, uint64_t deadline_ns);
/* Nobody waits any more, and its memory will be used for something else. */
void net_link_abandon(struct net_link *l, struct net_call *c);
/* Send and receive what can be without waiting. 1: there is more to send; 0; NET_BROKEN; or how the link failed. */
int net_link_pump(struct net_link *l);

/* A connection, greeted already; takes over the descriptor. */
int net_link_resume(struct net_link *l, int fd);
/* The end: every call has this outcome. */
void net_link_fail(struct net_link *l, int outcome);
/* 1: there is more to send. 0. NET_BROKEN, or how the link failed. */
int net_link_state(struct net_link *l);
bool net_link_healthy(struct net_link *l);
/* A duplicate of the socket, for whoever wants to watch it; -1: there is none, or no descriptor. */
int net_link_dup(struct net_link *l, uint32_t *generation);

static inline bool net_call_done(const struct net_call *c) {
    return __atomic_load_n(&c->outcome, __ATOMIC_ACQUIRE) != NET_PENDING;
}

/* net_link_io.c; the lock is held */
int net_link_broke(struct net_link *l);            /* NET_BROKEN */
int net_link_end(struct net_link *l, int outcome); /* outcome, which is every call's now */
int net_link_send(struct net_link *l);             /* 1: the socket takes no more. 0: all is sent */
int net_link_receive(struct net_link *l);          /* 1: something came. 0: nothing there */

#endif
