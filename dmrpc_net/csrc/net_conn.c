/* net_conn.c - see net_conn.h. Requests are checked, told from those that were carried out before, and carried out. */
#include "net_conn.h"

#include <stdlib.h>
#include <string.h>

struct net_conn *net_conn_open(struct net_shard *s, struct net_session *ses) {
    struct net_conn *c = malloc(sizeof *c);
    if (!c)
        return NULL;
    memset(c, 0, offsetof(struct net_conn, in));
    c->shard = s;
    c->session = ses;
    return c;
}

void net_conn_close(struct net_conn *c) {
    if (c->writing)
        net_write_abort(c->shard, &c->write);
    if (c->delivery)
        net_delivery_sent(c->shard, c->delivery, net_now_ns());
    free(c);
}

/* ---------------------------------------------------------------- answers */

static void answer(struct net_conn *c, const struct net_request *q, int status, uint64_t a,
                   uint64_t b, uint64_t payload) {
    struct net_answer h = {.payload = (uint32_t)payload,
                           .status = (uint16_t)status,
                           .op = q->op,
                           .id = q->id,
                           .a = a,
                           .b = b};
    memcpy(c->out + c->out_to, &h, sizeof h);
    c->out_to += sizeof h;
}

static void answer_bytes(struct net_conn *c, const struct net_request *q, const void *bytes,
                         uint32_t n) {
    answer(c, q, NET_OK, 0, 0, n);
    memcpy(c->out + c->out_to, bytes, n);
    c->out_to += n;
}

static void answer_pages(struct net_conn *c, const struct net_request *q, struct net_cursor from) {
    NET_COUNT(c->shard, bytes_read, from.left);
    answer(c, q, NET_OK, 0, 0, from.left);
    if (from.left > NET_INLINE_BYTES) {
        c->body = from;
    } else {
        uint32_t n = (uint32_t)from.left;
        net_cursor_read(&c->shard->pool, &from, c->out + c->out_to, n);
        c->out_to += n;
    }
}

static void sent_delivery(struct net_conn *c) {
    struct net_delivery *d = c->delivery;
    c->delivery = NULL;
    net_delivery_sent(c->shard, d, net_now_ns());
}

static void answer_delivery(struct net_conn *c, const struct net_request *q,
                            struct net_delivery *d) {
    net_delivery_unlist(d); /* its time begins when this answer has been sent */
    c->delivery = d;
    answer_pages(c, q, (struct net_cursor){.pages = d->pages, .at = d->offset, .left = d->bytes});
    if (!c->body.left)
        sent_delivery(c);
}

static void breach(struct net_conn *c, const struct net_request *q) {
    answer(c, q, NET_BAD_REQUEST, 0, 0, 0);
    NET_COUNT(c->shard, breaches, 1);
    c->broken = true;
}

static void answer_stats(struct net_conn *c, const struct net_request *q) {
    struct net_shard *s = c->shard;
    s->counters[NET_COUNTER_nr_free] = s->pool.nr_free;
    s->counters[NET_COUNTER_nr_refs] = s->refs.nr_live;
    s->counters[NET_COUNTER_nr_ranges] = 0;
    for (const struct net_session *ses = s->sessions; ses; ses = ses->next)
        s->counters[NET_COUNTER_nr_ranges] += ses->space.nr_ranges;
    answer_bytes(c, q, s->counters, sizeof s->counters);
}

/* ---------------------------------------------------------------- what changes nothing, and may be carried out again */

static bool only_reads(const struct net_request *q) {
    switch (q->op) {
    case NET_RREAD:
    case NET_HELD:
    case NET_STATS:
    case NET_AUDIT:
    case NET_PING:
        return true;
    case NET_GET:
        return q->flags & NET_KEEP;
    default:
        return false;
    }
}

/* May a read that comes after it return something else than one before it? */
static bool changes_reads(const struct net_request *q) {
    switch (q->op) {
    case NET_RALLOC:
    case NET_CLONE_REF:
    case NET_PUT:
        return false;
    case NET_CREATE_REF:
        return q->flags & NET_MOVE;
    default:
        return !only_reads(q);
    }
}

