/* net_audit.c - adds up everything that refers to a page, and compares: knows nothing of how it came about. */
#include <stdlib.h>

#include "net_shard.h"

static uint64_t add(uint32_t *sum, const uint32_t *pages, uint32_t nr) {
    uint64_t filled = 0;
    for (uint32_t i = 0; i < nr; i++) {
        sum[pages[i]]++;
        filled += pages[i] != 0;
    }
    return filled;
}

static void add_session(const struct net_session *ses, uint32_t *sum, struct net_audit *out) {
    out->nr_processes++;
    for (uint32_t c = 0; c < NET_NR_CLASSES; c++) {
        for (uint32_t i = 0; i < ses->space.classes[c].nr; i++) {
            const struct net_range *r = ses->space.classes[c].slots[i];
            if (!r)
                continue;
            uint64_t filled = add(sum, r->pages, r->nr_pages);
            out->mapped_pages += filled;
            out->hole_pages += r->nr_pages - filled;
            out->nr_ranges++;
            if (filled != r->nr_filled)
                out->nr_violations++;
        }
    }
    for (const struct net_delivery *d = ses->deliveries; d; d = d->sibling)
        out->delivered_pages += add(sum, d->pages, d->nr_pages);
}

static void add_write(const struct net_write *w, uint32_t *sum, struct net_audit *out) {
    for (uint32_t i = 0; i < w->nr; i++) {
        if (w->range && w->targets[i] == w->range->pages[w->first + i])
            continue;
        sum[w->targets[i]]++;
        out->pages_under_way++;
    }
}

bool net_shard_audit(struct net_shard *s, struct net_audit *out) {
    const struct net_pool *p = &s->pool;
    uint32_t *sum = calloc(p->nr_pages, sizeof *sum);
    uint32_t *free_times = calloc(p->nr_pages, sizeof *free_times);
    *out = (struct net_audit){.nr_pages = p->nr_pages - 1, .nr_free = p->nr_free};
    if (!sum || !free_times) {
        free(sum);
        free(free_times);
        return false;
    }
    uint64_t nr_entries = 0, nr_held = 0;
    for (const struct net_session *ses = s->sessions; ses; ses = ses->next) {
        add_session(ses, sum, out);
        nr_held += ses->nr_pages;
    }
    for (uint32_t i = 0; i < s->refs.nr; i++) {
        const struct net_ref *r = &s->refs.slots[i];
        if (!r->holder)
            continue;
        out->nr_refs++;
        out->ref_pages += add(sum, r->pages, r->nr_pages);
    }
    uint64_t fresh_holes = 0;
    for (const struct net_write *w = s->writes; w; w = w->next) {
        add_write(w, sum, out);
        fresh_holes += w->nr_holes;
    }
    nr_entries = out->mapped_pages + out->ref_pages + out->delivered_pages + fresh_holes;
    for (uint32_t i = 0; i < p->nr_free; i++)
        free_times[p->free[i]]++;
    for (uint32_t page = 1; page < p->nr_pages; page++) {
        out->in_use += p->counts[page] != 0;
        if (p->counts[page] == sum[page] && free_times[page] == (sum[page] == 0))
            continue;
        if (!out->nr_violations++)
            out->first_violation = page;
    }
    /* What quotas are measured by, and the zero page. */
    if (nr_entries != nr_held || out->nr_refs != s->refs.nr_live || p->counts[0] || free_times[0])
        out->nr_violations++;
    for (uint64_t i = 0; i < net_page_bytes(p); i++) {
        if (p->base[i]) {
            out->nr_violations++;
            break;
        }
    }
    free(sum);
    free(free_times);
    return true;
}
