/*
 * net_session.c - what one process holds in a shard, the answers kept for it, and the shard itself.
 *
 * Answers are kept until the client says, by `oldest` of a later request, that it has them. A get without KEEP consumes
 * its Ref, so repeating it needs the pages: they stay as a delivery until the answer is known to have arrived, or for
 * keep_ms after it was sent, whichever is first. A client that has nothing more to ask therefore keeps no pages for long.
 */
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>

#include "net_shard.h"

uint64_t net_now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

int net_shard_open(struct net_shard *s, uint32_t server, uint32_t index, void *slice,
                   uint64_t bytes, uint32_t page_shift, const struct net_limits *limits) {
    uint32_t secret[4];
    *s = (struct net_shard){.server = server, .index = index, .limits = *limits};
    s->deliveries.prev = s->deliveries.next = &s->deliveries;
    if (getrandom(secret, sizeof secret, 0) != sizeof secret)
        return NET_NO_MEMORY;
    int status = net_pool_open(&s->pool, slice, bytes, page_shift, limits->max_count, s->counters);
    if (status == NET_OK)
        status = net_refs_open(&s->refs, limits->max_ref_slots, secret);
    s->counters[NET_COUNTER_nr_pages] = s->pool.nr_pages - 1;
    return status;
}

void net_shard_close(struct net_shard *s) {
    while (s->sessions)
        net_session_close(s, s->sessions);
    net_refs_close(&s->refs);
    net_pool_close(&s->pool);
}

void net_shard_time_translation(struct net_shard *s) {
    uint64_t least = UINT64_MAX;
    for (int i = 0; i < 1000; i++) {
        uint64_t begin = net_now_ns(), lap = net_now_ns() - begin;
        if (lap < least)
            least = lap;
    }
    s->clock_ns = least;
    s->time_translation = true;
}

/* ---------------------------------------------------------------- sessions */

struct net_session *net_session_open(struct net_shard *s, uint32_t pid, uint64_t token,
                                     uint32_t session) {
    struct net_session *ses = calloc(1, sizeof *ses);
    if (!ses)
        return NULL;
    ses->pid = pid;
    ses->token = token;
    ses->refs = NET_NO_SLOT;
    ses->space.prefix = (uint64_t)s->server << NET_SERVER_SHIFT |
                        (uint64_t)s->index << NET_SHARD_SHIFT |
                        (uint64_t)(session % NET_NR_SESSIONS) << NET_SESSION_SHIFT;
    ses->next = s->sessions;
    if (ses->next)
        ses->next->prev = ses;
    s->sessions = ses;
    s->counters[NET_COUNTER_nr_processes]++;
    return ses;
}

/* Used when a connection begins or a process ends: not often enough for more than a list. */
struct net_session *net_session_find(struct net_shard *s, uint32_t pid) {
    struct net_session *ses = s->sessions;
    while (ses && ses->pid != pid)
        ses = ses->next;
    return ses;
}

void net_session_close(struct net_shard *s, struct net_session *ses) {
    struct net_space *space = &ses->space;
    for (struct net_write *w = s->writes, *next; w; w = next) {
        next = w->next;
        if (w->session == ses)
            net_write_abort(s, w);
    }
    while (ses->deliveries)
        net_delivery_free(s, ses->deliveries);
    while (ses->refs != NET_NO_SLOT) {
        struct net_ref *r = &s->refs.slots[ses->refs];
        uint32_t nr = r->nr_pages, *pages = net_ref_remove(&s->refs, r);
        net_pages_drop(&s->pool, pages, nr);
        free(pages);
        NET_COUNT(s, refs_dropped, 1);
    }
    for (uint32_t c = 0; c < NET_NR_CLASSES; c++) {
        for (uint32_t i = 0; i < space->classes[c].nr; i++) {
            struct net_range *r = space->classes[c].slots[i];
            if (!r)
                continue;
            uint32_t nr = r->nr_pages, *pages = net_space_remove(space, r);
            net_pages_drop(&s->pool, pages, nr);
            free(pages);
        }
    }
    net_space_close(space);
    if (ses->prev)
        ses->prev->next = ses->next;
    else
        s->sessions = ses->next;
    if (ses->next)
        ses->next->prev = ses->prev;
    free(ses->kept);
    free(ses);
    s->counters[NET_COUNTER_nr_processes]--;
    NET_COUNT(s, processes_ended, 1);
}