static void read_only(struct net_conn *c, const struct net_request *q) {
    struct net_shard *s = c->shard;
    struct net_cursor from;
    struct net_delivery *d;
    struct net_audit audit;
    uint64_t a = 0;
    int status = NET_OK;
    switch (q->op) {
    case NET_RREAD:
        if ((status = net_rread(s, c->session, q->a, q->b, &from)) == NET_OK) {
            answer_pages(c, q, from);
            return;
        }
        break;
    case NET_GET:
        if ((status = net_get(s, c->session, q, &d)) == NET_OK) {
            answer_delivery(c, q, d);
            return;
        }
        break;
    case NET_HELD:
        status = net_held(s, c->session, q->a, q->b, &a);
        break;
    case NET_STATS:
        answer_stats(c, q);
        return;
    case NET_AUDIT:
        if (net_shard_audit(s, &audit)) {
            answer_bytes(c, q, &audit, sizeof audit);
            return;
        }
        status = NET_NO_MEMORY;
        break;
    }
    answer(c, q, status, a, 0, 0);
}

/* ---------------------------------------------------------------- what changes something, and is done once */

static void keep_and_answer(struct net_conn *c, const struct net_request *q, struct net_kept *k,
                            int status, uint64_t a, uint64_t b) {
    k->status = (uint16_t)status;
    k->a = a;
    k->b = b;
    answer(c, q, status, a, b, 0);
}

static void change(struct net_conn *c, const struct net_request *q, struct net_kept *k) {
    struct net_shard *s = c->shard;
    struct net_session *ses = c->session;
    uint64_t a = 0;
    int status = NET_OK;
    switch (q->op) {
    case NET_RALLOC:
        status = net_ralloc(s, ses, q->a, &a);
        break;
    case NET_RFREE:
        status = net_rfree(s, ses, q->a);
        break;
    case NET_CREATE_REF:
        status = net_create_ref(s, ses, q->a, q->b, q->flags, &a);
        break;
    case NET_MAP_REF:
        status = net_map_ref(s, ses, q->a, q->b, q->flags, &a);
        break;
    case NET_ACCEPT_REF:
        status = net_accept_ref(s, ses, q->a, q->b, q->flags, &a);
        break;
    case NET_CLONE_REF:
        status = net_clone_ref(s, ses, q->a, q->b, &a);
        break;
    case NET_DROP_REF:
        status = net_drop_ref(s, ses, q->a, q->b, q->flags, &a);
        break;
    case NET_UNDO:
        status = net_undo(s, ses, q->a);
        break;
    case NET_GET: {
        struct net_delivery *d;
        if ((status = net_get(s, ses, q, &d)) == NET_OK) {
            k->delivery = d;
            d->kept = k;
            answer_delivery(c, q, d);
            return;
        }
        break;
    }
    }
    keep_and_answer(c, q, k, status, a, 0);
}

/* ---------------------------------------------------------------- payloads */

static void payload_begins(struct net_conn *c, const struct net_request *q) {
    c->request = *q;
    c->payload_left = q->payload;
    c->outcome = q->op == NET_PUT
                     ? net_put_begin(c->shard, c->session, q->payload, q->flags, &c->write)
                     : net_write_begin(c->shard, c->session, q->a, q->payload, &c->write);
    c->writing = c->outcome == NET_OK;
}

static void replay(struct net_conn *c, const struct net_request *q);
static struct net_kept *carried_out(struct net_conn *c, const struct net_request *q);

static void payload_ends(struct net_conn *c) {
    const struct net_request *q = &c->request;
    uint64_t a = 0, b = 0;
    int status = c->outcome;
    if (q->id <= c->session->last_id) {
        replay(c, q);
        return;
    }
    struct net_kept *k = carried_out(c, q); /* there is room: see take() */
    if (c->writing) {
        c->writing = false;
        if (q->op == NET_PUT)
            status = net_put_commit(c->shard, &c->write, q->flags, &a, &b);
        else
            net_write_commit(c->shard, &c->write);
    }
    if (k)
        keep_and_answer(c, q, k, status, a, b);
    else
        answer(c, q, status, a, b, 0);
}

