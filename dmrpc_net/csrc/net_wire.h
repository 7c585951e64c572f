/*
 * net_wire.h - what memory servers and their clients say to each other, described here and nowhere else.
 *
 * Byte streams (TCP or Unix), little-endian. Whoever connects sends a struct net_hello, and is answered with a struct
 * net_welcome; the server looks at nothing else of it before the secret in there was compared. Two kinds of
 * connections:
 *
 *   control  One for each process and server: the process's life. Nothing is sent on it after the greeting. When it
 *            ends, the server frees what the process holds, and then closes its own end.
 *   data     One for each process and shard, the newest counts. The client sends requests, each a struct net_request
 *            and `payload` bytes; the server carries them out one after the other and answers in that order, each
 *            time with a struct net_answer and `payload` bytes.
 *
 * A request has an id, greater than that of every request before it. After a data connection broke, the client sends on a
 * new one, in order, whatever has not been answered. Requests carried out before are not carried out again: their answers are
 * kept until `oldest` says that they have arrived.
 */
#ifndef NET_WIRE_H
#define NET_WIRE_H

#include <stdint.h>

#define NET_MAGIC 0x4e524d44u /* "DMRN" */
#define NET_VERSION 1u
#define NET_SECRET_BYTES 32u
#define NET_MAX_TRANSFER (1u << 30) /* bytes of one request or answer; clients cut what is longer */
/* asked of the kernel: docs/decisions/0019-what-sockets-hold.md */
#define NET_SEND_BUFFER (512u << 10)

/* ---------------------------------------------------------------- addresses
 *
 *   63      56 55     50 49      46 45     41 40                           0
 *   +---------+---------+----------+---------+---------------+-------------+
 *   | server  | shard   | session  | class   | index of the  | byte in     |
 *   |         |         |          |         | range         | the range   |
 *   +---------+---------+----------+---------+---------------+-------------+
 *                                                   41 - class      class bits
 *
 * An address means something together with a process. Ranges of up to 2^class bytes are numbered in each class, so an
 * address leads to its range by two array look-ups. The class is written less 11, so no address is 0. `session` is chosen
 * by the client: it changes when the client begins anew with a server that was lost, so that addresses of before are not
 * taken for new ones.
 */
#define NET_SERVER_SHIFT 56
#define NET_SHARD_SHIFT 50
#define NET_SESSION_SHIFT 46
#define NET_CLASS_SHIFT 41
#define NET_MAX_SERVERS 255u
#define NET_MAX_SHARDS 64u
#define NET_NR_SESSIONS 16u
#define NET_MIN_CLASS 12u /* the smallest page: 4 KiB */
#define NET_MAX_CLASS 40u

static inline uint32_t net_address_server(uint64_t a) { return (uint32_t)(a >> NET_SERVER_SHIFT); }
static inline uint32_t net_address_shard(uint64_t a) {
    return (uint32_t)(a >> NET_SHARD_SHIFT) & (NET_MAX_SHARDS - 1);
}
static inline uint32_t net_address_session(uint64_t a) {
    return (uint32_t)(a >> NET_SESSION_SHIFT) & (NET_NR_SESSIONS - 1);
}
static inline uint32_t net_address_class(uint64_t a) {
    return NET_MIN_CLASS - 1 + ((uint32_t)(a >> NET_CLASS_SHIFT) & 31);
}
static inline uint64_t net_address_index(uint64_t a) {
    return (a & ((1ull << NET_CLASS_SHIFT) - 1)) >> net_address_class(a);
}
static inline uint64_t net_address_offset(uint64_t a) {
    return a & ((1ull << net_address_class(a)) - 1);
}

/* ---------------------------------------------------------------- Refs: 24 bytes, good in any process that holds the secret */

#define NET_REF_TAG 0x4e6d0000u /* upper half of flags: tells these Refs from other bytes */

struct net_ref_wire {
    uint16_t server;
    uint16_t shard;
    uint32_t flags;
    uint64_t key; /* unguessable, but no more than that */
    uint64_t length;
};

