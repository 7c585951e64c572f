/*
 * net_write.c - rwrite and put. Their bytes come piece by piece, straight into pages.
 *
 * First every page that is needed is reserved, so a pool that runs dry changes nothing. Bytes for a page that only this
 * process holds go into the page itself. Bytes for a page that others hold, and for a hole, go into a fresh one, which the range shows
 * when all bytes are there: a connection that breaks in between leaves nobody's old bytes in anybody's range. What a
 * fresh page does not get from the client it gets here, from the page that it replaces or as zeros. So a page that is written from
 * end to end is not copied.
 *
 * The order for a page that others hold: copy, show, drop the count of the old one. Between reservation and
 * commit others may drop theirs, so the last one reclaims, whoever that is.
 */
#include <stdlib.h>
#include <string.h>

#include "net_shard.h"

static void enlist(struct net_shard *s, struct net_write *w) {
    w->prev = NULL;
    w->next = s->writes;
    if (w->next)
        w->next->prev = w;
    s->writes = w;
}

static void finish(struct net_shard *s, struct net_write *w) {
    if (w->prev)
        w->prev->next = w->next;
    else
        s->writes = w->next;
    if (w->next)
        w->next->prev = w->prev;
    w->session->nr_pages -= w->nr_holes;
    if (!w->all_in_place && w->targets != w->inline_targets)
        free(w->targets);
    w->session = NULL;
}

/* Give bytes [from, to) of a fresh page what they are to be: the old page's, or zeros. */
static void prepare(struct net_shard *s, uint32_t fresh, uint32_t old, uint64_t from, uint64_t to) {
    if (from >= to)
        return;
    memcpy(net_page(&s->pool, fresh) + from, net_page(&s->pool, old) + from, to - from);
    if (old)
        NET_COUNT(s, bytes_copied, to - from);
}

int net_write_begin(struct net_shard *s, struct net_session *ses, uint64_t address, uint64_t bytes,
                    struct net_write *w) {
    const uint64_t page_bytes = net_page_bytes(&s->pool);
    struct net_cursor to;
    int status = net_rread(s, ses, address, bytes, &to);
    if (status)
        return status;
    struct net_range *r = net_space_find(&ses->space, address);
    if (r->read_only)
        return NET_IS_READ_ONLY;

    const uint32_t first = (uint32_t)(to.at >> s->pool.page_shift);
    const uint32_t nr = (uint32_t)((to.at + bytes - 1) >> s->pool.page_shift) - first + 1;
    const uint32_t *old = r->pages + first;
    uint32_t nr_shared = 0, nr_holes = 0;
    for (uint32_t i = 0; i < nr; i++) {
        nr_holes += old[i] == 0;
        nr_shared += s->pool.counts[old[i]] > 1; /* the zero page's is 0 */
    }
    w->session = ses;
    w->range = r;
    w->first = first;
    w->nr = nr;
    w->nr_fresh = nr_shared + nr_holes;
    w->nr_holes = nr_holes;
    w->all_in_place = w->nr_fresh == 0;
    w->bytes = bytes;
    w->targets = w->all_in_place ? r->pages + first : w->inline_targets;
    if (!w->all_in_place) {
        if (ses->nr_pages + nr_holes > s->limits.max_pages)
            return NET_OVER_QUOTA;
        if (nr > NET_WRITE_INLINE && !(w->targets = malloc(nr * sizeof *w->targets)))
            return NET_NO_MEMORY;
        if (!net_pages_take(&s->pool, w->nr_fresh, w->targets)) {
            if (w->targets != w->inline_targets)
                free(w->targets);
            return NET_OUT_OF_PAGES;
        }
        for (uint32_t i = nr, k = w->nr_fresh; i-- > 0;) { /* from the end: spread them in place */
            bool fresh = old[i] == 0 || s->pool.counts[old[i]] > 1;
            w->targets[i] = fresh ? w->targets[--k] : old[i];
        }
        const uint64_t inside = to.at & (page_bytes - 1), end = (to.at + bytes) & (page_bytes - 1);
        const uint32_t last = nr - 1;
        if (w->targets[0] != old[0])
            prepare(s, w->targets[0], old[0], 0, inside);
        if (w->targets[last] != old[last] && end)
            prepare(s, w->targets[last], old[last], end, page_bytes);
        ses->nr_pages += nr_holes; /* until commit or abort, by this write */
    }
    w->to = (struct net_cursor){.pages = w->targets, .at = to.at & (page_bytes - 1), .left = bytes};
    enlist(s, w);
    return NET_OK;
}

