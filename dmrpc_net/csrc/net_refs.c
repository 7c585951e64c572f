/*
 * net_refs.c - Refs, found by a key that nobody can guess.
 *
 * A key is slot and generation, enciphered (Speck, blocks of 64 bits) with a secret that the shard draws when it starts. So keys look
 * random and never collide, one that was not made here is told from one that was used before, and finding a
 * Ref is one array look-up. The cipher is no security boundary: whoever holds the server's secret may use the server.
 */
#include <stdlib.h>
#include <string.h>

#include "net_shard.h"

#define ROUNDS 27

static inline uint32_t left(uint32_t x, int n) { return x << n | x >> (32 - n); }
static inline uint32_t right(uint32_t x, int n) { return x >> n | x << (32 - n); }

static void expand(uint32_t schedule[ROUNDS], const uint32_t key[4]) {
    uint32_t l[3] = {key[1], key[2], key[3]}, k = key[0];
    for (uint32_t i = 0; i < ROUNDS; i++) {
        schedule[i] = k;
        l[i % 3] = (k + right(l[i % 3], 8)) ^ i;
        k = left(k, 3) ^ l[i % 3];
    }
}

uint64_t net_key_seal(const struct net_refs *t, uint64_t plain) {
    uint32_t x = (uint32_t)(plain >> 32), y = (uint32_t)plain;
    for (int i = 0; i < ROUNDS; i++) {
        x = (right(x, 8) + y) ^ t->schedule[i];
        y = left(y, 3) ^ x;
    }
    return (uint64_t)x << 32 | y;
}

uint64_t net_key_open(const struct net_refs *t, uint64_t key) {
    uint32_t x = (uint32_t)(key >> 32), y = (uint32_t)key;
    for (int i = ROUNDS; i-- > 0;) {
        y = right(y ^ x, 3);
        x = left((x ^ t->schedule[i]) - y, 8);
    }
    return (uint64_t)x << 32 | y;
}

int net_refs_open(struct net_refs *t, uint32_t max, const uint32_t secret[4]) {
    *t = (struct net_refs){.max = max, .free = NET_NO_SLOT};
    expand(t->schedule, secret);
    return NET_OK;
}

void net_refs_close(struct net_refs *t) {
    free(t->slots);
    t->slots = NULL;
}

static bool grow(struct net_refs *t) {
    uint32_t capacity = t->capacity ? 2 * t->capacity : 64;
    if (capacity > t->max)
        capacity = t->max;
    if (capacity == t->capacity)
        return false;
    struct net_ref *slots = realloc(t->slots, capacity * sizeof *slots);
    if (!slots)
        return false;
    t->slots = slots;
    t->capacity = capacity;
    return true;
}

static void join(struct net_refs *t, struct net_ref *r, struct net_session *holder) {
    uint32_t slot = (uint32_t)(r - t->slots);
    r->holder = holder;
    r->prev = NET_NO_SLOT;
    r->next = holder->refs;
    if (r->next != NET_NO_SLOT)
        t->slots[r->next].prev = slot;
    holder->refs = slot;
    holder->nr_refs++;
    holder->nr_pages += r->nr_filled;
    holder->nr_virtual += r->nr_pages;
}

static void leave(struct net_refs *t, struct net_ref *r) {
    struct net_session *holder = r->holder;
    if (r->prev != NET_NO_SLOT)
        t->slots[r->prev].next = r->next;
    else
        holder->refs = r->next;
    if (r->next != NET_NO_SLOT)
        t->slots[r->next].prev = r->prev;
    holder->nr_refs--;
    holder->nr_pages -= r->nr_filled;
    holder->nr_virtual -= r->nr_pages;
}

struct net_ref *net_ref_add(struct net_refs *t, struct net_session *holder, uint32_t *pages,
                            uint32_t nr_pages, uint32_t nr_filled, uint64_t length, uint64_t *key) {
    uint32_t slot = t->free;
    if (slot != NET_NO_SLOT) {
        t->free = t->slots[slot].next;
    } else {
        if (t->nr == t->capacity && !grow(t))
            return NULL;
        slot = t->nr++;
        t->slots[slot].generation = 0;
    }
    struct net_ref *r = &t->slots[slot];
    *r = (struct net_ref){.length = length,
                          .pages = pages,
                          .nr_pages = nr_pages,
                          .nr_filled = nr_filled,
                          .generation = r->generation + 1};
    join(t, r, holder);
    t->nr_live++;
    *key = net_key_seal(t, (uint64_t)slot << 32 | r->generation);
    return r;
}

struct net_ref *net_ref_find(struct net_refs *t, uint64_t key, uint64_t length, int *status) {
    uint64_t plain = net_key_open(t, key);
    uint32_t slot = (uint32_t)(plain >> 32), generation = (uint32_t)plain;
    *status = NET_BAD_REF;
    if (slot >= t->nr || generation == 0 || generation > t->slots[slot].generation)
        return NULL;
    struct net_ref *r = &t->slots[slot];
    if (generation < r->generation || !r->holder) {
        *status = NET_REF_CONSUMED;
        return NULL;
    }
    if (r->length != length)
        return NULL;
    *status = NET_OK;
    return r;
}

struct net_ref *net_ref_of(struct net_refs *t, uint64_t key) {
    uint64_t plain = net_key_open(t, key);
    uint32_t slot = (uint32_t)(plain >> 32);
    struct net_ref *r = slot < t->nr ? &t->slots[slot] : NULL;
    return r && r->holder && r->generation == (uint32_t)plain ? r : NULL;
}

/* Give a Ref another key. False: its slot has had as many as there are. */
bool net_ref_renew(struct net_refs *t, struct net_ref *r, uint64_t *key) {
    if (r->generation == UINT32_MAX)
        return false;
    *key = net_key_seal(t, (uint64_t)(r - t->slots) << 32 | ++r->generation);
    return true;
}

void net_ref_pass(struct net_refs *t, struct net_ref *r, struct net_session *to) {
    leave(t, r);
    join(t, r, to);
}

uint32_t *net_ref_remove(struct net_refs *t, struct net_ref *r) {
    uint32_t *pages = r->pages;
    leave(t, r);
    r->holder = NULL;
    r->pages = NULL;
    /* After 2^32 uses a slot is left alone: a generation never comes again. */
    if (r->generation != UINT32_MAX) {
        r->next = t->free;
        t->free = (uint32_t)(r - t->slots);
    }
    t->nr_live--;
    return pages;
}
