/*
 * net_shard.h - one shard of a memory server: pages, Refs, and what each process holds. No sockets in here.
 *
 * A shard owns a slice of the server's pool and is used by one thread, so nothing here is atomic or locked. No operation
 * concerns two shards.
 *
 * Page 0 of a slice is the zero page: never handed out, never written, not counted. An entry of 0 in an array of pages is
 * a hole, and reading the hole reads page 0.
 *
 * Rules:
 *   - count of a page = entries of ranges + entries of Refs + entries of deliveries + writes under way that reserved it;
 *   - a page whose count is 0 is on the stack of free pages, once;
 *   - a page whose count is above 1 is not written;
 *   - what may fail is checked before anything is changed.
 */
#ifndef NET_SHARD_H
#define NET_SHARD_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

#include "net_wire.h"

#define NET_NO_SLOT UINT32_MAX

/* ---------------------------------------------------------------- net_pool.c: pages */

struct net_pool {
    uint8_t *base; /* nr_pages pages; page 0 is zeros */
    uint32_t page_shift;
    uint32_t nr_pages;
    uint32_t max_count; /* a count goes no further */
    uint32_t *counts;
    uint32_t *free; /* a stack of nr_free page numbers */
    uint32_t nr_free;
    uint64_t *counters; /* enum net_counter, of the shard */
};

int net_pool_open(struct net_pool *p, void *base, uint64_t bytes, uint32_t page_shift,
                  uint32_t max_count, uint64_t *counters);
void net_pool_close(struct net_pool *p);
/* All or nothing; the counts are 1 then. The content is whatever the pages held before. */
bool net_pages_take(struct net_pool *p, uint32_t nr, uint32_t *pages);
/* +1 on each that is no hole. NET_TOO_MANY_REFS: nothing has changed. */
int net_pages_hold(struct net_pool *p, const uint32_t *pages, uint32_t nr);
void net_pages_drop(struct net_pool *p, const uint32_t *pages, uint32_t nr);
void net_page_drop(struct net_pool *p, uint32_t page);
uint32_t net_pages_filled(const uint32_t *pages, uint32_t nr);

static inline uint8_t *net_page(const struct net_pool *p, uint32_t page) {
    return p->base + ((uint64_t)page << p->page_shift);
}
static inline uint64_t net_page_bytes(const struct net_pool *p) { return 1ull << p->page_shift; }
static inline uint64_t net_pages_for(const struct net_pool *p, uint64_t bytes) {
    return (bytes + net_page_bytes(p) - 1) >> p->page_shift;
}

/* Bytes of some pages, one after the other, seen from a position that moves on. */
struct net_cursor {
    const uint32_t *pages;
    uint64_t at;   /* byte, counted from the first page */
    uint64_t left; /* bytes */
};

/* Fill in up to max iovecs, neighbours in one; *bytes: what they hold together. */
int net_cursor_iov(const struct net_pool *p, const struct net_cursor *c, struct iovec *iov, int max,
                   uint64_t *bytes);
static inline void net_cursor_advance(struct net_cursor *c, uint64_t n) {
    c->at += n;
    c->left -= n;
}
void net_cursor_read(const struct net_pool *p, struct net_cursor *c, void *to, uint64_t n);
void net_cursor_write(const struct net_pool *p, struct net_cursor *c, const void *from, uint64_t n);

/* ---------------------------------------------------------------- net_space.c: ranges of a process */

#define NET_NR_CLASSES (NET_MAX_CLASS + 1)

struct net_range {
    uint64_t address;
    uint32_t nr_pages, nr_filled;
    bool read_only;
    uint64_t changed; /* id of the last request that wrote to it, or made it */
    uint32_t *pages;
};

struct net_class {            /* the ranges of one size */
    struct net_range **slots; /* by index */
    uint32_t nr, capacity;
    uint32_t *freed; /* ring of indices, the longest unused first; as large as slots */
    uint32_t freed_head, nr_freed;
};

struct net_space {
    uint64_t prefix; /* server, shard and session of every address */
    uint32_t nr_ranges;
    struct net_class classes[NET_NR_CLASSES];
};

/* A new range of these pages; takes over the array. NULL: *status says why, and the array is still the caller's. */
struct net_range *net_space_add(struct net_space *s, uint32_t page_shift, uint32_t *pages,
                                uint32_t nr_pages, int *status);
/* The range that an address lies in, or NULL. */
static inline struct net_range *net_space_find(const struct net_space *s, uint64_t address) {
    const uint64_t mask = ~0ull << NET_SESSION_SHIFT;
    uint32_t c = net_address_class(address);
    if ((address & mask) != s->prefix || c >= NET_NR_CLASSES)
        return NULL;
    uint64_t index = net_address_index(address);
    return index < s->classes[c].nr ? s->classes[c].slots[index] : NULL;
}
/* Forget a range; its array of pages is the caller's again. */
uint32_t *net_space_remove(struct net_space *s, struct net_range *r);
void net_space_close(struct net_space *s); /* ranges are gone already */