/* ---------------------------------------------------------------- requests */

static bool well_formed(const struct net_request *q) {
    static const uint8_t flags[NET_LAST_OP + 1] = {
        [NET_CREATE_REF] = NET_COPY | NET_MOVE,
        [NET_MAP_REF] = NET_READ_ONLY,
        [NET_PUT] = NET_KEEP,
        [NET_GET] = NET_KEEP,
        [NET_ACCEPT_REF] = NET_ANEW,
        [NET_DROP_REF] = NET_ANYBODYS,
    };
    const bool carries = q->op == NET_RWRITE || q->op == NET_PUT;
    return q->op >= 1 && q->op <= NET_LAST_OP && !(q->flags & ~flags[q->op]) && q->reserved == 0 &&
           q->id > 0 && q->oldest <= q->id && (carries ? q->payload > 0 : q->payload == 0) &&
           q->payload <= NET_MAX_TRANSFER;
}

/* Note that a new request is carried out. Where its answer is to be kept; NULL: there is no room. */
static struct net_kept *carried_out(struct net_conn *c, const struct net_request *q) {
    struct net_session *ses = c->session;
    struct net_kept *k = only_reads(q) ? NULL : net_kept_add(c->shard, ses, q);
    ses->last_id = q->id;
    if (changes_reads(q))
        ses->last_change = q->id;
    NET_COUNT(c->shard, requests, 1);
    return k;
}

/* Would a read that was carried out before return now what it returned then? */
static bool still_true(struct net_conn *c, const struct net_request *q) {
    const struct net_session *ses = c->session;
    const struct net_range *r;
    int status;
    switch (q->op) {
    case NET_RREAD:
        if ((r = net_space_find(&ses->space, q->a)))
            return r->changed <= q->id;
        break;
    case NET_GET: /* what a Ref denotes does not change */
        if (net_ref_find(&c->shard->refs, q->a, q->b, &status))
            return true;
        break;
    case NET_HELD:
        break;
    default:
        return true;
    }
    return ses->last_change <= q->id;
}

/* A request that was carried out before. */
static void replay(struct net_conn *c, const struct net_request *q) {
    struct net_session *ses = c->session;
    NET_COUNT(c->shard, duplicates, 1);
    if (only_reads(q)) {
        if (still_true(c, q))
            read_only(c, q);
        else
            answer(c, q, NET_ANSWER_LOST, 0, 0, 0);
        return;
    }
    struct net_kept *k = net_kept_find(ses, q->id);
    if (k && k->op != q->op)
        breach(c, q);
    else if (k && k->op == NET_GET && k->delivery)
        answer_delivery(c, q, k->delivery);
    else if (!k || (k->op == NET_GET && k->status == NET_OK))
        answer(c, q, NET_ANSWER_LOST, 0, 0, 0);
    else
        answer(c, q, k->status, k->a, k->b, 0);
}

static void take(struct net_conn *c, const struct net_request *q) {
    struct net_session *ses = c->session;
    if (!well_formed(q)) {
        breach(c, q);
        return;
    }
    const bool again = q->id <= ses->last_id;
    c->headers_only = q->payload >= 2 * NET_IN_BYTES;
    if (!again)
        net_kept_retire(c->shard, ses, q->oldest);
    if (q->payload) {
        if (!again && ses->nr_kept >= c->shard->limits.max_outstanding) {
            breach(c, q);
        } else if (again) {
            c->request = *q;
            c->payload_left = q->payload;
        } else {
            payload_begins(c, q);
        }
        return;
    }
    if (again) {
        replay(c, q);
        return;
    }
    if (only_reads(q)) {
        (void)carried_out(c, q);
        read_only(c, q);
        return;
    }
    struct net_kept *k = carried_out(c, q);
    if (k)
        change(c, q, k);
    else if (ses->nr_kept >= c->shard->limits.max_outstanding)
        breach(c, q);
    else
        answer(c, q, NET_NO_MEMORY, 0, 0, 0);
}

