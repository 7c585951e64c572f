/* net_ops.c - ranges and Refs: what requests do to them. Each checks first and changes afterwards. */
#include <stdlib.h>
#include <string.h>

#include "net_shard.h"

static int check_virtual(const struct net_shard *s, const struct net_session *ses, uint64_t nr) {
    return ses->nr_virtual + nr > s->limits.max_virtual ? NET_OVER_QUOTA : NET_OK;
}

static int check_pages(const struct net_shard *s, const struct net_session *ses, uint64_t nr) {
    return ses->nr_pages + nr > s->limits.max_pages ? NET_OVER_QUOTA : NET_OK;
}

static struct net_range *range_at(struct net_shard *s, struct net_session *ses, uint64_t address) {
    uint64_t start = net_lap_begin(s);
    struct net_range *r = net_space_find(&ses->space, address);
    NET_COUNT(s, translations, 1);
    net_lap_end(s, start);
    return r;
}

/* The range that starts at an address. */
static struct net_range *whole_range(struct net_shard *s, struct net_session *ses,
                                     uint64_t address) {
    struct net_range *r = range_at(s, ses, address);
    return r && r->address == address ? r : NULL;
}

static struct net_range *add_range(struct net_shard *s, struct net_session *ses, uint32_t *pages,
                                   uint32_t nr, int *status) {
    if (ses->space.nr_ranges >= s->limits.max_ranges) {
        *status = NET_OVER_QUOTA;
        return NULL;
    }
    struct net_range *r = net_space_add(&ses->space, s->pool.page_shift, pages, nr, status);
    if (r) {
        ses->nr_virtual += nr;
        ses->nr_pages += r->nr_filled;
        r->changed = ses->last_id;
    }
    return r;
}

/* Forget a range, not its pages. */
static uint32_t *remove_range(struct net_session *ses, struct net_range *r) {
    ses->nr_virtual -= r->nr_pages;
    ses->nr_pages -= r->nr_filled;
    return net_space_remove(&ses->space, r);
}

static void free_range(struct net_shard *s, struct net_session *ses, struct net_range *r) {
    uint32_t nr = r->nr_pages, *pages = remove_range(ses, r);
    net_pages_drop(&s->pool, pages, nr);
    free(pages);
}

int net_ralloc(struct net_shard *s, struct net_session *ses, uint64_t bytes, uint64_t *address) {
    int status;
    if (bytes == 0 || bytes > (uint64_t)(s->pool.nr_pages - 1) << s->pool.page_shift)
        return NET_BAD_SIZE;
    uint64_t nr = net_pages_for(&s->pool, bytes);
    if ((status = check_virtual(s, ses, nr)))
        return status;
    uint32_t *pages = calloc(nr, sizeof *pages);
    if (!pages)
        return NET_NO_MEMORY;
    struct net_range *r = add_range(s, ses, pages, (uint32_t)nr, &status);
    if (!r) {
        free(pages);
        return status;
    }
    *address = r->address;
    return NET_OK;
}

int net_rfree(struct net_shard *s, struct net_session *ses, uint64_t address) {
    struct net_range *r = whole_range(s, ses, address);
    if (!r)
        return NET_BAD_ADDRESS;
    free_range(s, ses, r);
    return NET_OK;
}

/* ---------------------------------------------------------------- Refs */

static int add_ref(struct net_shard *s, struct net_session *ses, uint32_t *pages, uint32_t nr,
                   uint32_t nr_filled, uint64_t length, uint64_t *key) {
    if (ses->nr_refs >= s->limits.max_refs)
        return NET_OVER_QUOTA;
    if (!net_ref_add(&s->refs, ses, pages, nr, nr_filled, length, key))
        return NET_NO_REF_SLOT;
    NET_COUNT(s, refs_created, 1);
    return NET_OK;
}

/* The Ref takes the range's place. */
static int move_range(struct net_shard *s, struct net_session *ses, struct net_range *r,
                      uint64_t bytes, uint64_t *key) {
    if (net_pages_for(&s->pool, bytes) != r->nr_pages)
        return NET_BAD_SIZE;
    int status = add_ref(s, ses, r->pages, r->nr_pages, r->nr_filled, bytes, key);
    if (status == NET_OK)
        (void)remove_range(ses, r);
    return status;
}

/* Pages of the Ref: the range's, held once more. */
static int share(struct net_shard *s, const uint32_t *from, uint32_t nr, uint32_t *pages) {
    int status = net_pages_hold(&s->pool, from, nr);
    if (status == NET_OK)
        memcpy(pages, from, nr * sizeof *pages);
    return status;
}

