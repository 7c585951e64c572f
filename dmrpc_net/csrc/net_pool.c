/*
 * net_pool.c - the pages of a shard: counts, the stack of those that are free, and bytes that lie in several of them.
 *
 * What was freed last is handed out first: it is in the caches (docs/decisions/0018-pages-freed-last.md). Runs that are freed
 * together are handed out together and in their order, and need few pieces when they are sent or received.
 */
#include <stdlib.h>
#include <string.h>

#include "net_shard.h"

int net_pool_open(struct net_pool *p, void *base, uint64_t bytes, uint32_t page_shift,
                  uint32_t max_count, uint64_t *counters) {
    uint64_t nr = bytes >> page_shift;
    if (nr < 2 || nr > UINT32_MAX)
        return NET_BAD_SIZE;
    *p = (struct net_pool){.base = base,
                           .page_shift = page_shift,
                           .nr_pages = (uint32_t)nr,
                           .max_count = max_count ? max_count : UINT32_MAX,
                           .counts = calloc(nr, sizeof *p->counts),
                           .free = malloc(nr * sizeof *p->free),
                           .nr_free = (uint32_t)nr - 1,
                           .counters = counters};
    if (!p->counts || !p->free) {
        net_pool_close(p);
        return NET_NO_MEMORY;
    }
    for (uint32_t i = 0; i < p->nr_free; i++)
        p->free[i] = p->nr_free - i; /* page 1 on top */
    memset(p->base, 0, net_page_bytes(p));
    return NET_OK;
}

void net_pool_close(struct net_pool *p) {
    free(p->counts);
    free(p->free);
    p->counts = p->free = NULL;
}

bool net_pages_take(struct net_pool *p, uint32_t nr, uint32_t *pages) {
    if (nr > p->nr_free)
        return false;
    for (uint32_t i = 0; i < nr; i++) {
        pages[i] = p->free[--p->nr_free];
        p->counts[pages[i]] = 1;
    }
    p->counters[NET_COUNTER_pages_taken] += nr;
    return true;
}

void net_page_drop(struct net_pool *p, uint32_t page) {
    if (!page || --p->counts[page])
        return;
    p->free[p->nr_free++] = page;
    p->counters[NET_COUNTER_pages_freed]++;
}

void net_pages_drop(struct net_pool *p, const uint32_t *pages, uint32_t nr) {
    while (nr-- > 0) /* the first of them on top */
        net_page_drop(p, pages[nr]);
}

int net_pages_hold(struct net_pool *p, const uint32_t *pages, uint32_t nr) {
    /* A page may occur twice, so the limit is looked at with each step. */
    for (uint32_t i = 0; i < nr; i++) {
        if (!pages[i])
            continue;
        if (p->counts[pages[i]] == p->max_count) {
            while (i-- > 0)
                p->counts[pages[i]] -= pages[i] != 0;
            return NET_TOO_MANY_REFS;
        }
        p->counts[pages[i]]++;
    }
    return NET_OK;
}

uint32_t net_pages_filled(const uint32_t *pages, uint32_t nr) {
    uint32_t filled = 0;
    for (uint32_t i = 0; i < nr; i++)
        filled += pages[i] != 0;
    return filled;
}

/* ---------------------------------------------------------------- bytes in pages */

int net_cursor_iov(const struct net_pool *p, const struct net_cursor *c, struct iovec *iov, int max,
                   uint64_t *bytes) {
    const uint64_t page_bytes = net_page_bytes(p);
    uint64_t at = c->at, left = c->left;
    int n = 0;
    while (left) {
        uint64_t inside = at & (page_bytes - 1), k = page_bytes - inside;
        uint8_t *start = net_page(p, c->pages[at >> p->page_shift]) + inside;
        if (k > left)
            k = left;
        if (n && (uint8_t *)iov[n - 1].iov_base + iov[n - 1].iov_len == start) {
            iov[n - 1].iov_len += k;
        } else {
            if (n == max)
                break;
            iov[n++] = (struct iovec){start, k};
        }
        at += k;
        left -= k;
    }
    *bytes = c->left - left;
    return n;
}

void net_cursor_read(const struct net_pool *p, struct net_cursor *c, void *to, uint64_t n) {
    uint8_t *out = to;
    while (n) {
        uint64_t inside = c->at & (net_page_bytes(p) - 1), k = net_page_bytes(p) - inside;
        if (k > n)
            k = n;
        memcpy(out, net_page(p, c->pages[c->at >> p->page_shift]) + inside, k);
        net_cursor_advance(c, k);
        out += k;
        n -= k;
    }
}

void net_cursor_write(const struct net_pool *p, struct net_cursor *c, const void *from,
                      uint64_t n) {
    const uint8_t *in = from;
    while (n) {
        uint64_t inside = c->at & (net_page_bytes(p) - 1), k = net_page_bytes(p) - inside;
        if (k > n)
            k = n;
        memcpy(net_page(p, c->pages[c->at >> p->page_shift]) + inside, in, k);
        net_cursor_advance(c, k);
        in += k;
        n -= k;
    }
}