bool net_conn_step(struct net_conn *c) {
    const uint32_t ready = c->in_to - c->in_from;
    if (c->broken || c->body.left ||
        c->out_to + sizeof(struct net_answer) + NET_INLINE_BYTES > NET_OUT_BYTES)
        return false;
    if (c->payload_left) {
        uint64_t n = ready < c->payload_left ? ready : c->payload_left;
        if (!n)
            return false;
        if (c->writing)
            net_cursor_write(&c->shard->pool, &c->write.to, c->in + c->in_from, n);
        c->in_from += (uint32_t)n;
        c->payload_left -= n;
        if (!c->payload_left)
            payload_ends(c);
        return true;
    }
    if (ready < sizeof(struct net_request))
        return false;
    struct net_request q;
    memcpy(&q, c->in + c->in_from, sizeof q);
    c->in_from += sizeof q;
    take(c, &q);
    return true;
}

/* ---------------------------------------------------------------- bytes */

int net_conn_want(struct net_conn *c, struct iovec *iov, int max) {
    int n = 0;
    if (c->in_from == c->in_to)
        c->in_from = c->in_to = 0;
    if (c->payload_left && c->writing && c->in_to == 0) {
        uint64_t bytes, start = net_lap_begin(c->shard);
        n = net_cursor_iov(&c->shard->pool, &c->write.to, iov, max - 1, &bytes);
        net_lap_end(c->shard, start);
        if (bytes < c->payload_left)
            return n;
    }
    if (c->in_from && c->in_to + sizeof(struct net_request) > NET_IN_BYTES) {
        memmove(c->in, c->in + c->in_from, c->in_to - c->in_from);
        c->in_to -= c->in_from;
        c->in_from = 0;
    }
    const uint32_t room = c->headers_only && c->in_to < sizeof(struct net_request)
                              ? sizeof(struct net_request)
                              : NET_IN_BYTES;
    iov[n].iov_base = c->in + c->in_to;
    iov[n].iov_len = room - c->in_to;
    return n + (c->in_to < NET_IN_BYTES);
}

void net_conn_got(struct net_conn *c, uint64_t n) {
    NET_COUNT(c->shard, bytes_in, n);
    if (c->payload_left && c->writing && c->in_to == 0) {
        uint64_t k = n < c->payload_left ? n : c->payload_left;
        net_cursor_advance(&c->write.to, k);
        c->payload_left -= k;
        n -= k;
        c->in_to += (uint32_t)n;
        if (!c->payload_left)
            payload_ends(c);
        return;
    }
    c->in_to += (uint32_t)n;
}

int net_conn_have(const struct net_conn *c, struct iovec *iov, int max, uint64_t *bytes) {
    int n = 0;
    *bytes = 0;
    if (c->out_to != c->out_from)
        iov[n++] =
            (struct iovec){(void *)(uintptr_t)(c->out + c->out_from), c->out_to - c->out_from};
    if (c->body.left) {
        uint64_t start = net_lap_begin(c->shard);
        n += net_cursor_iov(&c->shard->pool, &c->body, iov + n, max - n, bytes);
        net_lap_end(c->shard, start);
    }
    *bytes += c->out_to - c->out_from;
    return n;
}

void net_conn_sent(struct net_conn *c, uint64_t n) {
    uint64_t k = c->out_to - c->out_from;
    NET_COUNT(c->shard, bytes_out, n);
    if (k > n)
        k = n;
    c->out_from += (uint32_t)k;
    if (c->out_from == c->out_to)
        c->out_from = c->out_to = 0;
    if (n > k) {
        net_cursor_advance(&c->body, n - k);
        if (!c->body.left && c->delivery)
            sent_delivery(c);
    }
}
