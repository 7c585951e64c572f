/*
 * traffic.h - hosts that make, pass on, clone, map, write and drop the same Refs, at random and all at once.
 *
 * Refs go from one host to another through letter boxes, and are not taken out of them: whoever reads a letter may use it,
 * so for every Ref there are many who want it and one who gets it. The boxes are words written and read without any
 * ordering. So nothing but the Ref's state word and the frame words orders what the hosts do.
 *
 * Every page says what it holds in three places, and every player remembers what it saw: a page that changes under its
 * holder shows.
 */
#ifndef DM_TEST_TRAFFIC_H
#define DM_TEST_TRAFFIC_H

#include "by_hand.h"
#include "check.h"

#define TRAFFIC_BOXES 12u
#define TRAFFIC_MOST_PAGES 14u /* of a buffer: scattered ones fill an overflow frame */
#define TRAFFIC_BUFFERS 6u     /* of a player */

enum traffic_move { TRAFFIC_MAKE, TRAFFIC_ACCEPT, TRAFFIC_CLONE, TRAFFIC_DROP, TRAFFIC_MAP };
#define TRAFFIC_MOVES 5

struct traffic { /* what the players share; in shared memory if they are processes */
    uint64_t boxes[TRAFFIC_BOXES][sizeof(struct dm_ref_wire) / 8];
    uint64_t nr_made, nr_used; /* Refs that came to life, Refs whose life ended */
    uint64_t nr_won[TRAFFIC_MOVES], nr_lost;
};

struct traffic_buffer {
    uint32_t id; /* of a mapping; 0: none */
    uint32_t nr_pages;
    uint64_t stamp[TRAFFIC_MOST_PAGES];
};

struct player { /* one thread; a host may have several */
    struct dm_host *h;
    struct traffic *traffic;
    struct rng rng;
    bool has_uffd; /* without it nothing that protects pages is done */
    struct traffic_buffer buffers[TRAFFIC_BUFFERS];
};

/* One move. Context: no lock. */
void traffic_step(struct player *p);
void traffic_expect_unchanged(struct player *p, const struct traffic_buffer *b);

#endif