/* ---------------------------------------------------------------- greeting */

enum net_kind { NET_CONTROL = 1, NET_DATA = 2 };

struct net_hello {
    uint32_t magic;
    uint16_t version;
    uint16_t kind;
    uint8_t secret[NET_SECRET_BYTES];
    uint64_t token;   /* random, of the process: two processes never share a pid */
    uint32_t pid;     /* global process id. Control: 0 asks for one, of server 0 only */
    uint16_t shard;   /* data */
    uint8_t session;  /* data: goes into addresses */
    uint8_t reserved; /* 0 */
};

struct net_welcome {
    uint32_t magic;
    uint16_t version;
    uint16_t status; /* enum net_status; but for OK the connection ends after this */
    uint64_t epoch;  /* random, of the server's process */
    uint64_t slice_bytes;
    uint64_t last; /* data: id of the last request carried out */
    uint32_t pid;
    uint16_t server;
    uint16_t nr_shards;
    uint32_t page_size;
    uint32_t max_outstanding;
};

/* ---------------------------------------------------------------- requests and answers */

enum net_op {
    NET_RALLOC = 1,     /* a: bytes                             -> a: address */
    NET_RFREE = 2,      /* a: address of a range */
    NET_CREATE_REF = 3, /* a: address, b: bytes; COPY, MOVE     -> a: key */
    NET_MAP_REF = 4,    /* a: key, b: length; READ_ONLY         -> a: address */
    NET_RREAD = 5,      /* a: address, b: bytes                 -> payload */
    NET_RWRITE = 6,     /* a: address, payload */
    NET_ACCEPT_REF = 7, /* a: key, b: length; ANEW              -> a: key */
    NET_CLONE_REF = 8,  /* a: key, b: length                    -> a: key */
    NET_DROP_REF =
        9, /* a: key, b: length; ANYBODYS          -> a: 1 dropped, 0 not held by this process */
    NET_PUT = 10,   /* payload; KEEP                        -> a: key, b: address with KEEP */
    NET_GET = 11,   /* a: key, b: length, c: offset, d: bytes; KEEP -> payload */
    NET_HELD = 12,  /* a: key, b: length                    -> a: 1 held by this process, 0 not */
    NET_UNDO = 13,  /* a: id of an earlier request: give back what it gave, if it was carried out */
    NET_STATS = 14, /*                                      -> uint64_t[NET_NR_COUNTERS] */
    NET_AUDIT = 15, /*                                      -> struct net_audit */
    NET_PING = 16,
    NET_LAST_OP = NET_PING,
};

enum net_flag {
    NET_COPY = 1,      /* CREATE_REF: copy at once instead of on write */
    NET_MOVE = 2,      /* CREATE_REF: of a whole range, which is given up */
    NET_READ_ONLY = 4, /* MAP_REF */
    NET_KEEP = 8,      /* PUT: stay mapped as well. GET: leave the Ref as it is */
    NET_ANEW = 16,     /* ACCEPT_REF: under another key; nobody can use the old one any more */
    NET_ANYBODYS = 32, /* DROP_REF: whoever holds it, as long as nobody accepted it anew */
};

struct net_request {
    uint32_t payload;
    uint8_t op;
    uint8_t flags;
    uint16_t reserved; /* 0 */
    uint64_t id;
    uint64_t oldest; /* id of the oldest request without answer, this one at the latest */
    uint64_t a, b, c, d;
};

struct net_answer {
    uint32_t payload;
    uint16_t status;
    uint16_t op;
    uint64_t id;
    uint64_t a, b;
};