/* ---------------------------------------------------------------- net_refs.c: Refs of all processes */

struct net_session;

struct net_ref {
    struct net_session *holder; /* NULL: the slot is free */
    uint64_t length;
    uint32_t *pages;
    uint32_t nr_pages, nr_filled;
    uint32_t generation;
    uint32_t next, prev; /* of the holder; next free slot */
};

struct net_refs {
    struct net_ref *slots;
    uint32_t nr, capacity, max;
    uint32_t nr_live;
    uint32_t free;         /* first free slot, or NET_NO_SLOT */
    uint32_t schedule[27]; /* of the cipher that makes keys of slots and generations */
};

int net_refs_open(struct net_refs *t, uint32_t max, const uint32_t secret[4]);
void net_refs_close(struct net_refs *t);
/* NULL: no slot. Takes over the array of pages. */
struct net_ref *net_ref_add(struct net_refs *t, struct net_session *holder, uint32_t *pages,
                            uint32_t nr_pages, uint32_t nr_filled, uint64_t length, uint64_t *key);
/* The Ref of a key, if it is alive. */
struct net_ref *net_ref_of(struct net_refs *t, uint64_t key);
/* The same for what a client sent. NULL: *status is NET_BAD_REF or NET_REF_CONSUMED. */
struct net_ref *net_ref_find(struct net_refs *t, uint64_t key, uint64_t length, int *status);
void net_ref_pass(struct net_refs *t, struct net_ref *r, struct net_session *to);
bool net_ref_renew(struct net_refs *t, struct net_ref *r, uint64_t *key);
/* Forget a Ref; its array of pages is the caller's. */
uint32_t *net_ref_remove(struct net_refs *t, struct net_ref *r);
uint64_t net_key_seal(const struct net_refs *t, uint64_t plain);
uint64_t net_key_open(const struct net_refs *t, uint64_t key);

/* ---------------------------------------------------------------- net_session.c: a process, as far as this shard knows it */

struct
    net_delivery { /* pages of a Ref that was got: kept until the answer is known to have arrived */
    struct net_delivery *prev,
        *next; /* of the shard; those that are being sent are not in the list */
    bool listed;
    uint64_t expires_ns;
    struct net_kept *kept;
    uint32_t *pages;
    uint32_t nr_pages, nr_filled;
    uint64_t offset, bytes;
    struct net_session *session;
    struct net_delivery *sibling; /* of the session */
};

struct net_kept { /* the answer to a request that was carried out */
    uint64_t id;
    uint64_t a, b;
    uint16_t status;
    uint8_t op, flags;
    struct net_delivery *delivery;
};

struct net_session {
    uint32_t pid;
    uint64_t token;
    struct net_space space;
    uint32_t refs; /* first of those held, or NET_NO_SLOT */
    uint32_t nr_refs;
    uint64_t nr_pages;   /* entries that are no holes, of ranges and Refs held */
    uint64_t nr_virtual; /* entries, of ranges and Refs held */

    uint64_t last_id;      /* of the last request carried out */
    uint64_t last_change;  /* of the last one that may change what a read returns */
    struct net_kept *kept; /* ring */
    uint32_t kept_first, nr_kept, kept_capacity;
    struct net_delivery *deliveries;

    void *connection;                /* whoever feeds it; one at a time */
    struct net_session *next, *prev; /* of the shard */
};

struct net_limits {
    uint64_t max_pages;   /* of a process, in one shard */
    uint64_t max_virtual; /* entries of page arrays, of a process in one shard */
    uint32_t max_ranges;
    uint32_t max_refs;
    uint32_t max_outstanding;
    uint32_t max_count;     /* 0: the greatest that there is */
    uint32_t max_ref_slots; /* of the shard */
    uint32_t keep_ms;       /* how long deliveries are kept */
};

struct net_shard {
    struct net_pool pool;
    struct net_refs refs;
    struct net_limits limits;
    uint32_t server, index;
    bool eager; /* create_ref always copies */
    bool time_translation;
    uint64_t clock_ns; /* of two looks at the clock */
    struct net_session *sessions;
    struct net_delivery deliveries; /* head of the list; the first expires first */
    struct net_write *writes;       /* under way */
    uint64_t counters[NET_NR_COUNTERS];
};

#define NET_COUNT(s, name, n) ((s)->counters[NET_COUNTER_##name] += (uint64_t)(n))

int net_shard_open(struct net_shard *s, uint32_t server, uint32_t index, void *slice,
                   uint64_t bytes, uint32_t page_shift, const struct net_limits *limits);
void net_shard_close(struct net_shard *s); /* with all sessions */
struct net_session *net_session_open(struct net_shard *s, uint32_t pid, uint64_t token,
                                     uint32_t session);