/* ---------------------------------------------------------------- answers that are kept */

static struct net_kept *kept_at(const struct net_session *ses, uint32_t i) {
    return &ses->kept[(ses->kept_first + i) & (ses->kept_capacity - 1)];
}

void net_kept_retire(struct net_shard *s, struct net_session *ses, uint64_t oldest) {
    while (ses->nr_kept && kept_at(ses, 0)->id < oldest) {
        struct net_kept *k = kept_at(ses, 0);
        if (k->delivery)
            net_delivery_free(s, k->delivery);
        ses->kept_first = (ses->kept_first + 1) & (ses->kept_capacity - 1);
        ses->nr_kept--;
    }
}

static bool kept_grow(struct net_session *ses) {
    uint32_t capacity = ses->kept_capacity ? 2 * ses->kept_capacity : 4;
    struct net_kept *kept = malloc(capacity * sizeof *kept);
    if (!kept)
        return false;
    for (uint32_t i = 0; i < ses->nr_kept; i++) {
        kept[i] = *kept_at(ses, i);
        if (kept[i].delivery)
            kept[i].delivery->kept = &kept[i];
    }
    free(ses->kept);
    ses->kept = kept;
    ses->kept_capacity = capacity;
    ses->kept_first = 0;
    return true;
}

struct net_kept *net_kept_add(struct net_shard *s, struct net_session *ses,
                              const struct net_request *q) {
    if (ses->nr_kept >= s->limits.max_outstanding)
        return NULL;
    if (ses->nr_kept == ses->kept_capacity && !kept_grow(ses))
        return NULL;
    struct net_kept *k = kept_at(ses, ses->nr_kept++);
    *k = (struct net_kept){.id = q->id, .op = q->op, .flags = q->flags};
    return k;
}

struct net_kept *net_kept_find(struct net_session *ses, uint64_t id) {
    uint32_t lo = 0, hi = ses->nr_kept;
    while (lo < hi) {
        uint32_t mid = (lo + hi) / 2;
        if (kept_at(ses, mid)->id < id)
            lo = mid + 1;
        else
            hi = mid;
    }
    return lo < ses->nr_kept && kept_at(ses, lo)->id == id ? kept_at(ses, lo) : NULL;
}

/* ---------------------------------------------------------------- deliveries */

struct net_delivery *net_delivery_add(struct net_shard *s, struct net_session *ses, uint32_t *pages,
                                      uint32_t nr_pages, uint64_t offset, uint64_t bytes) {
    struct net_delivery *d = calloc(1, sizeof *d);
    (void)s;
    if (!d)
        return NULL;
    d->pages = pages;
    d->nr_pages = nr_pages;
    d->nr_filled = net_pages_filled(pages, nr_pages);
    d->offset = offset;
    d->bytes = bytes;
    d->session = ses;
    d->sibling = ses->deliveries;
    ses->deliveries = d;
    ses->nr_pages += d->nr_filled;
    return d;
}

void net_delivery_unlist(struct net_delivery *d) {
    if (!d->listed)
        return;
    d->prev->next = d->next;
    d->next->prev = d->prev;
    d->listed = false;
}

void net_delivery_free(struct net_shard *s, struct net_delivery *d) {
    struct net_delivery **at = &d->session->deliveries;
    while (*at != d)
        at = &(*at)->sibling;
    *at = d->sibling;
    net_delivery_unlist(d);
    if (d->kept)
        d->kept->delivery = NULL;
    d->session->nr_pages -= d->nr_filled;
    net_pages_drop(&s->pool, d->pages, d->nr_pages);
    free(d->pages);
    free(d);
}

void net_delivery_sent(struct net_shard *s, struct net_delivery *d, uint64_t now_ns) {
    if (!d->kept) { /* can be had again, or nobody will ask */
        net_delivery_free(s, d);
        return;
    }
    if (d->listed)
        return;
    d->expires_ns = now_ns + (uint64_t)s->limits.keep_ms * 1000000u;
    d->listed = true;
    d->prev = s->deliveries.prev;
    d->next = &s->deliveries;
    d->prev->next = d->next->prev = d;
}

uint64_t net_deliveries_expire(struct net_shard *s, uint64_t now_ns) {
    while (s->deliveries.next != &s->deliveries) {
        struct net_delivery *d = s->deliveries.next;
        if (d->expires_ns > now_ns)
            return d->expires_ns;
        net_delivery_free(s, d);
    }
    return 0;
}