enum net_status {
    NET_OK = 0,
    /* of requests */
    NET_BAD_ADDRESS = 1,
    NET_BAD_SIZE = 2,
    NET_BAD_REF = 3,
    NET_REF_CONSUMED = 4,
    NET_TOO_MANY_REFS = 5,
    NET_IS_READ_ONLY = 6,
    NET_OUT_OF_PAGES = 7,
    NET_OVER_QUOTA = 8,
    NET_NO_REF_SLOT = 9,
    NET_NO_ADDRESS_SPACE = 10,
    NET_ANSWER_LOST = 11, /* sent again; was carried out, and its answer is not kept any more */
    NET_BAD_REQUEST = 12, /* breaks the protocol: the connection ends */
    NET_NO_MEMORY = 13,   /* of the server's own */
    /* of greetings */
    NET_DENIED = 32,
    NET_OTHER_VERSION = 33,
    NET_NO_PROCESS = 34, /* no such process, or no longer */
    NET_PID_TAKEN = 35,
    NET_WRONG_SERVER = 36, /* no such shard; asked for a pid, and not server 0 */
    NET_FULL = 37,
    NET_LAST_STATUS = NET_FULL,
};

/* ---------------------------------------------------------------- what can be asked about a shard */

/* X(name, meaning) */
#define NET_COUNTERS(X)                                                                            \
    X(requests, "requests carried out")                                                            \
    X(duplicates, "requests that came again and were not carried out again")                       \
    X(bytes_read, "bytes sent as answers to rread and get")                                        \
    X(bytes_written, "bytes taken by rwrite and put")                                              \
    X(pages_taken, "pages that entered use")                                                       \
    X(pages_freed, "pages that left use")                                                          \
    X(pages_copied, "pages copied on write")                                                       \
    X(full_page_writes, "pages replaced on write without a copy")                                  \
    X(pages_copied_eagerly, "pages copied by create_ref")                                          \
    X(in_place_writes, "pages written where they are")                                             \
    X(holes_filled, "pages written for the first time")                                            \
    X(bytes_copied, "bytes copied from page to page")                                              \
    X(refs_created, "Refs made")                                                                   \
    X(refs_mapped, "Refs mapped or got")                                                           \
    X(refs_dropped, "Refs dropped, by their holder or by its end")                                 \
    X(translations, "addresses looked up")                                                         \
    X(translation_ns, "time spent on that; measured with --time-translation only")                 \
    X(bytes_in, "bytes received")                                                                  \
    X(bytes_out, "bytes sent")                                                                     \
    X(system_calls, "receives, sends and waits of the shard's loop")                               \
    X(processes_ended, "processes whose holdings were freed")                                      \
    X(breaches, "connections ended because they broke the protocol")                               \
    X(nr_pages, "pages of the shard")                                                              \
    X(nr_free, "of these, free")                                                                   \
    X(nr_processes, "processes that used the shard and are connected")                             \
    X(nr_ranges, "ranges")                                                                         \
    X(nr_refs, "Refs that are alive")                                                              \
    X(nr_locked, "pages that are locked in memory")

#define NET_COUNTER_NAME(name, meaning) NET_COUNTER_##name,
enum net_counter { NET_COUNTERS(NET_COUNTER_NAME) NET_NR_COUNTERS };
#undef NET_COUNTER_NAME

struct net_audit {
    uint64_t nr_pages;
    uint64_t nr_free;
    uint64_t in_use;       /* pages with a count */
    uint64_t mapped_pages; /* entries of ranges, holes left out */
    uint64_t hole_pages;
    uint64_t ref_pages;       /* entries of Refs that are alive, holes left out */
    uint64_t delivered_pages; /* of Refs that were got, until the answer is known to have arrived */
    uint64_t pages_under_way; /* reserved by writes that are being received */
    uint64_t nr_processes;
    uint64_t nr_ranges;
    uint64_t nr_refs;
    uint64_t
        nr_violations; /* pages whose count is not the sum of what refers to them, or that are free twice or never */
    uint64_t first_violation; /* page number */
};

_Static_assert(sizeof(struct net_ref_wire) == 24, "Ref");
_Static_assert(sizeof(struct net_hello) == 56, "hello");
_Static_assert(sizeof(struct net_welcome) == 48, "welcome");
_Static_assert(sizeof(struct net_request) == 56, "request");
_Static_assert(sizeof(struct net_answer) == 32, "answer");
_Static_assert(NET_NR_COUNTERS == 28, "counters");
_Static_assert(sizeof(struct net_audit) == 104, "audit");

#endif
