/*
 * relay_calls.c - who waits for which reply: each call is in the table of its client, by the client's id, and in that of
 * its backend, by the id it has there.
 *
 * Ids come in order, so the lowest bits are the best hash. A client that picks others to make buckets long finds that no
 * bucket is longer than its calls that wait, which are limited, and its delivered replies, which are too.
 */
#include <stdlib.h>

#include "relay.h"

#define FIRST_BUCKETS 16u

static uint32_t slot(const struct dm_calls *t, uint64_t id) {
    return (uint32_t)(id ^ id >> 32) & t->mask;
}

static int grow(struct dm_peer *p) {
    struct dm_calls *t = &p->calls;
    if (t->buckets && t->nr <= t->mask)
        return DM_OK;
    struct dm_calls more = {.mask = t->buckets ? 2 * t->mask + 1 : FIRST_BUCKETS - 1, .nr = t->nr};
    if (!(more.buckets = calloc(more.mask + 1, sizeof *more.buckets)))
        return t->buckets ? DM_OK : DM_ERR_NO_MEMORY; /* longer ones will do */
    for (uint32_t i = 0; t->buckets && i <= t->mask; i++)
        for (struct dm_call *c = t->buckets[i], *next; c; c = next) {
            next = c->next[p->side];
            struct dm_call **to = &more.buckets[slot(&more, c->id[p->side])];
            c->next[p->side] = *to;
            *to = c;
        }
    free(t->buckets);
    *t = more;
    return DM_OK;
}

struct dm_call *dm_call_add(struct dm_peer *client, uint64_t here, struct dm_peer *backend,
                            uint64_t there) {
    if (grow(client) || grow(backend))
        return NULL;
    struct dm_call *c = malloc(sizeof *c);
    if (!c)
        return NULL;
    *c = (struct dm_call){.peer = {client, backend}, .id = {here, there}};
    dm_node_init(&c->order);
    for (int side = DM_CLIENT; side <= DM_BACKEND; side++) {
        struct dm_calls *t = &c->peer[side]->calls;
        struct dm_call **to = &t->buckets[slot(t, c->id[side])];
        c->next[side] = *to;
        *to = c;
        t->nr++;
    }
    return c;
}

struct dm_call *dm_call_find(struct dm_peer *p, uint64_t id) {
    struct dm_call *c = p->calls.buckets ? p->calls.buckets[slot(&p->calls, id)] : NULL;
    while (c && c->id[p->side] != id)
        c = c->next[p->side];
    return c;
}

/* Some call of a peer, to take a table apart; *bucket: 0 at first. */
struct dm_call *dm_call_any(struct dm_peer *p, uint32_t *bucket) {
    struct dm_calls *t = &p->calls;
    for (; t->nr && *bucket <= t->mask; ++*bucket)
        if (t->buckets[*bucket])
            return t->buckets[*bucket];
    return NULL;
}

void dm_call_unlink(struct dm_call *c, enum dm_side side) {
    struct dm_peer *p = c->peer[side];
    if (!p)
        return;
    struct dm_call **at = &p->calls.buckets[slot(&p->calls, c->id[side])];
    while (*at != c)
        at = &(*at)->next[side];
    *at = c->next[side];
    p->calls.nr--;
    if (side == DM_CLIENT && c->delivered) {
        dm_node_leave(&c->order);
        p->nr_delivered--;
    }
    c->peer[side] = NULL;
}

void dm_call_free(struct dm_call *c) {
    dm_call_unlink(c, DM_CLIENT);
    dm_call_unlink(c, DM_BACKEND);
    free(c);
}
