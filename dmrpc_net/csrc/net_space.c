/*
 * net_space.c - the ranges of a process, found by address in two array look-ups (see the drawing in net_wire.h).
 *
 * Freed indices are used again only when NET_SPARE of their class are free, the longest unused first: for a while
 * a stale address is nobody's and is refused.
 */
#include <stdlib.h>
#include <string.h>

#include "net_shard.h"

#define NET_SPARE 64u

static uint32_t class_of(uint64_t bytes) {
    uint32_t c = bytes > 1 ? 64 - (uint32_t)__builtin_clzll(bytes - 1) : 0;
    return c < NET_MIN_CLASS ? NET_MIN_CLASS : c;
}

static bool grow(struct net_class *k) {
    uint32_t capacity = k->capacity ? 2 * k->capacity : 16;
    struct net_range **slots = realloc(k->slots, capacity * sizeof *slots);
    if (!slots)
        return false;
    k->slots = slots;
    uint32_t *freed = malloc(capacity * sizeof *freed);
    if (!freed)
        return false;
    for (uint32_t i = 0; i < k->nr_freed; i++)
        freed[i] = k->freed[(k->freed_head + i) % k->capacity];
    free(k->freed);
    k->freed = freed;
    k->freed_head = 0;
    k->capacity = capacity;
    return true;
}

static bool take_index(struct net_class *k, uint32_t limit, uint32_t *index) {
    bool fresh = k->nr < limit && k->nr_freed < NET_SPARE && (k->nr < k->capacity || grow(k));
    if (fresh) {
        *index = k->nr++;
        return true;
    }
    if (!k->nr_freed)
        return false;
    *index = k->freed[k->freed_head];
    k->freed_head = (k->freed_head + 1) % k->capacity;
    k->nr_freed--;
    return true;
}

struct net_range *net_space_add(struct net_space *s, uint32_t page_shift, uint32_t *pages,
                                uint32_t nr_pages, int *status) {
    uint32_t c = class_of((uint64_t)nr_pages << page_shift), index;
    if (c > NET_MAX_CLASS) {
        *status = NET_BAD_SIZE;
        return NULL;
    }
    struct net_range *r = malloc(sizeof *r);
    if (!r) {
        *status = NET_NO_MEMORY;
        return NULL;
    }
    uint64_t limit = 1ull << (NET_CLASS_SHIFT - c);
    if (!take_index(&s->classes[c], limit > UINT32_MAX ? UINT32_MAX : (uint32_t)limit, &index)) {
        free(r);
        *status = NET_NO_ADDRESS_SPACE;
        return NULL;
    }
    uint64_t address =
        s->prefix | (uint64_t)(c - NET_MIN_CLASS + 1) << NET_CLASS_SHIFT | (uint64_t)index << c;
    *r = (struct net_range){.address = address,
                            .nr_pages = nr_pages,
                            .nr_filled = net_pages_filled(pages, nr_pages),
                            .pages = pages};
    s->classes[c].slots[index] = r;
    s->nr_ranges++;
    *status = NET_OK;
    return r;
}

uint32_t *net_space_remove(struct net_space *s, struct net_range *r) {
    struct net_class *k = &s->classes[net_address_class(r->address)];
    uint32_t index = (uint32_t)net_address_index(r->address), *pages = r->pages;
    k->slots[index] = NULL;
    k->freed[(k->freed_head + k->nr_freed++) % k->capacity] = index;
    s->nr_ranges--;
    free(r);
    return pages;
}

void net_space_close(struct net_space *s) {
    for (uint32_t c = 0; c < NET_NR_CLASSES; c++) {
        free(s->classes[c].slots);
        free(s->classes[c].freed);
    }
    memset(s->classes, 0, sizeof s->classes);
}