/* Pages of the Ref: copies. Holes stay holes. */
static int copy(struct net_shard *s, const uint32_t *from, uint32_t nr, uint32_t nr_filled,
                uint32_t *pages) {
    const uint64_t page_bytes = net_page_bytes(&s->pool);
    if (!net_pages_take(&s->pool, nr_filled, pages))
        return NET_OUT_OF_PAGES;
    for (uint32_t i = nr, k = nr_filled; i-- > 0;) { /* from the end: spread them in place */
        uint32_t page = from[i] ? pages[--k] : 0;
        pages[i] = page;
        if (page)
            memcpy(net_page(&s->pool, page), net_page(&s->pool, from[i]), page_bytes);
    }
    NET_COUNT(s, pages_copied_eagerly, nr_filled);
    NET_COUNT(s, bytes_copied, nr_filled * page_bytes);
    return NET_OK;
}

int net_create_ref(struct net_shard *s, struct net_session *ses, uint64_t address, uint64_t bytes,
                   uint32_t flags, uint64_t *key) {
    const bool eager = (s->eager || (flags & NET_COPY)) && !(flags & NET_MOVE);
    struct net_range *r = range_at(s, ses, address);
    int status;
    if (!r || (address & (net_page_bytes(&s->pool) - 1)))
        return NET_BAD_ADDRESS;
    uint64_t first = net_address_offset(address) >> s->pool.page_shift;
    if (first >= r->nr_pages)
        return NET_BAD_ADDRESS;
    if (bytes == 0 || bytes > (uint64_t)(r->nr_pages - first) << s->pool.page_shift)
        return NET_BAD_SIZE;
    if (flags & NET_MOVE)
        return first ? NET_BAD_ADDRESS : move_range(s, ses, r, bytes, key);

    const uint32_t nr = (uint32_t)net_pages_for(&s->pool, bytes), *from = r->pages + first;
    const uint32_t nr_filled = nr == r->nr_pages ? r->nr_filled : net_pages_filled(from, nr);
    if ((status = check_virtual(s, ses, nr)) || (status = check_pages(s, ses, nr_filled)))
        return status;
    uint32_t *pages = malloc(nr * sizeof *pages);
    if (!pages)
        return NET_NO_MEMORY;
    status = eager ? copy(s, from, nr, nr_filled, pages) : share(s, from, nr, pages);
    if (status == NET_OK) {
        status = add_ref(s, ses, pages, nr, nr_filled, bytes, key);
        if (status != NET_OK)
            net_pages_drop(&s->pool, pages, nr);
    }
    if (status != NET_OK)
        free(pages);
    return status;
}

/* Can this process hold what somebody else holds now? */
static int check_taking(const struct net_shard *s, const struct net_session *ses,
                        const struct net_ref *r) {
    if (r->holder == ses)
        return NET_OK;
    int status = check_virtual(s, ses, r->nr_pages);
    return status ? status : check_pages(s, ses, r->nr_filled);
}

int net_map_ref(struct net_shard *s, struct net_session *ses, uint64_t key, uint64_t length,
                uint32_t flags, uint64_t *address) {
    int status;
    struct net_ref *r = net_ref_find(&s->refs, key, length, &status);
    if (!r || (status = check_taking(s, ses, r)))
        return status;
    struct net_range *range = add_range(s, ses, r->pages, r->nr_pages, &status);
    if (!range)
        return status;
    range->read_only = flags & NET_READ_ONLY;
    (void)net_ref_remove(&s->refs, r); /* its counts are the range's */
    NET_COUNT(s, refs_mapped, 1);
    *address = range->address;
    return NET_OK;
}

/* With ANEW its old key is of no use afterwards, not even to its sender: whoever gives up on a message may drop what is
 * in it without asking who has it now. */
int net_accept_ref(struct net_shard *s, struct net_session *ses, uint64_t key, uint64_t length,
                   uint32_t flags, uint64_t *anew) {
    int status;
    struct net_ref *r = net_ref_find(&s->refs, key, length, &status);
    if (!r || (status = check_taking(s, ses, r)))
        return status;
    if (r->holder != ses && ses->nr_refs >= s->limits.max_refs)
        return NET_OVER_QUOTA;
    if ((flags & NET_ANEW) && !net_ref_renew(&s->refs, r, anew))
        return NET_NO_REF_SLOT;
    if (r->holder != ses)
        net_ref_pass(&s->refs, r, ses);
    return NET_OK;
}

int net_clone_ref(struct net_shard *s, struct net_session *ses, uint64_t key, uint64_t length,
                  uint64_t *clone) {
    int status;
    struct net_ref *r = net_ref_find(&s->refs, key, length, &status);
    if (!r || (status = check_virtual(s, ses, r->nr_pages)) ||
        (status = check_pages(s, ses, r->nr_filled)))
        return status;
    const uint32_t nr = r->nr_pages, nr_filled = r->nr_filled;
    uint32_t *pages = malloc(nr * sizeof *pages);
    if (!pages)
        return NET_NO_MEMORY;
    status = s->eager ? copy(s, r->pages, nr, nr_filled, pages) : share(s, r->pages, nr, pages);
    if (status == NET_OK) {
        status = add_ref(s, ses, pages, nr, nr_filled, length, clone); /* r may move */
        if (status != NET_OK)
            net_pages_drop(&s->pool, pages, nr);
    }
    if (status != NET_OK)
        free(pages);
    return status;
}