void net_write_commit(struct net_shard *s, struct net_write *w) {
    struct net_session *ses = w->session;
    uint32_t *pages = w->range->pages + w->first;
    if (!w->all_in_place) {
        const uint64_t page_bytes = net_page_bytes(&s->pool);
        const uint64_t at = w->to.at - w->bytes; /* the first byte's place in the first page */
        uint32_t nr_whole = 0;
        for (uint32_t i = 0; i < w->nr; i++) {
            uint32_t old = pages[i];
            if (w->targets[i] == old)
                continue;
            pages[i] = w->targets[i];
            if (!old)
                continue;
            nr_whole += (i > 0 || at == 0) && at + w->bytes >= (i + 1) * page_bytes;
            net_page_drop(&s->pool, old);
        }
        w->range->nr_filled += w->nr_holes;
        ses->nr_pages += w->nr_holes;
        NET_COUNT(s, holes_filled, w->nr_holes);
        NET_COUNT(s, full_page_writes, nr_whole);
        NET_COUNT(s, pages_copied, w->nr_fresh - w->nr_holes - nr_whole);
    }
    w->range->changed = ses->last_id;
    NET_COUNT(s, in_place_writes, w->nr - w->nr_fresh);
    NET_COUNT(s, bytes_written, w->bytes);
    finish(s, w);
}

/* Context: the range is still there, for whoever removes ranges ends writes first. */
void net_write_abort(struct net_shard *s, struct net_write *w) {
    if (!w->range) {
        net_pages_drop(&s->pool, w->targets, w->nr);
    } else if (!w->all_in_place) {
        for (uint32_t i = 0; i < w->nr; i++)
            if (w->targets[i] != w->range->pages[w->first + i])
                net_page_drop(&s->pool, w->targets[i]);
    }
    finish(s, w);
}

/* ---------------------------------------------------------------- put */

int net_put_begin(struct net_shard *s, struct net_session *ses, uint64_t bytes, uint32_t flags,
                  struct net_write *w) {
    const uint64_t page_bytes = net_page_bytes(&s->pool);
    const uint32_t times = flags & NET_KEEP ? 2 : 1; /* as a Ref, and as a range */
    if (bytes == 0 || bytes > (uint64_t)(s->pool.nr_pages - 1) << s->pool.page_shift)
        return NET_BAD_SIZE;
    const uint32_t nr = (uint32_t)net_pages_for(&s->pool, bytes);
    if (ses->nr_virtual + (uint64_t)nr * times > s->limits.max_virtual ||
        ses->nr_pages + (uint64_t)nr * times > s->limits.max_pages ||
        ses->nr_refs >= s->limits.max_refs ||
        ((flags & NET_KEEP) && ses->space.nr_ranges >= s->limits.max_ranges))
        return NET_OVER_QUOTA;
    uint32_t *pages = malloc(nr * sizeof *pages);
    if (!pages)
        return NET_NO_MEMORY;
    if (!net_pages_take(&s->pool, nr, pages)) {
        free(pages);
        return NET_OUT_OF_PAGES;
    }
    if (bytes & (page_bytes - 1))
        prepare(s, pages[nr - 1], 0, bytes & (page_bytes - 1), page_bytes);
    w->session = ses;
    w->range = NULL;
    w->first = 0;
    w->nr = w->nr_fresh = w->nr_holes = nr;
    w->all_in_place = false;
    w->bytes = bytes;
    w->targets = pages;
    w->to = (struct net_cursor){.pages = pages, .left = bytes};
    ses->nr_pages += nr;
    enlist(s, w);
    return NET_OK;
}

int net_put_commit(struct net_shard *s, struct net_write *w, uint32_t flags, uint64_t *key,
                   uint64_t *address) {
    struct net_session *ses = w->session;
    struct net_range *range = NULL;
    uint32_t *copy = NULL;
    int status = NET_OK;
    *address = 0;
    if (flags & NET_KEEP) {
        if (!(copy = malloc(w->nr * sizeof *copy)))
            status = NET_NO_MEMORY;
        else if ((status = net_pages_hold(&s->pool, w->targets, w->nr)) == NET_OK) {
            memcpy(copy, w->targets, w->nr * sizeof *copy);
            range = net_space_add(&ses->space, s->pool.page_shift, copy, w->nr, &status);
            if (!range)
                net_pages_drop(&s->pool, w->targets, w->nr);
        }
    }
    if (status == NET_OK && !net_ref_add(&s->refs, ses, w->targets, w->nr, w->nr, w->bytes, key)) {
        status = NET_NO_REF_SLOT;
        if (range) {
            (void)net_space_remove(&ses->space, range);
            net_pages_drop(&s->pool, w->targets, w->nr);
        }
    }
    if (status != NET_OK) {
        free(copy);
        net_write_abort(s, w);
        return status;
    }
    if (range) {
        ses->nr_virtual += range->nr_pages;
        ses->nr_pages += range->nr_filled;
        range->changed = ses->last_id;
        *address = range->address;
    }
    NET_COUNT(s, refs_created, 1);
    NET_COUNT(s, holes_filled, w->nr);
    NET_COUNT(s, bytes_written, w->bytes);
    w->targets = w->inline_targets; /* they are the Ref's */
    finish(s, w);
    return NET_OK;
}
