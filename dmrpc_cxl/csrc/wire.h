/*
 * wire.h - messages between hosts and the coordinator, described here and nowhere else.
 *
 * Request/response over a byte stream (Unix or TCP). Every message is a header and `length` bytes of payload,
 * little-endian. A connection carries one request at a time; the reply repeats `type` and `request`.
 *
 * The first message on any connection is HELLO with the fabric's secret; the coordinator answers nothing else
 * before it. Native code sends HELLO, REGISTER, REJOIN, GUARD, GRANT, RETURN, LEAVE; Python sends the rest, whose
 * payloads are JSON objects in UTF-8.
 *
 * The *guard* connection is a Unix connection of its own: HELLO, then GUARD with the host's userfaultfd attached
 * (SCM_RIGHTS). Afterwards only the coordinator speaks on it: messages of type NOTIFY_*. Its end tells either
 * side that the other is gone.
 */
#ifndef DM_WIRE_H
#define DM_WIRE_H

#include <stdint.h>

#include "layout.h"

#define DM_WIRE_MAGIC 0x44524d44u /* "DMRD" */
#define DM_WIRE_VERSION 2u        /* 2: CHECK, TABLE_FULL, `keep` in a recall, RETURN of nothing */
#define DM_WIRE_MAX_PAYLOAD (1u << 20)
#define DM_WIRE_MAX_RUNS 4096u /* in the answer to a GRANT */

enum dm_msg_type {
    DM_MSG_HELLO = 1,    /* -> struct dm_msg_hello              <- struct dm_msg_hello_reply */
    DM_MSG_REGISTER = 2, /* -> struct dm_msg_register           <- struct dm_msg_registered */
    DM_MSG_REJOIN = 3,   /* -> struct dm_msg_rejoin             <- struct dm_msg_registered */
    DM_MSG_GUARD = 4,    /* -> struct dm_msg_rejoin + one fd    <- empty */
    DM_MSG_GRANT = 5,  /* -> struct dm_msg_grant              <- struct dm_run[], now the host's */
    DM_MSG_RETURN = 6, /* -> struct dm_run[] already owned by the pool, or none   <- empty */
    DM_MSG_LEAVE = 7,  /* -> empty; everything was released   <- empty */
    DM_MSG_PUBLISH = 16,  /* -> {"name", "endpoint"}             <- {} */
    DM_MSG_WITHDRAW = 17, /* -> {"name"}                         <- {} */
    DM_MSG_LOOKUP = 18,   /* -> {"name"}                         <- {"name", "endpoint", "host"} */
    DM_MSG_LIST = 19,     /* -> {"prefix"}                       <- {"services": [...]} */
    DM_MSG_STATS = 20,    /* -> {}                               <- {...} */
    DM_MSG_HOSTS = 21,    /* -> {}                               <- {"hosts": [...]} */
    DM_MSG_SHUTDOWN = 22, /* -> {}                               <- {} and the coordinator stops */
    DM_MSG_WAIT = 23,     /* -> {"hosts": n} or {"name": s}      <- {} once they are there */
    DM_MSG_CHECK = 24,    /* -> {"repair", "timeout"}              <- {...}, see scrubber.py */
    DM_MSG_NOTIFY_RECALL = 32, /* coordinator -> host: struct dm_msg_recall; give frames back */
    DM_MSG_NOTIFY_FENCED = 33, /* coordinator -> host: you were declared dead; stop */
};

/* Header status. 0 in requests. A reply with another status than OK has UTF-8 text as payload that says why. */
enum dm_wire_status {
    DM_WIRE_OK = 0,
    DM_WIRE_BAD_REQUEST = 1, /* malformed, wrong order, unknown type */
    DM_WIRE_DENIED = 2,      /* wrong secret or fabric */
    DM_WIRE_VERSION_MISMATCH = 3,
    DM_WIRE_NO_FRAMES = 4, /* pool cannot give a single frame */
    DM_WIRE_NO_HOST_SLOT = 5,
    DM_WIRE_NOT_REGISTERED = 6,
    DM_WIRE_FENCED = 7, /* incarnation is not the current one */
    DM_WIRE_NOT_FOUND = 8,
    DM_WIRE_EXISTS = 9,
    DM_WIRE_QUOTA = 10,
    DM_WIRE_INTERNAL = 11,
    DM_WIRE_SHUTTING_DOWN = 12,
    DM_WIRE_TABLE_FULL = 13,
};

struct dm_msg_header {
    uint32_t magic;
    uint16_t version;
    uint16_t type;
    uint32_t status;
    uint32_t length; /* payload bytes after this header, at most DM_WIRE_MAX_PAYLOAD */
    uint64_t request;
};

struct dm_msg_hello {
    uint64_t fabric_id;
    uint8_t secret[DM_SECRET_BYTES];
};

struct dm_msg_hello_reply {
    uint64_t epoch; /* of the coordinator */
};

struct dm_msg_register {
    uint64_t token;      /* random per attach: the same REGISTER repeated gets the same answer */
    uint64_t start_time; /* of the process, clock ticks after boot */
    uint32_t pid;        /* as the host sees itself */
    uint32_t low;        /* wished watermarks and batch, in frames; 0: the coordinator's default */
    uint32_t high;
    uint32_t batch;
    char name[DM_NAME_BYTES];
};

struct dm_msg_registered {
    uint64_t incarnation;
    uint64_t epoch;
    uint32_t host; /* 1 .. max_hosts */
    uint32_t low;
    uint32_t high;
    uint32_t batch;
    uint32_t batch_max; /* a host that asks again and again may grow its batch up to this */
    uint32_t frame_limit;
};

struct dm_msg_rejoin {
    uint64_t incarnation;
    uint32_t host;
    uint32_t reserved;
};

struct dm_msg_grant {
    uint32_t want;    /* frames; the reply may hold fewer, at least one */
    uint32_t min_run; /* one run of at least this many frames is needed; 0 or 1: any */
};

struct dm_msg_recall { /* answered by a RETURN, of no frames if need be */
    uint32_t want;     /* frames the coordinator would like back */
    uint32_t keep;     /* free frames that the host may keep, however many are wanted */
};

_Static_assert(sizeof(struct dm_msg_header) == 24, "message header");
_Static_assert(sizeof(struct dm_msg_hello) == 40, "hello");
_Static_assert(sizeof(struct dm_msg_register) == 32 + DM_NAME_BYTES, "register");
_Static_assert(sizeof(struct dm_msg_registered) == 40, "registered");
_Static_assert(sizeof(struct dm_msg_rejoin) == 16, "rejoin");

#endif
