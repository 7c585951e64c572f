/*
 * net_pager.h - memory whose bytes lie at a server until somebody looks: page faults become requests.
 *
 * A region is a run of an arena, registered with userfaultfd. A page of it that is missing comes from the Ref that the
 * region shows (or is zero, if it shows none), by a thread of the pager: the whole region at the first fault, or the pages
 * around the fault. They are received at the back of the arena, and then the front is made to show them. Pages come
 * write-protected; the first store to any of them makes the region dirty, and lifts the protection from all of it. A region that
 * is complete or not, but not dirty, therefore has the Ref's bytes. (Kernels before 6.4 cannot show a page and protect it in one
 * step: there a region is dirty from its first page on.)
 *
 * Rules:
 * - The thread that faults may hold the GIL, or a lock of a client's link. The pager takes neither: it has sockets of its
 *   own, made as a process of its own at the servers, which reads by key what others hold.
 * - When bytes cannot be had before the deadline, the missing pages are poisoned: who touches them gets SIGBUS, never wrong
 *   bytes.
 * - A region is removed by whoever frees its memory, when nobody can touch it any more.
 */
#ifndef NET_PAGER_H
#define NET_PAGER_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/socket.h>

#include "net_arena.h"
#include "net_wire.h"

struct net_pager;

struct net_region {
    struct net_run run;
    uint64_t length;
    uint64_t key; /* 0: missing pages are zeros */
    uint16_t server, shard;
    bool whole; /* fetch all at the first fault */
    /* under the pager's lock; others look at them by the functions below */
    bool dirty, failed;
    uint64_t nr_present;
    /* the pager's */
    bool busy;
    uint64_t next_page; /* behind what was fetched last */
    uint64_t window;    /* pages to fetch around the next fault */
    uint8_t *present;   /* a bit for each page */
};

static inline bool net_region_dirty(const struct net_region *r) {
    return __atomic_load_n(&r->dirty, __ATOMIC_RELAXED);
}
static inline bool net_region_failed(const struct net_region *r) {
    return __atomic_load_n(&r->failed, __ATOMIC_RELAXED);
}
static inline uint64_t net_region_present(const struct net_region *r) {
    return __atomic_load_n(&r->nr_present, __ATOMIC_RELAXED);
}

struct net_pager_stats {
    uint64_t nr_faults, nr_stores, nr_requests, bytes_fetched, nr_failed, nr_regions;
};

/* Returns NULL with errno: EPERM when this process may not use userfaultfd. */
struct net_pager *net_pager_new(uint64_t deadline_ns);
void net_pager_free(struct net_pager *p);
bool net_pager_poisons(const struct net_pager *p);

/* Do without what kernels before 6.4 lack, before anything is added. */
void net_pager_never_protect(struct net_pager *p);

/* Say how a shard is reached. Copies all. */
int net_pager_route(struct net_pager *p, const struct sockaddr *address, socklen_t length,
                    const struct net_hello *hello, uint16_t server);

/* Watch r->run. With all_present its pages are as they should be, and only stores are watched for. 0 or an errno. */
int net_pager_add(struct net_pager *p, struct net_region *r, bool all_present);
/* False: its run is still watched by the kernel, and must not be used again as it is. */
bool net_pager_remove(struct net_pager *p, struct net_region *r);

/* Show another Ref, whose bytes the region has just been found to hold or is about to be read for; not dirty from now on. */
int net_pager_protect(struct net_pager *p, struct net_region *r);

/* Supply pages that are missing from bytes that were got otherwise: all of the region's length. */
int net_pager_supply(struct net_pager *p, struct net_region *r, const char *bytes);

/* Wait for the end of a fetch that is under way. */
void net_pager_settle(struct net_pager *p, struct net_region *r);

void net_pager_stats(struct net_pager *p, struct net_pager_stats *to);

#endif
