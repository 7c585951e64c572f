/*
 * net_conn.h - the server's end of a data connection, without the socket: bytes in, bytes out.
 *
 * Whoever drives a connection goes round in this circle, as far as the socket lets it:
 *
 *     net_conn_step                    work on what was received, as long as that is possible
 *     net_conn_have, net_conn_sent     then send what there is to send, all of it
 *     net_conn_want, net_conn_got      and only then receive more
 *
 * So a client that does not read its answers is not served, and nothing is gathered for it. A large answer is sent straight from the
 * pages. They stay as they are meanwhile: nothing of the same process is carried out, and others cannot change them.
 */
#ifndef NET_CONN_H
#define NET_CONN_H

#include "net_shard.h"

#define NET_IN_BYTES (16u << 10)
#define NET_OUT_BYTES (64u << 10)
#define NET_INLINE_BYTES                                                                           \
    (16u << 10) /* an answer up to this is copied, to be sent together with others */
#define NET_MAX_IOV 128

struct net_conn {
    struct net_shard *shard;
    struct net_session *session;
    bool broken; /* by a breach: send what there is, then end */

    struct net_request request; /* whose payload is coming */
    uint64_t payload_left;
    int outcome; /* of a request whose payload is thrown away */
    bool writing;
    struct net_write write;

    struct net_cursor body; /* goes out after out */
    struct net_delivery *delivery;

    /* Whoever wrote much will write much again: then only a header is received into in, and the rest where it belongs. */
    bool headers_only;
    uint32_t in_from, in_to, out_from, out_to;
    uint8_t in[NET_IN_BYTES], out[NET_OUT_BYTES];
};

/* It becomes the session's connection; the one before was closed. NULL: no memory. */
struct net_conn *net_conn_open(struct net_shard *s, struct net_session *ses);
void net_conn_close(struct net_conn *c);

static inline bool net_conn_has_output(const struct net_conn *c) {
    return c->out_to != c->out_from || c->body.left;
}
int net_conn_have(const struct net_conn *c, struct iovec *iov, int max, uint64_t *bytes);
void net_conn_sent(struct net_conn *c, uint64_t n);
/* Carry out one request that was received, or take in what was received of its payload. False: nothing to do. */
bool net_conn_step(struct net_conn *c);
/* Where the next bytes belong; at least one place, unless step has to be called first. */
int net_conn_want(struct net_conn *c, struct iovec *iov, int max);
void net_conn_got(struct net_conn *c, uint64_t n);

#endif