struct net_session *net_session_find(struct net_shard *s, uint32_t pid);
/* Free all that a process holds. Its connection is gone already. */
void net_session_close(struct net_shard *s, struct net_session *ses);

/* Forget the answers of ids below oldest. */
void net_kept_retire(struct net_shard *s, struct net_session *ses, uint64_t oldest);
/* NULL: as many are kept as may be outstanding (or no memory). */
struct net_kept *net_kept_add(struct net_shard *s, struct net_session *ses,
                              const struct net_request *q);
struct net_kept *net_kept_find(struct net_session *ses, uint64_t id);

/* Takes over pages and the counts on them. */
struct net_delivery *net_delivery_add(struct net_shard *s, struct net_session *ses, uint32_t *pages,
                                      uint32_t nr_pages, uint64_t offset, uint64_t bytes);
void net_delivery_free(struct net_shard *s, struct net_delivery *d);
void net_delivery_unlist(struct net_delivery *d);
/* The answer was sent, or cannot be: from now on it is kept for a while. */
void net_delivery_sent(struct net_shard *s, struct net_delivery *d, uint64_t now_ns);
/* Free those whose time is over; returns when the next one's is, 0 for none. */
uint64_t net_deliveries_expire(struct net_shard *s, uint64_t now_ns);

/* ---------------------------------------------------------------- net_ops.c: what requests do; they return enum net_status */

int net_ralloc(struct net_shard *s, struct net_session *ses, uint64_t bytes, uint64_t *address);
int net_rfree(struct net_shard *s, struct net_session *ses, uint64_t address);
int net_create_ref(struct net_shard *s, struct net_session *ses, uint64_t address, uint64_t bytes,
                   uint32_t flags, uint64_t *key);
int net_map_ref(struct net_shard *s, struct net_session *ses, uint64_t key, uint64_t length,
                uint32_t flags, uint64_t *address);
int net_accept_ref(struct net_shard *s, struct net_session *ses, uint64_t key, uint64_t length,
                   uint32_t flags, uint64_t *anew);
int net_clone_ref(struct net_shard *s, struct net_session *ses, uint64_t key, uint64_t length,
                  uint64_t *clone);
int net_drop_ref(struct net_shard *s, struct net_session *ses, uint64_t key, uint64_t length,
                 uint32_t flags, uint64_t *dropped);
int net_held(struct net_shard *s, struct net_session *ses, uint64_t key, uint64_t length,
             uint64_t *held);
int net_rread(struct net_shard *s, struct net_session *ses, uint64_t address, uint64_t bytes,
              struct net_cursor *from);
int net_get(struct net_shard *s, struct net_session *ses, const struct net_request *q,
            struct net_delivery **delivery);
int net_undo(struct net_shard *s, struct net_session *ses, uint64_t id);

/* ---------------------------------------------------------------- net_write.c: writes whose bytes come piece by piece */

#define NET_WRITE_INLINE 64u

struct net_write {
    struct net_session *session;
    struct net_range *range; /* NULL: of a put */
    uint32_t first, nr;      /* pages of the range */
    /* Where the bytes go. All in place: the range's own entries. Else an array, in which fresh pages differ from the range's. */
    uint32_t *targets;
    bool all_in_place;
    uint32_t nr_fresh, nr_holes;
    struct net_cursor to;
    uint64_t bytes;
    struct net_write *next, *prev; /* of the shard */
    uint32_t inline_targets[NET_WRITE_INLINE];
};

/* Reserve every page that is needed, and prepare the parts of pages that are not written. On failure nothing has changed. */
int net_write_begin(struct net_shard *s, struct net_session *ses, uint64_t address, uint64_t bytes,
                    struct net_write *w);
int net_put_begin(struct net_shard *s, struct net_session *ses, uint64_t bytes, uint32_t flags,
                  struct net_write *w);
/* Every byte is there: show the pages. */
void net_write_commit(struct net_shard *s, struct net_write *w);
int net_put_commit(struct net_shard *s, struct net_write *w, uint32_t flags, uint64_t *key,
                   uint64_t *address);
void net_write_abort(struct net_shard *s, struct net_write *w);

/* ---------------------------------------------------------------- net_audit.c */

/* False: no memory. */
bool net_shard_audit(struct net_shard *s, struct net_audit *out);

uint64_t net_now_ns(void);

/* How long translation takes, where that is asked for. What looking at the clock takes is measured at the start and left out. */
static inline uint64_t net_lap_begin(const struct net_shard *s) {
    return s->time_translation ? net_now_ns() : 0;
}
static inline void net_lap_end(struct net_shard *s, uint64_t begin) {
    if (!s->time_translation)
        return;
    uint64_t lap = net_now_ns() - begin;
    if (lap > s->clock_ns)
        NET_COUNT(s, translation_ns, lap - s->clock_ns);
}
void net_shard_time_translation(struct net_shard *s);

#endif