static void drop_ref(struct net_shard *s, struct net_ref *r) {
    uint32_t nr = r->nr_pages, *pages = net_ref_remove(&s->refs, r);
    net_pages_drop(&s->pool, pages, nr);
    free(pages);
    NET_COUNT(s, refs_dropped, 1);
}

int net_drop_ref(struct net_shard *s, struct net_session *ses, uint64_t key, uint64_t length,
                 uint32_t flags, uint64_t *dropped) {
    int status;
    struct net_ref *r = net_ref_find(&s->refs, key, length, &status);
    *dropped = r && (r->holder == ses || (flags & NET_ANYBODYS));
    if (*dropped)
        drop_ref(s, r);
    return status == NET_REF_CONSUMED ? NET_OK : status;
}

int net_held(struct net_shard *s, struct net_session *ses, uint64_t key, uint64_t length,
             uint64_t *held) {
    int status;
    struct net_ref *r = net_ref_find(&s->refs, key, length, &status);
    *held = r && r->holder == ses;
    return status == NET_REF_CONSUMED ? NET_OK : status;
}

/* ---------------------------------------------------------------- reading */

int net_rread(struct net_shard *s, struct net_session *ses, uint64_t address, uint64_t bytes,
              struct net_cursor *from) {
    struct net_range *r = range_at(s, ses, address);
    if (!r)
        return NET_BAD_ADDRESS;
    uint64_t offset = net_address_offset(address);
    uint64_t end = (uint64_t)r->nr_pages << s->pool.page_shift;
    if (offset >= end)
        return NET_BAD_ADDRESS;
    if (bytes == 0 || bytes > NET_MAX_TRANSFER || bytes > end - offset)
        return NET_BAD_SIZE;
    *from = (struct net_cursor){.pages = r->pages, .at = offset, .left = bytes};
    return NET_OK;
}

int net_get(struct net_shard *s, struct net_session *ses, const struct net_request *q,
            struct net_delivery **delivery) {
    int status;
    struct net_ref *r = net_ref_find(&s->refs, q->a, q->b, &status);
    if (!r || (status = check_taking(s, ses, r)))
        return status;
    if (q->d > NET_MAX_TRANSFER || q->c > r->length || q->d > r->length - q->c)
        return NET_BAD_SIZE;
    const bool keep = q->flags & NET_KEEP;
    uint32_t *pages = r->pages, nr = r->nr_pages, first = 0;
    if (keep) {
        /* Its holder may drop it while it is being sent: hold the pages that are asked for until then. */
        const uint32_t shift = s->pool.page_shift;
        first = (uint32_t)(q->c >> shift);
        nr = q->d ? (uint32_t)((q->c + q->d - 1) >> shift) - first + 1 : 0;
        if ((status = check_pages(s, ses, net_pages_filled(r->pages + first, nr))))
            return status;
        if (!(pages = malloc((nr + !nr) * sizeof *pages)))
            return NET_NO_MEMORY;
        if ((status = share(s, r->pages + first, nr, pages))) {
            free(pages);
            return status;
        }
    }
    *delivery =
        net_delivery_add(s, ses, pages, nr, q->c - ((uint64_t)first << s->pool.page_shift), q->d);
    if (!*delivery) {
        if (keep) {
            net_pages_drop(&s->pool, pages, nr);
            free(pages);
        }
        return NET_NO_MEMORY;
    }
    if (!keep)
        (void)net_ref_remove(&s->refs, r);
    NET_COUNT(s, refs_mapped, !keep);
    return NET_OK;
}

/* ---------------------------------------------------------------- giving back what nobody waits for any more */

int net_undo(struct net_shard *s, struct net_session *ses, uint64_t id) {
    struct net_kept *k = net_kept_find(ses, id);
    if (!k || k->status != NET_OK)
        return NET_OK;
    if (k->op == NET_RALLOC || k->op == NET_MAP_REF)
        (void)net_rfree(s, ses, k->a);
    if (k->op == NET_PUT && k->b)
        (void)net_rfree(s, ses, k->b);
    if (k->op == NET_CREATE_REF || k->op == NET_CLONE_REF || k->op == NET_PUT ||
        (k->op == NET_ACCEPT_REF && (k->flags & NET_ANEW))) {
        struct net_ref *r = net_ref_of(&s->refs, k->a);
        if (r && r->holder == ses)
            drop_ref(s, r);
    }
    if (k->delivery)
        net_delivery_free(s, k->delivery);
    k->status = NET_ANSWER_LOST; /* once is enough: its address may be somebody else's soon */
    return NET_OK;
}
